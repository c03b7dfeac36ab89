"""Several KV cache groups in one job: which bytes go where, what is published, and what a window's lookups cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler
from world import HIT, MISS, PENDING, RETRY, World, all_keys, keys

from lmcache_native import KeyDeriver
from lmcache_native.integration.vllm import manager as manager_module
from lmcache_native.integration.vllm.slots import SlotLoadStoreSpec

# Two windows and a full group over the same memory, of other numbers of layers; the last one's layers have other page sizes.
GROUPS = ((4096, 4096), (4096,), (4096, 6144, 1024))
FULL, WINDOWS = 2, (0, 1)
HEADER_BYTES = 4096


@pytest.fixture
def world() -> Iterator[World]:
    found = World(groups=GROUPS, windowed=WINDOWS)
    yield found
    found.close()


def group_pages(world: World, blocks: dict[int, list[int]]) -> dict[int, list[bytes]]:
    return {group: world.group_pages(group, of) for group, of in blocks.items()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_load_of_all_groups(ranks: int) -> None:
    world = World(groups=GROUPS, windowed=WINDOWS, ranks=ranks)
    names = {0: [1], 1: [1, 2], FULL: [1, 2, 3]}
    blocks = {0: [3], 1: [9, 4], FULL: [1, 2, 5]}
    stored = group_pages(world, blocks)
    world.stored(world.request(), names, blocks)
    world.wipe([3, 9, 4, 1, 2, 5])
    reader = world.request()
    for group, of_group in names.items():
        assert world.look(reader, *of_group, group=group) == [HIT] * len(of_group)
    target = {0: [20], 1: [10, 11], FULL: [12, 13, 14]}
    world.load(reader, names, target)
    assert group_pages(world, target) == stored
    # A record has its own group's bytes only.
    images = [HEADER_BYTES + ranks * -(-sum(pages) // 4096) * 4096 for pages in GROUPS]
    assert world.store.stats()["host_used_bytes"] == images[0] + 2 * images[1] + 3 * images[2]
    world.close()


def test_the_same_block_hash_in_other_groups_is_another_chunk(world: World) -> None:
    world.stored(world.request(), {FULL: [1]}, {FULL: [3]})
    reader = world.request()
    assert [world.look(reader, 1, group=group) for group in range(3)] == [[MISS], [MISS], [HIT]]


def test_groups_that_start_inside_their_chunks() -> None:
    world = World(groups=GROUPS, windowed=WINDOWS, per_chunk=4)
    names = {0: [2], 1: [1, 2], FULL: [1, 2]}
    blocks = {0: [3, 9, 4, 2], 1: [8, 5, 6, 0, 1, 7, 10, 11], FULL: [12, 13, 14, 15, 16, 17, 18, 19]}
    stored = group_pages(world, blocks)
    world.stored(world.request(), names, blocks)
    reader = world.request()
    for group, of_group in names.items():
        world.look(reader, *of_group, group=group)
    # The request's blocks from number 6, 3 and 0 on; the last chunk of the full group in part.
    target = {0: [20, 21], 1: [22, 23, 12, 13, 14], FULL: [1, 2, 3, 4, 5, 6]}
    untouched = world.pages(0, [15, 16])
    world.load(reader, names, target, first_block={0: 6, 1: 3})
    assert group_pages(world, target) == {0: stored[0][2:], 1: stored[1][3:], FULL: stored[FULL][:6]}
    assert world.pages(0, [15, 16]) == untouched
    world.close()


def test_a_window_that_moved_on_publishes_whole_chunks_only() -> None:
    """The engine gave up the first chunk's first block before it was offered."""
    world = World(groups=GROUPS, windowed=WINDOWS, per_chunk=2)
    writer = world.request()
    output = world.prepare_store(writer, {0: [1, 2], FULL: [1]})
    world.copy_stores(output.store_spec, {0: [3, 9, 4], FULL: [6, 7]}, first={0: 1})
    world.manager.not_started(world.workers[0].take_not_started())
    world.manager.complete_store(set(output.keys_to_store), writer)
    reader = world.request()
    assert world.look(reader, 1, 2, group=0) == [MISS, HIT]
    assert world.look(reader, 1, group=FULL) == [HIT]
    stored = world.group_pages(0, [9, 4])
    world.load(reader, {0: [2]}, {0: [20, 21]}, first_block={0: 2})
    assert world.group_pages(0, [20, 21]) == stored
    assert world.store.stats()["host_quarantined_slots"] == 0
    world.close()


@pytest.mark.parametrize(("left", "first"), [([3, 9, 4], 0), ([3, 9], 1)])
def test_blocks_missing_where_it_cannot_be_told_publish_nothing_of_their_group(left: list[int], first: int) -> None:
    world = World(groups=GROUPS, windowed=WINDOWS, per_chunk=2)
    writer = world.request()
    output = world.prepare_store(writer, {0: [1, 2], FULL: [1]})
    world.copy_stores(output.store_spec, {0: left, FULL: [6, 7]}, first={0: first})
    world.manager.not_started(world.workers[0].take_not_started())
    world.manager.complete_store(set(output.keys_to_store), writer)
    assert world.look(writer, 1, 2, group=0) == [MISS, MISS]
    assert world.look(writer, 1, group=FULL) == [HIT]
    assert world.store.stats()["host_quarantined_slots"] == 0
    world.close()


def test_a_part_that_cannot_start_fails_the_load_and_gives_its_slots_back(world: World) -> None:
    names, blocks = {0: [1], 1: [1], FULL: [1]}, {0: [3], 1: [9], FULL: [4]}
    world.stored(world.request(), names, blocks)
    reader = world.request()
    for group in range(3):
        world.look(reader, 1, group=group)
    world.load(reader, names, {0: [20], 1: [99], FULL: [21]})
    worker = world.workers[0]
    assert len(worker.take_failed_jobs()) == len(worker.take_failed_serials()) == 1
    (job,) = worker.take_not_started()
    assert (job.load, len(job.slots)) == (True, 1)
    world.manager.not_started([job])
    world.store.clear()
    assert world.store.stats()["host_quarantined_slots"] == 0


def test_a_part_that_cannot_start_leaves_the_other_groups_of_a_store(world: World) -> None:
    writer = world.request()
    output = world.prepare_store(writer, {0: [1], FULL: [1]})
    world.copy_stores(output.store_spec, {0: [99], FULL: [4]})
    world.manager.not_started(world.workers[0].take_not_started())
    world.manager.complete_store(set(output.keys_to_store), writer)
    assert world.look(writer, 1, group=0) == [MISS]
    assert world.look(writer, 1, group=FULL) == [HIT]


def test_a_failed_chunk_is_numbered_within_its_job(world: World) -> None:
    """The slots of the first group's chunk, and of the third group's second, have other owners by now."""
    names, blocks = {0: [1], 1: [1, 2], FULL: [1, 2]}, {0: [3], 1: [9, 4], FULL: [1, 2]}
    world.stored(world.request(), names, blocks)
    reader = world.request()
    for group, of_group in names.items():
        world.look(reader, *of_group, group=group)

    def stale(spec: SlotLoadStoreSpec) -> SlotLoadStoreSpec:
        spec.generations[0] += 1
        spec.generations[4] += 1
        return spec

    world.load(reader, names, {0: [20], 1: [21, 22], FULL: [23, 12]}, change=stale)
    worker = world.workers[0]
    assert worker.take_failed_blocks() == {20, 12}
    assert len(worker.take_failed_jobs()) == 1


def test_a_chunk_that_is_gone_is_a_load_that_fails(world: World) -> None:
    """vLLM may ask for one more chunk of a window than it has looked up."""
    names, blocks = {0: [2], FULL: [1, 2]}, {0: [3], FULL: [1, 2]}
    world.stored(world.request(), names, blocks)
    reader = world.request()
    world.look(reader, 2, group=0)
    world.look(reader, 1, 2, group=FULL)
    before = world.pages(0, [20, 21, 22, 23])
    world.load(reader, {0: [1, 2], FULL: [1, 2]}, {0: [20, 21], FULL: [22, 23]})
    assert len(world.workers[0].take_failed_jobs()) == 1
    assert world.pages(0, [20, 21, 22, 23]) == before


def test_nothing_to_copy_is_a_job_that_ends(world: World) -> None:
    reader = world.request()
    world.stored(world.request(), {FULL: [1]}, {FULL: [3]})
    world.look(reader, 1, group=FULL)
    world.load(reader, {}, {})
    assert world.workers[0].take_failed_jobs() == set()


def test_what_does_not_fit_of_a_later_group_is_left_out() -> None:
    world = World(host_bytes=4 << 20, groups=GROUPS, windowed=WINDOWS)
    writer = world.request()
    output = world.prepare_store(writer, {0: list(range(200)), FULL: list(range(1000))})
    chunks = output.store_spec.group_chunks
    assert (chunks[0], chunks[1]) == (200, 0)
    assert 0 < chunks[FULL] < 1000
    assert output.keys_to_store == all_keys({0: list(range(200)), FULL: list(range(chunks[FULL]))})
    assert world.prepare_store(writer, {1: [5], FULL: [2000]}) is None
    world.close()


# ---- windows on NVMe ----------------------------------------------------------------------------------------------------------


def search(world: World, context: Any, names: list[int], window: int, group: int) -> int | None:
    """vLLM's own, from the end."""
    scheduler = SimpleNamespace(manager=world.manager)
    found: int | None = OffloadingConnectorScheduler._sliding_window_lookup(scheduler, keys(*names, group=group), window, context)
    return found


def found_at_last(world: World, context: Any, names: list[int], window: int, group: int) -> int:
    """Asks again while promotions are under way."""
    while (found := search(world, context, names, window, group)) is None:
        pass
    return found


def stored_on_nvme(directory: Path, group: int) -> World:
    """Twenty chunks of one group, on NVMe alone."""
    world = World(groups=GROUPS, windowed=WINDOWS, directory=directory)
    for first in range(0, 20, 10):
        world.stored(world.request(), {group: list(range(first, first + 10))}, {group: list(range(10))})
    world.store.flush(30.0)
    world.close()
    return World(groups=GROUPS, windowed=WINDOWS, directory=directory)


def test_a_search_for_a_window_promotes_no_more_than_the_window(tmp_path: Path) -> None:
    world = stored_on_nvme(tmp_path / "kv", group=0)
    reader = world.request()
    assert world.look(reader, 0, group=FULL) == [MISS]
    assert search(world, reader, list(range(20)), 3, group=0) is None
    assert found_at_last(world, reader, list(range(20)), 3, group=0) == 20
    assert world.store.stats()["promoted_chunks"] == 3
    world.close()


def test_a_search_goes_on_past_a_chunk_that_is_gone(tmp_path: Path) -> None:
    world = stored_on_nvme(tmp_path / "kv", group=0)
    reader = world.request()
    (chunk,) = KeyDeriver(bytes.fromhex(world.manager.namespace_hex)).derive_all(keys(18, group=0))
    assert world.store.erase(chunk)
    assert found_at_last(world, reader, list(range(20)), 3, group=0) == 18
    world.close()


def test_a_prefix_is_promoted_whole(tmp_path: Path) -> None:
    world = stored_on_nvme(tmp_path / "kv", group=FULL)
    reader = world.request()
    assert world.look(reader, *range(20), group=FULL) == [RETRY] * 20
    world.close()


def test_what_is_being_stored_is_pending_in_all_groups(world: World) -> None:
    writer = world.request()
    world.prepare_store(writer, {0: [1], FULL: [1]})
    assert [world.look(world.request(), 1, group=group) for group in (0, FULL)] == [[PENDING], [PENDING]]


def test_what_a_request_found_is_let_go_when_it_loads_nothing(world: World) -> None:
    """The other groups' chunks miss, say."""
    world.stored(world.request(), {FULL: [1, 2]}, {FULL: [3, 4]})
    reader = world.request()
    assert world.look(reader, 1, 2, group=FULL) == [HIT, HIT]
    assert world.store.stats()["requests"] == 1
    world.manager.nothing_to_load(reader)
    assert world.store.stats()["requests"] == 0
    assert world.look(reader, 1, group=FULL) == [HIT], "after a preemption, say"


def test_a_request_whose_load_failed_looks_nothing_up_again(world: World) -> None:
    world.stored(world.request(), {FULL: [1]}, {FULL: [3]})
    reader = world.request()
    world.look(reader, 1, group=FULL)
    world.load(reader, {FULL: [1]}, {FULL: [99]})
    world.manager.complete_load(set(), reader)
    failed = world.request()
    world.look(failed, 1, group=FULL)
    spec = world.manager.prepare_load(all_keys({FULL: [1]}), failed)
    world.manager.loads_failed([spec.serial])
    world.manager.complete_load(set(all_keys({FULL: [1]})), failed)
    world.manager.nothing_to_load(failed)
    assert world.look(failed, 1, group=FULL) == [MISS]


def test_gaps_that_windows_leave_are_no_errors() -> None:
    world = World(groups=GROUPS, windowed=WINDOWS, per_chunk=2)
    ended: list[bool] = []
    noted = world.manager.noted.store_ended
    world.manager.noted.store_ended = lambda tokens, seconds, *, failed: (  # type: ignore[method-assign]
        ended.append(failed),
        noted(tokens, seconds, failed=failed),
    )
    writer = world.request()
    output = world.prepare_store(writer, {0: [1, 2], FULL: [1]})
    world.copy_stores(output.store_spec, {0: [3, 9, 4], FULL: [6, 7]}, first={0: 1})
    world.manager.not_started(world.workers[0].take_not_started())
    world.manager.complete_store(set(output.keys_to_store), writer)
    output = world.prepare_store(writer, {0: [5], FULL: [5]})
    world.copy_stores(output.store_spec, {0: [3, 99], FULL: [6, 7]})  # no such block
    world.manager.not_started(world.workers[0].take_not_started())
    world.manager.complete_store(set(output.keys_to_store), writer)
    assert ended == [False, True]
    assert not world.manager._gaps
    world.close()


def test_promotions_of_a_request_have_one_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever windows it goes on to: afterwards what is on NVMe alone is a miss."""
    world = stored_on_nvme(tmp_path / "kv", group=FULL)
    reader = world.request()
    now = [time.monotonic()]
    monkeypatch.setattr(manager_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    state = reader.get_state(manager_module._RequestState)
    state.lookup = lambda _key: manager_module._RETRY  # a device that does not answer
    assert world.look(reader, 3, group=FULL) == [RETRY]
    now[0] += 9.0
    assert world.look(reader, 5, group=FULL) == [RETRY]
    now[0] += 2.0
    assert world.look(reader, *range(20), group=FULL) == [MISS] * 20
    assert world.store.stats()["promoted_chunks"] == 0
    world.manager.nothing_to_load(reader)
    assert world.look(reader, 3, group=FULL) == [RETRY], "the next time anew"
    world.close()
