"""Whether all ranks of an engine hold the same KV, so that a chunk is stored once (docs/design.md, replicated KV)."""

from __future__ import annotations

from typing import Any

from lmcache_native.integration.vllm import compat


def is_replicated(vllm_config: Any, kv_cache_config: Any) -> bool:
    """By what vLLM's own offloading asks for its `replicated_layout`. Scheduler and workers answer alike.

    MLA keeps one latent per token, made by projections that every rank of tensor parallelism holds whole, from activations that
    were reduced over all ranks. Other layers beside it, or another axis of parallelism, and ranks may differ."""
    parallel = vllm_config.parallel_config
    ranks = parallel.tensor_parallel_size
    return bool(
        ranks > 1
        # Of a vLLM that does not count them: not known.
        and getattr(kv_cache_config, "kv_tp_replicas", 1) == ranks
        and parallel.world_size == ranks
        and parallel.pipeline_parallel_size == 1
        and parallel.prefill_context_parallel_size == 1
        and parallel.decode_context_parallel_size == 1
        and parallel.distributed_executor_backend == "mp"
        and parallel.nnodes_within_dp == 1
        and vllm_config.model_config.use_mla
        and all(
            type(spec) is compat.MLAAttentionSpec
            for group in kv_cache_config.kv_cache_groups
            for spec in compat.uniform_specs(group.kv_cache_spec)
        )
    )


def stores(rank: int, *, replicated: bool) -> bool:
    """Whether this rank fills a part of a slot."""
    return rank == 0 or not replicated
