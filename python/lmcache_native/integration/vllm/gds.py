"""Whether this worker reads records from NVMe itself, by GPUDirect Storage: use_gds, what is installed, and what a probe found."""

from __future__ import annotations

from typing import Any

from lmcache_native import DeviceLoader, PagedKvLayout, SlotLayout, gds
from lmcache_native.config import NativeConfig, engine_directories
from lmcache_native.errors import LmcacheNativeError, Unavailable
from lmcache_native.integration.vllm.record_loader import RecordLoader
from lmcache_native.logging import get_logger

logger = get_logger(__name__)


def record_loader(
    config: NativeConfig, vllm_config: Any, paged: PagedKvLayout, slot: SlotLayout, *, device_type: str, device: int, owner: object
) -> RecordLoader | None:
    """None: loads go through host memory. use_gds=on: Unavailable where GPUDirect Storage does not work, with what is missing."""
    if config.use_gds == "off" or not config.directories or config.layerwise or not config.retrieve_nvme:
        return None
    if device_type != "cuda":
        if config.use_gds == "on":
            raise Unavailable(f"use_gds=on: the KV cache is on {device_type}, and GPUDirect Storage needs a CUDA device")
        return None
    parallel = vllm_config.parallel_config
    directories = engine_directories(config, parallel.data_parallel_index)
    try:
        plugin = _plugin_for(config, device)
        if plugin is None:
            return None
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
    except (LmcacheNativeError, OSError) as error:
        if config.use_gds == "on":
            raise Unavailable(f"use_gds=on: {error}") from error
        logger.info("loads from NVMe go through host memory: %s", error)
        return None
    return RecordLoader(loader, directories)


def _plugin_for(config: NativeConfig, device: int) -> str | None:
    """Path of the plugin; None: not used. Every directory must be better off with it. Unavailable: there is none."""
    plugin = gds.load_plugin()
    for directory in config.directories:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        choice = gds.choose(config.use_gds, str(directory), device=device)
        logger.info("loads from %s: %s", directory, choice.why)
        if not choice.use:
            return None
    return plugin
