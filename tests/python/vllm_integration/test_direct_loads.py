"""Loads past host memory: what is on NVMe alone is read by the workers. Here by DeviceLoader's host path, which on a GPU is what
GPUDirect Storage falls back to; every byte that a forward pass would read is checked."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_token_scheduler import HEADER_BYTES, evict, random_day
from token_parts import prompt
from token_world import Engine, engines, keys_of

from lmcache_native import Store
from lmcache_native.integration.vllm import quickstart_log, series

pytestmark = pytest.mark.unit

Make = Callable[..., Engine]


@pytest.fixture
def make() -> Iterator[Make]:
    with engines() as maker:
        yield maker


def on_nvme(engine: Engine, seed: int) -> list[int]:
    """A prompt of five chunks that are on NVMe alone."""
    tokens = prompt(seed, 125)
    engine.answered(tokens)
    evict(engine, tokens)
    return tokens


@pytest.mark.parametrize("config", [{}, {"async_loading": False}])
@pytest.mark.parametrize("ranks", [1, 2])
def test_records_are_read_by_the_workers(make: Make, tmp_path: Path, ranks: int, config: dict[str, Any]) -> None:
    engine = make(chunk=24, ranks=ranks, directory=tmp_path / "kv", direct=True, step_tokens=200, **config)
    tokens = on_nvme(engine, 17)
    promoted = engine.stats["promoted_chunks"]
    assert engine.answered(tokens) == 120
    assert engine.stats["promoted_chunks"] == promoted
    assert engine.scheduler.store.lookup(keys_of(engine, tokens)).host == 0


def test_one_load_from_both_tiers(make: Make, tmp_path: Path) -> None:
    engine = make(chunk=24, directory=tmp_path / "kv", direct=True)
    tokens = on_nvme(engine, 18)
    store = engine.scheduler.store
    some = list(keys_of(engine, tokens))[1:3]
    store.acquire(engine.scheduler.namespaces.plain(), some, 10.0).release()  # promoted: the second and the third
    assert store.lookup(keys_of(engine, tokens)) == (5, 2, 3)
    assert engine.answered(tokens) == 120


def test_what_another_still_stores_is_waited_for(make: Make, tmp_path: Path) -> None:
    engine = make(chunk=24, directory=tmp_path / "kv", direct=True)
    tokens = prompt(19, 125)
    first = engine.ask(tokens)
    second = engine.ask(tokens)
    engine.drain()
    assert engine.hit_tokens[second] in (0, 120)
    assert first in engine.hit_tokens


@pytest.fixture
def failed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Requests whose loads failed."""
    names: list[str] = []
    monkeypatch.setattr(quickstart_log, "load_failed", lambda request_id, *_: names.append(request_id))
    return names


def direct_loads_shown(engine: Engine) -> float:
    engine.scheduler._stats._next_s = 0.0
    report = engine.scheduler.stats()
    (value,) = report.data["data"][series.DIRECT_LOADS.name].values()
    return float(value)


def damage(engine: Engine, data: Path, tokens: list[int], chunk: int) -> None:
    ((_position, _path, offset, _bytes, _sequence),) = engine.scheduler.store.locate(keys_of(engine, tokens)[chunk : chunk + 1])
    with data.open("r+b") as file:
        file.seek(offset + HEADER_BYTES + 100)
        (byte,) = file.read(1)
        file.seek(offset + HEADER_BYTES + 100)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("ranks", [1, 2])
def test_damaged_record_is_recomputed(make: Make, tmp_path: Path, ranks: int, failed: list[str]) -> None:
    engine = make(chunk=24, ranks=ranks, directory=tmp_path / "kv", direct=True)
    tokens = on_nvme(engine, 20)
    damage(engine, tmp_path / "kv" / "data.000", tokens, 2)
    name = engine.ask(tokens)
    engine.drain()  # which checks every byte that was read
    assert failed == [name]


def test_damaged_record_is_stored_anew(make: Make, tmp_path: Path, failed: list[str]) -> None:
    engine = make(chunk=24, directory=tmp_path / "kv", direct=True)
    tokens = on_nvme(engine, 20)
    damage(engine, tmp_path / "kv" / "data.000", tokens, 2)
    engine.ask(tokens)
    engine.drain()
    assert (len(failed), engine.stats["corrupt_records"], engine.stats["promotion_refusals"]) == (1, 1, 0)
    engine.answered(tokens)
    evict(engine, tokens)
    hits = engine.stats["hits_nvme"]
    assert engine.answered(tokens) == 120
    assert engine.stats["hits_nvme"] == hits + 5
    assert len(failed) == 1
    assert engine.scheduler._direct_loads


def test_reads_that_fail_send_loads_through_host_memory(make: Make, tmp_path: Path, failed: list[str]) -> None:
    engine = make(chunk=24, directory=tmp_path / "kv", direct=True)
    tokens = on_nvme(engine, 20)
    loader = engine.workers[0]._loader
    assert loader is not None
    loader._files = [str(tmp_path / "gone")]
    was_on = direct_loads_shown(engine)
    engine.ask(tokens)
    engine.drain()
    assert len(failed) == 1
    assert (was_on, direct_loads_shown(engine)) == (1, 0)
    assert engine.stats["corrupt_records"] == 0
    evict(engine, tokens)
    promoted = engine.stats["promoted_chunks"]
    assert engine.answered(tokens) == 120
    assert engine.stats["promoted_chunks"] == promoted + 5


def test_record_whose_region_was_reused_is_recomputed(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: list[str]
) -> None:
    engine = make(chunk=24, directory=tmp_path / "kv", direct=True)
    tokens = on_nvme(engine, 21)
    locate = Store.locate

    def of_before(self: Store, keys: Any) -> Any:
        return [(*place[:4], place[4] - 1) for place in locate(self, keys)]

    monkeypatch.setattr(Store, "locate", of_before)
    name = engine.ask(tokens)
    engine.drain()
    assert failed == [name]


def test_record_that_is_gone_before_the_load(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: list[str]
) -> None:
    engine = make(chunk=24, directory=tmp_path / "kv", direct=True)
    tokens = on_nvme(engine, 22)
    lease = engine.scheduler._lease

    def cleared_in_between(state: Any, keys: Any, chunks: Any) -> Any:
        engine.scheduler.store.clear()
        return lease(state, keys, chunks)

    monkeypatch.setattr(engine.scheduler, "_lease", cleared_in_between)
    name = engine.ask(tokens)
    engine.drain()
    assert failed == [name]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("seed", [1, 3, 7, 9])
def test_random_days(make: Make, seed: int, ranks: int, tmp_path: Path) -> None:
    """Every byte is checked; how much is read from NVMe depends on the disk."""
    numbers = itertools.count()

    def fill_host_memory(engine: Engine, generator: random.Random) -> None:
        if generator.random() < 0.05:
            store = engine.scheduler.store
            store.flush(10.0)
            payload = bytes(engine.scheduler._chunk_bytes)
            for _ in range(engine.config.host_bytes // (len(payload) + HEADER_BYTES) + 1):
                store.put(next(numbers).to_bytes(8, "little"), payload)

    random_day(make, seed, ranks, tmp_path / "kv", fill_host_memory, direct=True)
