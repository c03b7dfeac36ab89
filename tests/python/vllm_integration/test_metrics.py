"""What becomes of the store's counters in vLLM's own Prometheus classes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

import lmcache_native as native
from lmcache_native.errors import InvalidArgument
from lmcache_native.integration.vllm import lmcache_series, series, spec, stats
from lmcache_native.integration.vllm.series import SERIES, Kind

LABELS = {"model_name": "m", "engine": "0"}


def registered(types: dict[Any, Any]) -> Any:
    config = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector_extra_config={"spec_name": spec.NAME}))
    return stats.prom_metrics(config, types, list(LABELS), {0: list(LABELS.values())})


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def prometheus(registry: CollectorRegistry) -> Any:
    return registered({kind: functools.partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[native.Store]:
    with native.Store(
        host_bytes=4 << 20,
        directory=tmp_path / "kv",
        nvme_bytes=96 << 20,
        max_payload_bytes=60 << 10,
        admission="always",  # also when writes wait, as on a busy machine
        write_deadline_s=600.0,
    ) as found:
        yield found


def use(store: native.Store, names: range) -> None:
    """More than fit in host memory, each of them on NVMe before it is evicted: reading them all is mostly promotions."""
    for name in names:
        assert store.put(name.to_bytes(4, "big"), bytes(60 << 10))
        if name % 20 == 0:
            store.flush(30.0)
    store.flush(30.0)
    for name in names:
        assert store.get(name.to_bytes(4, "big"), timeout_s=60.0) is not None


def test_the_first_report_has_every_series(registry: CollectorRegistry, prometheus: Any, store: native.Store) -> None:
    prometheus.observe(stats.StatsReporter("Test", "nvme").report(store).data)
    for row in SERIES:
        for values in {*row.stats, *row.noted} or {()}:
            suffix = {Kind.COUNTER: "_total", Kind.GAUGE: "", Kind.HISTOGRAM: "_count"}[row.kind]
            labels = LABELS | dict(zip(row.labels, values, strict=True)) if row is not series.INFO else None
            if labels is not None and (row.noted or row.stats):
                assert registry.get_sample_value(row.name + suffix, labels) is not None, row.name
    info = {"version": native.__version__, "connector": "Test", "verify": "nvme"}
    (sample,) = [sample for family in registry.collect() for sample in family.samples if sample.name == series.INFO.name]
    assert info.items() <= sample.labels.items()
    assert sample.labels["io_engine"] in ("io_uring", "threads")


def test_histograms_are_the_stores_own(registry: CollectorRegistry, prometheus: Any, store: native.Store) -> None:
    """Over several reports: the same buckets, count and sum as the store has."""
    reporter = stats.StatsReporter()
    for first in (0, 100, 200):
        use(store, range(first, first + 90))
        prometheus.observe(reporter.report(store).data)
    for row in SERIES:
        if not row.latency:
            continue
        buckets = store.latencies()[row.latency]
        assert sum(count for count, _ in buckets) > 50, row.name
        below = 0
        for bound, (count, _) in zip([*store.latency_bounds_s, float("inf")], buckets, strict=True):
            below += count
            le = LABELS | {"le": prometheus_client.utils.floatToGoString(bound)}
            assert registry.get_sample_value(row.name + "_bucket", le) == below, (row.name, bound)
        total = registry.get_sample_value(row.name + "_sum", LABELS)
        assert total == pytest.approx(sum(seconds for _, seconds in buckets), rel=1e-6), row.name


def test_tokens_add_up(registry: CollectorRegistry, prometheus: Any, store: native.Store) -> None:
    reporter = stats.StatsReporter()
    reporter.report(store)  # now it knows that there is NVMe
    reporter.noted.admitted(stats.Admission(prompt=100, engine=20, host=40, nvme=10))
    reporter.noted.admitted(stats.Admission(prompt=50, engine=0, host=0, nvme=0))
    prometheus.observe(reporter.report(store).data)

    def total(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"lmcache_native_{name}_total", LABELS | labels)

    assert (total("requests"), total("prompt_tokens"), total("engine_hit_tokens")) == (2, 150, 20)
    assert (total("hit_tokens", tier="host"), total("hit_tokens", tier="nvme")) == (40, 10)
    assert (total("miss_tokens", tier="host"), total("miss_tokens", tier="nvme")) == (90, 80)


def test_a_second_engine_in_one_process_registers_anew() -> None:
    types = {Counter: Counter, Gauge: Gauge, Histogram: Histogram}
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    before = set(prometheus_client.REGISTRY._collector_to_names)
    try:
        unregister_vllm_metrics()
        registered(types)
        unregister_vllm_metrics()  # as vLLM's logger does
        registered(types)
    finally:
        for collector in set(prometheus_client.REGISTRY._collector_to_names) - before:
            prometheus_client.REGISTRY.unregister(collector)


def test_gauges_of_several_front_ends_are_one(prometheus: Any) -> None:
    gauges = [row.name for row in SERIES if row.kind is Kind.GAUGE]
    assert {prometheus._offloading_metric_defs[name]._multiprocess_mode for name in gauges} == {"mostrecent"}


def test_vllms_log_line_is_short(store: native.Store) -> None:
    reporter = stats.StatsReporter()
    reporter.noted.admitted(stats.Admission(prompt=100, engine=20, host=40, nvme=10))
    line = reporter.report(store).reduce()
    assert line["tokens loaded from host"] == 40
    assert line["tokens loaded from NVMe"] == 10
    assert len(line) <= 7


def test_lmcaches_names(
    registry: CollectorRegistry, store: native.Store, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    assert lmcache_series.enabled() == ()
    monkeypatch.setenv(lmcache_series.VARIABLE, "perhaps")
    with pytest.raises(InvalidArgument, match=lmcache_series.VARIABLE):
        stats.definitions()
    monkeypatch.setenv(lmcache_series.VARIABLE, "1")
    prometheus = request.getfixturevalue("prometheus")
    reporter = stats.StatsReporter()
    reporter.noted.admitted(stats.Admission(prompt=100, engine=20, host=40, nvme=10))
    reporter.noted.load_ended(50, 0.25, failed=False)
    reporter.noted.load_ended(30, 0.25, failed=True)
    prometheus.observe(reporter.report(store).data)
    for name, value in (
        ("num_lookup_tokens_total", 80),
        ("num_lookup_hits_total", 50),
        ("num_vllm_hit_tokens_total", 20),
        ("num_requested_tokens_total", 80),
        ("num_hit_tokens_total", 50),
        ("retrieve_hit_rate", 50 / 80),
        ("time_to_retrieve_sum", 0.5),
        ("retrieve_speed_sum", 200),
        ("lmcache_is_healthy", 1),
    ):
        assert registry.get_sample_value("lmcache:" + name, LABELS) == value, name
