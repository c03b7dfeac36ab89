"""One rank's jobs: which bytes go where, and how failures are told."""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.v1.kv_offload.base import GPULoadStoreSpec
from world import HIT, MISS, PENDING, World, caches

from lmcache_native import PagedKvLayout, SlotLayout
from lmcache_native.errors import Unsupported
from lmcache_native.integration.vllm import copier_client
from lmcache_native.integration.vllm.layout import PagedMemory
from lmcache_native.integration.vllm.slots import SlotLoadStoreSpec
from lmcache_native.integration.vllm.worker import NativeOffloadingWorker, chunk_spans


@pytest.fixture
def world() -> Iterator[World]:
    found = World()
    yield found
    found.close()


@pytest.mark.parametrize(
    ("first_block", "blocks", "per_chunk", "expected"),
    [
        (0, 3, 1, ([0, 0, 0], [1, 1, 1], [0, 1, 2])),
        (5, 2, 1, ([0, 0], [1, 1], [0, 1])),
        (0, 4, 2, ([0, 0], [2, 2], [0, 2])),
        (1, 3, 2, ([1, 0], [1, 2], [0, 1])),
        (7, 6, 4, ([3, 0, 0], [1, 4, 1], [0, 1, 5])),
        (9, 2, 4, ([1], [2], [0])),
        (3, 0, 4, ([], [], [])),
    ],
)
def test_chunk_spans(first_block: int, blocks: int, per_chunk: int, expected: tuple[list[int], list[int], list[int]]) -> None:
    first, counts, begin = chunk_spans(first_block, blocks, per_chunk)
    assert (first.tolist(), counts.tolist(), begin.tolist()) == expected


def test_round_trip_of_each_rank() -> None:
    world = World(ranks=2)
    stored = [world.pages(rank, [3, 9, 4]) for rank in range(2)]
    world.stored(world.request(), [1, 2, 3], [3, 9, 4])
    world.wipe([3, 9, 4])
    reader = world.request()
    assert world.look(reader, 1, 2, 3) == [HIT, HIT, HIT]
    world.load(reader, [1, 2, 3], [20, 1, 7])
    assert [world.pages(rank, [20, 1, 7]) for rank in range(2)] == stored
    assert stored[0] != stored[1]
    world.close()


def test_load_that_starts_inside_a_chunk() -> None:
    world = World(per_chunk=4)
    blocks = [3, 9, 4, 2, 8, 5, 6, 0]
    stored = world.pages(0, blocks)
    world.stored(world.request(), [1, 2], blocks)
    reader = world.request()
    assert world.look(reader, 1, 2) == [HIT, HIT]
    untouched = world.pages(0, [10])
    world.load(reader, [1, 2], [11, 12, 13, 14, 15], first_block=3)
    assert world.pages(0, [11, 12, 13, 14, 15]) == stored[3:]
    assert world.pages(0, [10]) == untouched
    world.close()


def test_stale_slot_fails_its_blocks_only(world: World) -> None:
    world.stored(world.request(), [1, 2, 3], [3, 9, 4])
    reader = world.request()
    world.look(reader, 1, 2, 3)
    before = world.pages(0, [21])

    def stale(spec: SlotLoadStoreSpec) -> SlotLoadStoreSpec:
        generations = array("I", spec.generations)
        generations[1] += 1
        return SlotLoadStoreSpec(spec.serial, spec.offsets, generations, spec.group_chunks)

    world.load(reader, [1, 2, 3], [20, 21, 22], change=stale)
    worker = world.workers[0]
    assert worker.take_failed_blocks() == {21}
    assert len(worker.take_failed_serials()) == 1
    assert worker.take_failed_blocks() == set()
    assert world.pages(0, [21]) == before
    assert world.pages(0, [20, 22]) == world.pages(0, [3, 4])


def test_block_out_of_range_fails_the_load_and_gives_the_slots_back(world: World) -> None:
    world.stored(world.request(), [1, 2], [3, 9])
    reader = world.request()
    world.look(reader, 1, 2)
    world.load(reader, [1, 2], [20, 99])
    worker = world.workers[0]
    assert worker.take_failed_blocks() == {20, 99}
    (job,) = worker.take_not_started()
    assert job.load
    assert len(job.slots) == 2


def test_store_that_cannot_start_publishes_nothing_and_gives_the_slots_back(world: World) -> None:
    writer = world.request()
    output = world.prepare_store(writer, [1, 2])
    world.copy_stores(output.store_spec, [3])  # one block for two chunks
    world.manager.not_started(pickle.loads(pickle.dumps(world.workers[0].take_not_started())))
    world.manager.complete_store(set(output.keys_to_store), writer)
    assert world.look(writer, 1, 2) == [MISS, MISS]
    assert world.store.stats()["host_quarantined_slots"] == 0


def test_wait_covers_jobs_under_way(world: World) -> None:
    writer = world.request()
    output = world.prepare_store(writer, [1])
    worker = world.workers[0]
    worker.submit_store(77, GPULoadStoreSpec([5], (1,), (0,)), output.store_spec)
    worker.wait({77})
    assert [result.job_id for result in worker.get_finished()] == [77]
    worker.wait({77, 78})  # ended and unknown ones count as ended
    assert world.look(writer, 1) == [PENDING]  # copied, not committed
    world.manager.complete_store(set(output.keys_to_store), writer)
    assert world.look(writer, 1) == [HIT]


def test_no_scheduler_to_attach_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads fail (vLLM recomputes), stores go nowhere, and only the first job waits."""
    waits: list[float] = []
    attach = copier_client.ArenaAttachment.attach

    def counting(engine_id: str, rank: int, rank_bytes: int, timeout_s: float, replicated: bool) -> Any:
        waits.append(timeout_s)
        return attach(engine_id, rank, rank_bytes, timeout_s, replicated)

    monkeypatch.setattr(copier_client, "ATTACH_TIMEOUT_S", 0.01)
    monkeypatch.setattr(copier_client, "ArenaAttachment", type("Counting", (), {"attach": staticmethod(counting)}))
    lonely = NativeOffloadingWorker(caches(0), engine_id="nobody-serves-this", rank=0, ranks=1, blocks_per_chunk=1, copy_threads=1)
    spec = SlotLoadStoreSpec(5, array("Q", [0]), array("I", [1]), (1,))
    assert lonely.submit_load(1, spec, GPULoadStoreSpec([4], (1,), (0,)))
    assert lonely.submit_store(2, GPULoadStoreSpec([4], (1,), (0,)), spec)
    assert [(result.job_id, result.success) for result in lonely.get_finished()] == [(1, True), (2, True)]
    assert lonely.take_failed_blocks() == {4}
    assert lonely.take_failed_serials() == {5}
    assert [job.load for job in lonely.take_not_started()] == [True, False]
    assert waits == [0.01]


def test_what_cannot_be_measured_when_memory_is_registered_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(copier_client.logger, "warning", lambda text, *values: warnings.append(text % values))
    paged = PagedKvLayout.opaque([1 << 20], 4, 4096, 4096)
    copier_client.CopierClient(
        engine_id="nobody",
        rank=3,
        ranks=4,
        device_type="cuda",
        device_index=1 << 20,
        paged_layout=lambda: paged,
        slot_layout=SlotLayout.make(paged, 1),
        copy_threads=1,
        owner=None,
    )
    assert len(warnings) == 1
    assert warnings[0].startswith("rank 3: copies were not measured: ")


def test_layers_on_different_devices_are_refused() -> None:
    apart = caches(0)
    apart.tensors[1].tensor = apart.tensors[1].tensor.to("meta")
    with pytest.raises(Unsupported, match=r"different \(blocks, device\)"):
        PagedMemory.of_groups(apart)


def test_specs_are_small_and_pickle() -> None:
    spec = SlotLoadStoreSpec(3, array("Q", range(100)), array("I", range(100)), (100,))
    data = pickle.dumps(spec)
    again = pickle.loads(data)
    assert (again.serial, again.offsets, again.generations) == (spec.serial, spec.offsets, spec.generations)
    assert again.group_chunks == (100,)
    assert len(data) < 100 * 12 + 300
