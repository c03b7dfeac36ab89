"""Shared fixtures of the Python API's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lmcache_native as native

MIB = 1 << 20
StoreMaker = Callable[..., native.Store]


@pytest.fixture
def namespace() -> bytes:
    return native.make_namespace("test=1\n")


@pytest.fixture
def make_store() -> Iterator[StoreMaker]:
    """Opens stores that are closed when the test ends."""
    opened: list[native.Store] = []

    def make(**options: Any) -> native.Store:
        store = native.Store(**{"host_bytes": 16 * MIB, **options})
        opened.append(store)
        return store

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def store(make_store: StoreMaker) -> native.Store:
    return make_store()


@pytest.fixture
def nvme_options(tmp_path: Path) -> dict[str, Any]:
    return {"directory": tmp_path / "nvme", "nvme_bytes": 96 * MIB, "max_payload_bytes": MIB}
