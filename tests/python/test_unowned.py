"""Folders that an earlier start left: what they hold is within the limit of all. Real stores, one for each engine of a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import lmcache_native as native
from lmcache_native import InvalidArgument
from lmcache_native.config import (
    NativeConfig,
    describe_unowned,
    engine_directories,
    engine_directory_bytes,
    engine_nvme_bytes,
    unowned_stores,
    without_unowned,
)

MIB = 1 << 20
LIMIT = 256 * MIB
PAYLOAD = bytes(range(256)) * 3840  # 960 KiB


def allocated(folder: Path) -> int:
    return sum(entry.stat().st_blocks * 512 for entry in folder.iterdir())


@contextmanager
def engines(config: NativeConfig, count: int) -> Iterator[list[native.Store]]:
    """Opened as a server of `count` engines opens them."""
    with ExitStack() as stack:
        stores = []
        for index in range(count):
            left = without_unowned(config, unowned_stores(config, index, count))
            stores.append(
                native.Store(
                    host_bytes=16 * MIB,
                    max_payload_bytes=MIB,
                    region_bytes=4 * MIB,
                    directory=engine_directories(config, index),
                    nvme_bytes=engine_nvme_bytes(left, count),
                    directory_bytes=engine_directory_bytes(left, count),
                    nvme_free_floor_bytes=0,
                    nvme_daily_bytes=2**64 - 1,
                    admission="always",
                    fail_when_locked=True,
                )
            )
            stack.callback(stores[-1].close)
        yield stores


def fill(store: native.Store, chunks: int) -> None:
    for number in range(chunks):
        assert store.put(number.to_bytes(4, "little"), PAYLOAD)
        if number % 8 == 7:
            store.flush()
    store.flush()


@pytest.mark.parametrize(("before", "after"), [(4, 1), (4, 2), (2, 4)])
def test_the_limit_holds_over_restarts_with_other_numbers(tmp_path: Path, before: int, after: int) -> None:
    config = NativeConfig(host_bytes=16 * MIB, directories=(tmp_path,), nvme_bytes=LIMIT)
    with engines(config, before) as stores:
        for store in stores:
            fill(store, 2 * LIMIT // before // MIB)
    total = sum(allocated(folder) for folder in tmp_path.iterdir())
    assert LIMIT // 2 < total <= LIMIT
    left = unowned_stores(config, 0, after)
    assert [found.folder.name for found in left] == [f"vllm-dp{index}" for index in range(after, before)]
    assert [found.held_bytes for found in left] == [allocated(found.folder) for found in left]
    assert unowned_stores(config, after - 1, after) == left, "every engine sees the same"
    said = describe_unowned(config, left)
    assert all(f"lmcache-native clear {found.folder}" in said for found in left)
    assert (said == "") == (after >= before)
    with engines(config, after) as stores:
        assert sum(allocated(folder) for folder in tmp_path.iterdir()) <= LIMIT, "also right after the start"
        for store in stores:
            fill(store, 2 * LIMIT // after // MIB)
        assert sum(allocated(folder) for folder in tmp_path.iterdir()) <= LIMIT
        assert sum(store.stats()["nvme_limit_bytes"] for store in stores) <= LIMIT - sum(found.held_bytes for found in left)
    for found in left:
        native._native.clear_store(str(found.folder))
    assert describe_unowned(config, unowned_stores(config, 0, after)) == ""


def test_one_that_is_in_use_counts_with_all_it_may_take(tmp_path: Path) -> None:
    config = NativeConfig(host_bytes=16 * MIB, directories=(tmp_path,), nvme_bytes=LIMIT)
    with engines(config, 4):
        left = unowned_stores(config, 0, 2)
        assert [(found.folder.name, found.in_use, found.held_bytes) for found in left] == [
            ("vllm-dp2", True, LIMIT // 4),
            ("vllm-dp3", True, LIMIT // 4),
        ]
        assert "in use by another process" in describe_unowned(config, left)
        assert "clear" not in describe_unowned(config, left)
    assert not any(found.in_use for found in unowned_stores(config, 0, 2))


def test_over_several_directories_it_counts_with_its_part_of_each(tmp_path: Path) -> None:
    places = (tmp_path / "a", tmp_path / "b")
    config = NativeConfig(host_bytes=16 * MIB, directories=places, nvme_bytes=LIMIT)
    sized = NativeConfig(host_bytes=16 * MIB, directories=places, nvme_bytes=LIMIT, directory_bytes=(LIMIT // 4, LIMIT // 4 * 3))
    with engines(config, 2):
        assert [found.held_bytes for found in unowned_stores(config, 0, 1)] == [LIMIT // 4, LIMIT // 4]
        assert without_unowned(config, unowned_stores(config, 0, 1)).nvme_bytes == LIMIT // 2
        assert [found.held_bytes for found in unowned_stores(sized, 0, 1)] == [LIMIT // 8, LIMIT // 8 * 3]


def test_folders_of_long_ago_do_not_tell_how_many_engines_another_server_has(tmp_path: Path) -> None:
    config = NativeConfig(host_bytes=16 * MIB, directories=(tmp_path,), nvme_bytes=LIMIT)
    with engines(config, 8):
        pass
    with engines(config, 2):
        held = {found.folder.name: found.held_bytes for found in unowned_stores(config, 0, 1)}
        assert held["vllm-dp1"] >= LIMIT // 2 - 8 * MIB
        assert held["vllm-dp7"] < 8 * MIB


def test_a_folder_that_cannot_be_read_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = NativeConfig(host_bytes=16 * MIB, directories=(tmp_path,), nvme_bytes=LIMIT)
    with engines(config, 4):
        pass
    exists = Path.exists

    def refused(self: Path, **how: bool) -> bool:
        if self.parent.name == "vllm-dp1":
            raise PermissionError(13, "Permission denied", str(self))
        return exists(self, **how)

    monkeypatch.setattr(Path, "exists", refused)
    assert [found.folder.name for found in unowned_stores(config, 0, 1)] == ["vllm-dp2", "vllm-dp3"]


def test_nothing_left_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    config = NativeConfig(host_bytes=16 * MIB, directories=(tmp_path,), nvme_bytes=LIMIT)
    with engines(config, 2) as stores:
        fill(stores[1], LIMIT // 2 // MIB)
    less = NativeConfig(host_bytes=16 * MIB, directories=(tmp_path,), nvme_bytes=64 * MIB)
    with pytest.raises(InvalidArgument, match=f"no engine of this server uses; .*lmcache-native clear {tmp_path}/vllm-dp1"):
        without_unowned(less, unowned_stores(less, 0, 1))


def test_each_directory_keeps_its_own_limit(tmp_path: Path) -> None:
    places = (tmp_path / "a", tmp_path / "b")
    config = NativeConfig(host_bytes=16 * MIB, directories=places, nvme_bytes=LIMIT, directory_bytes=(LIMIT // 4, LIMIT // 4 * 3))
    with engines(config, 2) as stores:
        fill(stores[1], LIMIT // 2 // MIB)
    left = without_unowned(config, unowned_stores(config, 0, 1))
    assert left.directory_bytes == tuple(
        size - allocated(place / "vllm-dp1") for place, size in zip(places, config.directory_bytes, strict=True)
    )
    assert sum(left.directory_bytes) == left.nvme_bytes


def test_engines_that_take_directories_in_turn(tmp_path: Path) -> None:
    """by_engine after by_gpu: engine 0's part of the second directory is nobody's any more."""
    places = (tmp_path / "a", tmp_path / "b")
    both = NativeConfig(host_bytes=16 * MIB, directories=places, nvme_bytes=LIMIT)
    with engines(both, 2):
        pass
    turns = NativeConfig(host_bytes=16 * MIB, directories=places, nvme_bytes=LIMIT, striped=False)
    assert [found.folder for found in unowned_stores(turns, 0, 2)] == [places[0] / "vllm-dp1", places[1] / "vllm-dp0"]


def test_what_is_not_a_store_of_ours_is_not_looked_into(tmp_path: Path) -> None:
    config = NativeConfig(host_bytes=16 * MIB, directories=(tmp_path, tmp_path / "absent"), nvme_bytes=LIMIT)
    (tmp_path / "vllm-dp1").mkdir()
    (tmp_path / "vllm-dp1" / "file").write_bytes(b"x" * MIB)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "superblock").write_bytes(b"x")
    (tmp_path / "vllm-dp2").symlink_to(tmp_path / "other")
    assert unowned_stores(config, 0, 1) == []


def test_engines_of_another_node_are_none_of_ours(tmp_path: Path) -> None:
    """data_parallel_engines counts a node's; vLLM's index counts all."""
    config = NativeConfig(host_bytes=16 * MIB, directories=(tmp_path,), nvme_bytes=LIMIT)
    for index in range(2, 5):
        native.Store(
            host_bytes=16 * MIB, max_payload_bytes=MIB, directory=tmp_path / f"vllm-dp{index}", nvme_bytes=96 * MIB
        ).close()
    assert [found.folder.name for found in unowned_stores(config, 3, 2)] == ["vllm-dp4"]
    assert unowned_stores(config, 3, 3, first=2) == [], "nodes with different numbers of engines"
