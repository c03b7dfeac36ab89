"""Loads that fail, and resets with jobs under way: the request is recomputed, nothing stale is published."""

from __future__ import annotations

from typing import Any

import pytest
from same_answer import check_cold

HIT_TOKENS = 896


@pytest.mark.parametrize("failed_chunk", [0, 3])
def test_failed_load_is_recomputed_from_the_good_prefix(engine: Any, failed_chunk: int) -> None:
    engine.forget_all()
    prompt = engine.prompt(20 + failed_chunk)
    cold = engine.answer(prompt)
    engine.forget_gpu()
    with engine.failing_loads(failed_chunk):
        recomputed = engine.answer(prompt)  # kv_load_failure_policy "fail" would raise or end the request here
    assert len(recomputed.token_ids) == len(cold.token_ids)
    print(check_cold(cold, recomputed))
    # The request that failed looked nothing up again; the next one does, and gets everything.
    engine.forget_gpu()
    assert engine.answer(prompt).cached_tokens == HIT_TOKENS


def test_load_that_could_not_be_leased_is_recomputed(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.forget_all()
    prompt = engine.prompt(30)
    cold = engine.answer(prompt)
    engine.forget_gpu()
    prepare_load = engine.manager.prepare_load

    def cleared_in_between(keys: Any, req_context: Any) -> Any:
        engine.manager.store.clear()
        return prepare_load(keys, req_context)

    with monkeypatch.context() as patch:
        patch.setattr(engine.manager, "prepare_load", cleared_in_between)
        recomputed = engine.answer(prompt)
    assert recomputed.token_ids == cold.token_ids
    assert recomputed.top_logprobs == cold.top_logprobs


def test_reset_while_stores_are_under_way(engine: Any) -> None:
    engine.forget_all()
    prompt = engine.prompt(40)
    with engine.held_copies() as copier:
        cold = engine.answer(prompt)
        for _ in range(3):
            engine.llm.llm_engine.step()
        assert copier.held, "the store was to be under way"
        committed = engine.stats()["committed_chunks"]
        engine.llm.reset_prefix_cache(reset_connector=True)
        assert engine.stats()["host_quarantined_slots"] >= 7
    # The copies ended after the reset: published nothing, and their slots are free again.
    assert engine.stats()["committed_chunks"] == committed
    engine.forget_gpu()
    again = engine.answer(prompt)
    assert again.cached_tokens == 0
    assert again.token_ids == cold.token_ids
    engine.drain()
    assert engine.stats()["committed_chunks"] == committed + 7
    engine.forget_gpu()
    assert engine.answer(prompt).cached_tokens == HIT_TOKENS


def test_reset_while_a_load_is_under_way(engine: Any) -> None:
    from vllm import SamplingParams, TokensPrompt

    engine.forget_all()
    prompt = engine.prompt(50)
    engine.answer(prompt)
    engine.drain()
    own = engine.answer(prompt)
    engine.forget_gpu()
    llm_engine = engine.llm.llm_engine
    with engine.held_copies() as copier:
        llm_engine.add_request(
            "held", TokensPrompt(prompt_token_ids=prompt), SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        )
        while not copier.held:
            llm_engine.step()
        engine.llm.reset_prefix_cache(reset_connector=True)
        finished = []
        while not finished:  # the flush that a reset asks for lets the copy go
            finished = [output for output in llm_engine.step() if output.finished]
    # The load read slots that the reset had dropped but not reused.
    assert list(finished[0].outputs[0].token_ids) == own.token_ids
    engine.forget_gpu()
    engine.drain()
