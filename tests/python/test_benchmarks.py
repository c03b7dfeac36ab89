"""Times that the design names, recorded and never asserted: pytest tests/python/test_benchmarks.py --benchmark-only"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import lmcache_native as native

pytest.importorskip("pytest_benchmark")
np = pytest.importorskip("numpy")

TOKENS = 131_072
NAMESPACE = native.make_namespace("benchmark=1\n")
PAYLOAD_BYTES = 64 * 1024


def token_list() -> list[int]:
    generator = random.Random(7)
    return [generator.randrange(128_000) for _ in range(TOKENS)]


INPUTS: dict[str, Callable[[list[int]], Any]] = {
    "int32": lambda t: np.array(t, np.int32),  # goal: <= 0.5 ms
    "int64": lambda t: np.array(t, np.int64),
    "list": list,  # goal: <= 2.5 ms
}


@pytest.mark.parametrize("kind", INPUTS)
def test_hash_131072_tokens(benchmark: Any, kind: str) -> None:
    hasher = native.ChunkHasher(NAMESPACE)
    keys = benchmark(hasher.hash, INPUTS[kind](token_list()))
    assert len(keys) == TOKENS // 256


def test_derive_one_key(benchmark: Any) -> None:
    benchmark(native.KeyDeriver(NAMESPACE).derive, bytes(36))


@pytest.fixture
def store() -> Iterator[native.Store]:
    with native.Store(host_bytes=64 << 20) as store:
        yield store


def engine_keys(count: int) -> list[bytes]:
    return [i.to_bytes(36, "big") for i in range(count)]


def fill(store: native.Store, keys: list[bytes]) -> None:
    with store.reserve_engine_keys(NAMESPACE, keys, PAYLOAD_BYTES) as lease:
        for i in range(len(lease)):
            lease.mark_filled(i)
        assert lease.commit() == len(keys)


def test_request_lookup_repeated_hit(benchmark: Any, store: native.Store) -> None:
    """The scheduler's hot call, with its memo warm. Goal: <= 1.5 us."""
    keys = engine_keys(1)
    fill(store, keys)
    request = store.begin_request(NAMESPACE)
    assert benchmark(request.lookup, keys[0]) == native.Presence.HIT


def test_request_scan_of_100_keys(benchmark: Any, store: native.Store) -> None:
    """A new request's first scan: derives, looks up and pins each key once."""
    keys = engine_keys(100)
    fill(store, keys)

    def scan(request: native.Request) -> int:
        return sum(request.lookup(key) == 1 for key in keys)

    def setup() -> tuple[tuple[native.Request], dict[str, Any]]:
        return (store.begin_request(NAMESPACE),), {}

    assert benchmark.pedantic(scan, setup=setup, rounds=50) == 100


def test_store_lookup_of_1000_keys(benchmark: Any, store: native.Store) -> None:
    keys = engine_keys(900)
    fill(store, keys)
    derived = native.KeyDeriver(NAMESPACE).derive_all(engine_keys(1000))
    assert benchmark(store.lookup, derived).hit == 900


def test_reserve_and_abort_100(benchmark: Any, store: native.Store) -> None:
    keys = engine_keys(100)

    def reserve() -> int:
        with store.reserve_engine_keys(NAMESPACE, keys, PAYLOAD_BYTES) as lease:
            return len(lease.slot_offsets())

    assert benchmark(reserve) == 100


def test_put_2_mib(benchmark: Any, store: native.Store) -> None:
    data = np.zeros(2 << 20, np.uint8)
    numbers = iter(range(1_000_000))

    def put() -> bool:
        return store.put(next(numbers).to_bytes(8, "big"), data)

    assert benchmark.pedantic(put, rounds=20)


def test_get_2_mib(benchmark: Any, store: native.Store) -> None:
    data = np.zeros(2 << 20, np.uint8)
    out = np.empty_like(data)
    store.put(b"k", data)
    assert benchmark(store.get, b"k", out) is out
