"""LMCacheNativeConnector when things go wrong or happen at once: loads that fail or are late, resets, aborts, preemption, requests
that share a prefix. The answer is the cold run's, and nothing is left behind."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import pytest
from engine import Proxy, _replaced
from same_answer import check_cold

LENGTH = 885
HIT_TOKENS = 880


@pytest.fixture(autouse=True)
def nothing_is_left(token_engine: Any) -> Iterator[None]:
    yield
    check_nothing_is_left(token_engine)


def check_nothing_is_left(engine: Any) -> None:
    engine.drain()
    scheduler = engine.scheduler
    assert (scheduler._states, scheduler._jobs, scheduler._loading, scheduler._pending_blocks) == ({}, {}, {}, {})
    assert scheduler._prefetched_bytes == 0
    # What is being written behind is pinned; the keeper looks at the workers' words in its own time.
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        scheduler.store.flush(10.0)
        stats = engine.stats()
        if not (stats["host_quarantined_slots"] or stats["host_pinned_slots"]):
            break
    assert stats["host_quarantined_slots"] == 0
    assert stats["host_pinned_slots"] == 0


def add(engine: Any, name: str, prompt: list[int], max_tokens: int = 12, **parameters: Any) -> None:
    from vllm import SamplingParams, TokensPrompt

    engine.llm.llm_engine.add_request(
        name,
        TokensPrompt(prompt_token_ids=prompt),
        SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **parameters),
    )


def finish(engine: Any) -> dict[str, list[int]]:
    """Steps until all requests have ended: name -> tokens."""
    found: dict[str, list[int]] = {}
    while engine.llm.llm_engine.has_unfinished_requests():
        for output in engine.llm.llm_engine.step():
            if output.finished:
                found[output.request_id] = list(output.outputs[0].token_ids)
    return found


# ---- loads that fail ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failed_chunk", [0, 7])
def test_failed_load_is_recomputed_from_the_good_prefix(token_engine: Any, failed_chunk: int) -> None:
    token_engine.forget_all()
    prompt = token_engine.prompt(20 + failed_chunk, LENGTH)
    cold = token_engine.answer(prompt)
    token_engine.forget_gpu()
    with token_engine.failing_loads(failed_chunk):
        recomputed = token_engine.answer(prompt)
    print(check_cold(cold, recomputed))
    token_engine.forget_gpu()
    assert token_engine.answer(prompt).cached_tokens == HIT_TOKENS


def test_load_that_could_not_be_leased_is_recomputed(token_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    token_engine.forget_all()
    prompt = token_engine.prompt(30, LENGTH)
    cold = token_engine.answer(prompt)
    token_engine.forget_gpu()
    lease = token_engine.scheduler._lease

    def cleared_in_between(*args: Any) -> Any:
        token_engine.scheduler.store.clear()
        return lease(*args)

    with monkeypatch.context() as patch:
        patch.setattr(token_engine.scheduler, "_lease", cleared_in_between)
        recomputed = token_engine.answer(prompt)
    assert recomputed.token_ids == cold.token_ids
    assert recomputed.top_logprobs == cold.top_logprobs


def test_late_load_is_cancelled_and_recomputed(token_engine: Any) -> None:
    """The copier holds the load back; after blocking_timeout_secs the worker gives it up."""
    token_engine.forget_all()
    prompt = token_engine.prompt(35, LENGTH)
    cold = token_engine.answer(prompt)
    token_engine.forget_gpu()
    worker = token_engine.worker
    real = worker.attached()
    held: list[tuple[Any, Any]] = []
    cancelled: list[int] = []

    def submit(job_id: int, direction: str, *args: Any, **kwargs: Any) -> None:
        if direction == "load":
            held.append(((job_id, direction, *args), kwargs))
        else:
            real.submit(job_id, direction, *args, **kwargs)

    def cancel(ids: Any) -> None:
        cancelled.extend(ids)
        for args, kwargs in held:  # as the copier does it: what has not begun fails
            real.submit(*args, **kwargs)
        real.cancel(ids)

    with (
        _replaced(worker, _copier=Proxy(real, submit=submit, cancel=cancel), _load_timeout_s=0.05),
        token_engine.failing_loads(0),
    ):
        late = token_engine.answer(prompt)
    assert len(cancelled) == 1
    print(check_cold(cold, late))


# ---- resets -------------------------------------------------------------------------------------------------------------


def test_reset_while_stores_are_under_way(token_engine: Any) -> None:
    token_engine.forget_all()
    prompt = token_engine.prompt(40, LENGTH)
    committed = token_engine.stats()["committed_chunks"]
    with token_engine.held_copies() as copier:
        cold = token_engine.answer(prompt)
        for _ in range(3):
            token_engine.llm.llm_engine.step()
        assert copier.held, "the store was to be under way"
        token_engine.llm.reset_prefix_cache(reset_connector=True)
        assert token_engine.stats()["host_quarantined_slots"] >= 22
    # The copies ended after the reset: published nothing.
    assert token_engine.stats()["committed_chunks"] == committed
    token_engine.forget_gpu()
    again = token_engine.answer(prompt)
    assert again.cached_tokens == 0
    assert again.token_ids == cold.token_ids
    token_engine.forget_gpu()
    assert token_engine.answer(prompt).cached_tokens == HIT_TOKENS


def test_reset_while_a_load_is_under_way(token_engine: Any) -> None:
    token_engine.forget_all()
    prompt = token_engine.prompt(50, LENGTH)
    token_engine.answer(prompt)
    own = token_engine.answer(prompt)
    token_engine.forget_gpu()
    with token_engine.held_copies() as copier:
        add(token_engine, "held", prompt)
        while not copier.held:
            token_engine.llm.llm_engine.step()
        token_engine.llm.reset_prefix_cache(reset_connector=True)
        copier.let_go()
        # The load read slots that the reset had dropped but not reused.
        assert finish(token_engine)["held"] == own.token_ids


# ---- at once ------------------------------------------------------------------------------------------------------------


def test_two_requests_share_a_load(token_engine: Any) -> None:
    """The second, longer one waits while the first loads, and then has the loaded prefix from the engine."""
    token_engine.forget_all()
    prompt = token_engine.prompt(55, LENGTH)
    longer = prompt + token_engine.prompt(56, 60)
    token_engine.answer(prompt)
    token_engine.forget_gpu()
    before = token_engine.stats()["hits_host"]
    with token_engine.held_copies() as copier:
        add(token_engine, "first", prompt)
        add(token_engine, "second", longer)
        for _ in range(5):
            token_engine.llm.llm_engine.step()
        loads = [args for args, _kwargs in copier.held if args[1] == "load"]
        assert len(loads) == 1
        assert len(token_engine.scheduler._jobs) == 1
        copier.let_go()
        found = finish(token_engine)
    assert token_engine.stats()["hits_host"] - before == 22
    token_engine.forget_all()
    assert found["first"] == token_engine.answer(prompt).token_ids
    token_engine.forget_all()
    assert found["second"] == token_engine.answer(longer).token_ids


def test_request_waiting_for_an_aborted_load_goes_on(token_engine: Any) -> None:
    token_engine.forget_all()
    prompt = token_engine.prompt(57, LENGTH)
    cold = token_engine.answer(prompt)
    token_engine.forget_gpu()
    with token_engine.held_copies() as copier:
        add(token_engine, "first", prompt)
        add(token_engine, "second", prompt)
        while not copier.held:
            token_engine.llm.llm_engine.step()
        token_engine.llm.llm_engine.abort_request(["first"])
        for _ in range(3):
            token_engine.llm.llm_engine.step()
        loads = [args for args, _kwargs in copier.held if args[1] == "load"]
        assert len(loads) == 2  # its own
        copier.let_go()
        while token_engine.vllm_scheduler.requests:
            for output in token_engine.llm.llm_engine.step():
                if output.finished and output.request_id == "second":
                    second = list(output.outputs[0].token_ids)
    assert second == cold.token_ids


def test_abort_storm(token_engine: Any) -> None:
    """Requests aborted at every stage: queued, looking up, loading, computing, storing. Those that remain answer right."""
    token_engine.forget_all()
    prompts = [token_engine.prompt(70 + index, 300 + 97 * index) for index in range(6)]
    cold = [token_engine.answer(prompt) for prompt in prompts]
    token_engine.evict_to_nvme()
    names = {f"turn{turn}-prompt{index}": index for turn in range(8) for index in range(len(prompts))}
    for name, index in names.items():
        add(token_engine, name, prompts[index])
    kept = {name: index for number, (name, index) in enumerate(names.items()) if number % 5 == 0}
    victims = [name for name in names if name not in kept]
    found: dict[str, list[int]] = {}
    while token_engine.vllm_scheduler.requests:
        for output in token_engine.llm.llm_engine.step():
            if output.finished:
                found[output.request_id] = list(output.outputs[0].token_ids)
        if victims:
            token_engine.llm.llm_engine.abort_request([victims.pop(0)])
    for name, index in kept.items():
        expected = cold[index].token_ids
        assert len(found[name]) == len(expected)
        check_cold(cold[index], dataclasses.replace(cold[index], token_ids=found[name], cached_tokens=0))


def test_stores_of_finished_requests_whose_blocks_are_handed_out_again(token_engine: Any) -> None:
    """The copier holds every store back; the next requests take all of the engine's blocks. What is stored is right even so."""
    token_engine.forget_all()
    first = token_engine.prompt(80, LENGTH)
    cold = token_engine.answer(first)
    token_engine.forget_all()
    pool = token_engine.vllm_scheduler.kv_cache_manager.block_pool
    with token_engine.held_copies():
        token_engine.answer(first, max_tokens=1)
        # All blocks but those of one more request are in use: the next one gets those of the first.
        spare = [pool.get_new_blocks(pool.get_num_free_blocks() - 60)]
        token_engine.llm.reset_prefix_cache()
        token_engine.answer(token_engine.prompt(81, LENGTH), max_tokens=1)
        pool.free_blocks(spare[0])
    token_engine.forget_gpu()
    again = token_engine.answer(first)
    print(f"{again.cached_tokens} tokens were stored", check_cold(cold, again))


# ---- settings -----------------------------------------------------------------------------------------------------------


def test_request_settings(token_engine: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    token_engine.forget_all()
    prompt = token_engine.prompt(90, LENGTH)

    def ask(**parameters: Any) -> int:
        token_engine.forget_gpu()
        return int(token_engine.answer(prompt, max_tokens=1, extra_args={"kv_transfer_params": parameters}).cached_tokens)

    assert ask(**{"lmcache.skip_save": True}) == 0
    assert ask() == 0
    assert ask() == HIT_TOKENS
    assert ask(**{"lmcache.tag.user": "a"}) == 0
    assert ask(**{"lmcache.tag.user": "b"}) == 0
    assert ask(**{"lmcache.tag.user": "a"}) == HIT_TOKENS
    with pytest.raises(VLLMValidationError, match=r"lmcache\.skip_save='perhaps'"):
        ask(**{"lmcache.skip_save": "perhaps"})
    assert ask() == HIT_TOKENS, "the engine goes on"
