"""What this connector does not do yet, refused by name when the engine starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmcache_native.errors import InvalidArgument, Unsupported
from lmcache_native.integration.vllm import compat

MAX_RANKS = 64


def check_parallelism(parallel: Any) -> None:
    for name, flag in (
        ("pipeline_parallel_size", "--pipeline-parallel-size"),
        ("decode_context_parallel_size", "--decode-context-parallel-size"),
        ("prefill_context_parallel_size", "--prefill-context-parallel-size"),
    ):
        value = getattr(parallel, name)
        if value > 1:
            raise Unsupported(f"{flag} {value}: not yet supported with KV offloading by lmcache-native, use 1")
    if parallel.nnodes > 1:
        raise Unsupported(f"--nnodes {parallel.nnodes}: workers on another machine are not yet supported")
    backend = parallel.distributed_executor_backend
    if backend not in (None, "mp", "uni"):
        raise Unsupported(f"--distributed-executor-backend {backend}: not yet supported, use mp")
    if parallel.world_size > MAX_RANKS:
        raise Unsupported(f"{parallel.world_size} ranks: at most {MAX_RANKS}")


# Every other KVCacheSpec of vLLM is refused too, by its name alone.
_REFUSED = {
    "CircularBufferSpec": "its blocks are rings that hold a request's latest tokens, not a prefix",
    "CrossAttentionSpec": "its KV is of the encoder's input, which no hash of tokens covers",
    "EncoderOnlyAttentionSpec": "it keeps no KV",
    "HiddenStateCacheSpec": "it holds hidden states, not KV",
    "HiSparseHotSpec": "HiSparse keeps its KV in host memory itself",
    "HiSparseResidentSpec": "HiSparse keeps its KV in host memory itself",
    "MambaSpec": "a state (SSM, convolution, linear attention) is of one position, not of a chunk of tokens",
    "RSWASpec": "blocks between the prompt and the window are given up while the request runs",
    "SinkFullAttentionSpec": "its first blocks hold sinks that are no tokens",
    "SlidingWindowMLASpec": "latents in a window are not yet supported",
}


def is_windowed(spec: Any) -> bool:
    """Whether a layer reads only the latest tokens, so that the engine keeps no blocks of earlier ones."""
    return isinstance(spec, (compat.SlidingWindowSpec, compat.ChunkedLocalAttentionSpec))


def check_spec(spec: Any) -> None:
    """Unsupported, naming the kind, unless the KV of layers like this one can be offloaded."""
    # Exactly these: a subclass may give up blocks early, or keep KV that its block alone does not hold.
    kind = type(spec)
    if kind in (compat.FullAttentionSpec, compat.MLAAttentionSpec):
        if spec.non_causal:
            raise Unsupported("non-causal attention: a prefix's KV depends on what follows it, it cannot be cached")
    elif kind is compat.SlidingWindowSpec:
        if spec.extra_retained_tokens:
            raise Unsupported(
                f"SlidingWindowSpec that retains {spec.extra_retained_tokens} tokens below its window (several MTP modules): "
                "not yet supported with KV offloading by lmcache-native"
            )
    elif kind is not compat.ChunkedLocalAttentionSpec:
        why = next((f": {_REFUSED[base.__name__]}" for base in kind.__mro__ if base.__name__ in _REFUSED), "")
        raise Unsupported(f"{kind.__name__} layers: not yet supported with KV offloading by lmcache-native{why}")


def offloaded_groups(kv_cache_config: Any) -> tuple[Any, ...]:
    """All KV cache groups, in vLLM's order: the last four bytes of a chunk's key are an index into it. Unsupported, with what it is
    by name, when one of them cannot be offloaded: a prefix without the KV of some layers is worth nothing."""
    groups = tuple(kv_cache_config.kv_cache_groups)
    if not groups:
        raise Unsupported("a model without attention layers that keep KV: there is nothing to offload")
    for index, group in enumerate(groups):
        for spec in compat.uniform_specs(group.kv_cache_spec):
            check_spec(spec)
        # Engines without HiSparse, or without groups of a draft model's own, do not say so.
        if getattr(group, "host_resident", False) or not getattr(group, "enable_kv_transfer", True):
            raise Unsupported(f"KV cache group {index} ({group.role.value}) is not for connectors: HiSparse is not yet supported")
        if getattr(group, "is_eagle_group", False) and len(groups) > 1:
            raise Unsupported(
                f"KV cache group {index} holds the layers of an EAGLE or MTP draft model: not yet supported beside other groups"
            )
    return groups


def check_zeroing(kv_cache_config: Any, vllm_config: Any) -> None:
    """Unsupported where the engine may zero a block before the connector's store of what was in it is submitted: vLLM's V2 model
    runner zeroes what it hands out before it calls the connector."""
    if kv_cache_config.needs_kv_cache_zeroing and vllm_config.use_v2_model_runner:
        raise Unsupported(
            "KV cache layers of different precisions (--kv-cache-dtype-skip-layers, a draft model) with vLLM's V2 model runner: "
            "not yet supported, use VLLM_USE_V2_MODEL_RUNNER=0"
        )


def offloaded_group(kv_cache_config: Any) -> Any:
    """The one KV cache group of full attention that LMCacheNativeConnector takes: its chunks are of tokens, in all layers."""
    groups = kv_cache_config.kv_cache_groups
    specs = [spec for group in groups for spec in compat.uniform_specs(group.kv_cache_spec)]
    for spec in specs:
        check_spec(spec)
    if len(groups) == 1 and not any(is_windowed(spec) for spec in specs):
        return groups[0]
    kinds = ", ".join(dict.fromkeys(type(spec).__name__ for spec in specs))
    raise Unsupported(
        f"{len(groups)} KV cache groups ({kinds}): LMCacheNativeConnector takes one group of full attention; use "
        "NativeOffloadingConnector, which takes this model (LMCACHE_NATIVE=1 with --kv-offloading-size)"
    )


def check_role(role: str | None) -> None:
    if role != "kv_both":
        raise InvalidArgument(f"kv_role={role!r} (kv_transfer_config): must be 'kv_both', a cache both stores and loads")


def check_spec_name(extra_config: dict[str, Any], ours: str) -> None:
    named = extra_config.get("spec_name", ours)
    if named != ours:
        raise InvalidArgument(
            f"spec_name={named!r} (kv_connector_extra_config): NativeOffloadingConnector serves {ours} only; "
            "remove it, or unset LMCACHE_NATIVE to use vLLM's connector"
        )


def blocks_per_chunk(chunk_tokens: int | None, block_tokens: Sequence[int], extra_config: dict[str, Any]) -> int | None:
    """Blocks that make `chunk_tokens`; None: not configured by us, vLLM's own keys (or one block) decide. `block_tokens`: of each
    KV cache group.

    vLLM's keys may say the same: a process that holds a worker and the scheduler resolves one configuration twice.
    """
    if chunk_tokens is None:
        return None
    if len(set(block_tokens)) > 1:
        sizes = ", ".join(map(str, sorted(set(block_tokens))))
        raise InvalidArgument(
            f"chunk_size={chunk_tokens}: this model's KV cache groups have blocks of {sizes} tokens, and a chunk is as many blocks "
            "in each: leave chunk_size unset, or give blocks_per_chunk"
        )
    block = block_tokens[0]
    if chunk_tokens % block != 0:
        right = max(block, chunk_tokens // block * block)
        raise InvalidArgument(
            f"chunk_size={chunk_tokens}: must be a multiple of the engine's block size, {block} tokens, for example {right}"
        )
    blocks = chunk_tokens // block
    for name, same in (("block_size", chunk_tokens), ("blocks_per_chunk", blocks)):
        if extra_config.get(name, same) != same:
            raise InvalidArgument(f"chunk_size={chunk_tokens} and {name}={extra_config[name]!r} contradict: give one of them")
    return blocks
