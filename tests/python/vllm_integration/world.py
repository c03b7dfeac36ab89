"""A scheduler's manager and its workers, over one real store, in one process. Pages hold made-up bytes."""

from __future__ import annotations

import itertools
import uuid
from pathlib import Path
from typing import Any

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
    LookupResult,
    ReqContext,
    TierFilter,
    make_offload_key,
)

from lmcache_native import Store
from lmcache_native.integration.vllm.manager import NativeOffloadingManager
from lmcache_native.integration.vllm.worker import NativeOffloadingWorker

LAYERS = 2
PAGE_BYTES = 4096
BLOCKS = 24

MISS, HIT, PENDING, RETRY = LookupResult.MISS, LookupResult.HIT, LookupResult.HIT_PENDING, LookupResult.RETRY


def caches(seed: int) -> CanonicalKVCaches:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randint(-128, 128, (BLOCKS, PAGE_BYTES), dtype=torch.int8, generator=generator) for _ in range(LAYERS)]
    return CanonicalKVCaches(
        tensors=[CanonicalKVCacheTensor(tensor, PAGE_BYTES) for tensor in tensors],
        group_data_refs=[[CanonicalKVCacheRef(index, PAGE_BYTES) for index in range(LAYERS)]],
    )


def keys(*names: int) -> list[bytes]:
    return [make_offload_key(name.to_bytes(32, "big"), 0) for name in names]


class World:
    def __init__(self, *, ranks: int = 1, per_chunk: int = 1, host_bytes: int = 16 << 20, directory: Path | None = None) -> None:
        self.per_chunk = per_chunk
        self.caches = [caches(seed=rank) for rank in range(ranks)]
        engine_id = f"test-{uuid.uuid4()}"
        self.workers = [
            NativeOffloadingWorker(cache, engine_id=engine_id, rank=rank, ranks=ranks, blocks_per_chunk=per_chunk, copy_threads=1)
            for rank, cache in enumerate(self.caches)
        ]
        rank_bytes = self.workers[0].slot_layout.rank_bytes
        self.store = Store(
            host_bytes=host_bytes,
            rank_count=ranks,
            max_payload_bytes=rank_bytes * ranks,
            directory=directory,
            nvme_bytes=128 << 20 if directory else 0,
        )
        self.store.serve(engine_id, rank_bytes)
        self.manager = NativeOffloadingManager()
        self.manager.open(self.store, {"test": "1"}, rank_bytes * ranks)
        self._jobs = itertools.count()
        self._requests = itertools.count()

    def request(
        self, *, lora: Any = None, tiers: TierFilter = TierFilter.ALL, parameters: dict[str, Any] | None = None
    ) -> ReqContext:
        context = ReqContext(req_id=f"r{next(self._requests)}", load_tier_filter=tiers, kv_transfer_params=parameters)
        self.manager.announce_adapter(lora)
        self.manager.on_new_request(context)
        return context

    def look(self, context: ReqContext, *names: int) -> list[LookupResult]:
        return [self.manager.lookup(key, context) for key in keys(*names)]

    def pages(self, rank: int, blocks: list[int]) -> list[bytes]:
        return [b"".join(tensor.tensor[block].numpy().tobytes() for tensor in self.caches[rank].tensors) for block in blocks]

    def wipe(self, blocks: list[int]) -> None:
        for cache in self.caches:
            for tensor in cache.tensors:
                tensor.tensor[blocks] = 0

    def prepare_store(self, context: ReqContext, names: list[int]) -> Any:
        return self.manager.prepare_store(keys(*names), context)

    def copy_stores(self, spec: Any, blocks: list[int], ranks: list[int] | None = None) -> None:
        """The workers' part of a store."""
        for rank, worker in enumerate(self.workers):
            if ranks is None or rank in ranks:
                job = next(self._jobs)
                assert worker.submit_store(job, GPULoadStoreSpec(blocks, (len(blocks),), (0,)), spec)
                self.ended(worker, job)

    def stored(self, context: ReqContext, names: list[int], blocks: list[int]) -> None:
        output = self.prepare_store(context, names)
        assert output.keys_to_store == keys(*names)
        self.copy_stores(output.store_spec, blocks)
        self.manager.complete_store(set(output.keys_to_store), context)

    def load(self, context: ReqContext, names: list[int], blocks: list[int], first_block: int = 0, change: Any = None) -> None:
        """A whole load, lookup to completion, into `blocks`, the request's blocks from number `first_block` on."""
        spec = self.manager.prepare_load(keys(*names), context)
        for worker in self.workers:
            job = next(self._jobs)
            target = GPULoadStoreSpec(blocks, (len(blocks),), (first_block,))
            assert worker.submit_load(job, spec if change is None else change(spec), target)
            self.ended(worker, job)
        self.manager.complete_load(set(keys(*names)), context)

    @staticmethod
    def ended(worker: NativeOffloadingWorker, job: int) -> None:
        worker.wait({job})
        (result,) = worker.get_finished()
        assert (result.job_id, result.success) == (job, True)

    def close(self) -> None:
        for worker in self.workers:
            worker.shutdown()
        self.manager.shutdown()
