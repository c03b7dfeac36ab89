"""A request's own settings under NativeOffloadingConnector, and the events of tiers under both."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.v1.kv_offload.base import Medium
from world import HIT, MISS, World, keys

import lmcache_native as native
from lmcache_native.errors import InvalidArgument
from lmcache_native.integration.vllm.kv_events import ChunkEvents
from lmcache_native.integration.vllm.manager import ChunkGroup
from lmcache_native.integration.vllm.token_keys import RequestSettings, request_settings, tagged


@pytest.fixture
def world() -> Iterator[World]:
    found = World()
    yield found
    found.close()


def test_tags_share_nothing(world: World) -> None:
    world.stored(world.request(parameters={"lmcache.tag.user": "a"}), [1], [3])
    assert world.look(world.request(parameters={"lmcache.tag.user": "a"}), 1) == [HIT]
    for other in ({"lmcache.tag.user": "b"}, {"lmcache.tag.team": "a"}, {"lmcache.tag.user": "a", "lmcache.tag.b": ""}, {}, None):
        assert world.look(world.request(parameters=other), 1) == [MISS], other


def test_tags_are_told_apart_whatever_they_hold() -> None:
    namespace = bytes(32)
    tags = ((), (("a", "b"),), (("a", 'b"],["c'),), (("a", "b"), ("c", "")), (("ab", ""),))
    assert len({tagged(namespace, each) for each in tags}) == len(tags)
    assert tagged(namespace, ()) == namespace


def test_skip_save_loads_and_stores_nothing(world: World) -> None:
    quiet = world.request(parameters={"lmcache.skip_save": True})
    assert world.prepare_store(quiet, [1, 2]).keys_to_store == []
    assert world.look(world.request(), 1) == [MISS]
    world.stored(world.request(), [1], [3])
    assert world.look(quiet, 1) == [HIT]


def test_low_priority_leaves_first() -> None:
    world = World(host_bytes=4 << 20)
    writer, low = world.request(), world.request(parameters={"lmcache.priority": "low"})
    world.stored(writer, [1], [3])
    world.stored(low, [2], [4])
    for name in range(100, 1500, 20):
        world.stored(writer, list(range(name, name + 20)), list(range(20)))
        if world.store.stats()["evicted_chunks"]:
            break
    assert world.look(world.request(), 1, 2) == [HIT, MISS]
    world.close()


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("lmcache.priority", "urgent", "low, normal or high"),
        ("lmcache.priority", None, "low, normal or high"),
        ("lmcache.report", 2, "true or false"),
        ("lmcache.tag.a", ["b"], "text or a number"),
    ],
)
def test_a_wrong_value_is_named_and_the_request_goes_without(
    world: World, caplog: pytest.LogCaptureFixture, name: str, value: object, right: str
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        request_settings({name: value})
    assert str(refused.value) == f"{name}={value!r} (kv_transfer_params): must be {right}"
    with caplog.at_level(logging.WARNING):
        asked = world.request(parameters={name: value})
    assert name in caplog.text
    world.stored(world.request(), [1], [3])
    assert world.look(asked, 1) == [MISS]
    assert world.prepare_store(asked, [2]).keys_to_store == []
    world.manager.on_request_finished(asked)


def test_settings() -> None:
    found = request_settings({"lmcache.priority": "Low", "lmcache.report": "1", "lmcache.tag.n": 2})
    assert found == RequestSettings(tags=(("n", "2"),), priority=native.Priority.LOW, report=True)


def test_events_of_vllms_connector(tmp_path: Path) -> None:
    world = World(host_bytes=4 << 20, directory=tmp_path / "kv")
    world.manager.open(
        world.store, {"test": "1"}, [ChunkGroup(world.workers[0].slot_layouts[0].rank_bytes, windowed=False)], events=True
    )
    writer = world.request(parameters={"lmcache.tag.user": "a"})
    world.stored(writer, [1, 2], [3, 4])
    world.store.flush(30.0)
    told = [(event.keys, event.medium, event.removed) for event in world.manager.take_events()]
    assert told == [(keys(1, 2), Medium.CPU, False), (keys(1, 2), Medium.STORAGE, False)]
    for name in range(100, 1500, 20):
        world.stored(writer, list(range(name, name + 20)), list(range(20)))
    removed = {key for event in world.manager.take_events() if event.removed and event.medium == Medium.CPU for key in event.keys}
    assert set(keys(1, 2)) <= removed
    world.manager.reset_cache()
    assert list(world.manager.take_events()) == []
    world.close()


def test_events_of_a_chunk_that_leaves_while_it_is_stored_again(tmp_path: Path) -> None:
    world = World(host_bytes=4 << 20, directory=None)
    group = ChunkGroup(world.workers[0].slot_layouts[0].rank_bytes, windowed=False)
    world.manager.open(world.store, {"test": "1"}, [group], events=True)
    writer = world.request()
    world.stored(writer, [1], [3])
    list(world.manager.take_events())
    for name in range(100, 1500, 20):  # it goes
        world.stored(writer, list(range(name, name + 20)), list(range(20)))
    output = world.prepare_store(writer, [1])
    told = [(event.keys, event.removed) for event in world.manager.take_events()]
    assert any(removed and keys(1)[0] in gone for gone, removed in told)
    world.copy_stores(output.store_spec, [3])
    world.manager.complete_store(set(output.keys_to_store), writer)
    (event,) = world.manager.take_events()
    assert (event.keys, event.removed) == (keys(1), False)
    world.close()


def test_events_remember_no_chunk_that_was_never_published(tmp_path: Path) -> None:
    world = World(host_bytes=4 << 20, directory=None)
    group = ChunkGroup(world.workers[0].slot_layouts[0].rank_bytes, windowed=False)
    world.manager.open(world.store, {"test": "1"}, [group], events=True)
    writer = world.request()
    output = world.prepare_store(writer, [1, 2])
    world.manager.complete_store(set(output.keys_to_store), writer, success=False)
    assert list(world.manager.take_events()) == []
    assert world.manager._events is not None
    assert not world.manager._events._known
    world.close()


class Chunks:
    """A store and its events, chunk by chunk."""

    NAMESPACE = native.make_namespace("events=1\n")

    def __init__(self, directory: Path) -> None:
        self.store = native.Store(host_bytes=4 << 20, directory=directory, nvme_bytes=96 << 20, max_payload_bytes=60 << 10)
        self.events = ChunkEvents(self.store, 4)

    @classmethod
    def key(cls, name: int) -> bytes:
        return native.KeyDeriver(cls.NAMESPACE).derive(name.to_bytes(4, "big"))

    def put(self, name: int, parent: bytes | None = None) -> None:
        self.events.describe(self.key(name), parent, [name, 1, 2, 3], None)
        with self.store.reserve(self.NAMESPACE, [self.key(name)], 60 << 10) as lease:
            lease.mark_filled(0)
            assert lease.commit() == 1

    def evict(self) -> None:
        for filler in range(1000, 1080):
            with self.store.reserve(self.NAMESPACE, [self.key(filler)], 60 << 10) as lease:
                lease.mark_filled(0)
                lease.commit()

    def of(self, name: int) -> list[object]:
        return [event for event in self.events.take() if event.block_hashes == [self.key(name)]]


def test_events_follow_a_chunk(tmp_path: Path) -> None:
    chunks = Chunks(tmp_path / "kv")
    chunks.put(1, parent=chunks.key(7))
    chunks.store.flush(30.0)
    chunks.evict()
    known = {"parent_block_hash": chunks.key(7), "token_ids": [1, 1, 2, 3], "block_size": 4, "lora_id": None, "lora_name": None}
    assert chunks.of(1) == [
        BlockStored(block_hashes=[chunks.key(1)], medium="CPU", **known),
        BlockStored(block_hashes=[chunks.key(1)], medium="STORAGE", **known),
        BlockRemoved(block_hashes=[chunks.key(1)], medium="CPU"),
    ]
    with chunks.store.acquire(Chunks.NAMESPACE, [chunks.key(1)], 30.0):
        assert chunks.of(1) == [BlockStored(block_hashes=[chunks.key(1)], medium="CPU", **known)]
    chunks.store.erase(chunks.key(1))
    assert {type(event) for event in chunks.of(1)} == {BlockRemoved}
    assert chunks.events._payloads == {}
    chunks.put(2)
    chunks.events.cleared()
    chunks.store.clear()
    assert [type(event) for event in chunks.events.take()] == [AllBlocksCleared]
    chunks.store.close()


def test_of_what_an_earlier_process_left_the_hash_is_told(tmp_path: Path) -> None:
    before = Chunks(tmp_path / "kv")
    before.put(1)
    before.store.flush(30.0)
    before.store.close()
    after = Chunks(tmp_path / "kv")
    with after.store.acquire(Chunks.NAMESPACE, [after.key(1)], 30.0):
        (event,) = after.of(1)
    assert (event.medium, event.block_size, event.token_ids, event.parent_block_hash) == ("CPU", 0, [], None)
    after.store.close()
