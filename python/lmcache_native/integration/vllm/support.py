"""What this connector does not do yet, refused by name when the engine starts."""

from __future__ import annotations

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


def offloaded_group(kv_cache_config: Any) -> Any:
    """The one KV cache group. Unsupported when there are more, or it is not plain full attention."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise Unsupported(f"{len(groups)} KV cache groups (hybrid attention): not yet supported, only models with one")
    for spec in compat.uniform_specs(groups[0].kv_cache_spec):
        # Exactly these: a subclass may give up blocks early, or keep KV that its block alone does not hold.
        if type(spec) not in (compat.FullAttentionSpec, compat.MLAAttentionSpec):
            raise Unsupported(f"{type(spec).__name__} layers: not yet supported, only full attention")
        if spec.non_causal:
            raise Unsupported("non-causal attention: a prefix's KV depends on what follows it, it cannot be cached")
    return groups[0]


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


def blocks_per_chunk(chunk_tokens: int | None, block_tokens: int, extra_config: dict[str, Any]) -> int | None:
    """Blocks that make `chunk_tokens`; None: not configured by us, vLLM's own keys (or one block) decide.

    vLLM's keys may say the same: a process that holds a worker and the scheduler resolves one configuration twice.
    """
    if chunk_tokens is None:
        return None
    if chunk_tokens % block_tokens != 0:
        right = max(block_tokens, chunk_tokens // block_tokens * block_tokens)
        raise InvalidArgument(
            f"chunk_size={chunk_tokens}: must be a multiple of the engine's block size, {block_tokens} tokens, for example {right}"
        )
    blocks = chunk_tokens // block_tokens
    for name, same in (("block_size", chunk_tokens), ("blocks_per_chunk", blocks)):
        if extra_config.get(name, same) != same:
            raise InvalidArgument(f"chunk_size={chunk_tokens} and {name}={extra_config[name]!r} contradict: give one of them")
    return blocks
