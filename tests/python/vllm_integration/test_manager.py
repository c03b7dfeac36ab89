"""The scheduler's side: what becomes visible when, and that nothing stays held."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.v1.kv_offload.base import Medium, ReqContext, TierFilter, TierMatcher
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from world import HIT, MISS, PENDING, RETRY, World, keys

from lmcache_native.errors import Unavailable
from lmcache_native.integration.vllm import stats
from lmcache_native.integration.vllm.manager import NativeOffloadingManager


@pytest.fixture
def world() -> Iterator[World]:
    found = World()
    yield found
    found.close()


def test_visible_after_commit_only(world: World) -> None:
    writer, reader = world.request(), world.request()
    assert world.look(reader, 1) == [MISS]
    output = world.prepare_store(writer, [1])
    assert world.look(reader, 1) == [PENDING]
    world.copy_stores(output.store_spec, [3])
    assert world.look(reader, 1) == [PENDING]
    world.manager.complete_store(set(output.keys_to_store), writer)
    assert world.look(reader, 1) == [HIT]


def test_one_rank_without_its_word_publishes_nothing() -> None:
    world = World(ranks=2)
    writer = world.request()
    output = world.prepare_store(writer, [1])
    world.copy_stores(output.store_spec, [3], ranks=[0])
    world.manager.complete_store(set(output.keys_to_store), writer)  # vLLM says success
    assert world.look(writer, 1) == [MISS]
    world.close()


def test_what_is_there_or_under_way_is_not_stored_twice(world: World) -> None:
    writer = world.request()
    world.stored(writer, [1], [3])
    first = world.prepare_store(writer, [1, 2])
    assert first.keys_to_store == keys(2)
    second = world.prepare_store(world.request(), [1, 2, 3])
    assert second.keys_to_store == keys(3)
    assert second.evicted_keys == []


def test_none_when_nothing_fits() -> None:
    world = World(host_bytes=4 << 20)
    writer = world.request()
    fits = world.prepare_store(writer, list(range(2000)))
    assert 0 < len(fits.keys_to_store) < 2000
    assert fits.keys_to_store == keys(*range(len(fits.keys_to_store)))
    assert world.prepare_store(writer, [5000]) is None
    world.manager.complete_store(set(fits.keys_to_store), writer, success=False)
    world.close()


def test_store_completes_after_its_request(world: World) -> None:
    writer = world.request()
    output = world.prepare_store(writer, [1])
    world.manager.on_request_finished(writer)
    world.copy_stores(output.store_spec, [3])
    world.manager.complete_store(set(output.keys_to_store), writer)
    assert world.look(world.request(), 1) == [HIT]
    assert world.manager._states == {state for state in world.manager._states if not state.finished}


def test_failed_load_is_not_tried_again_by_the_same_request(world: World) -> None:
    world.stored(world.request(), [1], [3])
    reader = world.request()
    assert world.look(reader, 1) == [HIT]
    spec = world.manager.prepare_load(keys(1), reader)
    world.manager.loads_failed({spec.serial})
    world.manager.complete_load(set(keys(1)), reader)
    assert world.look(reader, 1) == [MISS]
    assert world.look(world.request(), 1) == [HIT]
    world.manager.loads_failed({spec.serial})  # known no more


def test_load_without_a_lease_is_empty_and_fails_in_the_worker(world: World) -> None:
    world.stored(world.request(), [1], [3])
    reader = world.request()
    assert world.look(reader, 1) == [HIT]
    world.store.clear()
    world.load(reader, [1], [8])
    assert world.workers[0].take_failed_blocks() == {8}


def test_leased_slots_survive_pressure() -> None:
    world = World(host_bytes=4 << 20)
    world.stored(world.request(), [1], [3])
    reader = world.request()
    assert world.look(reader, 1) == [HIT]
    spec = world.manager.prepare_load(keys(1), reader)
    other = world.request()
    for name in range(100, 1500, 20):
        world.stored(other, list(range(name, name + 20)), list(range(20)))
    assert world.store.stats()["evicted_chunks"] > 0
    again = world.manager.prepare_load(keys(1), reader)
    assert (again.offsets, again.generations) == (spec.offsets, spec.generations)
    world.close()


def test_reset_drops_all_and_publishes_nothing_of_before(world: World) -> None:
    writer, reader, finished = world.request(), world.request(), world.request()
    world.stored(writer, [1], [3])
    assert world.look(reader, 1) == [HIT]
    world.manager.prepare_load(keys(1), reader)
    output = world.prepare_store(writer, [2])
    world.manager.on_request_finished(finished)
    world.manager.reset_cache()
    assert world.look(reader, 1, 2) == [MISS, MISS]
    world.copy_stores(output.store_spec, [4])  # the worker knows nothing of the reset
    assert world.look(reader, 2) == [MISS]
    # vLLM never completes jobs of before the reset; those of new requests work.
    later = world.request()
    world.stored(later, [1, 2], [3, 4])
    assert world.look(later, 1, 2) == [HIT, HIT]


def test_tiers(tmp_path: Path) -> None:
    world = World(directory=tmp_path / "kv")
    world.stored(world.request(), [1], [3])
    host = world.request()
    assert world.look(host, 1) == [HIT]
    world.manager.prepare_load(keys(1), host)
    assert world.manager.get_load_source(keys(1)[0], host) == CacheHitSource.HOST
    world.store.flush(30.0)
    world.close()

    world = World(directory=tmp_path / "kv")
    no_storage = world.request(tiers=TierFilter((TierMatcher(medium=Medium.CPU),)))
    assert world.look(no_storage, 1) == [MISS]
    disk = world.request()
    assert world.look(disk, 1) == [RETRY]
    while world.look(disk, 1) == [RETRY]:
        pass
    assert world.look(disk, 1) == [HIT]
    assert world.manager.get_load_source(keys(1)[0], disk) == CacheHitSource.DISK
    world.close()


def adapter(folder: Path, weights: bytes) -> SimpleNamespace:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return SimpleNamespace(lora_name="a", lora_path=str(folder), lora_int_id=1, load_inplace=True)


def test_adapters_do_not_share(world: World, tmp_path: Path) -> None:
    first = adapter(tmp_path / "lora", b"\0" * 8 + b"one")
    world.stored(world.request(lora=first), [1], [3])
    assert world.look(world.request(lora=first), 1) == [HIT]
    assert world.look(world.request(), 1) == [MISS]
    other_weights = adapter(tmp_path / "lora", b"\0" * 8 + b"two")  # same name, same path
    assert world.look(world.request(lora=other_weights), 1) == [MISS]


def test_without_a_store_the_mistake_is_named() -> None:
    manager = NativeOffloadingManager()
    context = ReqContext(req_id="r")
    manager.on_new_request(context)
    with pytest.raises(Unavailable, match="NativeOffloadingConnector"):
        manager.lookup(keys(1)[0], context)
    assert manager.get_stats() is None
    manager.shutdown()


def test_stats_are_defined_metrics_and_count_what_changed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "INTERVAL_S", 0.0)
    defined = stats.definitions()
    world.stored(world.request(), [1, 2], [3, 4])
    reader = world.request()
    world.look(reader, 1, 2)
    world.load(reader, [1, 2], [5, 6])
    report = world.manager.get_stats().data["data"]
    assert set(report) <= set(defined)
    assert report["lmcache_native_hit_chunks"] == {("host",): 2, ("nvme",): 0}  # the first report has everything
    assert report["lmcache_native_host_used_bytes"][()] > 0
    again = world.manager.get_stats().data["data"]
    assert "lmcache_native_hit_chunks" not in again


def test_shutdown_ends_everything(world: World) -> None:
    reader = world.request()
    world.stored(reader, [1], [3])
    world.look(reader, 1)
    world.manager.prepare_load(keys(1), reader)
    world.manager.shutdown()
    assert world.store.closed
    world.manager.shutdown()


def test_after_a_reset_nothing_is_shared_with_another_life(world: World) -> None:
    """A reset may mean that weights are about to change in memory."""
    before = world.manager.namespace_hex
    live = world.request()
    world.manager.reset_cache()
    after = world.manager.namespace_hex
    assert after != before
    assert world.manager.prepare_store(keys(1), live).keys_to_store == []  # its KV may be of the old weights
    world.stored(world.request(), [1], [3])
    assert world.look(world.request(), 1) == [HIT]
    assert world.look(live, 1) == [MISS]
    world.manager.reset_cache()
    assert world.manager.namespace_hex not in (before, after)
    assert world.look(world.request(), 1) == [MISS]


def test_an_adapter_loaded_again_is_looked_at_again(world: World, tmp_path: Path) -> None:
    first = adapter(tmp_path / "lora", b"\0" * 8 + b"one")
    first.load_inplace = False
    world.stored(world.request(lora=first), [1], [3])
    again = adapter(tmp_path / "lora", b"\0" * 8 + b"two")
    again.load_inplace, again.lora_int_id = False, 2
    assert world.look(world.request(lora=again), 1) == [MISS]
    # Which weights vLLM has for the first one, it alone knows: those that it loaded, or these if it had to load them again.
    unknown = world.request(lora=first)
    assert world.look(unknown, 1) == [MISS]
    assert world.manager.prepare_store(keys(2), unknown).keys_to_store == []


def test_an_adapter_that_changes_under_a_request_is_neither_published_nor_loaded(world: World, tmp_path: Path) -> None:
    first = adapter(tmp_path / "lora", b"\0" * 8 + b"one")
    world.stored(world.request(lora=first), [1], [3])
    reader, writer, looked = world.request(lora=first), world.request(lora=first), world.request(lora=first)
    assert world.look(looked, 1) == [HIT]
    spec = world.manager.prepare_store(keys(2), writer).store_spec
    world.copy_stores(spec, [4])
    adapter(tmp_path / "lora", b"\0" * 8 + b"two")
    world.manager.complete_store(keys(2), writer)
    assert world.look(reader, 1) == [MISS]
    assert len(world.manager.prepare_load(keys(1), looked).offsets) == 0, "it must be recomputed"
    adapter(tmp_path / "lora", b"\0" * 8 + b"one")  # the old weights' namespace again: nothing was published in it
    assert world.look(world.request(lora=first), 1, 2) == [HIT, MISS]


def test_adapter_weights_that_cannot_be_read_share_with_no_other_load(world: World, tmp_path: Path) -> None:
    gone = adapter(tmp_path / "lora", b"\0" * 8 + b"one")
    gone.lora_path, gone.load_inplace = str(tmp_path / "removed"), False
    world.stored(world.request(lora=gone), [1], [3])
    assert world.look(world.request(lora=gone), 1) == [HIT]
    gone.lora_int_id = 2
    assert world.look(world.request(lora=gone), 1) == [MISS]
