"""Opens one engine's store, for the scheduler's side of either connector."""

from __future__ import annotations

import os
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from lmcache_native import Store, build_info
from lmcache_native.config import (
    GIB,
    NativeConfig,
    available_memory_bytes,
    describe_unowned,
    engine_daily_bytes,
    engine_directories,
    engine_directory_bytes,
    engine_nvme_bytes,
    unowned_stores,
    without_unowned,
)
from lmcache_native.errors import InvalidArgument, LmcacheNativeError, Unavailable
from lmcache_native.integration.vllm import gds
from lmcache_native.logging import get_logger

logger = get_logger(__name__)

TAKE_OVER_POLL_S = 0.2


class StoreOpening:
    """`config` must have passed check_machine()."""

    def __init__(self, vllm_config: Any, config: NativeConfig) -> None:
        self._vllm_config = vllm_config
        self._config = config
        self._engines = engines_sharing(vllm_config, config)
        self._index = vllm_config.parallel_config.data_parallel_index
        self._directories = engine_directories(config, self._index)
        local = vllm_config.parallel_config.data_parallel_rank_local
        first = None if local is None else self._index - local
        self._speaks = self._index % self._engines == 0 if local is None else local == 0  # for all engines of the node
        self._unowned = unowned_stores(config, self._index, self._engines, first=first)
        self._shared = without_unowned(config, self._unowned)

    def open(self, rank_bytes: int, *, replicated: bool = False) -> Store:
        """The store, served to the workers. `rank_bytes`: one rank's part of a chunk. `replicated`: all ranks share one part."""
        config = self._config
        world = self._vllm_config.parallel_config.world_size
        payload_bytes = rank_bytes if replicated else rank_bytes * world
        available = available_memory_bytes()
        if config.host_bytes > available:
            logger.warning(
                "host size %.2f GiB: %.2f GiB are available now, and the kernel ends a process when memory runs out. Lower the "
                "size, or raise the container's limit on memory",
                config.host_bytes / GIB,
                available / GIB,
            )
        if config.host_bytes < 2 * payload_bytes:
            raise InvalidArgument(
                f"host size {config.host_bytes / GIB:.3f} GiB (--kv-offloading-size, max_local_cpu_size): a chunk of this "
                f"model takes {payload_bytes / GIB:.3f} GiB, at least two must fit"
            )
        try:
            store = Store(
                host_bytes=config.host_bytes,
                directory=self._directories or None,
                nvme_bytes=engine_nvme_bytes(self._shared, self._engines),
                directory_bytes=engine_directory_bytes(self._shared, self._engines),
                nvme_daily_bytes=engine_daily_bytes(config, self._engines),
                nvme_free_floor_bytes=config.nvme_free_floor_bytes,
                admission=config.admission,
                verify=config.verify,
                write_deadline_s=config.write_deadline_s,
                rank_count=world,
                replicated=replicated,
                max_payload_bytes=payload_bytes,
                region_bytes=config.region_bytes,
                io_engine=config.io_engine,
                cache_policy=config.cache_policy,
                fail_when_locked=config.fail_when_locked,
                lock_wait_s=config.lock_wait_s,
                nvme_io_timeout_s=config.nvme_io_timeout_s,
                allow_network_file_system=config.allow_network_file_system,
                promotion_deadline_s=config.promotion_deadline_s,
                promotion_budget_bytes=config.promotion_budget_bytes,
                request_ttl_s=config.request_ttl_s,
                numa_nodes=self._numa_nodes(),
                hugetlb=config.hugetlb,
            )
        except InvalidArgument as error:
            given = f"--kv-offloading-size {config.host_bytes / GIB:g}"
            if self._directories:
                given += f", local_disk={_listed(self._directories)}, max_local_disk_size={config.nvme_bytes / GIB:g}"
                if self._shared is not config:
                    given += f" ({self._shared.nvme_bytes / GIB:g} left beside folders that no engine uses)"
            raise InvalidArgument(f"{given}: {error}") from error
        self._count_probes(store)
        store.serve(self._vllm_config.kv_transfer_config.engine_id, rank_bytes)
        return store

    def _count_probes(self, store: Store) -> None:
        if self._config.use_gds == "off" or not store.nvme_ready:
            return
        for number, directory in enumerate(self._directories):
            try:
                store.count_writes(number, gds.take_written_bytes(directory.parent))
            except (LmcacheNativeError, OSError) as error:
                logger.warning("what a probe for GPUDirect Storage wrote to %s is not in the day's count: %s", directory, error)

    def log_start(self, store: Store, serving: str, chunk: str) -> None:
        config = self._config
        nvme = "no NVMe"
        if self._directories:
            share = engine_nvme_bytes(self._shared, self._engines) / GIB
            shared = f" (1/{self._engines} of {self._shared.nvme_bytes / GIB:g})" if self._engines > 1 else ""
            state = (
                f"{store.stats()['recovered_chunks']} chunks found, {store.io_engine_note}" if store.nvme_ready else "not in use"
            )
            nvme = f"NVMe {_listed(self._directories)} {share:g} GiB{shared}: {state}"
        if config.instance_id is not None:
            serving += f" (instance {config.instance_id})"
        logger.info(
            "lmcache_native %s serving %s: host %.2f GiB, %s; %s",
            build_info()["version"],
            serving,
            config.host_bytes / GIB,
            nvme,
            chunk,
        )
        if store.nvme_warning:
            logger.warning("%s", store.nvme_warning)
        if store.stats()["nvme_waiting"]:
            threading.Thread(
                target=self._announce_take_over, args=(weakref.ref(store),), name="lmcn-take-over", daemon=True
            ).start()
        held = describe_unowned(config, self._unowned) if self._speaks else ""
        if held:
            logger.warning("%s", held)

    def _announce_take_over(self, store: weakref.ref[Store]) -> None:
        """One line when `store` is no longer waiting for its directories. Ends with the store."""
        directories = _listed(self._directories)
        while (held := store()) is not None:
            try:
                if not held.stats()["nvme_waiting"]:
                    if held.nvme_ready:
                        self._count_probes(held)
                        chunks = held.stats()["recovered_chunks"]
                        logger.info("NVMe %s taken over: %d chunks found, %s", directories, chunks, held.io_engine_note)
                    else:
                        logger.warning("NVMe %s not taken over: %s", directories, held.nvme_warning)
                    return
            except Unavailable:
                return  # closed
            del held
            time.sleep(TAKE_OVER_POLL_S)

    def _numa_nodes(self) -> list[int]:
        if self._config.numa_nodes is not None:
            return list(self._config.numa_nodes)
        if not self._config.numa_auto:
            return []
        try:
            return sorted(_nodes_of_devices(self._vllm_config))
        except OSError as error:
            logger.warning(
                "numa_mode auto: the GPUs' nodes cannot be found, host memory lies wherever the kernel puts it: %s", error
            )
            return []


def _listed(directories: tuple[Path, ...]) -> str:
    return ", ".join(map(str, directories))


def _nodes_of_devices(vllm_config: Any) -> set[int]:
    """NUMA nodes of this engine's GPUs; on the CPU, those that this process may run on."""
    if vllm_config.device_config.device_type == "cuda":
        import torch

        nodes = set()
        parallel = vllm_config.parallel_config
        first = (parallel.data_parallel_rank_local or 0) * parallel.world_size
        for index in range(first, first + parallel.world_size):
            properties = torch.cuda.get_device_properties(index)
            bus = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
            nodes.add(int(Path(f"/sys/bus/pci/devices/{bus}/numa_node").read_text(encoding="ascii")))
        return {node for node in nodes if node >= 0}
    allowed = os.sched_getaffinity(0)
    return {
        int(node.name.removeprefix("node"))
        for node in Path("/sys/devices/system/node").glob("node[0-9]*")
        if any((node / f"cpu{cpu}").exists() for cpu in allowed)
    }


def engines_sharing(vllm_config: Any, config: NativeConfig) -> int:
    """How many engines share the NVMe limit."""
    parallel = vllm_config.parallel_config
    if config.data_parallel_engines is not None:
        return config.data_parallel_engines
    if parallel.data_parallel_size > 1:
        return int(parallel.data_parallel_size)
    if parallel.data_parallel_index > 0 or str(vllm_config.kv_transfer_config.engine_id).endswith("_dp0"):
        if config.directory is None:
            return 1
        # vLLM tells an engine core of a dense model its index, but no longer how many there are.
        raise InvalidArgument(
            "data_parallel_engines missing (kv_connector_extra_config): with --data-parallel-size above 1, say how many engines "
            "divide max_local_disk_size among them (LMCACHE_NATIVE=1 with --kv-offloading-size says it by itself)"
        )
    return 1
