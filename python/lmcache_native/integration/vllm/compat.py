"""The only place that names vLLM's moving parts. Tested with vLLM 0.32.

Each interface is looked up when first used: `from .compat import OffloadingConnector`. A missing one is one typed error that
names it, instead of an ImportError from somewhere deep.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

from lmcache_native.errors import Unsupported
from lmcache_native.logging import get_logger

logger = get_logger(__name__)

TESTED_VERSION = "0.32"

_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1"

# name here -> (module, attribute)
_INTERFACES = {
    "AttentionLayerBase": ("vllm.model_executor.layers.attention_layer_base", "AttentionLayerBase"),
    "CacheHitSource": ("vllm.v1.metrics.cache_hit_source", "CacheHitSource"),
    "FullAttentionSpec": ("vllm.v1.kv_cache_interface", "FullAttentionSpec"),
    "GPULoadStoreSpec": ("vllm.v1.kv_offload.base", "GPULoadStoreSpec"),
    "KVConnectorFactory": ("vllm.distributed.kv_transfer.kv_connector.factory", "KVConnectorFactory"),
    "KVConnectorHandshakeMetadata": (f"{_CONNECTOR}.base", "KVConnectorHandshakeMetadata"),
    "KVConnectorRole": (f"{_CONNECTOR}.base", "KVConnectorRole"),
    "LoadStoreSpec": ("vllm.v1.kv_offload.base", "LoadStoreSpec"),
    "Locality": ("vllm.v1.kv_offload.base", "Locality"),
    "LookupResult": ("vllm.v1.kv_offload.base", "LookupResult"),
    "Medium": ("vllm.v1.kv_offload.base", "Medium"),
    "OffloadingConnector": (f"{_CONNECTOR}.offloading_connector", "OffloadingConnector"),
    "OffloadingConnectorStats": (f"{_CONNECTOR}.offloading.metrics", "OffloadingConnectorStats"),
    "OffloadingCounterMetadata": ("vllm.v1.kv_offload.base", "OffloadingCounterMetadata"),
    "OffloadingGaugeMetadata": ("vllm.v1.kv_offload.base", "OffloadingGaugeMetadata"),
    "OffloadingManager": ("vllm.v1.kv_offload.base", "OffloadingManager"),
    "OffloadingSpec": ("vllm.v1.kv_offload.base", "OffloadingSpec"),
    "OffloadingSpecFactory": ("vllm.v1.kv_offload.factory", "OffloadingSpecFactory"),
    "OffloadingWorker": ("vllm.v1.kv_offload.base", "OffloadingWorker"),
    "OffloadingWorkerMetadata": (f"{_CONNECTOR}.offloading.common", "OffloadingWorkerMetadata"),
    "PrepareStoreOutput": ("vllm.v1.kv_offload.base", "PrepareStoreOutput"),
    "RequestOffloadingContext": ("vllm.v1.kv_offload.base", "RequestOffloadingContext"),
    "TierFilter": ("vllm.v1.kv_offload.base", "TierFilter"),
    "TransferResult": ("vllm.v1.kv_offload.base", "TransferResult"),
    "UniformTypeKVCacheSpecs": ("vllm.v1.kv_cache_interface", "UniformTypeKVCacheSpecs"),
    "VllmConfig": ("vllm.config", "VllmConfig"),
    "get_hash_fn_by_name": ("vllm.utils.hashing", "get_hash_fn_by_name"),
    "get_layers_from_vllm_config": ("vllm.config", "get_layers_from_vllm_config"),
    "resolve_none_hash_seed": ("vllm.v1.core.kv_cache_utils", "resolve_none_hash_seed"),
}


def __getattr__(name: str) -> Any:
    if name not in _INTERFACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _INTERFACES[name]
    try:
        value = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise Unsupported(
            f"vLLM {vllm_version()} has no {module}.{attribute} (lmcache-native was tested with {TESTED_VERSION}.x): {error}"
        ) from error
    globals()[name] = value
    return value


def vllm_version() -> str:
    return str(importlib.import_module("vllm.version").__version__)


def warn_if_untested(log: logging.Logger = logger) -> None:
    """Exactly one warning per engine: call it where the scheduler's connector is made."""
    version = vllm_version()
    if version != TESTED_VERSION and not version.startswith(TESTED_VERSION + "."):
        log.warning("vLLM %s: lmcache-native was tested with %s.x only", version, TESTED_VERSION)


# ---- registries ---------------------------------------------------------------------------------------------------------


def _registry(factory: Any, name: str) -> dict[str, Callable[[], Any]]:
    registry = getattr(factory, "_registry", None)
    if not isinstance(registry, dict):
        raise Unsupported(f"vLLM {vllm_version()}: {name} has no _registry to register in")
    return registry


def register_spec(name: str, module: str) -> None:
    """Makes `spec_name: name` known to vLLM, so that it needs no spec_module_path. Idempotent."""
    factory = __getattr__("OffloadingSpecFactory")
    if name not in _registry(factory, "OffloadingSpecFactory"):
        factory.register_spec(name, module, name)


def replace_connector(name: str, original_name: str, load: Callable[[], Any]) -> bool:
    """`name` loads ours from now on; what it loaded before stays reachable as `original_name`. False: was done already."""
    registry = _registry(__getattr__("KVConnectorFactory"), "KVConnectorFactory")
    if original_name in registry:
        return False
    if name not in registry:
        raise Unsupported(f"vLLM {vllm_version()}: no connector is named {name!r}")
    registry[original_name] = registry[name]
    registry[name] = load
    return True


def after_transfer_config(hook: Callable[[Any], None]) -> None:
    """Calls hook(vllm_config) each time vLLM has derived its kv_transfer_config from --kv-offloading-size."""
    config_class = __getattr__("VllmConfig")
    method = getattr(config_class, "_post_init_kv_transfer_config", None)
    if method is None:
        raise Unsupported(f"vLLM {vllm_version()} has no VllmConfig._post_init_kv_transfer_config")

    def _post_init_kv_transfer_config(self: Any) -> None:
        method(self)
        hook(self)

    config_class._post_init_kv_transfer_config = _post_init_kv_transfer_config


# ---- facts about a running engine -----------------------------------------------------------------------------------------


def attention_backends(vllm_config: Any, layer_names: list[str]) -> list[str]:
    """Sorted names of the backends of `layer_names`, with what else decides how they pack a page (worker side only)."""
    layers = __getattr__("get_layers_from_vllm_config")(vllm_config, __getattr__("AttentionLayerBase"), layer_names)
    names = set()
    for layer in layers.values():
        name = str(layer.get_attn_backend().get_name())
        isa = getattr(layer, "isa", None)  # the CPU backend packs K by instruction set
        names.add(name if isa is None else f"{name}/{isa}")
    return sorted(names)


def none_hash_seed(algorithm: str) -> str:
    """The seed of the first block's hash. REQUIRES: a collision-resistant algorithm (others are seeded at random)."""
    hash_function = __getattr__("get_hash_fn_by_name")(algorithm)
    return str(__getattr__("resolve_none_hash_seed")(hash_function))


def uniform_specs(kv_cache_spec: Any) -> list[Any]:
    """The per-layer specs of one KV cache group."""
    if isinstance(kv_cache_spec, __getattr__("UniformTypeKVCacheSpecs")):
        return list(kv_cache_spec.kv_cache_specs.values())
    return [kv_cache_spec]
