"""Whether this worker reads records from NVMe itself, by GPUDirect Storage: use_gds, what is installed, and what a probe found."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import lmcache_native
from lmcache_native import DeviceLoader, GdsPlugin, GdsProbe, PagedKvLayout, SlotLayout, probe_gds
from lmcache_native.config import NativeConfig, engine_directories
from lmcache_native.errors import LmcacheNativeError, Unavailable
from lmcache_native.integration.vllm.record_loader import RecordLoader
from lmcache_native.logging import get_logger

logger = get_logger(__name__)

PLUGIN = "liblmcn_gds.so"
PROBE_BYTES = 256 << 20


def record_loader(
    config: NativeConfig, vllm_config: Any, paged: PagedKvLayout, slot: SlotLayout, *, device_type: str, device: int, owner: object
) -> RecordLoader | None:
    """None: loads go through host memory. use_gds=on: Unavailable where GPUDirect Storage does not work, with what is missing."""
    directories = engine_directories(config, vllm_config.parallel_config.data_parallel_index)
    if config.use_gds == "off" or not directories or config.layerwise or not config.retrieve_nvme:
        return None
    try:
        if device_type != "cuda":
            raise Unavailable(f"the KV cache is on {device_type}, and it needs a CUDA device")
        plugin = load_plugin()
        for directory in config.directories:
            _judge(config, directory, _probe(directory, plugin, device))
        parallel = vllm_config.parallel_config
        loader = DeviceLoader.cuda(
            paged,
            slot,
            device=device,
            plugin=plugin,
            rank=parallel.rank,
            rank_count=parallel.world_size,
            buffer_bytes=config.gds_buffer_bytes,
            owner=owner,
        )
    except LmcacheNativeError as error:
        if config.use_gds == "on":
            raise Unavailable(f"use_gds=on: {error}") from error
        logger.log(20 if device_type == "cuda" else 10, "loads from NVMe go through host memory, not GPUDirect Storage: %s", error)
        return None
    return RecordLoader(loader, directories)


def load_plugin() -> GdsPlugin:
    """Unavailable: this wheel was built without it, or libkvikio is not there."""
    package = lmcache_native.__file__
    assert package is not None
    path = Path(package).with_name(PLUGIN)
    if not path.exists():
        raise Unavailable(f"this build of lmcache-native has no {PLUGIN}")
    try:
        importlib.import_module("libkvikio").load_library()
    except (ImportError, OSError) as error:
        raise Unavailable(f"libkvikio cannot be loaded ({error}): pip install 'lmcache-native[gds]'") from error
    return GdsPlugin.load(str(path))


def _probe(directory: Path, plugin: GdsPlugin, device: int) -> GdsProbe:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return probe_gds(str(directory), plugin, device, PROBE_BYTES)


def _judge(config: NativeConfig, directory: Path, probe: GdsProbe) -> None:
    """Unavailable: not used for this directory."""
    rates = f"GDS {probe.gds_read:.2f} GB/s, through host memory {probe.host_read:.2f} GB/s"
    logger.info("reads of %s: %s; mode %s (%s)", directory, rates, probe.mode, probe.reason)
    if probe.mode != "gds":
        raise Unavailable(f"{directory}: {probe.reason}")
    if config.use_gds == "auto" and not probe.use_gds:
        raise Unavailable(f"{directory}: it is no faster ({rates})")
