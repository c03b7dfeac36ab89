"""T1, T2 and T3 of token_scheduler.py, with copies that are under way for as long as they can be."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from token_parts import HeldCopier, prompt
from token_world import Engine, engines, in_store
from vllm.lora.request import LoRARequest
from vllm.v1.request import RequestStatus

Make = Callable[..., Engine]
LOADING, WAITING, RUNNING = RequestStatus.WAITING_FOR_REMOTE_KVS, RequestStatus.WAITING, RequestStatus.RUNNING


@pytest.fixture
def make() -> Iterator[Make]:
    with engines() as found:
        yield found


# ---- T1: no block is written under a store ------------------------------------------------------------------------------


def check_stored(engine: Engine, tokens: list[int], held: HeldCopier) -> None:
    """What is in the store can be loaded, and is right."""
    held.end()
    engine.drain()
    assert engine.answered(tokens) == (len(tokens) - 1) // 24 * 24


@pytest.mark.parametrize("ahead", [False, True])
def test_finished_requests_block_is_handed_out_again(make: Make, ahead: bool) -> None:
    engine = make(chunk=24, blocks=10, ahead=ahead)
    first, second = prompt(30, 125), prompt(31, 125)
    held = engine.hold("store")
    names = [engine.ask(first), engine.ask(second)]
    while names[0] in engine.requests:
        engine.step()
    assert held.held
    assert engine.scheduler._pending_blocks
    while names[1] in engine.requests:
        engine.step()
    check_stored(engine, first, held)
    check_stored(engine, second, held)


def test_finished_requests_block_is_loaded_into(make: Make) -> None:
    engine = make(chunk=24, blocks=10)
    first, second = prompt(32, 125), prompt(33, 125)
    engine.answered(second)
    held = engine.hold("store")
    name = engine.ask(first)
    while name in engine.requests:
        engine.step()
    engine.forget_blocks()
    name = engine.ask(second)  # all its blocks were the first one's, and are written by a load
    while name in engine.requests:
        engine.step()
    assert engine.hit_tokens[name] == 120
    check_stored(engine, first, held)


def test_finished_requests_block_is_copied_into(make: Make) -> None:
    """The step that copies into a block waits for the store that reads it. Free blocks' stores are not waited for."""
    engine = make(chunk=24)
    held = engine.hold("store")
    name = engine.ask(prompt(34, 125))
    while name in engine.requests:
        engine.step()
    pending = {block: set(jobs) for block, jobs in engine.scheduler._pending_blocks.items()}
    assert engine.step().meta.flush == set()
    block = min(pending)
    engine.copies = [SimpleNamespace(src_block_id=39, dst_block_id=block)]
    assert engine.step().meta.flush == pending[block]
    assert not set(held.held) & pending[block]


def test_preempted_requests_stores_end_before_the_step(make: Make) -> None:
    engine = make(chunk=24, blocks=10)
    first, second = prompt(35, 125), prompt(36, 125)
    held = engine.hold("store")
    name = engine.ask(first, max_tokens=3)
    engine.step()
    engine.step()
    engine.step()
    assert held.held
    engine.preempt(name)
    request = engine.requests.pop(name)
    other = engine.ask(second)
    engine.requests[name] = request  # behind the other one
    engine.forget_blocks()
    engine.step()
    assert engine.requests[other].status == RUNNING
    check_stored(engine, first, held)


# ---- T2: nothing that rests on a failed load is published ---------------------------------------------------------------


@pytest.mark.parametrize("config", [{"async_loading": False}, {"async_loading": False, "layerwise": True}])
@pytest.mark.parametrize("ranks", [1, 2])
def test_store_that_rests_on_a_failed_load_is_dropped_and_its_request_stores_nothing_more(
    make: Make, ranks: int, config: dict[str, Any]
) -> None:
    engine = make(chunk=24, ranks=ranks, step_tokens=200, blocks=60, **config)
    tokens, longer = prompt(40, 125), prompt(40, 125) + prompt(41, 70)
    engine.answered(tokens)
    engine.forget_blocks()
    engine.fail_loads(random.Random(1), 1.0, ranks=[ranks - 1])
    name = engine.ask(longer, max_tokens=4)
    step = engine.step()
    assert [job.end for job in step.meta.stores] == [192], "a store of the step whose load failed"
    assert engine.requests[name].num_computed_tokens < 120
    (store,) = engine.scheduler._jobs.values()
    assert len(store.lease) == 0
    engine.drain()
    engine.heal_loads()
    engine.forget_blocks()
    assert engine.answered(longer) == 120
    engine.forget_blocks()
    assert engine.answered(longer) == 192


def test_request_that_computed_on_a_failed_load_and_was_aborted_before_anyone_knew(make: Make) -> None:
    """Its blocks are free and no request's, but vLLM's cache would still find them: the cache is emptied."""
    engine = make(chunk=24, step_tokens=200, blocks=60, async_loading=False)
    tokens, longer = prompt(46, 125), prompt(46, 125) + prompt(47, 70)
    engine.answered(tokens)
    engine.forget_blocks()
    engine.fail_loads(random.Random(1), 1.0)
    name = engine.ask(longer, max_tokens=4)
    update = engine.scheduler.update

    def aborted_first(meta: Any) -> None:
        if name in engine.requests:
            engine.requests[name].status = RequestStatus.FINISHED_ABORTED
            engine.scheduler.request_finished(engine.requests[name])
        update(meta)

    engine.scheduler.update = aborted_first
    engine.step()
    engine.scheduler.update = update
    assert engine.cached == {}
    engine._free(name)
    engine.heal_loads()
    engine.drain()
    assert in_store(engine, longer) == 5


def first_load_only() -> Any:
    """The first load fails, at its first chunk."""
    chances = iter([0.0])
    return SimpleNamespace(random=lambda: next(chances, 1.0), randrange=lambda _count: 0)


def test_request_that_shares_a_failed_loads_blocks_stores_nothing_more(make: Make) -> None:
    """vLLM gave it the first one's blocks while they were being loaded. What it stored before stays dropped."""
    engine = make(chunk=24, blocks=80, step_tokens=100, async_loading=False)
    tokens, longer = prompt(42, 125), prompt(42, 125) + prompt(43, 260)
    engine.answered(tokens)
    engine.forget_blocks()
    engine.fail_loads(first_load_only(), 1.0)
    first, second = engine.ask(tokens, max_tokens=4), engine.ask(longer, max_tokens=2)
    step = engine.step()
    assert [(job.request_id, job.begin, job.end) for job in step.meta.stores] == [(second, 120, 216)]
    assert engine.requests[first].num_computed_tokens == 0
    assert engine.cached == {}
    engine.drain()
    engine.heal_loads()
    assert in_store(engine, longer) == 5
    assert engine.answered(longer) == 120
    assert engine.answered(longer) == 384


def test_failed_load_that_nobody_computed_upon_drops_no_stores(make: Make) -> None:
    engine = make(chunk=24, blocks=60)
    tokens, other = prompt(44, 125), prompt(45, 30)
    engine.answered(tokens)
    engine.forget_blocks()
    held = engine.hold("store")
    running = engine.ask(other, max_tokens=200)
    engine.step()
    (job,) = engine.scheduler._jobs.values()
    engine.fail_loads(random.Random(1), 1.0)
    name = engine.ask(tokens)
    while engine.requests[name].status != RUNNING:
        engine.step()
    assert running in engine.requests
    assert len(job.lease) == 1
    held.end()
    engine.drain()
    assert in_store(engine, other) == 1


# ---- T3: one load of a chunk at a time ----------------------------------------------------------------------------------


def two_that_share(engine: Engine, **options: Any) -> tuple[list[int], str, str, HeldCopier]:
    """The first loads, the second waits."""
    tokens = prompt(50, 125)
    engine.answered(tokens)
    engine.forget_blocks()
    held = engine.hold("load")
    first, second = engine.ask(tokens), engine.ask([*tokens, 7, 7, 7], **options)
    for _ in range(3):
        engine.step()
    assert (engine.requests[first].status, engine.requests[second].status) == (LOADING, WAITING)
    assert len(held.held) == 1
    return tokens, first, second, held


@pytest.mark.parametrize("ahead", [False, True])
def test_second_request_waits_for_the_first_ones_load(make: Make, ahead: bool) -> None:
    engine = make(chunk=24, blocks=60, ahead=ahead)
    _tokens, first, second, held = two_that_share(engine)
    held.end()
    engine.drain()
    assert (engine.hit_tokens[first], engine.hit_tokens[second]) == (120, 8)  # 112 of 120 are whole blocks


def test_second_request_goes_on_when_the_first_is_aborted(make: Make) -> None:
    engine = make(chunk=24, blocks=60)
    _tokens, first, second, held = two_that_share(engine)
    engine.abort(first)
    engine.step()
    assert engine.requests[second].status == LOADING
    assert len(held.held) == 2
    held.end()
    engine.drain()
    assert engine.hit_tokens[second] == 120


@pytest.mark.parametrize("ranks", [1, 2])
def test_second_request_goes_on_when_the_first_ones_load_fails(make: Make, ranks: int) -> None:
    engine = make(chunk=24, blocks=60, ranks=ranks)
    _tokens, first, second, held = two_that_share(engine)
    engine.fail_loads(random.Random(3), 1.0, ranks=[ranks - 1])
    held.end()
    engine.drain()
    assert engine.hit_tokens[first] == 120
    assert engine.hit_tokens[second] <= 120


def test_one_that_was_preempted_waits_as_well(make: Make) -> None:
    engine = make(chunk=24, blocks=60)
    tokens = prompt(51, 125)
    running = engine.ask(tokens, max_tokens=20)
    for _ in range(3):
        engine.step()
    engine.settle()
    held = engine.hold("load")
    engine.preempt(running)
    engine.forget_blocks()
    request = engine.requests.pop(running)
    first = engine.ask(tokens)
    engine.requests[running] = request  # behind the other one
    engine.step()
    engine.step()
    assert (engine.requests[first].status, request.status) == (LOADING, RequestStatus.PREEMPTED)
    held.end()
    engine.drain()
    assert engine.hit_tokens[running] == 8  # beyond the 112 that the engine got from the first one's load


def test_tails_are_loaded_by_one_at_a_time(make: Make) -> None:
    engine = make(chunk=24, save_partial_chunk=True)
    tokens = prompt(52, 20)
    engine.answered(tokens)
    engine.forget_blocks()
    held = engine.hold("load")
    first, second = engine.ask(tokens), engine.ask(tokens)
    engine.step()
    assert len(held.held) == 1
    held.end()
    engine.drain()
    assert (engine.hit_tokens[first], engine.hit_tokens[second]) == (19, 3)


def test_an_adapter_that_changes_under_a_request_is_neither_published_nor_loaded(make: Make, tmp_path: Path) -> None:
    """Whether vLLM computed with the old weights or with the new, it alone knows."""
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"\0" * 8 + b"one")
    adapter = LoRARequest("a", 1, str(tmp_path), load_inplace=True)
    engine = make(chunk=16)
    kept, lost = prompt(53, 32), prompt(54, 32)
    engine.answered(kept, fields={"lora_request": adapter})
    held = engine.hold("store")
    engine.ask(lost, fields={"lora_request": adapter})
    engine.step()
    engine.step()
    assert len(held.held) == 1
    queued = engine.ask(kept, fields={"lora_request": adapter})
    file.write_bytes(b"\0" * 8 + b"two")
    held.end()
    engine.drain()
    assert engine.hit_tokens[queued] == 0
    file.write_bytes(b"\0" * 8 + b"one")
    assert engine.answered(kept, fields={"lora_request": adapter}) == 31
    assert engine.answered(lost, fields={"lora_request": adapter}) == 0
