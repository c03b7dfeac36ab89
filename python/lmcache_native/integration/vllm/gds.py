"""Whether this worker reads records from NVMe itself, by GPUDirect Storage: use_gds, what is installed, and what a probe found."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from lmcache_native import DeviceLoader, PagedKvLayout, SlotLayout, gds
from lmcache_native.config import NativeConfig, engine_directories
from lmcache_native.errors import LmcacheNativeError, Unavailable
from lmcache_native.integration.vllm.layout import machine_id
from lmcache_native.integration.vllm.record_loader import RecordLoader
from lmcache_native.logging import get_logger

logger = get_logger(__name__)

PROBE_BYTES = 64 << 20  # of the scratch file, which is written twice
PROBE_TIMEOUT_S = 30.0


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
            owner=owner,
        )
    except (LmcacheNativeError, OSError) as error:
        if config.use_gds == "on":
            raise Unavailable(f"use_gds=on: {error}") from error
        logger.info("loads from NVMe go through host memory: %s", error)
        return None
    return RecordLoader(loader, directories)


def probe_once(directory: Path, device: int, config: NativeConfig) -> gds.GdsProbe:
    """One probe of a directory for all workers, until the machine is started anew: they must agree, and it writes to the drive.
    Kept in the user's cache folder. Unavailable: no room for it, or no answer in time."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmcache-native" / "gds"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    name = hashlib.sha256(f"{machine_id()} {directory} {directory.stat().st_dev}".encode()).hexdigest()[:32]
    until = time.monotonic() + 2 * PROBE_TIMEOUT_S
    with (cache / f"{name}.lock").open("w") as lock:
        while not _locked(lock.fileno()):
            if time.monotonic() > until:
                raise Unavailable(f"{directory}: another worker's probe does not end")
            time.sleep(0.05)
        kept = cache / f"{name}.json"
        try:
            return gds.GdsProbe(**json.loads(kept.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # none yet, or not one of ours
            found = _probe(directory, device, config)
        written = cache / f"{name}.tmp"
        written.write_text(json.dumps(dataclasses.asdict(found)), encoding="utf-8")
        written.replace(kept)
        return found


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _probe(directory: Path, device: int, config: NativeConfig) -> gds.GdsProbe:
    free = shutil.disk_usage(directory).free
    if free < config.nvme_free_floor_bytes + 2 * PROBE_BYTES:
        raise Unavailable(f"{directory}: {free >> 20} MiB are free, too few for a probe above the floor (local_disk_min_free)")
    result: list[gds.GdsProbe | Exception] = []

    def run() -> None:
        try:
            result.append(gds.probe(str(directory), device=device, file_bytes=PROBE_BYTES))
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
