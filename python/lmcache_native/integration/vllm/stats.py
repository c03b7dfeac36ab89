"""The store's counters as vLLM's connector metrics (Prometheus, and vLLM's own log line)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from lmcache_native import Store
from lmcache_native.integration.vllm import compat
from lmcache_native.logging import get_logger

logger = get_logger(__name__)

INTERVAL_S = 0.5

# metric -> (name in Store.stats(), label values, documentation)
_HITS = "lmcache_native:hit_chunks"
_COUNTERS = {
    "lmcache_native:evicted_chunks": ("evicted_chunks", "Chunks evicted from host memory."),
    "lmcache_native:nvme_written_bytes": ("demoted_bytes", "Bytes written to NVMe."),
    "lmcache_native:nvme_read_bytes": ("promoted_bytes", "Bytes read from NVMe and verified."),
    "lmcache_native:nvme_dropped_chunks": ("demotion_drops", "Chunks not written to NVMe because the device could not keep up."),
    "lmcache_native:nvme_refused_first_touch_chunks": (
        "refused_first_touch",
        "Chunks not written to NVMe: seen for the first time, with most of the day's writes spent or admission second_touch.",
    ),
    "lmcache_native:nvme_refused_device_behind_chunks": (
        "refused_device_behind",
        "Chunks not written to NVMe: seen for the first time while the device was behind with its writes.",
    ),
    "lmcache_native:nvme_refused_over_budget_chunks": (
        "refused_over_budget",
        "Chunks not written to NVMe: the day's limit on writes is reached.",
    ),
    "lmcache_native:nvme_reappended_chunks": (
        "reappended_chunks",
        "Chunks written again when their region was reclaimed, since they were used.",
    ),
    "lmcache_native:corrupt_host_chunks": (
        "corrupt_host_chunks",
        "Chunks in host memory that failed verification: misses.",
    ),
    "lmcache_native:misplaced_records": ("misplaced_reads", "Reads that found a whole record of another chunk: misses."),
    "lmcache_native:corrupt_records": ("corrupt_records", "Records on NVMe that failed verification: misses."),
    "lmcache_native:io_errors": ("read_errors", "Reads from NVMe that failed: misses."),
    "lmcache_native:refused_promotions": ("promotion_refusals", "Chunks on NVMe beyond a request's promotion budget: misses."),
}
_GAUGES = {
    "lmcache_native:host_used_bytes": ("host_used_bytes", "Host memory in use."),
    "lmcache_native:host_quarantined_slots": ("host_quarantined_slots", "Slots that wait for a worker's word."),
    "lmcache_native:nvme_live_bytes": ("nvme_live_bytes", "Bytes on NVMe that can be looked up."),
    "lmcache_native:nvme_dirty_bytes": ("nvme_dirty_bytes", "Bytes in host memory that a crash now would lose."),
    "lmcache_native:nvme_lost_paths": ("nvme_lost_paths", "NVMe directories out of use after an error."),
    "lmcache_native:nvme_waiting": ("nvme_waiting", "1 while another process has the NVMe directories; they are taken over later."),
    "lmcache_native:nvme_day_written_bytes": ("nvme_day_bytes", "Bytes written to NVMe within the last 24 hours."),
    "lmcache_native:nvme_day_limit_bytes": ("nvme_day_limit_bytes", "Limit on bytes written to NVMe within 24 hours."),
    "lmcache_native:nvme_quarantined": ("nvme_quarantined", "1 when NVMe is out of use after an error."),
}


def definitions() -> dict[str, Any]:
    found: dict[str, Any] = {
        _HITS: compat.OffloadingCounterMetadata(documentation="Chunks loaded, by the tier they came from.", labelnames=("tier",))
    }
    for name, (_, text) in _COUNTERS.items():
        found[name] = compat.OffloadingCounterMetadata(documentation=text)
    for name, (_, text) in _GAUGES.items():
        found[name] = compat.OffloadingGaugeMetadata(documentation=text)
    return found


def note_transfer(stats: Any, kind: str, size_bytes: int, seconds: float) -> None:
    """Adds a transfer that ended to vLLM's own metrics of any offloading connector. `kind`: load or store."""
    stats.increase_counter(f"vllm:kv_offload_{kind}_bytes", size_bytes)
    stats.increase_counter(f"vllm:kv_offload_{kind}_time", seconds)
    stats.observe_histogram(f"vllm:kv_offload_{kind}_size", size_bytes)


class StatsReporter:
    """Turns snapshots into what changed since the last one. vLLM asks after each step; a snapshot is taken at most every 0.5 s."""

    def __init__(self) -> None:
        self._last: Mapping[str, int] = {}
        self._next_s = 0.0

    def due(self) -> bool:
        now = time.monotonic()
        if now < self._next_s:
            return False
        self._next_s = now + INTERVAL_S
        return True

    def report(self, store: Store) -> Any:
        """Also says once in the log when NVMe went out of use since the last call."""
        snapshot = store.stats()
        if snapshot["nvme_lost_paths"] > self._last.get("nvme_lost_paths", 0):
            left = "host memory" if snapshot["nvme_quarantined"] else "the others"
            logger.warning("%s; the engine goes on with %s", store.nvme_warning, left)
        stats = compat.OffloadingConnectorStats()
        for tier, field in (("host", "hits_host"), ("nvme", "hits_nvme")):
            self._count(stats, _HITS, snapshot, field, (tier,))
        for name, (field, _) in _COUNTERS.items():
            self._count(stats, name, snapshot, field, ())
        for name, (field, _) in _GAUGES.items():
            stats.set_gauge(name, snapshot[field])
        self._last = snapshot
        return stats

    def _count(self, stats: Any, name: str, snapshot: Mapping[str, int], field: str, labels: tuple[str, ...]) -> None:
        grown = snapshot[field] - self._last.get(field, 0)
        if grown > 0:
            stats.increase_counter(name, grown, labels)
