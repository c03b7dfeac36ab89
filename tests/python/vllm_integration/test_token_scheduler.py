"""Scheduler side and workers of LMCacheNativeConnector together: every byte that a forward pass reads is checked."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from token_world import Engine
from vllm.v1.request import RequestStatus


@pytest.fixture
def make() -> Iterator[Any]:
    engines: list[Engine] = []

    def make_one(**options: Any) -> Engine:
        engines.append(Engine(**options))
        return engines[-1]

    yield make_one
    for engine in engines:
        engine.drain()
        engine.check_nothing_is_left()
        engine.close()


def prompt(seed: int, length: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(500) for _ in range(length)]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("chunk", [8, 16, 24, 40])
def test_load_after_the_engine_forgot(make: Any, chunk: int, ranks: int) -> None:
    engine = make(chunk=chunk, ranks=ranks)
    tokens = prompt(1, 125)
    assert engine.answered(tokens) == 0
    engine.forget_blocks()
    assert engine.answered(tokens) == 124 // chunk * chunk
    engine.forget_blocks()
    engine.answered(tokens[:40])  # the engine has two blocks, which may end within a chunk
    assert engine.answered(tokens) == 124 // chunk * chunk - 32


@pytest.mark.parametrize("config", [{"async_loading": False}, {"async_loading": False, "layerwise": True}])
def test_load_within_the_step(make: Any, config: dict[str, Any]) -> None:
    engine = make(chunk=24, ranks=2, **config)
    tokens = prompt(2, 125)
    engine.answered(tokens)
    engine.forget_blocks()
    assert engine.answered(tokens) == 120


def test_rank_that_fails_to_store_is_not_published(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(chunk=24, ranks=2)
    tokens = prompt(3, 125)
    with monkeypatch.context() as patch:
        patch.setattr(engine.workers[1], "attached", lambda: (_ for _ in ()).throw(unavailable()))
        engine.answered(tokens)
    assert engine.scheduler.store.stats()["committed_chunks"] == 0
    engine.forget_blocks()
    assert engine.answered(tokens) == 0
    engine.forget_blocks()
    assert engine.answered(tokens) == 120


def unavailable() -> Exception:
    from lmcache_native.errors import Unavailable

    return Unavailable("planted")


def test_rank_that_fails_to_load_is_recomputed(make: Any) -> None:
    engine = make(chunk=24, ranks=2)
    tokens = prompt(4, 125)
    engine.answered(tokens)
    engine.forget_blocks()
    engine._fail_loads_of(1, engine.workers[1], random.Random(1), 1.0)
    engine.answered(tokens)  # its forward passes check what they read
    assert engine.scheduler.store.stats()["committed_chunks"] == 5


def test_second_request_waits_for_the_first_ones_load(make: Any) -> None:
    engine = make(chunk=24, blocks=60)
    tokens = prompt(5, 125)
    engine.answered(tokens)
    engine.forget_blocks()
    first, second = engine.ask(tokens), engine.ask([*tokens, 7, 7, 7])
    engine.step()
    assert engine.requests[first].status == RequestStatus.WAITING_FOR_REMOTE_KVS
    assert engine.requests[second].status == RequestStatus.WAITING
    engine.drain()
    assert (engine.hit_tokens[first], engine.hit_tokens[second]) == (120, 8)  # 112 of 120 are whole blocks


def test_promoted_while_queued(make: Any, tmp_path: Path) -> None:
    engine = make(chunk=24, directory=tmp_path / "kv")
    tokens = prompt(6, 125)
    engine.answered(tokens)
    engine.scheduler.store.flush(10.0)
    for seed in range(100, 400):
        engine.answered(prompt(seed, 125))
        if engine.scheduler.store.lookup(engine_keys(engine, tokens)).host == 0:
            break
    engine.scheduler.store.flush(10.0)
    engine.forget_blocks()
    found = engine.scheduler.store.lookup(engine_keys(engine, tokens))
    assert (found.host, found.nvme) == (0, 5)
    name = engine.ask(tokens)  # starts to promote
    assert engine.scheduler._prefetched_bytes > 0
    engine.drain()
    assert engine.hit_tokens[name] == 120


def engine_keys(engine: Engine, tokens: list[int]) -> Any:
    from lmcache_native import ChunkHasher

    return ChunkHasher(engine.scheduler.namespaces.of(None), engine.config.chunk_tokens).hash(tokens)


def test_reset_with_everything_under_way(make: Any) -> None:
    engine = make(chunk=24, blocks=80)
    tokens = prompt(7, 125)
    engine.answered(tokens)
    engine.forget_blocks()
    engine.ask(tokens)
    engine.ask(prompt(8, 100), max_tokens=20)
    engine.step()
    engine.scheduler.reset()
    engine.drain()
    engine.forget_blocks()
    assert engine.answered(tokens) == 0


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_random_days(make: Any, seed: int, ranks: int, tmp_path: Path) -> None:
    """Arrivals, aborts, preemptions, resets, failed loads, few blocks and a small arena; each forward pass checks what it reads."""
    generator = random.Random(seed)
    engine = make(
        chunk=generator.choice([8, 16, 24, 40]),
        ranks=ranks,
        blocks=generator.choice([24, 40, 80]),
        directory=tmp_path / "kv" if seed % 2 else None,
        async_loading=seed % 3 != 2,
        save_decode=seed % 2 == 0,
        save_partial_chunk=seed % 3 == 1,
    )
    if engine.config.async_loading:
        engine.fail_loads(generator, 0.1)
    topics = [prompt(1000 + topic, 150) for topic in range(4)]
    hits = 0
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
            running = [name for name, request in engine.requests.items() if request.status == RequestStatus.RUNNING]
            if running:
                engine.preempt(generator.choice(running))
        elif event < 0.42:
            engine.forget_blocks()
        elif event < 0.423:
            engine.scheduler.reset()
        engine.step()
    engine.drain()
    hits = sum(engine.hit_tokens.values())
    assert hits > 200
