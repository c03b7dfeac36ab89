"""LMCache's own Prometheus names (lmcache:...), for dashboards that exist: with LMCACHE_NATIVE_COMPAT_METRICS=1, and those only
that can be filled truthfully. docs/metrics.md has the mapping, and what is left out and why.

A name of LMCache's keeps LMCache's meaning where ours is the same; labels are vLLM's (model_name, engine).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lmcache_native.config import parse_flag
from lmcache_native.errors import InvalidArgument
from lmcache_native.integration.vllm import compat, series
from lmcache_native.integration.vllm.series import Kind, Series

if TYPE_CHECKING:
    from lmcache_native.integration.vllm.stats import Admission

VARIABLE = "LMCACHE_NATIVE_COMPAT_METRICS"
PREFIX = "lmcache:"

_PARTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_TOKENS_PER_S = (1.0, 8.0, 64.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 65536.0, 262144.0, 1048576.0)


def _noted(name: str, text: str) -> Series:
    return Series(PREFIX + name, Kind.COUNTER, text, noted=((),))


def _histogram(name: str, text: str, buckets: tuple[float, ...] = series.SECONDS) -> Series:
    return Series(PREFIX + name, Kind.HISTOGRAM, text, noted=((),), buckets=buckets)


def _from(kind: Kind, name: str, stat: str, text: str) -> Series:
    return Series(PREFIX + name, kind, text, stats={(): stat})


SERIES: tuple[Series, ...] = (
    _noted("num_lookup_requests", "Requests looked up."),
    _noted("num_lookup_tokens", "Prompt tokens looked up: those that the engine did not have."),
    _noted("num_lookup_hits", "Of those, tokens found."),
    _noted("lookup_0_hit_requests", "Requests looked up of which nothing was found."),
    _noted("num_prompt_tokens", "Prompt tokens."),
    _noted("num_vllm_hit_tokens", "Prompt tokens that the engine had."),
    _noted("num_retrieve_requests", "Loads."),
    _noted("num_requested_tokens", "Tokens of loads."),
    _noted("num_hit_tokens", "Tokens of loads that succeeded."),
    _noted("num_store_requests", "Stores."),
    _noted("num_stored_tokens", "Tokens stored, including evicted ones."),
    _from(Kind.COUNTER, "local_cpu_evict_count", "evicted_chunks", "Evictions from host memory."),
    _from(Kind.COUNTER, "local_cpu_evict_keys_count", "evicted_chunks", "Chunks evicted from host memory."),
    _from(Kind.COUNTER, "local_cpu_evict_failed_count", "reserve_failures", "Stores for which not all slots could be had."),
    _from(Kind.GAUGE, "local_cache_usage", "host_used_bytes", "Host memory in use, bytes."),
    _from(Kind.GAUGE, "local_storage_usage", "nvme_live_bytes", "NVMe in use, bytes."),
    _from(Kind.GAUGE, "active_memory_objs_count", "host_slots", "Chunks in host memory."),
    _from(Kind.GAUGE, "pinned_memory_objs_count", "host_pinned_slots", "Pinned chunks in host memory."),
    Series(PREFIX + "lmcache_is_healthy", Kind.GAUGE, "0 when a tier is out of use.", noted=((),)),
    Series(PREFIX + "retrieve_hit_rate", Kind.GAUGE, "Tokens loaded of those asked for, since the last report.", noted=((),)),
    Series(PREFIX + "lookup_hit_rate", Kind.GAUGE, "Tokens found of those looked up, since the last report.", noted=((),)),
    _histogram("time_to_retrieve", "Loads, seconds."),
    _histogram("time_to_store", "Stores, seconds."),
    _histogram("retrieve_to_gpu_time", "Copies of loads, seconds."),
    _histogram("store_from_gpu_time", "Copies of stores, seconds."),
    _histogram("retrieve_speed", "Tokens per second of loads.", _TOKENS_PER_S),
    _histogram("store_speed", "Tokens per second of stores.", _TOKENS_PER_S),
    _histogram("request_cache_hit_rate", "Part of a request's looked up tokens that was found.", _PARTS),
)


def enabled() -> tuple[Series, ...]:
    """None without the environment variable."""
    value = os.environ.get(VARIABLE, "")
    flag = parse_flag(value) if value else False
    if flag is None:
        raise InvalidArgument(f"{VARIABLE}={value!r} (environment): must be true or false")
    return SERIES if flag else ()


def note_admitted(stats: Any, found: Admission) -> None:
    if not enabled():
        return
    hit, asked = found.host + found.nvme, found.prompt - found.engine
    for name, value in (
        ("num_lookup_requests", 1),
        ("num_lookup_tokens", asked),
        ("num_lookup_hits", hit),
        ("lookup_0_hit_requests", int(hit == 0)),
        ("num_prompt_tokens", found.prompt),
        ("num_vllm_hit_tokens", found.engine),
    ):
        stats.increase_counter(PREFIX + name, value)
    if asked:
        stats.observe_histogram(PREFIX + "request_cache_hit_rate", hit / asked)
        _set_rate(stats, "lookup_hit_rate", "num_lookup_hits", "num_lookup_tokens")


def note_copied(stats: Any, kind: str, seconds: float) -> None:
    if enabled():
        stats.observe_histogram(PREFIX + ("retrieve_to_gpu_time" if kind == "load" else "store_from_gpu_time"), seconds)


def note_load_ended(stats: Any, tokens: int, seconds: float, *, failed: bool) -> None:
    if not enabled():
        return
    stats.increase_counter(PREFIX + "num_retrieve_requests")
    stats.increase_counter(PREFIX + "num_requested_tokens", tokens)
    stats.increase_counter(PREFIX + "num_hit_tokens", 0 if failed else tokens)
    stats.observe_histogram(PREFIX + "time_to_retrieve", seconds)
    if not failed and seconds > 0:
        stats.observe_histogram(PREFIX + "retrieve_speed", tokens / seconds)
    _set_rate(stats, "retrieve_hit_rate", "num_hit_tokens", "num_requested_tokens")


def note_store_ended(stats: Any, tokens: int, seconds: float, *, failed: bool) -> None:
    if not enabled():
        return
    stats.increase_counter(PREFIX + "num_store_requests")
    stats.increase_counter(PREFIX + "num_stored_tokens", tokens)
    stats.observe_histogram(PREFIX + "time_to_store", seconds)
    if not failed and seconds > 0:
        stats.observe_histogram(PREFIX + "store_speed", tokens / seconds)


def set_gauges(stats: Any, snapshot: Mapping[str, int], rows: tuple[Series, ...]) -> None:
    if rows:
        stats.set_gauge(PREFIX + "lmcache_is_healthy", int(snapshot["nvme_lost_paths"] == 0))


def _set_rate(stats: Any, name: str, part: str, whole: str) -> None:
    """Of what is in `stats` now: since the last report."""
    values = compat.stats_values(stats)
    total = values[PREFIX + whole][()]
    if total:
        stats.set_gauge(PREFIX + name, values[PREFIX + part][()] / total)
