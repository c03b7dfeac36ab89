"""The answer with loaded KV is the answer without, for both tiers; and each check notices planted wrong KV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from same_answer import Answer, check_cold, check_own_hit, check_pages

HIT_TOKENS = 896  # 7 whole blocks of a prompt of 900 tokens: too few are left to answer without the loaded KV


class Reference:
    """One prompt's cold answer, its answer on the engine's own prefix hit, and the pages that were stored."""

    def __init__(self, engine: Any, seed: int) -> None:
        engine.forget_all()
        self.prompt = engine.prompt(seed)
        with engine.watch_stores() as stored:
            self.cold: Answer = engine.answer(self.prompt)
            engine.drain()
        self.stored = stored
        self.own: Answer = engine.answer(self.prompt)
        assert self.cold.cached_tokens == 0
        assert self.own.cached_tokens == HIT_TOKENS
        engine.forget_gpu()


@pytest.fixture(scope="module")
def reference(engine: Any) -> Reference:
    return Reference(engine, seed=1)


def check_all(reference: Reference, loaded: Answer, pages: list[Any]) -> None:
    check_pages(reference.stored, pages)
    check_own_hit(reference.own, loaded)
    print(check_cold(reference.cold, loaded))


def test_from_host_memory(engine: Any, reference: Reference) -> None:
    engine.forget_gpu()
    before = engine.stats()
    with engine.watch_loads() as pages:
        loaded = engine.answer(reference.prompt)
    check_all(reference, loaded, pages)
    assert engine.stats()["hits_host"] - before["hits_host"] == 7


def test_from_nvme(engine: Any, reference: Reference) -> None:
    engine.evict_to_nvme()
    before = engine.stats()
    with engine.watch_loads() as pages:
        loaded = engine.answer(reference.prompt)
    check_all(reference, loaded, pages)
    assert engine.stats()["hits_nvme"] - before["hits_nvme"] == 7


def test_longer_prompt_extends_a_loaded_prefix(engine: Any, reference: Reference) -> None:
    engine.forget_gpu()
    prompt = reference.prompt + engine.prompt(2, 200)
    loaded = engine.answer(prompt)
    engine.drain()
    own = engine.answer(prompt)
    assert loaded.cached_tokens == HIT_TOKENS
    assert own.cached_tokens == HIT_TOKENS + 128  # the block that was completed after the load is cached, and stored
    engine.forget_gpu()
    check_own_hit(own, engine.answer(prompt))


def test_every_check_notices_wrong_kv(engine: Any, reference: Reference) -> None:
    """The KV of another prompt, of the right length, in every block: as if chunk keys had collided."""
    engine.forget_gpu()
    with engine.watch_stores() as others:
        engine.answer(engine.prompt(6), max_tokens=1)
        engine.drain()
    assert len(others) == len(reference.stored)
    engine.forget_gpu()
    with engine.wrong_kv(others), engine.watch_loads() as pages:
        wrong = engine.answer(reference.prompt)
    engine.forget_gpu()
    assert wrong.cached_tokens == HIT_TOKENS
    with pytest.raises(AssertionError, match="other bytes"):
        check_pages(reference.stored, pages)
    with pytest.raises(AssertionError):
        check_own_hit(reference.own, wrong)
    with pytest.raises(AssertionError, match="in the cold run"):
        check_cold(reference.cold, wrong)


def flip_bits(directory: Path) -> int:
    """One bit in each 64 KiB of every data file."""
    flipped = 0
    for path in directory.rglob("*"):
        if not path.is_file() or path.stat().st_size < 1 << 20:
            continue
        with open(path, "r+b") as file:
            for offset in range(40_000, path.stat().st_size, 64 << 10):
                file.seek(offset)
                (byte,) = file.read(1)
                file.seek(offset)
                file.write(bytes([byte ^ 4]))
                flipped += 1
    return flipped


def test_flipped_bits_on_nvme_are_a_miss_never_an_answer(engine: Any) -> None:
    reference = Reference(engine, seed=3)
    engine.evict_to_nvme()
    assert flip_bits(engine.directory) > 0
    before = engine.stats()
    loaded = engine.answer(reference.prompt)
    assert loaded.cached_tokens == 0
    assert engine.stats()["corrupt_records"] > before["corrupt_records"]
    assert loaded.token_ids == reference.cold.token_ids
    assert loaded.top_logprobs == reference.cold.top_logprobs
    # What was found corrupt is gone, and stored anew: by this request, or by the next where the promotion had not yet failed.
    # Then the KV comes from prefills of other shapes, so only the tokens can be compared.
    engine.forget_gpu()
    engine.answer(reference.prompt)
    engine.forget_gpu()
    whole = engine.answer(reference.prompt)
    assert whole.cached_tokens == HIT_TOKENS
    print(check_cold(reference.cold, whole))
