"""The store's counters, and what the connectors count, as vLLM's connector metrics (Prometheus, and vLLM's own log line)."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmcache_native import Store, build_info
from lmcache_native.integration.vllm import compat, lmcache_series, series
from lmcache_native.integration.vllm.series import SERIES, Kind, Series
from lmcache_native.logging import get_logger

logger = get_logger(__name__)

INTERVAL_S = 0.5

NO_LABELS: tuple[str, ...] = ()


def definitions() -> dict[str, Any]:
    """What may be in a report."""
    return {row.name: row.metadata for row in (*SERIES, *lmcache_series.enabled())}


class NativeStats(compat.OffloadingConnectorStats):  # type: ignore[misc]
    """As vLLM's, with one short log line instead of every series."""

    SHOWN = (
        (series.HIT_TOKENS.name, ("host",), "tokens loaded from host"),
        (series.HIT_TOKENS.name, ("nvme",), "tokens loaded from NVMe"),
        (series.MISS_TOKENS.name, ("host",), "tokens not in host"),
        (series.STORED_TOKENS.name, NO_LABELS, "tokens stored"),
        (series.PREFIX + "host_used_bytes", NO_LABELS, "host bytes"),
        (series.PREFIX + "nvme_live_bytes", NO_LABELS, "NVMe bytes"),
        (series.PREFIX + "nvme_dirty_bytes", NO_LABELS, "bytes to be written"),
    )

    def reduce(self) -> dict[str, int | float]:
        values = compat.stats_values(self)
        return {shown: values[name][labels] for name, labels, shown in self.SHOWN if labels in values.get(name, {})}


def prom_metrics(vllm_config: Any, metric_types: Mapping[Any, Any], labelnames: list[str], per_engine_labelvalues: Any) -> Any:
    """vLLM's metrics with our definitions. With several API servers a gauge is the value that was set last, as vLLM's own are;
    prometheus_client's default would be one series for each process."""
    from prometheus_client import REGISTRY, Gauge

    for collector in list(REGISTRY._collector_to_names):  # of an engine before, in this process: vLLM removes its own only
        if getattr(collector, "_name", "").startswith((series.PREFIX, lmcache_series.PREFIX)):
            REGISTRY.unregister(collector)
    types = dict(metric_types)
    types[Gauge] = functools.partial(types[Gauge], multiprocess_mode="mostrecent")
    return compat.OffloadPromMetrics(vllm_config, types, labelnames, per_engine_labelvalues)


@dataclass(frozen=True, slots=True)
class Admission:
    """What was found for a request's prompt when it was first scheduled, in tokens."""

    prompt: int
    engine: int  # the engine's own prefix cache had them
    host: int
    nvme: int

    @property
    def missed(self) -> int:
        return self.prompt - self.engine - self.host - self.nvme

    def response(self) -> dict[str, Any]:
        """The response's kv_transfer_params."""
        hits = {"engine": self.engine, "host": self.host, "nvme": self.nvme}
        return {"lmcache_native": {"prompt_tokens": self.prompt, "hit_tokens": hits}}


class Noted:
    """What a connector counts itself. One thread."""

    def __init__(self) -> None:
        self._stats = compat.OffloadingConnectorStats()
        self.has_nvme = False

    def admitted(self, found: Admission) -> None:
        self._count(series.REQUESTS, 1)
        self._count(series.PROMPT_TOKENS, found.prompt)
        self._count(series.ENGINE_HITS, found.engine)
        self._count(series.HIT_TOKENS, found.host, ("host",))
        self._count(series.HIT_TOKENS, found.nvme, ("nvme",))
        self._count(series.MISS_TOKENS, found.missed + found.nvme, ("host",))
        if self.has_nvme:
            self._count(series.MISS_TOKENS, found.missed, ("nvme",))
        lmcache_series.note_admitted(self._stats, found)

    def without_cache(self, reason: str) -> None:
        self._count(series.UNCACHED, 1, (reason,))

    def copied(self, kind: str, size_bytes: int, seconds: float) -> None:
        """A job's copies ended. `kind`: load or store."""
        self._count(series.SCATTER_BYTES if kind == "load" else series.GATHER_BYTES, size_bytes)
        self._observe(series.SCATTER_SECONDS if kind == "load" else series.GATHER_SECONDS, seconds)
        lmcache_series.note_copied(self._stats, kind, seconds)

    def transferred(self, kind: str, size_bytes: int, seconds: float) -> None:
        """The same in vLLM's own metrics of any offloading connector."""
        self._stats.increase_counter(f"vllm:kv_offload_{kind}_bytes", size_bytes)
        self._stats.increase_counter(f"vllm:kv_offload_{kind}_time", seconds)
        self._stats.observe_histogram(f"vllm:kv_offload_{kind}_size", size_bytes)

    def looked_up(self, seconds: float) -> None:
        self._stats.observe_histogram("vllm:kv_offload_lookup_sync_delay_seconds", seconds)

    def answered_late(self, seconds: float, *, vllm_too: bool) -> None:
        """A request had to ask again, for so long. `vllm_too`: vLLM's connector does not say it itself."""
        self._observe(series.PROMOTION_WAIT, seconds)
        if vllm_too:
            self._stats.observe_histogram("vllm:kv_offload_lookup_async_delay_seconds", seconds)

    def allocation_failed(self) -> None:
        self._stats.increase_counter("vllm:kv_offload_allocation_failure")

    def load_ended(self, tokens: int, seconds: float, *, failed: bool) -> None:
        self._observe(series.LOAD_SECONDS, seconds)
        if failed:
            self.failed("load")
        lmcache_series.note_load_ended(self._stats, tokens, seconds, failed=failed)

    def store_ended(self, tokens: int, seconds: float, *, failed: bool) -> None:
        """`tokens`: of what was published. `failed`: not all of what was offered."""
        self._observe(series.STORE_SECONDS, seconds)
        self._count(series.STORED_TOKENS, tokens)
        if failed:
            self.failed("store")
        lmcache_series.note_store_ended(self._stats, tokens, seconds, failed=failed)

    def failed(self, kind: str) -> None:
        self._count(series.ERRORS, 1, (kind,))

    def take(self) -> Any:
        stats, self._stats = self._stats, compat.OffloadingConnectorStats()
        return stats

    def _count(self, row: Series, value: float, labels: tuple[str, ...] = NO_LABELS) -> None:
        self._stats.increase_counter(row.name, value, labels)

    def _observe(self, row: Series, seconds: float) -> None:
        self._stats.observe_histogram(row.name, seconds)


class StatsReporter:
    """Turns snapshots into what changed since the last one. vLLM asks after each step; a snapshot is taken at most every 0.5 s."""

    def __init__(self, connector: str = "", verify: str = "") -> None:
        """For the labels of `info`."""
        self.noted = Noted()
        self._connector = connector
        self._verify = verify
        self._last: Mapping[str, int] = {}
        self._last_latencies: Mapping[str, list[tuple[int, float]]] = {}
        self._compat = lmcache_series.enabled()
        self._next_s = 0.0

    def due(self) -> bool:
        now = time.monotonic()
        if now < self._next_s:
            return False
        self._next_s = now + INTERVAL_S
        return True

    def report(self, store: Store, loads: int = 0, stores: int = 0, *, direct_loads: bool = False) -> Any:
        """`loads`, `stores`: jobs under way in the workers. `direct_loads`: whether they read NVMe themselves now. Also says once
        in the log when NVMe went out of use since the last call. The first report has every series, most of them zero, so that
        rates have a beginning."""
        snapshot = store.stats()
        if snapshot["nvme_lost_paths"] > self._last.get("nvme_lost_paths", 0):
            left = "host memory" if snapshot["nvme_quarantined"] else "the others"
            logger.warning("%s; the engine goes on with %s", store.nvme_warning, left)
        first = not self._last
        self.noted.has_nvme = snapshot["nvme_paths"] > 0
        stats = NativeStats()
        for row in (*SERIES, *self._compat):
            self._add_stats(stats, row, snapshot, first=first)
        for name, count in (("load", loads), ("store", stores)):
            stats.set_gauge(series.WORKER_JOBS.name, count, (name,))
        stats.set_gauge(series.DIRECT_LOADS.name, int(direct_loads))
        stats.set_gauge(series.INFO.name, 1, self._info(store))
        self._add_latencies(stats, store.latencies())
        lmcache_series.set_gauges(stats, snapshot, self._compat)
        self._last = snapshot
        return stats.aggregate(self.noted.take())

    def _info(self, store: Store) -> tuple[str, ...]:
        engine = store.io_engine_note.split(":")[0].split(" ")[0].rstrip(",;")
        return (str(build_info()["version"]), self._connector, engine or "none", self._verify)

    def _add_stats(self, stats: Any, row: Series, snapshot: Mapping[str, int], *, first: bool) -> None:
        for labels, name in row.stats.items():
            if row.kind is Kind.GAUGE:
                stats.set_gauge(row.name, snapshot[name], labels)
                continue
            grown = snapshot[name] - self._last.get(name, 0)
            if grown > 0 or first:
                stats.increase_counter(row.name, max(grown, 0), labels)
        if first and row.kind is Kind.COUNTER:
            for labels in row.noted:
                stats.increase_counter(row.name, 0, labels)
        elif first and row.kind is Kind.HISTOGRAM:
            compat.observe_all(stats, row.name, [])

    def _add_latencies(self, stats: Any, latencies: Mapping[str, list[tuple[int, float]]]) -> None:
        """Each bucket's mean, as often as it grew: the histogram's buckets, count and sum are then the store's."""
        for row in SERIES:
            if not row.latency:
                continue
            values: list[float] = []
            before = self._last_latencies.get(row.latency, [])
            for bucket, (count, total) in enumerate(latencies[row.latency]):
                last_count, last_total = before[bucket] if before else (0, 0.0)
                if grown := count - last_count:
                    values += [_within((total - last_total) / grown, bucket)] * grown
            if values:
                compat.observe_all(stats, row.name, values)
        self._last_latencies = latencies


def _within(seconds: float, bucket: int) -> float:
    """A duration that ended between the reading of count and total may move the mean a little beyond the bucket."""
    bounds = series.SECONDS
    lowest = bounds[bucket - 1] * (1 + 1e-9) if bucket else 0.0
    return max(lowest, seconds if bucket == len(bounds) else min(seconds, bounds[bucket]))


def log_admission(request_id: str, found: Admission, *, show: bool) -> None:
    logger.log(
        logging.INFO if show else logging.DEBUG,
        "request %s: %d prompt tokens, hit engine %d, host %d, NVMe %d",
        request_id,
        found.prompt,
        found.engine,
        found.host,
        found.nvme,
    )
