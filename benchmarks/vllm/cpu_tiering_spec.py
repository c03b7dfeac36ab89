"""vLLM's own tiered offloading, made to run on the CPU: the peer of ttft.py.

vLLM's, unchanged: TieringOffloadingSpec and its manager, lookups, eviction and promotion; the shared region in /dev/shm with its
views; the `fs` tier with its 16 + 16 threads, its files and their O_DIRECT; connector and scheduler around them.

Ours: `get_worker`, because vLLM's refuses a machine without a GPU, and MemcpyWorker, which it returns: `memmove` of whole engine
pages between the engine's tensors and the shared region, in one thread of its own. So copies overlap with the engine's steps, as
vLLM's own do on a GPU's stream, and are in order. A chunk is one engine block. What the peer's numbers say of this worker's speed
they say of us; what they say of tiers, files and scheduling they say of vLLM.
"""

from __future__ import annotations

import ctypes
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class MemcpyWorker(OffloadingWorker):  # type: ignore[misc, unused-ignore]
    """Called by one thread, vLLM's worker. A job that raises does so again in `get_finished`, which ends the engine."""

    def __init__(self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion) -> None:
        self._engine = [cache.tensor for cache in kv_caches.tensors]
        self._host = [region.create_next_worker_view(cache.page_size_bytes) for cache in kv_caches.tensors]
        self._page_bytes = [cache.page_size_bytes for cache in kv_caches.tensors]
        self._region = region
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._jobs: dict[int, Future[TransferResult]] = {}

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._submit(job_id, self._engine, src_spec, self._host, dst_spec)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._submit(job_id, self._host, src_spec, self._engine, dst_spec)

    def get_finished(self) -> list[TransferResult]:
        ended = [job_id for job_id, job in self._jobs.items() if job.done()]
        return [self._jobs.pop(job_id).result() for job_id in ended]

    def wait(self, job_ids: set[int]) -> None:
        for job_id in job_ids:
            if job_id in self._jobs:
                self._jobs[job_id].exception()

    def shutdown(self) -> None:
        self._thread.shutdown()
        self._host.clear()
        self._region.cleanup()

    def _submit(self, job_id: int, sources: Any, src_spec: Any, targets: Any, dst_spec: Any) -> bool:
        source_ids, target_ids = src_spec.block_ids.tolist(), dst_spec.block_ids.tolist()
        self._jobs[job_id] = self._thread.submit(self._copy, job_id, sources, source_ids, targets, target_ids)
        return True

    def _copy(self, job_id: int, sources: Any, source_ids: list[int], targets: Any, target_ids: list[int]) -> TransferResult:
        begin = time.perf_counter()
        for source, target, page_bytes in zip(sources, targets, self._page_bytes, strict=True):
            source_base, source_stride = source.data_ptr(), source.stride(0)
            target_base, target_stride = target.data_ptr(), target.stride(0)
            for source_id, target_id in zip(source_ids, target_ids, strict=True):
                ctypes.memmove(target_base + target_id * target_stride, source_base + source_id * source_stride, page_bytes)
        return TransferResult(
            job_id=job_id,
            success=True,
            transfer_size=sum(self._page_bytes) * len(source_ids),
            transfer_time=max(time.perf_counter() - begin, 1e-9),
        )


class CpuTieringSpec(TieringOffloadingSpec):  # type: ignore[misc, unused-ignore]
    def get_worker(self, kv_caches: CanonicalKVCaches) -> MemcpyWorker:
        if self.blocks_per_chunk != 1:
            raise ValueError(f"block_size makes chunks of {self.blocks_per_chunk} engine blocks; this worker copies chunks of 1")
        if self._worker is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=0 if self.replicated_layout else self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker: MemcpyWorker | None = MemcpyWorker(kv_caches, region)
        return self._worker
