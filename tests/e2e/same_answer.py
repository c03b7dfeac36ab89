"""What "same answer" means. Each check is shown to fail when wrong KV is planted (test_same_answer.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Two roundings of a bf16 logit of magnitude 16..32 apart: a prefill of another shape may choose differently below that.
TOP2_GAP_BOUND = 0.25


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    top_logprobs: list[dict[int, float]]  # per generated token
    cached_tokens: int


def check_pages(stored: Sequence[np.ndarray], loaded: Sequence[np.ndarray]) -> None:
    """(a) Paged bytes after a load are those that were stored, chunk by chunk."""
    assert len(stored) == len(loaded) > 0
    for index, (before, after) in enumerate(zip(stored, loaded, strict=True)):
        assert np.array_equal(before, after), f"block {index} came back with other bytes"


def check_own_hit(own: Answer, loaded: Answer) -> None:
    """(b) Tokens and logprobs are those of the engine's own prefix hit of the same length."""
    assert own.cached_tokens == loaded.cached_tokens > 0
    assert own.token_ids == loaded.token_ids
    assert own.top_logprobs == loaded.top_logprobs


def check_cold(cold: Answer, loaded: Answer) -> str:
    """(c) Tokens are those of a cold run, unless the two likeliest were closer than TOP2_GAP_BOUND. Says what was found."""
    assert cold.cached_tokens == 0
    for step, (left, right) in enumerate(zip(cold.token_ids, loaded.token_ids, strict=True)):
        first, second = sorted(cold.top_logprobs[step].values(), reverse=True)[:2]
        if left != right:
            gap = first - second
            assert gap < TOP2_GAP_BOUND, f"token {step} is {right}, was {left} in the cold run, whose top two were {gap:.3f} apart"
            return f"differs from token {step} on: the cold run's top two were {gap:.3f} apart (bound {TOP2_GAP_BOUND})"
    gaps = [a - b for a, b in (sorted(top.values(), reverse=True)[:2] for top in cold.top_logprobs)]
    return f"all {len(cold.token_ids)} tokens equal, smallest top-two gap {min(gaps):.3f}"
