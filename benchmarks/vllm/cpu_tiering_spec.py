"""vLLM's own tiered offloading, made to run on the CPU: the peer of ttft.py.

All of it is vLLM's (TieringOffloadingSpec: manager, lookups, the shared region in /dev/shm, the `fs` tier with its threads and
files) except what vLLM refuses to do without a GPU, the copies between engine pages and the shared region. These are memory copies
here, in one thread of their own, so that they overlap with the engine's steps as vLLM's copies on a GPU stream do.
"""

from __future__ import annotations

import ctypes
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class MemcpyWorker(OffloadingWorker):
    def __init__(self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion, blocks_per_chunk: int) -> None:
        assert blocks_per_chunk == 1, "ttft.py measures chunks of one engine block"
        self._tensors = [cache.tensor for cache in kv_caches.tensors]
        self._views = [region.create_next_worker_view(cache.page_size_bytes) for cache in kv_caches.tensors]
        self._sizes = [cache.page_size_bytes for cache in kv_caches.tensors]
        self._region = region
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._jobs: dict[int, Future[TransferResult]] = {}

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        self._jobs[job_id] = self._thread.submit(
            self._copy, job_id, self._tensors, src_spec.block_ids, self._views, dst_spec.block_ids
        )
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        self._jobs[job_id] = self._thread.submit(
            self._copy, job_id, self._views, src_spec.block_ids, self._tensors, dst_spec.block_ids
        )
        return True

    def _copy(self, job_id: int, sources: Any, source_ids: Any, targets: Any, target_ids: Any) -> TransferResult:
        begin = time.perf_counter()
        copied = 0
        for source, target, size in zip(sources, targets, self._sizes, strict=True):
            source_base, source_stride = source.data_ptr(), source.stride(0)
            target_base, target_stride = target.data_ptr(), target.stride(0)
            for source_id, target_id in zip(source_ids.tolist(), target_ids.tolist(), strict=True):
                ctypes.memmove(target_base + target_id * target_stride, source_base + source_id * source_stride, size)
                copied += size
        return TransferResult(
            job_id=job_id, success=True, transfer_size=copied, transfer_time=max(time.perf_counter() - begin, 1e-9)
        )

    def get_finished(self) -> list[TransferResult]:
        ended = [job_id for job_id, job in self._jobs.items() if job.done()]
        return [self._jobs.pop(job_id).result() for job_id in ended]

    def wait(self, job_ids: set[int]) -> None:
        for job_id in job_ids:
            if job_id in self._jobs:
                self._jobs[job_id].exception()

    def shutdown(self) -> None:
        self._thread.shutdown()
        self._region.cleanup()


class CpuTieringSpec(TieringOffloadingSpec):
    def get_worker(self, kv_caches: CanonicalKVCaches) -> MemcpyWorker:
        if self._worker is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = MemcpyWorker(kv_caches, region, self.blocks_per_chunk)
        return self._worker
