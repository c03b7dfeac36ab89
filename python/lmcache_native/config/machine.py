"""What the machine has: memory, file systems; and each engine's share of what was configured."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lmcache_native.config.values import GIB, UNLIMITED, NativeConfig
from lmcache_native.errors import InvalidArgument

# Control groups, version 2 and version 1: folder below /sys/fs/cgroup, its limit, what counts towards it.
_GROUPS = {
    "": ("", "memory.max", "memory.current"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}


def check_machine(config: NativeConfig, engines: int = 1) -> None:
    """Host size of `engines` on this node against memory, paths and limit against the file systems. Creates and changes nothing."""
    memory = memory_limit_bytes()
    if config.host_bytes * engines > memory:
        each = f" for each of {engines} engines" if engines > 1 else ""
        raise InvalidArgument(
            f"host size {config.host_bytes / GIB:.2f} GiB{each} (--kv-offloading-size, max_local_cpu_size): "
            f"this machine may use {memory / GIB:.2f} GiB of memory"
        )
    for directory in config.directories:
        _check_directory(directory)
    # One file system may hold several of the directories.
    needs: dict[int, tuple[Path, int]] = {}
    for directory, used in zip(config.directories, _shares(config), strict=True):
        existing = _existing(directory)
        first, before = needs.get(existing.stat().st_dev, (existing, 0))
        needs[existing.stat().st_dev] = (first, before + used)
    for existing, used in needs.values():
        total = shutil.disk_usage(existing).total
        if used > total:
            share = f", {used / GIB:g} of it there" if used != config.nvme_bytes else ""
            raise InvalidArgument(
                f"max_local_disk_size={config.nvme_bytes / GIB:g}{share}: "
                f"the file system of {existing} has {total / GIB:.1f} GiB in all"
            )


def _shares(config: NativeConfig) -> list[int]:
    """Bytes that may lie below each directory, as far as the number of engines is known."""
    places = len(config.directories)
    if places == 0:
        return []
    if config.directory_bytes:
        return list(config.directory_bytes)
    if config.striped:
        return [config.nvme_bytes // places] * places
    engines = config.data_parallel_engines or places
    share = engine_nvme_bytes(config, engines)
    return [share * len(range(i, engines, places)) for i in range(places)]


def _existing(directory: Path) -> Path:
    while not directory.exists():
        directory = directory.parent
    return directory


def _check_directory(directory: Path) -> None:
    existing = _existing(directory)
    if not existing.is_dir():
        raise InvalidArgument(f"local_disk={str(directory)!r}: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InvalidArgument(f"local_disk={str(directory)!r}: no permission to write in {existing}")


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """Physical memory, or the tightest limit of the control groups that this process is in when that is smaller. `root`: where proc
    and sys are."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for group, limit_file, _ in _control_groups(root):
        limit = min(limit, _number_in(group / limit_file) or limit)
    return limit


def available_memory_bytes(root: Path = Path("/")) -> int:
    """What the kernel says new programs can have without swapping, or what the control groups leave when that is less."""
    available = memory_limit_bytes(root)
    for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            available = min(available, int(rest.split()[0]) * 1024)
    for group, limit_file, used_file in _control_groups(root):
        limit, used = _number_in(group / limit_file), _number_in(group / used_file)
        if limit is not None and used is not None:
            reclaimable = _inactive_file_bytes(group / "memory.stat")
            available = min(available, max(0, limit - max(0, used - reclaimable)))
    return available


def _control_groups(root: Path) -> Iterator[tuple[Path, str, str]]:
    """Folder, limit file and usage file of each group from this process' own up. In a container the way up may not be there."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = ["0::/"]
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in set(controllers.split(",")) & set(_GROUPS):
            below, limit_file, used_file = _GROUPS[controller]
            top = root / "sys/fs/cgroup" / below
            own = Path(os.path.normpath(f"{top}/{path}"))
            way_up = [group for group in (own, *own.parents) if group == top or top in group.parents]
            for group in way_up or [top]:
                yield group, limit_file, used_file


def _inactive_file_bytes(stat: Path) -> int:
    """Page cache that a control group counts as used and gives up when memory is asked for: the weights just read, for one."""
    try:
        lines = stat.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    values = dict(line.split()[:2] for line in lines if len(line.split()) >= 2)
    return int(values.get("total_inactive_file", values.get("inactive_file", "0")))


def _number_in(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def engine_directories(config: NativeConfig, engine_index: int) -> tuple[Path, ...]:
    """The directories of one vLLM engine: each has one owner."""
    used = config.directories
    if used and not config.striped:
        used = (used[engine_index % len(used)],)
    return tuple(directory / f"vllm-dp{engine_index}" for directory in used)


def engine_nvme_bytes(config: NativeConfig, engines: int) -> int:
    """One engine's share of the limit of all."""
    return sum(engine_directory_bytes(config, engines)) or config.nvme_bytes // engines


def engine_directory_bytes(config: NativeConfig, engines: int) -> tuple[int, ...]:
    """One engine's limit in each of its directories, engine_nvme_bytes() in all; (): even shares of that."""
    return tuple(size // engines for size in config.directory_bytes)


def engine_daily_bytes(config: NativeConfig, engines: int) -> int:
    """One engine's share of the day's writes; UNLIMITED stays. Without a limit in the configuration: what the file systems hold."""
    if config.nvme_daily_bytes == UNLIMITED:
        return UNLIMITED
    total = config.nvme_daily_bytes
    if total == 0:
        places = {place.stat().st_dev: place for place in map(_existing, config.directories)}
        total = sum(shutil.disk_usage(place).total for place in places.values())
    return max(1, total // engines) if total else 0
