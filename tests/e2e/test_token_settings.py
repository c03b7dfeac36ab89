"""LMCacheNativeConnector's settings, on one engine whose scheduler side is given another configuration for each."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from engine import _replaced
from same_answer import check_cold
from test_token_failures import check_nothing_is_left

LENGTH = 885
HIT_TOKENS = 880


@pytest.fixture(autouse=True)
def empty(token_engine: Any) -> Iterator[None]:
    token_engine.forget_all()
    yield
    check_nothing_is_left(token_engine)


@contextlib.contextmanager
def configured(engine: Any, **changes: Any) -> Iterator[None]:
    scheduler = engine.scheduler
    config = dataclasses.replace(scheduler._config, **changes)
    with _replaced(scheduler, _config=config, _save_tails=config.save_partial_chunk):
        yield
        engine.drain()


def cached(engine: Any, prompt: list[int], **extra: Any) -> int:
    engine.forget_gpu()
    return int(engine.answer(prompt, max_tokens=1, **extra).cached_tokens)


def test_tails(token_engine: Any) -> None:
    """save_unfull_chunk: the tail is found for the very same prompt, all but the last token, and for no other."""
    prompt = token_engine.prompt(1, LENGTH)
    with configured(token_engine, save_partial_chunk=True):
        with token_engine.watch_stores() as stored:
            cold = token_engine.answer(prompt)
            token_engine.drain()
        token_engine.forget_gpu()
        with token_engine.watch_loads() as loaded:
            again = token_engine.answer(prompt)
        assert again.cached_tokens == LENGTH - 1
        assert (stored[0][:, :, : LENGTH - 1] == loaded[0]).all()
        print(check_cold(cold, again))
        assert cached(token_engine, prompt[:-1]) == HIT_TOKENS
        assert cached(token_engine, [*prompt, 17]) == HIT_TOKENS
        assert cached(token_engine, [*prompt[:-1], 17]) == HIT_TOKENS


def test_whole_prompt_of_whole_chunks_loads_all_but_the_last_token(token_engine: Any) -> None:
    prompt = token_engine.prompt(2, HIT_TOKENS)
    cold = token_engine.answer(prompt)
    token_engine.forget_gpu()
    loaded = token_engine.answer(prompt)
    assert loaded.cached_tokens == HIT_TOKENS - 1
    print(check_cold(cold, loaded))


def test_min_retrieve_tokens(token_engine: Any) -> None:
    prompt = token_engine.prompt(3, LENGTH)
    cached(token_engine, prompt)
    with configured(token_engine, min_retrieve_tokens=881):
        assert cached(token_engine, prompt) == 0
    with configured(token_engine, min_retrieve_tokens=880):
        assert cached(token_engine, prompt) == HIT_TOKENS


def test_hit_miss_ratio(token_engine: Any) -> None:
    prompt = token_engine.prompt(4, LENGTH)
    cached(token_engine, prompt)
    with configured(token_engine, hit_miss_ratio=0.5):
        assert cached(token_engine, prompt) == 440
    with configured(token_engine, hit_miss_ratio=0.0):
        assert cached(token_engine, prompt) == 0


def test_priority_limit(token_engine: Any) -> None:
    prompt = token_engine.prompt(5, LENGTH)
    with configured(token_engine, priority_limit=-1):  # requests have priority 0 here
        assert cached(token_engine, prompt) == 0
    assert cached(token_engine, prompt) == 0
    with configured(token_engine, priority_limit=0):
        assert cached(token_engine, prompt) == HIT_TOKENS


def test_host_memory_only_when_asked(token_engine: Any) -> None:
    """retrieve_locations without LocalDiskBackend."""
    prompt = token_engine.prompt(6, LENGTH)
    cached(token_engine, prompt)
    with configured(token_engine, retrieve_nvme=False):
        assert cached(token_engine, prompt) == HIT_TOKENS
        token_engine.evict_to_nvme()
        assert cached(token_engine, prompt) == 0
    token_engine.evict_to_nvme()
    assert cached(token_engine, prompt) == HIT_TOKENS


def test_chunked_prefill_and_decoded_tokens(token_engine: Any) -> None:
    """save_decode_cache: what was generated is found by a longer chat."""
    prompt = token_engine.prompt(7, 300)
    with configured(token_engine, save_decode=True):
        token_engine.forget_gpu()
        first = token_engine.answer(prompt, max_tokens=100)
        assert cached(token_engine, [*prompt, *first.token_ids, 17]) == 360  # 399 tokens were computed: 9 chunks
    with configured(token_engine, save_decode=False):
        other = token_engine.prompt(8, 300)
        token_engine.forget_gpu()
        first = token_engine.answer(other, max_tokens=100)
        assert cached(token_engine, [*other, *first.token_ids, 17]) == 280


def test_events(token_engine: Any) -> None:
    from lmcache_native.integration.vllm.kv_events import ChunkEvents

    prompt = token_engine.prompt(9, 100)
    scheduler = token_engine.scheduler
    told = ChunkEvents(scheduler.store, scheduler._chunk_tokens)  # as with enable_kv_events at the start
    # vLLM's scheduler takes the events at each step, to publish them.
    with _replaced(scheduler, _events=told), _replaced(token_engine.connector, take_events=lambda: ()):
        cached(token_engine, prompt)
        token_engine.drain()
        taken = [event for event in token_engine.scheduler.take_events() if type(event).__name__ == "BlockStored"]
        events = [event for event in taken if event.medium == "CPU"]
        token_engine.forget_all()
        cleared, *_ = token_engine.scheduler.take_events()
    assert [event.token_ids for event in events] == [prompt[:40], prompt[40:80]]
    assert [event.block_size for event in events] == [40, 40]
    assert events[0].parent_block_hash is None
    assert events[1].parent_block_hash == events[0].block_hashes[0]
    assert type(cleared).__name__ == "AllBlocksCleared"


def test_store_that_finds_no_slot_is_offered_again(token_engine: Any) -> None:
    """Another holds the whole arena for two steps of a request; then its chunks are stored."""
    from lmcache_native import make_namespace

    store = token_engine.scheduler.store
    size = token_engine.scheduler._chunk_bytes
    other = store.reserve_engine_keys(make_namespace("other=1\n"), [bytes([index]) * 32 for index in range(200)], size)
    with pytest.raises(Exception, match="slot"):
        store.reserve_engine_keys(make_namespace("other=2\n"), [b"x" * 32], size)
    steps = 0
    build = token_engine.connector.build_connector_meta

    def building(output: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            other.abort()
        return build(output)

    prompt = token_engine.prompt(10, LENGTH)
    with _replaced(token_engine.connector, build_connector_meta=building):
        token_engine.answer(prompt)
        token_engine.drain()
    assert cached(token_engine, prompt) == HIT_TOKENS
