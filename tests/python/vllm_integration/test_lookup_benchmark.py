"""What vLLM's scheduler pays per key. Records, asserts no times; beside the floor of any manager in Python: a dict look-up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from world import HIT, MISS, World, keys

NAMES = range(1000)


@pytest.fixture(scope="module")
def world() -> World:
    filled = World(host_bytes=64 << 20)
    request = filled.request()
    for first in range(0, len(NAMES), 20):
        filled.stored(request, list(NAMES[first : first + 20]), list(range(20)))
    return filled


def scan(lookup: Callable[[bytes, Any], Any], names: list[bytes], request: Any) -> Any:
    result = None
    for key in names:
        result = lookup(key, request)
    return result


def test_first_scan_of_1000_hits(benchmark: Any, world: World) -> None:
    names = keys(*NAMES)

    def fresh() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (world.manager.lookup, names, world.request()), {}

    assert benchmark.pedantic(scan, setup=fresh, rounds=50) is HIT


def test_repeated_scan_of_1000_hits(benchmark: Any, world: World) -> None:
    request = world.request()
    assert benchmark(scan, world.manager.lookup, keys(*NAMES), request) is HIT
    world.manager.on_request_finished(request)


def test_first_scan_of_1000_misses(benchmark: Any, world: World) -> None:
    names = keys(*range(5000, 6000))

    def fresh() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (world.manager.lookup, names, world.request()), {}

    assert benchmark.pedantic(scan, setup=fresh, rounds=50) is MISS


def test_floor_dict_lookup_of_1000(benchmark: Any) -> None:
    names = keys(*NAMES)
    present = dict.fromkeys(names, 1)

    def lookup(key: bytes, _request: Any) -> Any:
        return HIT if key in present else MISS

    assert benchmark(scan, lookup, names, None) is HIT
