"""LMCacheNativeConnector, with chunks that do not divide the engine's blocks: the answer with loaded KV is the answer without, for
both tiers, and each check notices planted wrong KV."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from same_answer import Answer, check_cold, check_own_hit
from test_same_answer import flip_bits

LENGTH = 885
HIT_TOKENS = 880  # 22 chunks of 40 tokens, and 55 blocks of 16


class Reference:
    """One prompt's cold answer, its answer on the engine's own prefix hit (where that ends within a chunk, the rest of the chunk is
    loaded), and the KV that was stored."""

    def __init__(self, engine: Any, seed: int, length: int = LENGTH) -> None:
        engine.forget_all()
        self.prompt = engine.prompt(seed, length)
        with engine.watch_stores() as stored:
            self.cold: Answer = engine.answer(self.prompt)
            engine.drain()
        assert len(stored) == 1
        self.stored = stored[0]
        self.own: Answer = engine.answer(self.prompt)
        assert self.cold.cached_tokens == 0
        assert self.own.cached_tokens == (length - 1) // engine.CHUNK_TOKENS * engine.CHUNK_TOKENS
        engine.forget_gpu()


@pytest.fixture(scope="module")
def reference(token_engine: Any) -> Reference:
    return Reference(token_engine, seed=1)


def check_kv(stored: np.ndarray, loaded: np.ndarray) -> None:
    """(a) The engine's bytes after a load are those that were stored, token by token."""
    assert loaded.size > 0
    assert np.array_equal(stored[:, :, : loaded.shape[2]], loaded), "KV came back with other bytes"


def check_all(reference: Reference, loaded: Answer, kv: list[np.ndarray]) -> None:
    assert len(kv) == 1
    assert kv[0].shape[2] == HIT_TOKENS
    check_kv(reference.stored, kv[0])
    check_own_hit(reference.own, loaded)
    print(check_cold(reference.cold, loaded))


def test_from_host_memory(token_engine: Any, reference: Reference) -> None:
    token_engine.forget_gpu()
    before = token_engine.stats()
    with token_engine.watch_loads() as kv:
        loaded = token_engine.answer(reference.prompt)
    check_all(reference, loaded, kv)
    assert token_engine.stats()["hits_host"] - before["hits_host"] == 22


def test_from_nvme(token_engine: Any, reference: Reference) -> None:
    token_engine.evict_to_nvme()
    before = token_engine.stats()
    with token_engine.watch_loads() as kv:
        loaded = token_engine.answer(reference.prompt)
    check_all(reference, loaded, kv)
    assert token_engine.stats()["hits_nvme"] - before["hits_nvme"] == 22


def test_hit_that_ends_within_a_block(token_engine: Any) -> None:
    """920 tokens are 23 chunks and 57.5 blocks: the block's other half is computed."""
    reference = Reference(token_engine, seed=4, length=925)
    with token_engine.watch_loads() as kv:
        loaded = token_engine.answer(reference.prompt)
    assert loaded.cached_tokens == 920
    check_kv(reference.stored, kv[0])
    print(check_cold(reference.cold, loaded))
    # The engine's cache holds that block now, half loaded and half computed, and it is right.
    again = token_engine.answer(reference.prompt)
    assert again.cached_tokens == 920
    print(check_cold(reference.cold, again))


def test_load_that_begins_within_a_chunk(token_engine: Any, reference: Reference) -> None:
    """The engine has 48 tokens, a chunk and a fifth of one: the load begins in the middle of the second chunk."""
    token_engine.answer(reference.prompt)  # stored again where a test before cleared it
    token_engine.forget_gpu()
    assert token_engine.answer([*reference.prompt[:55], 17], max_tokens=1).cached_tokens == 40
    with token_engine.watch_loads() as kv:
        loaded = token_engine.answer(reference.prompt)
    assert kv[0].shape[2] == HIT_TOKENS - 48
    check_kv(reference.stored[:, :, 48:], kv[0])
    check_own_hit(reference.own, loaded)


def test_longer_prompt_extends_a_loaded_prefix(token_engine: Any, reference: Reference) -> None:
    token_engine.answer(reference.prompt)
    token_engine.forget_gpu()
    prompt = reference.prompt + token_engine.prompt(2, 200)
    loaded = token_engine.answer(prompt)
    token_engine.drain()
    assert loaded.cached_tokens == HIT_TOKENS
    token_engine.forget_gpu()
    assert token_engine.answer(prompt).cached_tokens == 1080  # what was computed after the load is stored too


def test_every_check_notices_wrong_kv(token_engine: Any, reference: Reference) -> None:
    """The KV of another prompt, of the right length, in every block: as if chunk keys had collided."""
    token_engine.answer(reference.prompt)
    token_engine.forget_gpu()
    with token_engine.watch_stores() as others:
        token_engine.answer(token_engine.prompt(6, LENGTH), max_tokens=1)
        token_engine.drain()
    token_engine.forget_gpu()
    with token_engine.watch_loads() as kv, token_engine.wrong_kv(others[0]):  # the inner one acts first
        wrong = token_engine.answer(reference.prompt)
    token_engine.forget_gpu()
    assert wrong.cached_tokens == HIT_TOKENS
    with pytest.raises(AssertionError, match="other bytes"):
        check_kv(reference.stored, kv[0])
    with pytest.raises(AssertionError):
        check_own_hit(reference.own, wrong)
    with pytest.raises(AssertionError, match="in the cold run"):
        check_cold(reference.cold, wrong)


def test_flipped_bits_on_nvme_are_a_miss_never_an_answer(token_engine: Any) -> None:
    reference = Reference(token_engine, seed=3)
    token_engine.evict_to_nvme()
    assert flip_bits(token_engine.directory) > 0
    before = token_engine.stats()
    loaded = token_engine.answer(reference.prompt)
    assert loaded.cached_tokens == 0
    assert token_engine.stats()["corrupt_records"] > before["corrupt_records"]
    assert loaded.token_ids == reference.cold.token_ids
    assert loaded.top_logprobs == reference.cold.top_logprobs


def test_thirty_mixed_prompts_under_pressure(token_engine: Any) -> None:
    """Prompts that share prefixes with others, ten times what host memory holds, each asked twice in random order."""
    token_engine.forget_all()
    generator = random.Random(5)
    prompts = []
    for index in range(30):
        shared = token_engine.prompt(100 + index % 6, generator.choice([200, 400, 600]))
        prompts.append(shared + token_engine.prompt(200 + index, generator.randrange(60, 400)))
    cold = {}
    for index, prompt in enumerate(prompts):
        token_engine.llm.reset_prefix_cache()
        found = token_engine.answers([prompt], cache_salt=f"alone-{index}")[0]  # a key of its own: really cold
        assert found.cached_tokens == 0
        cold[index] = found
        token_engine.drain()
    before = token_engine.stats()
    order = [index for index in range(30) for _ in range(2)]
    generator.shuffle(order)
    hit_tokens = 0
    for index in order:
        token_engine.forget_gpu()
        found = token_engine.answer(prompts[index])
        hit_tokens += found.cached_tokens
        check_cold(cold[index], found)
    after = token_engine.stats()
    print(f"{hit_tokens} of {sum(len(prompts[index]) for index in order)} prompt tokens from the cache")
    assert after["evicted_chunks"] > before["evicted_chunks"]
    assert after["hits_nvme"] > before["hits_nvme"]
    assert hit_tokens > sum(map(len, prompts)) // 2


def test_chat_with_growing_history(token_engine: Any) -> None:
    """Ten turns, each with the answers of all turns before: every turn loads what the one before stored."""
    token_engine.forget_all()
    history = token_engine.prompt(50, 300)
    stored_tokens = 0
    for turn in range(10):
        token_engine.forget_gpu()
        found = token_engine.answer(history, max_tokens=16)
        token_engine.drain()
        assert found.cached_tokens >= stored_tokens // token_engine.CHUNK_TOKENS * token_engine.CHUNK_TOKENS
        cold = token_engine.answer(history, max_tokens=16, cache_salt=f"turn {turn}")
        check_cold(cold, found)
        stored_tokens = len(history)
        history = history + found.token_ids + token_engine.prompt(60 + turn, 70)
    assert len(history) > 1000
