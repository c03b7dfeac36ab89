"""Folders that engines of an earlier start left below the configured paths, and that no engine of this one uses: a server that had
more of them (--data-parallel-size), or divided its paths otherwise. What they hold is within the limit of all."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lmcache_native.config.machine import engine_directories
from lmcache_native.config.values import GIB, NativeConfig
from lmcache_native.errors import InvalidArgument

_NAME = re.compile(r"vllm-dp(\d{1,4})")
_MARKS = ("superblock", "data.000")


@dataclass(frozen=True, slots=True)
class Unowned:
    """`held_bytes`: space on the disk; of one that is in use, what its owner may come to hold. `place`: index of its parent in
    NativeConfig.directories."""

    folder: Path
    place: int
    held_bytes: int
    in_use: bool


def unowned_stores(config: NativeConfig, engine_index: int, engines: int, *, first: int | None = None) -> list[Unowned]:
    """As engine `engine_index` of `engines` on this node sees them; each of these engines sees the same. `first`: index of the
    node's first engine, where the caller knows it. Changes nothing."""
    first = engine_index // engines * engines if first is None else first
    owned = {folder for index in range(first, first + engines) for folder in engine_directories(config, index)}
    found: list[tuple[int, Path, int]] = []
    for place, directory in enumerate(config.directories):
        with contextlib.suppress(OSError):  # not made yet, or not readable: opening the store says so
            numbers = {entry: int(match[1]) for entry in sorted(directory.iterdir()) if (match := _NAME.fullmatch(entry.name))}
            found += [(place, folder, number) for folder, number in numbers.items() if folder not in owned]
    stores = [(place, folder, number) for place, folder, number in found if _is_store(folder)]
    used = {folder for _, folder, _ in stores if _in_use(folder)}
    # The server that uses them has at least so many engines; what each is allowed it may still take.
    least = max((number for _, folder, number in stores if folder in used), default=0) + 1
    return [
        Unowned(folder, place, max(_held_bytes(folder), _share(config, place, least) if folder in used else 0), folder in used)
        for place, folder, _ in stores
    ]


def _share(config: NativeConfig, place: int, engines: int) -> int:
    """What one of `engines` may hold in one of its directories."""
    if config.directory_bytes:
        return config.directory_bytes[place] // engines
    return config.nvme_bytes // engines // (len(config.directories) if config.striped else 1)


def without(config: NativeConfig, unowned: Sequence[Unowned]) -> NativeConfig:
    """`config` with the limits that are left to engines. InvalidArgument: nothing is."""
    held = sum(store.held_bytes for store in unowned)
    if held == 0:
        return config
    sizes = list(config.directory_bytes)
    for store in unowned if sizes else ():
        sizes[store.place] -= store.held_bytes
    if held >= config.nvme_bytes or any(size <= 0 for size in sizes):
        raise InvalidArgument(
            f"max_local_disk_size={config.nvme_bytes / GIB:g}: {held / GIB:.2f} GiB are held by folders that no engine of this "
            f"server uses; {_remedy(unowned)}"
        )
    return dataclasses.replace(config, nvme_bytes=config.nvme_bytes - held, directory_bytes=tuple(sizes))


def describe(config: NativeConfig, unowned: Sequence[Unowned]) -> str:
    """One line for the log; "" where next to nothing is held."""
    held = sum(store.held_bytes for store in unowned)
    if held < 1 << 20:
        return ""
    return (
        f"{held / GIB:.2f} GiB of max_local_disk_size={config.nvme_bytes / GIB:g} are held by folders that no engine of this "
        f"server uses (it had more, or other paths): the engines share the rest; {_remedy(unowned)}"
    )


def _remedy(unowned: Sequence[Unowned]) -> str:
    free = [f"lmcache-native clear {store.folder}" for store in unowned if not store.in_use and store.held_bytes]
    used = [str(store.folder) for store in unowned if store.in_use]
    parts = []
    if free:
        parts.append(f"to have the space back: {'; '.join(free)}")
    if used:
        parts.append(f"in use by another process: {', '.join(used)}")
    return "; ".join(parts)


def _is_store(folder: Path) -> bool:
    try:
        return not folder.is_symlink() and any((folder / mark).exists() for mark in _MARKS)
    except PermissionError:  # another user's: none of this server's
        return False


def _held_bytes(folder: Path) -> int:
    held = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # its owner has just replaced it
                held += entry.stat(follow_symlinks=False).st_blocks * 512
    return held


def _in_use(folder: Path) -> bool:
    try:
        lock = os.open(folder / "LOCK", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
