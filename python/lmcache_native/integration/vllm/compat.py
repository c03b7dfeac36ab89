"""The only place that names vLLM's moving parts; shapes.py says how they must look, interface_check.py compares.

Each interface is looked up when first used: `from .compat import OffloadingConnector`. A missing one is one typed error that
names it, instead of an ImportError from somewhere deep.
"""

from __future__ import annotations

import enum
import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

from lmcache_native.errors import InvalidArgument, Unsupported
from lmcache_native.logging import get_logger

logger = get_logger(__name__)

# Releases with which both connectors were run (docs/compatibility.md), oldest first.
TESTED_VERSIONS = ("0.29", "0.30", "0.31", "0.32")

_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1"

# name here -> (module, attribute)
INTERFACES = {
    "AllBlocksCleared": ("vllm.distributed.kv_events", "AllBlocksCleared"),
    "AttentionLayerBase": ("vllm.model_executor.layers.attention_layer_base", "AttentionLayerBase"),
    "BlockRemoved": ("vllm.distributed.kv_events", "BlockRemoved"),
    "BlockStored": ("vllm.distributed.kv_events", "BlockStored"),
    "CacheHitSource": ("vllm.v1.metrics.cache_hit_source", "CacheHitSource"),
    "ChunkedLocalAttentionSpec": ("vllm.v1.kv_cache_interface", "ChunkedLocalAttentionSpec"),
    "current_platform": ("vllm.platforms", "current_platform"),
    "FullAttentionSpec": ("vllm.v1.kv_cache_interface", "FullAttentionSpec"),
    "get_hash_fn_by_name": ("vllm.utils.hashing", "get_hash_fn_by_name"),
    "get_layers_from_vllm_config": ("vllm.config", "get_layers_from_vllm_config"),
    "GPULoadStoreSpec": ("vllm.v1.kv_offload.base", "GPULoadStoreSpec"),
    "group_kernel_blocks": ("vllm.v1.kv_cache_interface", "group_kernel_blocks"),
    "InputProcessor": ("vllm.v1.engine.input_processor", "InputProcessor"),
    "KVConnectorBase_V1": (f"{_CONNECTOR}.base", "KVConnectorBase_V1"),
    "KVConnectorFactory": ("vllm.distributed.kv_transfer.kv_connector.factory", "KVConnectorFactory"),
    "KVConnectorHandshakeMetadata": (f"{_CONNECTOR}.base", "KVConnectorHandshakeMetadata"),
    "KVConnectorMetadata": (f"{_CONNECTOR}.base", "KVConnectorMetadata"),
    "KVConnectorRole": (f"{_CONNECTOR}.base", "KVConnectorRole"),
    "KVConnectorWorkerMetadata": (f"{_CONNECTOR}.base", "KVConnectorWorkerMetadata"),
    "LoadStoreSpec": ("vllm.v1.kv_offload.base", "LoadStoreSpec"),
    "Locality": ("vllm.v1.kv_offload.base", "Locality"),
    "LookupResult": ("vllm.v1.kv_offload.base", "LookupResult"),
    "Medium": ("vllm.v1.kv_offload.base", "Medium"),
    "MLAAttentionSpec": ("vllm.v1.kv_cache_interface", "MLAAttentionSpec"),
    "OffloadingConnector": (f"{_CONNECTOR}.offloading_connector", "OffloadingConnector"),
    "OffloadingConnectorStats": (f"{_CONNECTOR}.offloading.metrics", "OffloadingConnectorStats"),
    "OffloadingCounterMetadata": ("vllm.v1.kv_offload.base", "OffloadingCounterMetadata"),
    "OffloadingGaugeMetadata": ("vllm.v1.kv_offload.base", "OffloadingGaugeMetadata"),
    "OffloadingHistogramMetadata": ("vllm.v1.kv_offload.base", "OffloadingHistogramMetadata"),
    "OffloadingEvent": ("vllm.v1.kv_offload.base", "OffloadingEvent"),
    "OffloadingManager": ("vllm.v1.kv_offload.base", "OffloadingManager"),
    "OffloadingSpec": ("vllm.v1.kv_offload.base", "OffloadingSpec"),
    "OffloadingSpecFactory": ("vllm.v1.kv_offload.factory", "OffloadingSpecFactory"),
    "OffloadingWorker": ("vllm.v1.kv_offload.base", "OffloadingWorker"),
    "OffloadingWorkerMetadata": (f"{_CONNECTOR}.offloading.common", "OffloadingWorkerMetadata"),
    "OffloadPromMetrics": (f"{_CONNECTOR}.offloading.metrics", "OffloadPromMetrics"),
    "PrepareStoreOutput": ("vllm.v1.kv_offload.base", "PrepareStoreOutput"),
    "RequestOffloadingContext": ("vllm.v1.kv_offload.base", "RequestOffloadingContext"),
    "RequestStatus": ("vllm.v1.request", "RequestStatus"),
    "resolve_none_hash_seed": ("vllm.v1.core.kv_cache_utils", "resolve_none_hash_seed"),
    "SlidingWindowSpec": ("vllm.v1.kv_cache_interface", "SlidingWindowSpec"),
    "SupportsHMA": (f"{_CONNECTOR}.base", "SupportsHMA"),
    "TierFilter": ("vllm.v1.kv_offload.base", "TierFilter"),
    "TransferResult": ("vllm.v1.kv_offload.base", "TransferResult"),
    "UniformTypeKVCacheSpecs": ("vllm.v1.kv_cache_interface", "UniformTypeKVCacheSpecs"),
    "VllmConfig": ("vllm.config", "VllmConfig"),
    "VLLMValidationError": ("vllm.exceptions", "VLLMValidationError"),
}


class CacheHitSource(enum.IntEnum):
    """What a vLLM before 0.32, which never asks where a hit came from, is given in place of its own."""

    EXTERNAL_UNSPECIFIED = 0
    HOST = 1
    DISK = 2


# Interfaces of later vLLMs that an earlier one does not miss.
SUBSTITUTES: dict[str, Any] = {"CacheHitSource": CacheHitSource}
del CacheHitSource  # so that the name leads to vLLM's own where it has one


def __getattr__(name: str) -> Any:
    if name not in INTERFACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = INTERFACES[name]
    try:
        value = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if name not in SUBSTITUTES:
            raise Unsupported(
                f"vLLM {vllm_version()} has no {module}.{attribute} (lmcache-native was tested with {tested_text()}): {error}"
            ) from error
        value = SUBSTITUTES[name]
    globals()[name] = value
    return value


def vllm_version() -> str:
    return str(importlib.import_module("vllm.version").__version__)


def installed_version() -> str | None:
    """None: there is no vLLM."""
    return vllm_version() if importlib.util.find_spec("vllm") is not None else None


def is_tested(version: str) -> bool:
    return any(version == tested or version.startswith(tested + ".") for tested in TESTED_VERSIONS)


def tested_text() -> str:
    return ", ".join(f"{version}.x" for version in TESTED_VERSIONS)


def warn_if_untested(log: logging.Logger = logger) -> None:
    """Exactly one warning per engine: call it where the scheduler's connector is made."""
    version = vllm_version()
    if not is_tested(version):
        log.warning("vLLM %s: lmcache-native was tested with %s only", version, tested_text())


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


def add_connector(name: str, load: Callable[[], Any]) -> bool:
    """Makes `kv_connector: name` known to vLLM, so that it needs no kv_connector_module_path. False: was known already."""
    registry = _registry(__getattr__("KVConnectorFactory"), "KVConnectorFactory")
    if name in registry:
        return False
    registry[name] = load
    return True


def connector_class(kv_transfer_config: Any) -> Any:
    """None: none is named, or it cannot be loaded."""
    try:
        return __getattr__("KVConnectorFactory").get_connector_class(kv_transfer_config)
    except (ImportError, AttributeError, ValueError):
        return None


def replace_connector(name: str, original_name: str, load: Callable[[], Any]) -> bool:
    """`name` loads ours from now on; what it loaded before, if anything, stays reachable as `original_name`. False: was done
    already."""
    registry = _registry(__getattr__("KVConnectorFactory"), "KVConnectorFactory")
    if original_name in registry:
        return False

    def nothing() -> Any:
        raise ValueError(f"vLLM {vllm_version()} has no connector of its own named {name!r}")

    registry[original_name] = registry.get(name, nothing)
    registry[name] = load
    return True


def check_registries() -> None:
    """Unsupported, before anything is registered, where something could not be."""
    _registry(__getattr__("KVConnectorFactory"), "KVConnectorFactory")
    _transfer_config_method(__getattr__("VllmConfig"))


def _transfer_config_method(config_class: Any) -> Callable[[Any], None]:
    method: Callable[[Any], None] | None = getattr(config_class, "_post_init_kv_transfer_config", None)
    if method is None:
        raise Unsupported(f"vLLM {vllm_version()} has no VllmConfig._post_init_kv_transfer_config")
    return method


def after_transfer_config(hook: Callable[[Any], None]) -> None:
    """Calls hook(vllm_config) each time vLLM has derived its kv_transfer_config from --kv-offloading-size."""
    config_class = __getattr__("VllmConfig")
    method = _transfer_config_method(config_class)

    def _post_init_kv_transfer_config(self: Any) -> None:
        method(self)
        hook(self)

    config_class._post_init_kv_transfer_config = _post_init_kv_transfer_config


def before_requests(check: Callable[[Any, Any], None]) -> None:
    """Calls check(vllm_config, kv_transfer_params) in the front end, for each request that has some. Its InvalidArgument becomes
    vLLM's own error of a wrong request: HTTP 400, or an exception of LLM.generate."""
    processor = __getattr__("InputProcessor")
    process_inputs = getattr(processor, "process_inputs", None)
    if process_inputs is None:
        raise Unsupported(f"vLLM {vllm_version()} has no InputProcessor.process_inputs")

    @functools.wraps(process_inputs)
    def checking(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = (getattr(params, "extra_args", None) or {}).get("kv_transfer_params")
        if parameters:
            try:
                check(self.vllm_config, parameters)
            except InvalidArgument as error:
                raise __getattr__("VLLMValidationError")(str(error), parameter="kv_transfer_params") from error
        return process_inputs(self, request_id, prompt, params, *args, **kwargs)

    processor.process_inputs = checking


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


def chooses_cache_layout(vllm_config: Any) -> bool:
    """Whether vLLM needs a cache layout of its own: of hisparse, since 0.30."""
    return getattr(vllm_config.attention_config, "hisparse_config", None) is not None


def scheduled_blocks(block_state: Any, request_id: str) -> Any:
    """A scheduled request's block ids, a list for each KV cache group. `block_state`: of the step's SchedulerOutput."""
    if hasattr(block_state, "get_block_ids"):
        return block_state.get_block_ids(request_id)
    return block_state.block_ids[request_id]  # before 0.30


def requests_may_fail() -> bool:
    """Whether a connector can name requests whose loads failed, not blocks alone: since 0.30."""
    return hasattr(__getattr__("KVConnectorBase_V1"), "get_transfer_results")


def tells_sources() -> bool:
    """Whether OffloadingConnector says from which tier a hit comes: since 0.32. Before, all count as host memory's."""
    return hasattr(__getattr__("OffloadingConnector"), "get_external_cache_hit_sources")


def request_context(connector_scheduler: Any, request_id: str) -> Any:
    """The ReqContext that OffloadingConnector's scheduler has made for a request. None: it has none, or has it no more."""
    status = connector_scheduler._req_status.get(request_id)
    return None if status is None else status.req_context


def stats_values(stats: Any) -> dict[str, dict[tuple[str, ...], Any]]:
    """What an OffloadingConnectorStats holds: metric -> label values -> value, or the observations of a histogram."""
    values: dict[str, dict[tuple[str, ...], Any]] = stats._values
    return values


def observe_all(stats: Any, name: str, values: list[float]) -> None:
    """Of a histogram without labels. `values` may be empty: the series then exists, with nothing in it."""
    stats._types.setdefault(name, "histogram")
    stats_values(stats).setdefault(name, {}).setdefault((), []).extend(values)


def none_hash_seed(algorithm: str) -> str:
    """The seed of the first block's hash. REQUIRES: a collision-resistant algorithm (others are seeded at random)."""
    hash_function = __getattr__("get_hash_fn_by_name")(algorithm)
    return str(__getattr__("resolve_none_hash_seed")(hash_function))


def uniform_specs(kv_cache_spec: Any) -> list[Any]:
    """The per-layer specs of one KV cache group."""
    if isinstance(kv_cache_spec, __getattr__("UniformTypeKVCacheSpecs")):
        return list(kv_cache_spec.kv_cache_specs.values())
    return [kv_cache_spec]


def layer_specs(group: Any) -> dict[str, Any]:
    """Layer name -> its spec, of one KV cache group. A layer that uses another's cache may be missing."""
    spec = group.kv_cache_spec
    if isinstance(spec, __getattr__("UniformTypeKVCacheSpecs")):
        return dict(spec.kv_cache_specs)
    return dict.fromkeys(group.layer_names, spec)


def cache_writes(vllm_config: Any, layer_names: list[str]) -> dict[str, Callable[[Sequence[Any], Any, Any], None]]:
    """Layer name -> what the engine calls to put new tokens into its cache, as (planes, cache, slot_mapping). planes: K and V, or
    MLA's latent alone, each [token, head, dim]. cache: as registered, [block, head, token, ...]. Layers without such a call are
    left out (worker side only)."""
    layers = __getattr__("get_layers_from_vllm_config")(vllm_config, __getattr__("AttentionLayerBase"), layer_names)
    found: dict[str, Callable[[Sequence[Any], Any, Any], None]] = {}
    for name, layer in layers.items():
        update = getattr(getattr(layer, "impl", None), "do_kv_cache_update", None)
        if update is None:
            continue
        latent = getattr(layer, "kv_lora_rank", None)
        found[name] = _key_value_write(layer, update) if latent is None else _latent_write(layer, update, int(latent))
    return found


def _key_value_write(layer: Any, update: Callable[..., None]) -> Callable[[Sequence[Any], Any, Any], None]:
    def write(planes: Sequence[Any], cache: Any, slot_mapping: Any) -> None:
        key, value = planes
        update(layer, key, value, cache, slot_mapping)

    return write


def _latent_write(layer: Any, update: Callable[..., None], rank: int) -> Callable[[Sequence[Any], Any, Any], None]:
    """As MLAAttention calls it: the compressed KV and the rotary part apart, the cache without its head axis."""

    def write(planes: Sequence[Any], cache: Any, slot_mapping: Any) -> None:
        (latent,) = planes
        kv_c, k_pe = latent[:, 0, :rank].contiguous(), latent[:, :, rank:].contiguous()
        update(kv_c, k_pe, cache.squeeze(1), slot_mapping, layer.kv_cache_dtype, layer._k_scale)

    return write
