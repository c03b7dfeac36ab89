"""Whether this worker reads records from NVMe itself, by GPUDirect Storage: use_gds, what is installed, and what a probe found."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lmcache_native import DeviceLoader, PagedKvLayout, SlotLayout, gds
from lmcache_native.config import NativeConfig, engine_directories
from lmcache_native.errors import LmcacheNativeError, ResourceExhausted, Unavailable
from lmcache_native.integration.vllm.layout import machine_id
from lmcache_native.integration.vllm.record_loader import RecordLoader
from lmcache_native.logging import get_logger

logger = get_logger(__name__)

PROBE_BYTES = 64 << 20  # of the scratch file, which is written twice
PROBE_TIMEOUT_S = 30.0
READS_OF_DRIVE = 8  # at once
MOST_READS = 64  # that DeviceLoader takes


def record_loader(
    config: NativeConfig,
    vllm_config: Any,
    paged: PagedKvLayout,
    slot: SlotLayout,
    *,
    device_type: str,
    device: int,
    owner: object,
    replicated: bool = False,
) -> RecordLoader | None:
    """None: loads go through host memory. use_gds=on: Unavailable where GPUDirect Storage does not work, with what is missing.
    `replicated`: every rank reads the one part of a record."""
    if config.use_gds == "off" or not config.directories or config.layerwise or not config.retrieve_nvme:
        return None
    if device_type != "cuda":
        if config.use_gds == "on":
            raise Unavailable(f"use_gds=on: the KV cache is on {device_type}, and GPUDirect Storage needs a CUDA device")
        return None
    parallel = vllm_config.parallel_config
    directories = engine_directories(config, parallel.data_parallel_index)
    try:
        plugin = gds.load_plugin()
        check_room(config.gds_buffer_bytes, vllm_config.cache_config, *memory_of(device))
        for directory in directories:
            choice = gds.judge(config.use_gds, str(directory.parent), probe_once(directory.parent, device, config))
            logger.info("loads from %s: %s", directory.parent, choice.why)
            if not choice.use:
                return None
        loader = DeviceLoader.cuda(
            paged,
            slot,
            device=device,
            plugin=plugin,
            rank=0 if replicated else parallel.rank,
            rank_count=1 if replicated else parallel.world_size,
            buffer_bytes=config.gds_buffer_bytes,
            in_flight=min(READS_OF_DRIVE * len(directories), MOST_READS),
            files=len(directories),
            owner=owner,
        )
    except (LmcacheNativeError, OSError) as found:
        error: Exception = found
        if isinstance(found, ResourceExhausted):
            error = ResourceExhausted(f"{found}; lower gds_buffer_size or vLLM's gpu_memory_utilization")
        if config.use_gds == "on":
            raise Unavailable(f"use_gds=on: {error}") from error
        logger.info("loads from NVMe go through host memory: %s", error)
        return None
    return RecordLoader(loader, directories)


def memory_of(device: int) -> tuple[int, int]:
    """Free and total bytes of a CUDA device."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return free, total


def check_room(staging_bytes: int, cache_config: Any, free_bytes: int, total_bytes: int) -> None:
    """vLLM has sized its cache before any connector exists in a worker, and captures graphs afterwards: staging memory comes from
    what vLLM's share of the device leaves to others, and must be free. ResourceExhausted."""
    room, share = free_bytes, "kv_cache_memory_bytes"
    if not cache_config.kv_cache_memory_bytes:
        utilization = cache_config.gpu_memory_utilization
        room = min(room, int(total_bytes * (1 - utilization)))
        share = f"gpu_memory_utilization={utilization:g}"
    if staging_bytes > room:
        raise ResourceExhausted(
            f"gds_buffer_size is {staging_bytes >> 20} MiB, {share} leaves room for {room >> 20} MiB of device memory "
            f"({free_bytes >> 20} of {total_bytes >> 20} MiB are free)"
        )


def probe_once(directory: Path, device: int, config: NativeConfig) -> gds.GdsProbe:
    """One probe of a directory for all workers, which must agree, and for later starts: it writes to the drive. Kept in the user's
    cache folder for as long as everything that decides it stays; that there is no GDS, which costs no writes to find out, until the
    machine is started anew. Unavailable: no room for it, or no answer in time."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    ground = grounds(directory, device)
    with _one_at_a_time(directory) as file:
        kept = file.with_suffix(".json")
        found = _kept(kept, ground)
        if found is None:
            _check_floor(directory, config)
            uncounted = file.with_suffix(".written")
            before = _uncounted(uncounted)
            uncounted.write_text(str(before + 2 * PROBE_BYTES), encoding="utf-8")  # first: the probe may be killed
            found = _probe(directory, device)
            if found.mode != "gds" and found.host_write == 0:  # nothing was written
                uncounted.write_text(str(before), encoding="utf-8")
            written = file.with_suffix(".tmp")
            verdict = {"grounds": ground, "boot": machine_id(), "probe": dataclasses.asdict(found)}
            written.write_text(json.dumps(verdict), encoding="utf-8")
            written.replace(kept)
        return found


def take_written_bytes(directory: Path) -> int:
    """What probes of a directory have written since the last call: for the day's count of the store that opens there."""
    if not _verdict(directory).with_suffix(".written").exists():
        return 0
    with _one_at_a_time(directory) as file:
        uncounted = file.with_suffix(".written")
        written = _uncounted(uncounted)
        uncounted.unlink(missing_ok=True)
    return written


def _uncounted(file: Path) -> int:
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0


def _verdict(directory: Path) -> Path:
    """The name, without an ending, of what is kept about a directory. Unavailable."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmcache-native" / "gds"
    except RuntimeError as error:  # a user without a home, as in containers
        raise Unavailable("no cache folder: neither XDG_CACHE_HOME nor HOME is set") from error
    machine = _text("/etc/machine-id") or machine_id()
    return cache / hashlib.sha256(f"{machine} {directory}".encode()).hexdigest()[:32]


@contextlib.contextmanager
def _one_at_a_time(directory: Path) -> Iterator[Path]:
    """_verdict(), for this process alone meanwhile. Unavailable."""
    file = _verdict(directory)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    until = time.monotonic() + 2 * PROBE_TIMEOUT_S
    with file.with_suffix(".lock").open("w") as lock:
        while not _locked(lock.fileno()):
            if time.monotonic() > until:
                raise Unavailable(f"{directory}: another worker's probe does not end")
            time.sleep(0.05)
        yield file


def _kept(file: Path, ground: dict[str, str]) -> gds.GdsProbe | None:
    try:
        verdict = json.loads(file.read_text(encoding="utf-8"))
        found = gds.GdsProbe(**verdict["probe"])
        valid = verdict["grounds"] == ground and (found.mode == "gds" or verdict["boot"] == machine_id())
    except (OSError, ValueError, TypeError, KeyError):  # none yet, or not one of ours
        return None
    return found if valid else None


def grounds(directory: Path, device: int) -> dict[str, str]:
    """What decides a probe: machine, file system, GPU, drivers, cuFile's configuration, and what reads."""
    system = os.statvfs(directory)
    environment = {name: value for name, value in sorted(os.environ.items()) if name.startswith(("CUFILE_", "KVIKIO_"))}
    return {
        "machine": _text("/etc/machine-id") or machine_id(),
        "file system": f"{directory.stat().st_dev} {system.f_fsid} {system.f_blocks}",
        "device": _device_name(device),
        "kernel": os.uname().release,
        "driver": _text("/proc/driver/nvidia/version"),
        "nvidia-fs": _text("/proc/driver/nvidia-fs/version") or _text("/sys/module/nvidia_fs/version"),
        "cufile.json": _text(os.environ.get("CUFILE_ENV_PATH_JSON") or "/etc/cufile.json"),
        "environment": json.dumps(environment),
        "version": gds_version(),
    }


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _device_name(device: int) -> str:
    if device < 0:
        return "host memory"
    import torch

    return str(torch.cuda.get_device_name(device))


def gds_version() -> str:
    """Of this package and of kvikio."""
    try:
        return f"{version('lmcache-native')} {version('libkvikio-cu13')}"
    except PackageNotFoundError:
        return ""


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _check_floor(directory: Path, config: NativeConfig) -> None:
    free = shutil.disk_usage(directory).free
    if free < config.nvme_free_floor_bytes + 2 * PROBE_BYTES:
        raise Unavailable(f"{directory}: {free >> 20} MiB are free, too few for a probe above the floor (local_disk_min_free)")


def _probe(directory: Path, device: int) -> gds.GdsProbe:
    result: list[gds.GdsProbe | Exception] = []

    def run() -> None:
        try:
            result.append(gds.probe(str(directory), device=device, file_bytes=PROBE_BYTES, measure_without_gds=False))
        except (LmcacheNativeError, OSError) as error:
            result.append(error)

    thread = threading.Thread(target=run, name="gds-probe", daemon=True)  # a drive that does not answer keeps it
    thread.start()
    thread.join(PROBE_TIMEOUT_S)
    if not result:
        raise Unavailable(f"{directory}: no answer to a probe within {PROBE_TIMEOUT_S:.0f} s")
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]
