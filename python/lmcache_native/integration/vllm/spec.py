"""NativeOffloadingSpec: hands vLLM the manager and the worker. Used by NativeOffloadingConnector."""

from __future__ import annotations

import os
from typing import Any

from lmcache_native.config import resolve
from lmcache_native.integration.vllm import compat, stats
from lmcache_native.integration.vllm.manager import NativeOffloadingManager
from lmcache_native.integration.vllm.worker import NativeOffloadingWorker

NAME = "NativeOffloadingSpec"


class NativeOffloadingSpec(compat.OffloadingSpec):  # type: ignore[misc]
    """`config`: vLLM's OffloadingConfig."""

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        return stats.definitions()

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._manager: NativeOffloadingManager | None = None
        self._worker: NativeOffloadingWorker | None = None
        self.replicated = False  # set before get_worker(): all ranks share one part of a slot

    def get_manager(self) -> NativeOffloadingManager:
        if self._manager is None:
            self._manager = NativeOffloadingManager()
        return self._manager

    def get_worker(self, kv_caches: Any) -> NativeOffloadingWorker:
        if self._worker is None:
            self._worker = NativeOffloadingWorker(
                kv_caches,
                engine_id=self.config.engine_id,
                rank=self.config.parallel.rank,
                ranks=self.config.parallel.world_size,
                blocks_per_chunk=self.blocks_per_chunk,
                copy_threads=resolve(self.extra_config, os.environ).copy_threads,
                replicated=self.replicated,
            )
        return self._worker


compat.register_spec(NAME, __name__)
