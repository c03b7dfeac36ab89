"""What the demo calls a failure, on made-up answers."""

from __future__ import annotations

import argparse
from pathlib import Path

import demo
import pytest
from demo import COLD, ENGINE, HOST, KILLED, RESTART, TAIL, Demo, Sample
from vllm_server import Completion

TOP = [{1: -0.1, 9: -3.0}, {2: -0.2, 8: -0.3}, {3: -0.3, 7: -4.0}]  # undecided between 2 and 8 at token 1, nowhere else
HIT_TOKENS = 128


def sample(source: str, token_ids: tuple[int, ...] = (1, 2, 3), last_logprob: float = -0.3) -> Sample:
    hit = HIT_TOKENS if source else 0
    answer = Completion("", list(token_ids), [-0.1, -0.2, last_logprob], TOP, 150, hit, 0.1, 0.2, "length")
    return Sample(100.0, 150, hit, {source: hit} if source else {}, answer)


def judge(monkeypatch: pytest.MonkeyPatch, **changed: Sample) -> list[str]:
    """Failures of a run in which all went well but for `changed`."""
    monkeypatch.setattr(demo, "machine", dict)
    run = Demo(argparse.Namespace(repeats=1, work=Path("nowhere"), model="model"))
    good = {
        COLD: sample(""),
        ENGINE: sample("device"),
        HOST: sample("host"),
        TAIL: sample("host"),
        RESTART: sample("disk"),
        KILLED: sample("disk"),
    }
    for name, one in (good | changed).items():
        run.phases[name].samples.append(one)
    run.compare_answers()
    failures = run.failures()
    assert run.result()["failures"] == failures
    assert run.table().count("\n") == 1 + len(good)
    return failures


def test_a_good_run_has_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge(monkeypatch) == []


def test_a_miss_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge(monkeypatch, **{KILLED: sample("")}) == ["hit on NVMe, after kill -9: no hit"]


def test_a_hit_from_another_tier_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    (failure,) = judge(monkeypatch, **{RESTART: sample("host")})
    assert "expected disk" in failure


def test_a_cold_run_with_a_hit_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge(monkeypatch, **{COLD: sample("device")}) == ["a cold run had cache hits"]


@pytest.mark.parametrize("token_ids", [(9, 2, 3), (1, 7, 3)], ids=["decided there", "not one of the two best"])
def test_another_answer_is_a_failure(monkeypatch: pytest.MonkeyPatch, token_ids: tuple[int, ...]) -> None:
    answers = {ENGINE: sample("device", token_ids), HOST: sample("host", token_ids)}
    failures = judge(monkeypatch, **answers, **{RESTART: sample("disk", token_ids), KILLED: sample("disk", token_ids)})
    assert len(failures) == 4
    assert all("another answer than the cold run" in failure for failure in failures)


def test_another_answer_where_the_cold_run_was_undecided_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    token_ids = (1, 8, 3)
    answers = {ENGINE: sample("device", token_ids), HOST: sample("host", token_ids)}
    assert judge(monkeypatch, **answers, **{RESTART: sample("disk", token_ids), KILLED: sample("disk", token_ids)}) == []


def test_other_logprobs_than_the_engine_s_own_hit_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    (failure,) = judge(monkeypatch, **{HOST: sample("host", last_logprob=-0.31)})
    assert "logprobs" in failure
