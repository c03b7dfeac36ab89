"""Scheduler side and workers of LMCacheNativeConnector together: every byte that a forward pass reads is checked."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from token_parts import BLOCK, prompt
from token_world import Engine, engines, in_store, keys_of
from vllm.v1.request import RequestStatus

from lmcache_native import ChunkKeys
from lmcache_native.errors import LmcacheNativeError
from lmcache_native.integration.vllm import compat

Make = Callable[..., Engine]
HEADER_BYTES = 4096  # of a slot
LOADING, RUNNING = RequestStatus.WAITING_FOR_REMOTE_KVS, RequestStatus.RUNNING


@pytest.fixture
def make() -> Iterator[Make]:
    with engines() as found:
        yield found


# ---- what is found ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("chunk", [8, 16, 24, 40])
def test_load_after_the_engine_forgot(make: Make, chunk: int, ranks: int, ahead: bool) -> None:
    engine = make(chunk=chunk, ranks=ranks, ahead=ahead)
    tokens = prompt(1, 125)
    assert engine.answered(tokens) == 0
    assert engine.answered(tokens) == 124 // chunk * chunk
    engine.answered(tokens[:40])  # the engine has two blocks, which may end within a chunk
    assert engine.answered_warm(tokens) == 124 // chunk * chunk - 32


@pytest.mark.parametrize("chunk", [8, 16, 24, 40])
def test_load_writes_what_it_brings_and_nothing_else(make: Make, chunk: int) -> None:
    """Neither the blocks that the engine has, nor what follows the hit in its last block."""
    engine = make(chunk=chunk)
    tokens = prompt(2, 125)
    engine.answered(tokens)
    engine.answered(tokens[:40])
    free = [block for block in engine.free if block not in engine.cached.values()]
    for tensor in engine.pages[0].tensors:
        tensor[free] = 0x33
    before = [tensor.clone() for tensor in engine.pages[0].tensors]
    held = engine.hold("load")
    name = engine.ask(tokens)
    engine.step()
    blocks = list(engine.blocks[name])
    held.let_go()
    engine.workers[0].wait_ended(list(engine.scheduler._jobs))
    begin, end = 32, 124 // chunk * chunk
    assert engine.requests[name].num_computed_tokens == end
    for token in range(begin, end):
        for layer, tensor in enumerate(before):
            tensor[blocks[token // BLOCK], :, token % BLOCK] = engine.pages[0].tensors[layer][
                blocks[token // BLOCK], :, token % BLOCK
            ]
    assert all(bool((tensor == engine.pages[0].tensors[layer]).all()) for layer, tensor in enumerate(before))
    engine.check(0, name, end)


@pytest.mark.parametrize("chunk", [8, 24, 40])
def test_of_a_whole_prompt_all_but_the_last_token_is_loaded(make: Make, chunk: int) -> None:
    engine = make(chunk=chunk)
    tokens = prompt(3, 120)
    engine.answered(tokens)
    assert engine.answered(tokens) == 119


@pytest.mark.parametrize("length", [7, 24, 25, 120, 121, 125])
def test_tails_are_found_for_the_very_same_prompt_only(make: Make, length: int) -> None:
    engine = make(chunk=24, save_partial_chunk=True)
    tokens = prompt(4, length)
    whole = (length - 1) // 24 * 24
    assert engine.answered(tokens) == 0
    assert engine.answered(tokens) == length - 1
    assert engine.answered([*tokens, 7]) == length // 24 * 24
    assert engine.answered([*tokens[:-1], 999]) == whole
    assert engine.answered(tokens[:-1]) == ((length - 1) // 24 * 24 if (length - 1) % 24 else max(length - 2, 0))


def test_without_the_setting_tails_are_not_stored(make: Make) -> None:
    engine = make(chunk=24)
    tokens = prompt(5, 20)
    engine.answered(tokens)
    assert engine.answered(tokens) == 0
    assert engine.stats["committed_chunks"] == 0


def test_prefill_in_many_steps_stores_as_it_goes(make: Make) -> None:
    engine = make(chunk=24, step_tokens=20)
    tokens = prompt(6, 125)
    engine.ask(tokens)
    steps = [engine.step() for _ in range(7)]
    stores = [[(job.begin, job.end) for job in step.meta.stores] for step in steps]
    assert stores == [[], [(0, 24)], [(24, 48)], [(48, 72)], [(72, 96)], [(96, 120)], []]
    engine.drain()
    assert in_store(engine, tokens) == 5


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("save_decode", "expected"), [(False, 24), (True, 72)])
def test_generated_tokens(make: Make, save_decode: bool, expected: int, ahead: bool) -> None:
    engine = make(chunk=24, save_decode=save_decode, ahead=ahead)
    tokens = prompt(7, 40)
    name = engine.ask(tokens, max_tokens=50)
    request = engine.requests[name]
    engine.drain()
    assert request.num_tokens == 90  # the last one's KV was never computed
    assert engine.answered([*request.all_token_ids, 1], lmcache_skip_save=True) == expected
    assert engine.answered([*request.all_token_ids[:70], 1, 2, 3, 4], lmcache_skip_save=True) == min(expected, 48)


# ---- settings -----------------------------------------------------------------------------------------------------------


def test_requests_and_engines_that_do_not_save(make: Make) -> None:
    engine, reader = make(chunk=24), make(chunk=24, skip_save=True)
    tokens = prompt(8, 125)
    engine.answered(tokens, lmcache_skip_save=True)
    reader.answered(tokens)
    assert (engine.stats["committed_chunks"], reader.stats["committed_chunks"]) == (0, 0)
    engine.answered(tokens)
    assert engine.answered(tokens, lmcache_skip_save="yes") == 120  # loads even so


def test_wrong_request_settings_are_served_without_the_cache(make: Make) -> None:
    engine = make(chunk=24)
    tokens = prompt(9, 125)
    engine.answered(tokens, lmcache_skip_save="perhaps")
    assert engine.stats["committed_chunks"] == 0
    engine.answered(tokens)
    assert engine.answered(tokens, lmcache_skip_save="perhaps") == 0


@pytest.mark.parametrize("settings", [{"lmcache_tag.user": "a"}, {"fields": {"cache_salt": "a"}}], ids=["tag", "salt"])
def test_tags_and_salts_keep_tenants_apart(make: Make, settings: dict[str, Any]) -> None:
    engine = make(chunk=24)
    tokens = prompt(10, 125)
    assert engine.answered(tokens, **settings) == 0
    assert engine.answered(tokens) == 0
    assert engine.answered(tokens, **settings) == 120
    assert engine.answered(tokens, **{"lmcache_tag.user": "b"}) == 0


def test_requests_that_do_not_read_the_cache_still_save(make: Make) -> None:
    engine = make(chunk=24)
    tokens = prompt(11, 125)
    engine.answered(tokens)
    name = engine.ask([*tokens, *tokens])
    engine.scheduler._states[name].may_load = False  # as of skip_reading_prefix_cache
    engine.drain()
    assert engine.hit_tokens[name] == 0
    assert engine.answered([*tokens, *tokens]) == 240


def test_unimportant_requests_are_not_stored(make: Make) -> None:
    engine = make(chunk=24, priority_limit=3)
    low, high = prompt(12, 125), prompt(13, 125)
    engine.answered(low, fields={"priority": 4})
    engine.answered(high, fields={"priority": 3})
    assert (in_store(engine, low), in_store(engine, high)) == (0, 5)


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, 0), (0.5, 48), (0.8, 96), (1.0, 120)])
def test_no_more_than_a_part_of_a_prompt_is_a_hit(make: Make, ratio: float, expected: int) -> None:
    engine = make(chunk=24, hit_miss_ratio=ratio)
    tokens = prompt(14, 125)
    engine.answered(tokens)
    assert engine.answered(tokens) == expected


def test_hits_that_are_not_worth_it(make: Make) -> None:
    engine = make(chunk=24, min_retrieve_tokens=89)
    tokens = prompt(15, 125)
    engine.answered(tokens)
    assert engine.answered(tokens) == 120
    engine.answered(tokens[:40])
    assert engine.answered_warm(tokens) == 0  # 88 tokens beyond the engine's own 32


# ---- small memory -------------------------------------------------------------------------------------------------------


def test_store_that_is_refused_is_offered_again(make: Make) -> None:
    engine = make(chunk=24)
    tokens = prompt(16, 40)
    size = engine.scheduler._chunk_bytes
    store = engine.scheduler.store
    filler = ChunkKeys.from_bytes(random.Random(0).randbytes(32 * 2000))
    lease = store.reserve(bytes(32), filler, size)
    assert 0 < len(lease) < 2000
    name = engine.ask(tokens, max_tokens=30)
    for _ in range(3):
        engine.step()
    assert engine.requests[name].num_computed_tokens > 40
    assert in_store(engine, tokens) == 0
    lease.abort()
    engine.drain()
    assert in_store(engine, tokens) == 1


def evict(engine: Engine, tokens: list[int]) -> None:
    """From host memory, not from NVMe."""
    engine.scheduler.store.flush(10.0)
    for seed in range(10_000, 10_400):
        engine.answered(prompt(seed, 125))
        if engine.scheduler.store.lookup(keys_of(engine, tokens)).host == 0:
            break
    engine.scheduler.store.flush(10.0)
    engine.forget_blocks()
    found = engine.scheduler.store.lookup(keys_of(engine, tokens))
    assert (found.host, found.nvme) == (0, 5)


def test_promoted_while_queued(make: Make, tmp_path: Path) -> None:
    engine = make(chunk=24, directory=tmp_path / "kv")
    tokens = prompt(17, 125)
    engine.answered(tokens)
    evict(engine, tokens)
    name = engine.ask(tokens)  # starts to promote
    assert engine.scheduler._prefetched_bytes == 5 * engine.scheduler._chunk_bytes
    engine.drain()
    assert engine.hit_tokens[name] == 120


def test_what_was_refused_at_arrival_is_promoted_in_turn(make: Make, tmp_path: Path) -> None:
    """A request's budget is three chunks each time: at arrival, and when it is asked again."""
    engine = make(chunk=24, directory=tmp_path / "kv", promotion_budget_bytes=3 * (4096 + HEADER_BYTES))
    assert engine.scheduler._chunk_bytes == 4096
    tokens = prompt(29, 125)
    engine.answered(tokens)
    evict(engine, tokens)
    assert engine.answered(tokens) == 120


def test_promotion_of_a_queued_request_that_is_aborted(make: Make, tmp_path: Path) -> None:
    engine = make(chunk=24, directory=tmp_path / "kv")
    tokens = prompt(18, 125)
    engine.answered(tokens)
    evict(engine, tokens)
    engine.abort(engine.ask(tokens))
    assert engine.scheduler._prefetched_bytes == 0


def test_queued_requests_promote_no_more_than_a_quarter_of_the_memory(make: Make, tmp_path: Path) -> None:
    engine = make(chunk=24, directory=tmp_path / "kv", blocks=60)
    prompts = [prompt(19 + index, 125) for index in range(3)]
    for tokens in prompts:
        engine.answered(tokens)
    for tokens in prompts:
        evict(engine, tokens)
    limit = engine.config.host_bytes // 4 // engine.scheduler._chunk_bytes
    engine.scheduler._prefetched_bytes = (limit - 9) * engine.scheduler._chunk_bytes  # others', which are queued
    names = [engine.ask(tokens) for tokens in prompts]
    assert [engine.scheduler._states[name].prefetched_bytes > 0 for name in names] == [True, False, False]
    engine.drain()
    assert [engine.hit_tokens[name] for name in names] == [120, 120, 120]  # promoted when their turn came
    engine.scheduler._prefetched_bytes -= (limit - 9) * engine.scheduler._chunk_bytes


def test_nvme_that_shall_not_be_looked_up(make: Make, tmp_path: Path) -> None:
    engine = make(chunk=24, directory=tmp_path / "kv", retrieve_nvme=False)
    tokens = prompt(23, 125)
    engine.answered(tokens)
    evict(engine, tokens)
    assert engine.answered(tokens) == 0


# ---- resets, ends, events -----------------------------------------------------------------------------------------------


def test_reset_with_everything_under_way(make: Make) -> None:
    engine = make(chunk=24, blocks=80)
    tokens, other, third = prompt(60, 125), prompt(61, 100), prompt(62, 100)
    engine.answered(tokens)
    engine.forget_blocks()
    held = engine.hold()
    loading = engine.ask(tokens)
    engine.ask(other, max_tokens=20)
    for _ in range(4):
        engine.step()
    assert engine.requests[loading].status == LOADING
    assert len(held.held) >= 2
    committed = engine.stats["committed_chunks"]
    engine.scheduler.reset()
    new = engine.ask(third)
    held.end()
    engine.drain()
    assert engine.stats["committed_chunks"] == committed + 4, "only what arrived after the reset is stored"
    assert engine.hit_tokens[new] == 0
    assert (engine.answered(tokens), engine.answered(other)) == (0, 0)
    assert (engine.answered(tokens), engine.answered(other)) == (120, 96)


def test_shutdown_with_everything_under_way() -> None:
    engine = Engine(chunk=24, blocks=80, ranks=2)
    tokens = prompt(63, 125)
    engine.answered(tokens)
    engine.forget_blocks()
    helds = [engine.hold(rank=rank) for rank in range(2)]
    engine.ask(tokens)
    engine.ask(prompt(64, 100), max_tokens=20)
    for _ in range(4):
        engine.step()
    assert all(len(held.held) >= 2 for held in helds)
    engine.scheduler.shutdown()
    assert (engine.scheduler._states, engine.scheduler._jobs, engine.scheduler.stats()) == ({}, {}, None)
    engine.close()
    engine.close()
    with pytest.raises(LmcacheNativeError):
        engine.scheduler.store.lookup(keys_of(engine, tokens))


def test_same_id_again_while_its_store_is_under_way(make: Make) -> None:
    engine = make(chunk=24)
    tokens = prompt(65, 125)
    held = engine.hold("store")
    name = engine.ask(tokens)
    while name in engine.requests:
        engine.step()
    assert engine.scheduler._states[name].finished
    engine._names = iter([int(name[1:])])  # type: ignore[assignment]
    assert engine.ask(prompt(66, 125)) == name
    while name in engine.requests:
        engine.step()
    held.end()
    engine.drain()
    assert in_store(engine, tokens) == 5


def test_events(make: Make) -> None:
    engine = make(chunk=24, kv_events=True)
    tokens = prompt(67, 60)
    engine.answered(tokens)
    keys = list(keys_of(engine, tokens))
    stored = list(engine.scheduler.take_events())
    assert [event.block_hashes for event in stored] == [[keys[0]], [keys[1]]]
    assert [event.parent_block_hash for event in stored] == [None, keys[0]]
    assert [event.token_ids for event in stored] == [tokens[:24], tokens[24:48]]
    assert {(event.block_size, event.lora_id, event.medium) for event in stored} == {(24, None, "CPU")}
    engine.answered(tokens)
    assert list(engine.scheduler.take_events()) == []
    engine.scheduler.reset()
    assert [type(event) for event in engine.scheduler.take_events()] == [compat.AllBlocksCleared]


def test_no_events_unless_asked(make: Make) -> None:
    engine = make(chunk=24)
    engine.answered(prompt(68, 60))
    engine.scheduler.reset()
    assert list(engine.scheduler.take_events()) == []


# ---- at random ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("seed", range(12))
def test_random_days(make: Make, seed: int, ranks: int, tmp_path: Path) -> None:
    random_day(make, seed, ranks, tmp_path / "kv" if seed % 2 else None)


def random_day(
    make: Make,
    seed: int,
    ranks: int,
    directory: Path | None,
    also: Callable[[Engine, random.Random], None] = lambda _engine, _generator: None,
    **options: Any,
) -> Engine:
    """Arrivals, aborts, preemptions, resets, failed loads, slow copies, few blocks and a small arena. `also`: before each step."""
    generator = random.Random(seed)
    engine = make(
        chunk=generator.choice([8, 16, 24, 40]),
        ranks=ranks,
        blocks=generator.choice([24, 40, 80]),
        directory=directory,
        async_loading=seed % 3 != 2,
        layerwise=seed % 6 == 5,
        save_decode=seed % 2 == 0,
        save_partial_chunk=seed % 3 == 1,
        ahead=seed % 4 >= 2,
        **options,
    )
    if engine.config.async_loading:
        engine.fail_loads(generator, 0.1)
    for rank in range(ranks):
        engine.hold(None if engine.config.async_loading else "store", generator, rank)
    topics = [prompt(1000 + topic, 150) for topic in range(4)]
    for _ in range(400):
        event = generator.random()
        if event < 0.3 and len(engine.requests) < 6:
            head = generator.choice(topics)[: generator.randrange(10, 150)]
            engine.ask(head + prompt(generator.randrange(50), generator.randrange(60)), max_tokens=generator.randrange(1, 12))
        elif event < 0.34 and engine.requests:
            name = generator.choice(list(engine.requests))
            if engine.requests[name].status != RequestStatus.FINISHED_ABORTED:
                engine.abort(name)
        elif event < 0.38:
            running = [name for name, request in engine.requests.items() if request.status == RUNNING]
            if running:
                engine.preempt(generator.choice(running))
        elif event < 0.42:
            engine.forget_blocks()
        elif event < 0.423:
            engine.scheduler.reset()
        also(engine, generator)
        engine.step()
    engine.drain()
    assert sum(engine.hit_tokens.values()) > 200
    return engine
