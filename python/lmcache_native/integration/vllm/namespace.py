"""The namespace: everything that must match before bytes may be shared. Two engines with equal text may read each other's chunks.

Not in it, because chunk keys cover them (vLLM's block hashes, or token_keys.py): tokens, multimodal content, prompt embeddings,
cache salt, tags. A LoRA adapter's weights are in no hash, so requests with one get a namespace of their own (`adapter_identity`).
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcache_native import build_info, describe_namespace, make_namespace
from lmcache_native.config import NativeConfig
from lmcache_native.errors import InvalidArgument
from lmcache_native.integration.vllm import compat, fingerprint
from lmcache_native.integration.vllm.layout import WorkerLayout
from lmcache_native.logging import get_logger

logger = get_logger(__name__)

# Collision-resistant and seeded the same in every process: fit for a store that outlives the process.
LASTING_HASHES = ("sha256", "sha256_cbor")
HOST_ONLY_HASHES = ("xxhash", "xxhash_cbor")


def describe(
    vllm_config: Any, config: NativeConfig, layout: WorkerLayout, groups: Sequence[Any], key_scheme: Mapping[str, str]
) -> dict[str, str]:
    """Name -> value, all text. `groups`: the offloaded KV cache groups, whose layouts `layout.groups` has when there are several.
    `key_scheme`: block_hash_scheme() or token_scheme().

    InvalidArgument when NVMe is configured and something that must match cannot be known.
    """
    model = vllm_config.model_config
    cache = vllm_config.cache_config
    parallel = vllm_config.parallel_config
    lasting = config.directory is not None
    parts = {
        **key_scheme,
        "format": str(build_info()["format_version"]),
        "layout": layout.layout_id,
        "layers": f"{layout.layers}x{layout.page_bytes}",
        "layer_names": _digest("\n".join(groups[0].layer_names)),
        "group": "0",  # with the two above: what is said of the only group when its layers are all full attention of one page size
        "world": f"tp={parallel.tensor_parallel_size};pp={parallel.pipeline_parallel_size};"
        f"dcp={parallel.decode_context_parallel_size};pcp={parallel.prefill_context_parallel_size}",
        "kv_dtype": f"{cache.cache_dtype};{model.dtype};skip={cache.kv_cache_dtype_skip_layers}",
    }
    shapes = [of.pages for of in layout.groups]
    if (
        len(groups) > 1
        or shapes not in ([], [parts["layers"]])
        or _kind(groups[0]) not in ("FullAttentionSpec", "MLAAttentionSpec")
    ):
        for number, (group, pages) in enumerate(zip(groups, shapes, strict=True)):
            parts[f"group.{number}"] = (
                f"{_kind(group)};block_tokens={group.kv_cache_spec.block_size};pages={pages};layers={_digest(chr(10).join(group.layer_names))}"
            )
    if layout.replicated:  # the ranks are in `world` all the same: other sums, other bytes
        parts["kv"] = "replicated"
    parts |= _model_parts("model", model, vllm_config.load_config, config, lasting)
    speculative = vllm_config.speculative_config
    if speculative is not None:
        parts["speculative"] = str(speculative.method)
        if speculative.draft_model_config is not None:
            parts |= _model_parts("draft", speculative.draft_model_config, vllm_config.load_config, config, lasting)
    return parts


def _kind(group: Any) -> str:
    """What a group's layers keep: the classes of their specs, and their windows (tokens)."""
    kinds: dict[str, None] = {}
    for spec in compat.uniform_specs(group.kv_cache_spec):
        window = spec.sliding_window if isinstance(spec, compat.SlidingWindowSpec) else None
        local = spec.attention_chunk_size if isinstance(spec, compat.ChunkedLocalAttentionSpec) else None
        tokens = window or local
        kinds[type(spec).__name__ + ("" if tokens is None else f"({tokens})")] = None
    return "+".join(kinds)


def block_hash_scheme(
    vllm_config: Any, config: NativeConfig, groups: Sequence[Any], tokens_per_hash: int, blocks_per_chunk: int
) -> dict[str, str]:
    """Chunk keys are made from vLLM's block hashes, and the index of a KV cache group."""
    return {
        "keys": f"vllm-offload-key/1;tokens_per_hash={tokens_per_hash}",
        "hash": _hash_scheme(vllm_config.cache_config.prefix_caching_hash_algo, config.directory is not None),
        "block_tokens": str(groups[0].kv_cache_spec.block_size),
        "blocks_per_chunk": str(blocks_per_chunk),
    }


def token_scheme(chunk_tokens: int, opaque_block_tokens: int | None) -> dict[str, str]:
    """Chunk keys are made from tokens (ChunkHasher). `opaque_block_tokens`: the engine's block, where pages are opaque; canonical
    chunks do not depend on it."""
    scheme = {"keys": f"tokens/1;chunk_tokens={chunk_tokens}"}
    return scheme if opaque_block_tokens is None else scheme | {"block_tokens": str(opaque_block_tokens)}


@dataclass(frozen=True, slots=True)
class RequestNamespace:
    """One request's, from its arrival on."""

    id: bytes
    adapter_path: Path | None = None
    adapter_files: fingerprint.Signature = ()  # at arrival

    def holds(self) -> bool:
        """Whether the adapter's files are still those of the request's arrival, so that whenever between the two the engine loaded
        them, it loaded these. Otherwise nothing may be published under `id`, or loaded from it. A few stat() calls."""
        return self.adapter_path is None or fingerprint.signature(self.adapter_path) == self.adapter_files


@dataclass(frozen=True, slots=True)
class _Adapter:
    files: fingerprint.Signature
    identity: str


class Namespaces:
    """The namespaces of one engine: one per LoRA adapter, all under one epoch. One thread at a time.

    vLLM resets the connector's cache also because weights are about to change in memory, where no fingerprint sees it. So
    raise_epoch() names an epoch that no other process has: what is stored from then on dies with this one.
    """

    def __init__(self, description: Mapping[str, str]) -> None:
        self._description = dict(description)
        self._epoch = ""
        self._adapters: dict[tuple[str, str, int], _Adapter] = {}
        self._unknown: set[tuple[str, str, int]] = set()
        self._made: dict[str, bytes] = {}  # by adapter, "": none

    def plain(self) -> bytes:
        """Of requests without an adapter."""
        return self._of("")

    def of(self, lora_request: Any) -> RequestNamespace | None:
        """Of a request that arrives with this adapter (None: without). None: its weights cannot be known, serve it without the
        cache. The files are read when an adapter is first seen, and each time they change under load_inplace."""
        if lora_request is None:
            return RequestNamespace(self._of(""))
        name, path = str(lora_request.lora_name), Path(lora_request.lora_path)
        loaded = (name, str(lora_request.lora_path), int(lora_request.lora_int_id))
        files = fingerprint.signature(path)
        known = self._adapters.get(loaded)
        if known is None or (known.files != files and lora_request.load_inplace):
            known = self._adapters[loaded] = _Adapter(files, adapter_identity(name, loaded[1]))
        if known.files != files:
            if loaded not in self._unknown:
                self._unknown.add(loaded)
                logger.warning(
                    "adapter %s: the files in %s changed after it was loaded, and vLLM may hold their old or their new content: "
                    "its requests are served without the cache until it is loaded again (use load_inplace, or a path of its own)",
                    name,
                    path,
                )
            return None
        return RequestNamespace(self._of(known.identity), path, files)

    def _of(self, adapter: str) -> bytes:
        if adapter not in self._made:
            parts = self._description | ({"lora": adapter} if adapter else {}) | ({"epoch": self._epoch} if self._epoch else {})
            self._made[adapter] = make_namespace(canonical_text(parts))
        return self._made[adapter]

    def raise_epoch(self) -> None:
        self._epoch = secrets.token_hex(16)
        self._made.clear()


def canonical_text(parts: dict[str, str]) -> str:
    """Sorted `name=value` lines; values are JSON strings, so that no value can look like another line."""
    return describe_namespace({name: json.dumps(value) for name, value in parts.items()})


def adapter_identity(name: str, path: str) -> str:
    """Of a LoRA adapter, whose weights decide the KV too. Weights that cannot be read share with no other load of it."""
    try:
        found = fingerprint.of_directory(Path(path)) if Path(path).is_dir() else fingerprint.of_model(path, None, None)
    except OSError:  # changed or removed under us
        found = None
    return f"{name};{path};{found or 'unknown:' + secrets.token_hex(16)}"


def _hash_scheme(algorithm: str, lasting: bool) -> str:
    if algorithm in LASTING_HASHES:
        return f"{algorithm};seed={compat.none_hash_seed(algorithm)}"
    if lasting or algorithm not in HOST_ONLY_HASHES:
        raise InvalidArgument(
            f"--prefix-caching-hash-algo={algorithm}: block hashes that are seeded at random or not collision-resistant "
            f"cannot name chunks on NVMe: use {' or '.join(LASTING_HASHES)}, or leave local_disk unset"
        )
    return algorithm  # seed random per process, and so is the life of host memory


def _model_parts(prefix: str, model: Any, load: Any, config: NativeConfig, lasting: bool) -> dict[str, str]:
    parts = {
        f"{prefix}.name": str(model.model),
        f"{prefix}.revision": str(model.revision),
        f"{prefix}.config": _digest(_config_text(model)),
        f"{prefix}.quantization": str(model.quantization),
        f"{prefix}.load": f"{load.load_format};{load.model_loader_extra_config}",
    }
    multimodal = getattr(model, "multimodal_config", None)
    if multimodal is not None and multimodal.mm_processor_kwargs:  # vLLM's hash of an item holds the request's only
        parts[f"{prefix}.mm_processor_kwargs"] = json.dumps(multimodal.mm_processor_kwargs, sort_keys=True, default=repr)
    if _rope_depends_on_length(model.hf_text_config):
        parts[f"{prefix}.max_model_len"] = str(model.max_model_len)
    if config.model_fingerprint is not None:
        found: str | None = "given:" + config.model_fingerprint
    elif load.load_format == "dummy":
        found = f"dummy:{model.seed}"
    else:
        found = fingerprint.of_model(model.model_weights or model.model, model.revision, load.download_dir)
    if found is None and lasting:
        raise InvalidArgument(
            f"model {model.model!r}: its weights are not in a local directory, so a store that outlives this process could not "
            "tell them from others of that name: set model_fingerprint in kv_connector_extra_config, or leave local_disk unset"
        )
    parts[f"{prefix}.weights"] = found or "unknown"
    return parts


def _config_text(model: Any) -> str:
    """The model's configuration as loaded: hf_overrides and rope are in it. Not who loaded it."""
    config = json.loads(model.hf_config.to_json_string(use_diff=False))
    config.pop("transformers_version", None)
    return f"{json.dumps(config, sort_keys=True)}\n{model.quantization_config!r}"


def _rope_depends_on_length(text_config: Any) -> bool:
    for name in ("rope_scaling", "rope_parameters"):
        rope = getattr(text_config, name, None)
        if isinstance(rope, dict) and any(_is_scaled(part) for part in (rope, *rope.values())):
            return True
    return False


def _is_scaled(rope: Any) -> bool:
    """Of all layers, or of one layer type."""
    return isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) != "default"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
