"""One rank's side of LMCacheNativeConnector: when jobs are submitted, waited for, given up, and how failures are told."""

from __future__ import annotations

import random
import uuid
from array import array
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from token_parts import BLOCK, pages, prompt
from token_world import Engine, engines
from vllm.v1.request import RequestStatus

from lmcache_native.errors import DeadlineExceeded, Unavailable
from lmcache_native.integration.vllm import copier_client
from lmcache_native.integration.vllm.token_worker import TokenWorker
from lmcache_native.integration.vllm.transfer import TokenConnectorMetadata, TransferJob

Make = Callable[..., Engine]
NOTHING = TokenConnectorMetadata()


@pytest.fixture
def make() -> Iterator[Make]:
    with engines() as found:
        yield found


@pytest.fixture
def alone() -> Iterator[TokenWorker]:
    """No scheduler serves its engine."""
    worker = TokenWorker(
        pages(10),
        ["a", "b"],
        chunk_tokens=24,
        engine_id=f"test-{uuid.uuid4()}",
        rank=0,
        ranks=1,
        copy_threads=1,
        load_timeout_s=10.0,
        layerwise=False,
    )
    yield worker
    worker.shutdown()


def job(name: str, *, chunks: int = 2, slots: int | None = None, synchronous: bool = False) -> TransferJob:
    """All of `chunks` chunks of 24 tokens, in blocks 1, 2, ..."""
    slots = chunks if slots is None else slots
    blocks = -(-chunks * 24 // BLOCK)
    return TransferJob(
        id=int(name[1:]),
        request_id=name,
        begin=0,
        end=chunks * 24,
        chunks=array("I", range(chunks)),
        offsets=array("Q", range(slots)),
        generations=array("I", [1] * slots),
        first_block=0,
        block_ids=array("q", range(1, blocks + 1)),
        synchronous=synchronous,
    )


def run(worker: TokenWorker, meta: TokenConnectorMetadata) -> None:
    worker.begin_step(meta)
    worker.start_loads(meta)
    worker.end_step(meta)


# ---- without an arena ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("synchronous", [False, True])
def test_load_without_an_arena_fails_whole(alone: TokenWorker, monkeypatch: pytest.MonkeyPatch, synchronous: bool) -> None:
    monkeypatch.setattr(copier_client, "ATTACH_TIMEOUT_S", 0.01)
    run(alone, TokenConnectorMetadata(loads=[job("r1", synchronous=synchronous)]))
    assert alone.take_received() == (set() if synchronous else {"r1"})
    assert alone.take_failed_blocks() == {1, 2, 3}
    report = alone.take_report()
    assert report is not None
    assert (report.ended[1].failed, report.ended[1].ranks) == (True, 1)
    assert [(slots.load, list(slots.offsets)) for slots in report.not_started] == [(True, [0, 1])]
    assert (alone.take_received(), alone.take_failed_blocks(), alone.take_report()) == (set(), set(), None)


def test_store_without_an_arena_is_told_in_the_next_step(alone: TokenWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copier_client, "ATTACH_TIMEOUT_S", 0.01)
    run(alone, TokenConnectorMetadata(stores=[job("r1")]))
    assert alone.take_report() is None
    run(alone, TokenConnectorMetadata(flush={1}))
    report = alone.take_report()
    assert report is not None
    assert report.ended[1].failed
    assert not report.not_started[0].load
    assert alone.take_failed_blocks() == set()


def test_attaching_is_tried_again_later_and_quickly(alone: TokenWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []

    class Arena:
        @staticmethod
        def attach(_engine: str, _rank: int, _rank_bytes: int, timeout_s: float, *, replicated: bool) -> Any:
            tried.append(timeout_s)
            raise DeadlineExceeded("nobody serves it")

    monkeypatch.setattr(copier_client, "ArenaAttachment", Arena)
    for _ in range(3):
        with pytest.raises(Unavailable):
            alone.attached()
    assert tried == [copier_client.ATTACH_TIMEOUT_S]
    alone._attach_at_s = 0.0  # a minute later
    with pytest.raises(Unavailable):
        alone.attached()
    assert tried == [copier_client.ATTACH_TIMEOUT_S, copier_client.ATTACH_AGAIN_TIMEOUT_S]


def test_engine_whose_worker_cannot_attach_answers_from_its_own(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(chunk=24, ranks=2)
    tokens = prompt(1, 125)
    engine.answered(tokens)
    with monkeypatch.context() as patch:
        patch.setattr(engine.workers[1], "attached", unavailable)
        assert engine.answered(tokens) == 120  # offered, failed, computed
        assert engine.answered(prompt(2, 125)) == 0
    assert engine.stats["committed_chunks"] == 5
    assert engine.answered(tokens) == 120


def unavailable() -> Any:
    raise Unavailable("planted")


# ---- failures -----------------------------------------------------------------------------------------------------------


def test_load_without_slots_fails_and_says_which_blocks(alone: TokenWorker) -> None:
    run(alone, TokenConnectorMetadata(loads=[job("r1", slots=0)]))
    assert alone.take_received() == {"r1"}
    assert alone.take_failed_blocks() == {1, 2, 3}


@pytest.mark.parametrize("config", [{}, {"async_loading": False}, {"async_loading": False, "layerwise": True}])
def test_hit_that_cannot_be_leased_any_more_is_computed(
    make: Make, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    engine = make(chunk=24, step_tokens=200, **config)
    tokens = prompt(3, 125)
    engine.answered(tokens)
    lease = engine.scheduler._lease

    def cleared_in_between(state: Any, keys: Any, chunks: Any) -> Any:
        engine.scheduler.store.clear()
        return lease(state, keys, chunks)

    with monkeypatch.context() as patch:
        patch.setattr(engine.scheduler, "_lease", cleared_in_between)
        if not engine.config.async_loading:
            mark_what_a_failed_load_leaves(engine, patch)
        assert engine.answered(tokens) == 120
    engine.drain()
    if not engine.config.async_loading:  # what was computed on is not trusted: the next request stores it
        assert engine.answered(tokens) == 0
    assert engine.answered(tokens) == 120


def mark_what_a_failed_load_leaves(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """What is computed in the step of a failed synchronous load is garbage, and the engine's check knows."""
    worker = engine.workers[0]
    start = worker.start_loads

    def starting(meta: TokenConnectorMetadata) -> None:
        start(meta)
        engine._garbage |= worker._failed_blocks

    patch.setattr(worker, "start_loads", starting)


@pytest.mark.parametrize("config", [{}, {"async_loading": False}, {"async_loading": False, "layerwise": True}])
def test_slot_that_changed_fails_its_own_blocks(make: Make, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]) -> None:
    """The copier itself finds the wrong generation of chunk 2: tokens 48 to 72."""
    engine = make(chunk=24, step_tokens=200, **config)
    tokens = prompt(4, 125)
    engine.answered(tokens)
    found: list[set[int]] = []
    scheduler, worker = engine.scheduler, engine.workers[0]
    build, take = scheduler.build_meta, worker.take_failed_blocks

    def wrong(output: Any) -> TokenConnectorMetadata:
        meta = build(output)
        for load in meta.loads:
            load.generations[2] += 1
            if load.synchronous:
                engine._garbage.update(load.block_ids[3:5])
        return meta

    def taking() -> set[int]:
        found.append(take())
        return found[-1]

    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "build_meta", wrong)
        patch.setattr(worker, "take_failed_blocks", taking)
        name = engine.ask(tokens, max_tokens=2)
        engine.forget_blocks()
        while engine.requests[name].status != RequestStatus.RUNNING or not any(found):
            engine.step()
    blocks = engine.blocks[name]
    assert [failed for failed in found if failed] == [set(blocks[3:5])]
    engine.drain()


def test_failure_of_no_chunk_in_particular_is_one_of_all(make: Make) -> None:
    engine = make(chunk=24)
    tokens = prompt(18, 125)
    engine.answered(tokens)
    engine.forget_blocks()
    held = engine.hold("nothing")
    real = held.poll

    def poll() -> list[Any]:
        return [SimpleNamespace(id=done.id, ok=False, bytes=0, seconds=0.0, message="planted", failed_items=[]) for done in real()]

    held.poll = poll  # type: ignore[method-assign]
    name = engine.ask(tokens)
    while engine.requests[name].status != RequestStatus.RUNNING:
        engine.step()
    assert engine.requests[name].num_computed_tokens <= engine.step_tokens  # from the first token on
    held.poll = real  # type: ignore[method-assign]


def test_block_that_does_not_exist_fails_the_job(make: Make) -> None:
    engine = make(chunk=24)
    engine.answered(prompt(5, 60))
    worker = engine.workers[0]
    found = job("r99")
    found.block_ids[1] = 1000
    run(worker, TokenConnectorMetadata(loads=[found]))
    assert worker.take_received() == {"r99"}
    assert worker.take_failed_blocks() == {1, 3, 1000}
    report = worker.take_report()
    assert report is not None
    assert report.ended[99].failed


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("failing", [[0], [1], [0, 1]])
def test_rank_that_fails_to_load_is_recomputed(make: Make, failing: list[int], ahead: bool) -> None:
    engine = make(chunk=24, ranks=2, ahead=ahead)
    tokens = prompt(6, 125)
    engine.answered(tokens)
    engine.fail_loads(random.Random(1), 1.0, failing)
    for _ in range(3):
        assert engine.answered(tokens) == 120  # its forward passes check what they read
    assert engine.stats["committed_chunks"] == 5


@pytest.mark.parametrize("slow", [0, 1])
def test_ranks_that_fail_in_different_steps(make: Make, slow: int) -> None:
    engine = make(chunk=24, ranks=2)
    tokens = prompt(7, 125)
    engine.answered(tokens)
    engine.forget_blocks()
    engine.fail_loads(random.Random(2), 1.0)
    held = engine.hold("load", rank=slow)
    name = engine.ask(tokens)
    engine.step()
    engine.workers[1 - slow].wait_ended(list(engine.scheduler._jobs))
    engine.step()
    assert engine.requests[name].status == RequestStatus.WAITING_FOR_REMOTE_KVS
    assert engine.requests[name].num_computed_tokens < 120  # one rank has failed
    held.end()
    engine.drain()


def test_rank_that_fails_to_store_is_not_published(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(chunk=24, ranks=2)
    tokens = prompt(8, 125)
    with monkeypatch.context() as patch:
        patch.setattr(engine.workers[1], "attached", unavailable)
        engine.answered(tokens)
    assert engine.stats["committed_chunks"] == 0
    assert engine.answered(tokens) == 0
    assert engine.answered(tokens) == 120


# ---- late loads ---------------------------------------------------------------------------------------------------------


def test_late_load_is_cancelled_once(make: Make) -> None:
    engine = make(chunk=24, load_timeout_s=0.002)
    tokens = prompt(9, 125)
    engine.answered(tokens)
    engine.fail_loads(random.Random(3), 1.0)
    held = engine.hold("load")
    assert engine.answered(tokens) == 120
    assert len(held.cancelled) == 1
    held.end()


def test_load_in_time_is_not_cancelled(make: Make) -> None:
    engine = make(chunk=24, load_timeout_s=60.0)
    tokens = prompt(10, 125)
    engine.answered(tokens)
    held = engine.hold("load", random.Random(4))
    assert engine.answered(tokens) == 120
    assert held.cancelled == []


@pytest.mark.parametrize("layerwise", [False, True])
def test_late_load_within_the_step_is_cancelled_and_waited_for(make: Make, layerwise: bool) -> None:
    engine = make(chunk=24, async_loading=False, layerwise=layerwise, load_timeout_s=0.001, step_tokens=200)
    tokens = prompt(11, 125)
    engine.answered(tokens)
    held = engine.hold("load")
    held.late = True
    engine.fail_loads(random.Random(5), 1.0)
    assert engine.answered(tokens) == 120
    assert len(held.cancelled) == 1
    held.end()


# ---- order --------------------------------------------------------------------------------------------------------------


def test_stores_are_submitted_when_the_next_step_begins(make: Make) -> None:
    engine = make(chunk=24)
    held = engine.hold("store")
    engine.ask(prompt(12, 30))
    step = engine.step()
    assert len(step.meta.stores) == 1
    assert not held.held
    engine.workers[0].begin_step(NOTHING)
    assert list(held.held) == [step.meta.stores[0].id]


def test_flush_waits_for_its_jobs_only(make: Make) -> None:
    engine = make(chunk=24)
    held = engine.hold("store")
    engine.ask(prompt(13, 30))
    engine.ask(prompt(14, 30))
    first, second = (store.id for store in engine.step().meta.stores)
    engine.workers[0].begin_step(TokenConnectorMetadata(flush={first, 12345}))
    assert list(held.held) == [second]


@pytest.mark.parametrize("config", [{"async_loading": False}, {"async_loading": False, "layerwise": True}])
def test_load_within_the_step(make: Make, config: dict[str, Any]) -> None:
    engine = make(chunk=24, ranks=2, **config)
    tokens = prompt(15, 125)
    engine.answered(tokens)
    assert engine.answered(tokens) == 120


def test_each_layer_waits_for_itself(make: Make) -> None:
    """Layers beyond those with memory of their own share the last one's; names that are not ours are not waited for."""
    engine = make(chunk=24, async_loading=False, layerwise=True)
    tokens = prompt(16, 125)
    engine.answered(tokens)
    waited: list[int] = []
    worker = engine.workers[0]
    held = engine.hold("nothing")
    real = worker.attached()._copier  # type: ignore[attr-defined]

    def wait_layers(job_id: int, layers: int, timeout_s: float, stream: int) -> None:
        waited.append(layers)
        real.wait_layers(job_id, layers, timeout_s=timeout_s, stream=stream)

    held.wait_layers = wait_layers  # type: ignore[attr-defined]
    worker.wait_for_layer("a")
    assert waited == []
    worker._layer_of["c"] = 1
    worker_start = worker.start_loads

    def starting(meta: TokenConnectorMetadata) -> None:
        worker_start(meta)
        worker.wait_for_layer("c")
        worker.wait_for_layer("of another cache")

    worker.start_loads = starting  # type: ignore[method-assign]
    engine.answered(tokens)
    assert waited[:3] == [2, 1, 2]
    assert set(waited) == {1, 2}
    del worker.start_loads  # type: ignore[method-assign]


def test_shutdown_waits_for_jobs_and_can_be_repeated() -> None:
    engine = Engine(chunk=24)
    tokens = prompt(17, 125)
    engine.answered(tokens)
    engine.forget_blocks()
    engine.ask(tokens)
    engine.step()
    worker = engine.workers[0]
    worker.shutdown()
    worker.shutdown()
    worker.begin_step(TokenConnectorMetadata(flush={1, 2, 3}))
    assert (worker.take_received(), worker.take_failed_blocks(), worker._loads, worker._deferred) == (set(), set(), {}, [])
    engine.close()
