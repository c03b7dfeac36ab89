"""A scheduler's manager and its workers, over one real store, in one process. Pages hold made-up bytes."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Sequence
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
from lmcache_native.integration.vllm.manager import ChunkGroup, NativeOffloadingManager
from lmcache_native.integration.vllm.worker import NativeOffloadingWorker

LAYERS = 2
PAGE_BYTES = 4096
BLOCKS = 24

MISS, HIT, PENDING, RETRY = LookupResult.MISS, LookupResult.HIT, LookupResult.HIT_PENDING, LookupResult.RETRY


Groups = Sequence[Sequence[int]]  # by KV cache group: the page bytes of its layers
Names = list[int] | dict[int, list[int]]  # of chunks of group 0, or by group


def caches(seed: int, groups: Groups = ((PAGE_BYTES,) * LAYERS,)) -> CanonicalKVCaches:
    """As vLLM lays groups out: layer number n of each lies in the same memory, whose blocks are as large as the largest page."""
    generator = torch.Generator().manual_seed(seed)
    pages = [max(sizes) for sizes in itertools.zip_longest(*groups, fillvalue=0)]
    tensors = [torch.randint(-128, 128, (BLOCKS, page), dtype=torch.int8, generator=generator) for page in pages]
    return CanonicalKVCaches(
        tensors=[CanonicalKVCacheTensor(tensor, page) for tensor, page in zip(tensors, pages, strict=True)],
        group_data_refs=[[CanonicalKVCacheRef(index, page) for index, page in enumerate(of_group)] for of_group in groups],
    )


def keys(*names: int, group: int = 0) -> list[bytes]:
    return [make_offload_key(name.to_bytes(32, "big"), group) for name in names]


def all_keys(names: Names) -> list[bytes]:
    """In vLLM's order."""
    if isinstance(names, list):
        return keys(*names)
    return [key for group in sorted(names) for key in keys(*names[group], group=group)]


class World:
    """`windowed`: groups of which only the latest chunks are looked for."""

    def __init__(
        self,
        *,
        ranks: int = 1,
        per_chunk: int = 1,
        host_bytes: int = 16 << 20,
        directory: Path | None = None,
        groups: Groups = ((PAGE_BYTES,) * LAYERS,),
        windowed: Sequence[int] = (),
        nvme_bytes: int = 128 << 20,
        replicated: bool = False,
    ) -> None:
        parts = 1 if replicated else ranks
        self.per_chunk = per_chunk
        self.groups = groups
        self.caches = [caches(rank, groups) for rank in range(ranks)]
        engine_id = f"test-{uuid.uuid4()}"
        self.workers = [
            NativeOffloadingWorker(
                cache,
                engine_id=engine_id,
                rank=rank,
                ranks=ranks,
                blocks_per_chunk=per_chunk,
                copy_threads=1,
                replicated=replicated,
            )
            for rank, cache in enumerate(self.caches)
        ]
        rank_bytes = self.workers[0].slot_layout.rank_bytes
        self.store = Store(
            host_bytes=host_bytes,
            rank_count=ranks,
            replicated=replicated,
            max_payload_bytes=rank_bytes * parts,
            directory=directory,
            nvme_bytes=nvme_bytes if directory else 0,
        )
        self.store.serve(engine_id, rank_bytes)
        self.manager = NativeOffloadingManager()
        layouts = self.workers[0].slot_layouts
        self.manager.open(
            self.store, {"test": "1"}, [ChunkGroup(of.rank_bytes * parts, group in windowed) for group, of in enumerate(layouts)]
        )
        self._jobs = itertools.count()
        self._requests = itertools.count()

    def request(self, *, lora: Any = None, tiers: TierFilter = TierFilter.ALL) -> ReqContext:
        context = ReqContext(req_id=f"r{next(self._requests)}", load_tier_filter=tiers)
        self.manager.announce_adapter(lora)
        self.manager.on_new_request(context)
        return context

    def look(self, context: ReqContext, *names: int, group: int = 0) -> list[LookupResult]:
        return [self.manager.lookup(key, context) for key in keys(*names, group=group)]

    def pages(self, rank: int, blocks: list[int]) -> list[bytes]:
        return [b"".join(tensor.tensor[block].numpy().tobytes() for tensor in self.caches[rank].tensors) for block in blocks]

    def wipe(self, blocks: list[int]) -> None:
        for cache in self.caches:
            for tensor in cache.tensors:
                tensor.tensor[blocks] = 0

    def group_pages(self, group: int, blocks: list[int]) -> list[bytes]:
        """What rank 0's layers of this group have in each block."""
        cache = self.caches[0]
        parts = [(cache.tensors[ref.tensor_idx].tensor, ref.page_size_bytes) for ref in cache.group_data_refs[group]]
        return [b"".join(tensor[block, :page].numpy().tobytes() for tensor, page in parts) for block in blocks]

    def paged(self, blocks: list[int] | dict[int, list[int]], first: dict[int, int]) -> GPULoadStoreSpec:
        """`first`: by group, the number within the request of the first of its blocks (0 where it is not said)."""
        by_group = blocks if isinstance(blocks, dict) else {0: blocks}
        of = [by_group.get(group, []) for group in range(len(self.groups))]
        return GPULoadStoreSpec(
            [block for part in of for block in part], [*map(len, of)], [first.get(g, 0) for g in range(len(of))]
        )

    def prepare_store(self, context: ReqContext, names: Names) -> Any:
        return self.manager.prepare_store(all_keys(names), context)

    def copy_stores(
        self,
        spec: Any,
        blocks: list[int] | dict[int, list[int]],
        ranks: list[int] | None = None,
        first: dict[int, int] | None = None,
    ) -> None:
        """The workers' part of a store."""
        for rank, worker in enumerate(self.workers):
            if ranks is None or rank in ranks:
                job = next(self._jobs)
                assert worker.submit_store(job, self.paged(blocks, first or {}), spec)
                self.ended(worker, job)

    def stored(self, context: ReqContext, names: Names, blocks: list[int] | dict[int, list[int]]) -> None:
        output = self.prepare_store(context, names)
        assert output.keys_to_store == all_keys(names)
        self.copy_stores(output.store_spec, blocks)
        self.manager.complete_store(set(output.keys_to_store), context)

    def load(
        self,
        context: ReqContext,
        names: Names,
        blocks: list[int] | dict[int, list[int]],
        first_block: int | dict[int, int] = 0,
        change: Any = None,
    ) -> None:
        """A whole load, lookup to completion, into `blocks`, the request's blocks from number `first_block` on."""
        first = first_block if isinstance(first_block, dict) else {0: first_block}
        spec = self.manager.prepare_load(all_keys(names), context)
        for worker in self.workers:
            job = next(self._jobs)
            assert worker.submit_load(job, spec if change is None else change(spec), self.paged(blocks, first))
            self.ended(worker, job)
        self.manager.complete_load(set(all_keys(names)), context)

    @staticmethod
    def ended(worker: NativeOffloadingWorker, job: int) -> None:
        worker.wait({job})
        (result,) = worker.get_finished()
        assert (result.job_id, result.success) == (job, True)

    def close(self) -> None:
        for worker in self.workers:
            worker.shutdown()
        self.manager.shutdown()
