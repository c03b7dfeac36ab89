"""The Prometheus series of both connectors: names, labels, where each value comes from. docs/metrics.md explains each.

Counters are exported with `_total` behind the name, as Prometheus has it. Every series also has vLLM's own labels, model_name and
engine.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmcache_native import Store
from lmcache_native.integration.vllm import compat

PREFIX = "lmcache_native_"

SECONDS = Store.latency_bounds_s


class Kind(enum.Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Series:
    """`stats`: label values -> name in Store.stats(). `noted`: label values that the connectors count themselves. `latency`: name
    in Store.latencies()."""

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()
    stats: Mapping[tuple[str, ...], str] = field(default_factory=dict)
    noted: tuple[tuple[str, ...], ...] = ()
    latency: str = ""
    buckets: tuple[float, ...] = ()

    @property
    def metadata(self) -> Any:
        if self.kind is Kind.COUNTER:
            return compat.OffloadingCounterMetadata(documentation=self.text, labelnames=self.labels)
        if self.kind is Kind.GAUGE:
            return compat.OffloadingGaugeMetadata(documentation=self.text, labelnames=self.labels)
        return compat.OffloadingHistogramMetadata(documentation=self.text, labelnames=self.labels, buckets=self.buckets)


def _counter(name: str, stat: str, text: str) -> Series:
    return Series(PREFIX + name, Kind.COUNTER, text, stats={(): stat})


def _counters(name: str, label: str, text: str, stats: Mapping[str, str] | None = None, noted: tuple[str, ...] = ()) -> Series:
    by_label: dict[tuple[str, ...], str] = {(value,): stat for value, stat in (stats or {}).items()}
    return Series(PREFIX + name, Kind.COUNTER, text, (label,), by_label, tuple((value,) for value in noted))


def _noted(name: str, text: str) -> Series:
    return Series(PREFIX + name, Kind.COUNTER, text, noted=((),))


def _gauge(name: str, stat: str, text: str) -> Series:
    return Series(PREFIX + name, Kind.GAUGE, text, stats={(): stat})


def _seconds(name: str, text: str, latency: str = "") -> Series:
    return Series(PREFIX + name, Kind.HISTOGRAM, text, noted=() if latency else ((),), latency=latency, buckets=SECONDS)


REQUESTS = _noted("requests", "Requests whose prompt was looked up, when they were first scheduled.")
UNCACHED = _counters("requests_without_cache", "reason", "Requests served without the cache.", noted=("parameters", "adapter"))
PROMPT_TOKENS = _noted("prompt_tokens", "Prompt tokens of those requests.")
ENGINE_HITS = _noted("engine_hit_tokens", "Of those, tokens that the engine still had itself.")
HIT_TOKENS = _counters("hit_tokens", "tier", "Prompt tokens loaded, by the tier they came from.", noted=("host", "nvme"))
MISS_TOKENS = _counters(
    "miss_tokens",
    "tier",
    "Prompt tokens that neither the engine had nor the tier. nvme: of those that host memory did not have; without NVMe 0.",
    noted=("host", "nvme"),
)
STORED_TOKENS = _noted("stored_tokens", "Tokens whose KV was published.")
GATHER_BYTES = _noted("gather_bytes", "Bytes copied from the engine's memory to host memory.")
SCATTER_BYTES = _noted("scatter_bytes", "Bytes copied to the engine's memory, also those that GPUDirect Storage read.")
GATHER_SECONDS = _seconds("gather_seconds", "Copies of a job from the engine's memory to host memory.")
SCATTER_SECONDS = _seconds("scatter_seconds", "Copies of a job to the engine's memory.")
LOAD_SECONDS = _seconds("load_seconds", "From the decision to load a request's tokens until the scheduler heard of its end.")
STORE_SECONDS = _seconds("store_seconds", "From the reservation of slots until their chunks were published or dropped.")
PROMOTION_WAIT = _seconds("promotion_wait_seconds", "Of requests that had to ask again: from their first question to the answer.")
ERRORS = _counters(
    "errors",
    "kind",
    "Errors; each is a miss or a dropped store, never a wrong answer.",
    {
        "nvme_read": "read_errors",
        "nvme_write": "write_errors",
        "corrupt_record": "corrupt_records",
        "misplaced_record": "misplaced_reads",
        "corrupt_host_chunk": "corrupt_host_chunks",
    },
    ("load", "store"),
)
DIRECT_LOADS = Series(
    PREFIX + "direct_loads", Kind.GAUGE, "1 while workers read NVMe themselves, past host memory (use_gds).", noted=((),)
)
WORKER_JOBS = Series(
    PREFIX + "worker_jobs", Kind.GAUGE, "Jobs handed to the workers and not ended.", ("kind",), noted=(("load",), ("store",))
)
INFO = Series(PREFIX + "info", Kind.GAUGE, "1; what runs is in the labels.", ("version", "connector", "io_engine", "verify"))

SERIES: tuple[Series, ...] = (
    INFO,
    # requests and tokens
    REQUESTS,
    UNCACHED,
    PROMPT_TOKENS,
    ENGINE_HITS,
    HIT_TOKENS,
    MISS_TOKENS,
    STORED_TOKENS,
    _counters("hit_chunks", "tier", "Chunks loaded, by the tier they came from.", {"host": "hits_host", "nvme": "hits_nvme"}),
    _counter("lookups", "lookups", "Questions for one chunk."),
    _counter("miss_chunks", "misses", "Chunks asked for that no tier had or could give in time, once a request."),
    # host memory
    _counter("stored_chunks", "committed_chunks", "Chunks published."),
    _counter("aborted_chunks", "aborted_chunks", "Chunks of stores that were dropped or failed."),
    _counter("store_refusals", "reserve_failures", "Stores for which not all slots could be had: the rest is offered again."),
    _counter("evicted_chunks", "evicted_chunks", "Chunks evicted from host memory."),
    _counter("evicted_bytes", "evicted_bytes", "Bytes evicted from host memory."),
    _counter("resets", "cleared", "Times that everything was dropped."),
    _gauge("host_capacity_bytes", "host_limit_bytes", "Size of host memory."),
    _gauge("host_used_bytes", "host_used_bytes", "Host memory in use."),
    _gauge("host_chunks", "host_slots", "Slots of host memory in use."),
    _gauge("host_pinned_chunks", "host_pinned_slots", "Of those, held by requests, jobs and I/O: not evicted."),
    _gauge("host_quarantined_slots", "host_quarantined_slots", "Slots that wait for a worker's word."),
    _gauge("index_chunks", "index_entries", "Chunks known in any tier."),
    _gauge("index_memory_bytes", "index_memory_bytes", "Memory of the index."),
    # promotion and writes
    _counter("promoted_chunks", "promoted_chunks", "Chunks read from NVMe into host memory and verified."),
    _counter("promoted_bytes", "promoted_bytes", "Their bytes."),
    _counter("promotion_failures", "promotion_failures", "Promotions that failed: misses."),
    _counter("promotion_timeouts", "promotion_timeouts", "Promotions that a request did not wait for any longer: misses."),
    _counters(
        "promotion_refusals",
        "reason",
        "Chunks on NVMe that were not promoted for a request: misses.",
        {"request_budget": "refused_request_budget", "pinned": "refused_pin_limit", "no_slot": "refused_no_slot"},
    ),
    _counter("nvme_read_bytes", "nvme_read_bytes", "Bytes read from NVMe into host memory, also those that did not verify."),
    _counter("nvme_written_bytes", "demoted_bytes", "Bytes of chunks written to NVMe."),
    _counter("nvme_written_chunks", "demoted_chunks", "Chunks written to NVMe."),
    _counters(
        "nvme_refused_chunks",
        "reason",
        "Chunks not offered to NVMe: seen for the first time while writes are dear (or admission is second_touch, or the request's "
        "priority low); likewise while the device was behind; the day's limit is reached.",
        {"first_touch": "refused_first_touch", "device_behind": "refused_device_behind", "day_limit": "refused_over_budget"},
    ),
    _counters(
        "nvme_dropped_chunks",
        "reason",
        "Chunks that waited for their write and were not written: for too long, evicted before, no room in the log.",
        {"late": "dropped_late", "evicted": "dropped_evicted", "no_room": "dropped_no_room"},
    ),
    _counter("nvme_failed_writes", "demotion_failures", "Chunks whose write to NVMe failed."),
    _counter("nvme_reclaimed_regions", "reclaimed_regions", "Regions of NVMe that were reused."),
    _counter("nvme_reclaimed_chunks", "reclaimed_chunks", "Chunks that left NVMe with their region."),
    _counter("nvme_reappended_chunks", "reappended_chunks", "Of those, chunks written again since they were used."),
    _counter("nvme_reappended_bytes", "reappended_bytes", "Their bytes; in nvme_written_bytes too."),
    _counter("nvme_recovered_chunks", "recovered_chunks", "Chunks found on NVMe at start."),
    _counter("nvme_stale_reads", "stale_reads", "Reads that found their region reused: misses, no errors."),
    _counter("verified_bytes", "verified_bytes", "Bytes whose checksums were computed before a request got them."),
    _gauge("nvme_capacity_bytes", "nvme_limit_bytes", "Limit of NVMe, all paths."),
    _gauge("nvme_allocated_bytes", "nvme_allocated_bytes", "NVMe space taken from the file systems."),
    _gauge("nvme_live_bytes", "nvme_live_bytes", "Bytes on NVMe that can be looked up."),
    _gauge("nvme_dirty_bytes", "nvme_dirty_bytes", "Bytes in host memory that a crash now would lose."),
    _gauge("nvme_dirty_chunks", "nvme_dirty_chunks", "Their chunks: waiting for their write or being written."),
    _gauge("nvme_writes_in_flight", "demotions_in_flight", "Of those, being written."),
    _gauge("nvme_day_written_bytes", "nvme_day_bytes", "Bytes written to NVMe within the last 24 hours."),
    _gauge("nvme_day_limit_bytes", "nvme_day_limit_bytes", "Limit on bytes written to NVMe within 24 hours."),
    _gauge("nvme_paths", "nvme_paths", "NVMe directories configured."),
    _gauge("nvme_lost_paths", "nvme_lost_paths", "NVMe directories out of use after an error."),
    _gauge("nvme_quarantined", "nvme_quarantined", "1 when NVMe is out of use after an error."),
    _gauge(
        "nvme_waiting",
        "nvme_waiting",
        "1 while the NVMe directories are still to be taken over from their owner.",
    ),
    DIRECT_LOADS,
    # queues
    _gauge("promotions_in_flight", "promotions_in_flight", "Promotions queued or under way."),
    _gauge("checks_in_flight", "checks_in_flight", "Checksums of chunks in host memory (verify: all) queued or under way."),
    _gauge("open_lookups", "requests", "Requests that hold, or may hold, pins."),
    _gauge("workers_attached", "attached_ranks", "Workers attached to host memory."),
    WORKER_JOBS,
    ERRORS,
    # stages
    GATHER_BYTES,
    SCATTER_BYTES,
    GATHER_SECONDS,
    SCATTER_SECONDS,
    _seconds("nvme_read_seconds", "Reads of a chunk from NVMe, until the device answered.", "read"),
    _seconds("nvme_write_seconds", "Writes of a chunk to NVMe, until the device answered.", "write"),
    _seconds("nvme_write_wait_seconds", "From when a chunk was to be written until it was.", "write_wait"),
    _seconds("verify_seconds", "Checksums over a chunk.", "verify"),
    _seconds("promotion_seconds", "Promotions of a chunk: queue, read, verification.", "promotion"),
    PROMOTION_WAIT,
    LOAD_SECONDS,
    STORE_SECONDS,
)
