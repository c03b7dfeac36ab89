"""NativeOffloadingWorker: one rank's side. Turns vLLM's jobs into jobs of a PagedCopier, and knows which blocks failed to load.

vLLM asserts that every job succeeds, so every job is reported as a success: a failed store is known by its slot's word, which the
scheduler's commit reads, and a failed load by its blocks (take_failed_blocks), which vLLM recomputes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmcache_native import CopyDirection
from lmcache_native.errors import LmcacheNativeError, Unavailable
from lmcache_native.integration.vllm import compat
from lmcache_native.integration.vllm.copier_client import CopierClient
from lmcache_native.integration.vllm.layout import PagedMemory, slot_layout
from lmcache_native.integration.vllm.slots import SlotLoadStoreSpec
from lmcache_native.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class NotStarted:
    """A job that never reached this rank's copier, so that its slots' words stay empty. Goes to the scheduler; must pickle."""

    rank: int
    load: bool
    slots: SlotLoadStoreSpec


@dataclass(frozen=True, slots=True)
class _Load:
    serial: int
    slots: SlotLoadStoreSpec
    block_ids: np.ndarray[Any, np.dtype[np.int32]]
    block_begin: np.ndarray[Any, np.dtype[np.uint32]]
    blocks: np.ndarray[Any, np.dtype[np.uint32]]


class NativeOffloadingWorker(compat.OffloadingWorker, CopierClient):  # type: ignore[misc]
    """One thread, the model runner's, calls everything."""

    def __init__(self, kv_caches: Any, *, engine_id: str, rank: int, ranks: int, blocks_per_chunk: int, copy_threads: int) -> None:
        self.memory = PagedMemory.of(kv_caches)
        self._tensors = [tensor.tensor for tensor in kv_caches.tensors]
        CopierClient.__init__(
            self,
            engine_id=engine_id,
            rank=rank,
            ranks=ranks,
            device_type=self.memory.device_type,
            device_index=self.memory.device_index,
            paged_layout=self.memory.paged_layout,
            slot_layout=slot_layout(len(self.memory.bases), self.memory.page_bytes, blocks_per_chunk),
            copy_threads=copy_threads,
            owner=self._tensors,
        )
        self._blocks_per_chunk = blocks_per_chunk
        self._loads: dict[int, _Load] = {}
        self._ended: list[Any] = []  # jobs that never reached the copier
        self._failed_blocks: set[int] = set()
        self._failed_serials: set[int] = set()
        self._not_started: list[NotStarted] = []
        self._copies: list[tuple[str, int, float]] = []

    # ---- vLLM's interface ---------------------------------------------------------------------------------------------

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: SlotLoadStoreSpec) -> bool:
        blocks = np.asarray(src_spec.block_ids)
        per_chunk = self._blocks_per_chunk
        chunks = len(dst_spec)
        if len(blocks) != chunks * per_chunk:
            self._store_failed(job_id, dst_spec, f"{len(blocks)} blocks for {chunks} chunks of {per_chunk}")
            return True
        begin = np.arange(chunks, dtype=np.uint32) * per_chunk
        counts = np.full(chunks, per_chunk, dtype=np.uint32)
        self._submit(job_id, CopyDirection.GATHER, dst_spec, np.zeros(chunks, dtype=np.uint32), counts, begin, blocks)
        return True

    def submit_load(self, job_id: int, src_spec: SlotLoadStoreSpec, dst_spec: Any) -> bool:
        blocks = np.asarray(dst_spec.block_ids)
        first, counts, begin = chunk_spans(dst_spec.block_indices[0], len(blocks), self._blocks_per_chunk)
        self._loads[job_id] = _Load(src_spec.serial, src_spec, blocks, begin, counts)
        if len(first) != len(src_spec):
            spans = f"{len(blocks)} blocks span {len(first)} chunks, not {len(src_spec)}"
            self._load_failed(job_id, spans if len(src_spec) else "the scheduler could not lease its chunks")
            return True
        self._submit(job_id, CopyDirection.SCATTER, src_spec, first, counts, begin, blocks)
        return True

    def get_finished(self) -> list[Any]:
        results, self._ended = self._ended, []
        for done in self._copier.poll() if self._copier is not None else ():
            load = self._loads.pop(done.id, None)
            if not done.ok:
                logger.error("%s job %d: %s", "store" if load is None else "load", done.id, done.message)
                if load is not None:
                    self._note_failure(load, done.failed_items)
            self._copies.append(("store" if load is None else "load", done.bytes, done.seconds))
            results.append(
                compat.TransferResult(job_id=done.id, success=True, transfer_size=done.bytes, transfer_time=max(done.seconds, 1e-9))
            )
        return results

    def wait(self, job_ids: set[int]) -> None:
        self.wait_ended(job_ids)

    def shutdown(self) -> None:
        self.detach()
        self._loads.clear()

    # ---- failures -----------------------------------------------------------------------------------------------------

    def take_failed_blocks(self) -> set[int]:
        """Blocks whose load failed, since the last call."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_failed_serials(self) -> set[int]:
        """The manager's numbers of loads that failed, since the last call."""
        failed, self._failed_serials = self._failed_serials, set()
        return failed

    def take_not_started(self) -> list[NotStarted]:
        """Jobs that this rank could not start, since the last call."""
        jobs, self._not_started = self._not_started, []
        return jobs

    def take_copies(self) -> list[tuple[str, int, float]]:
        """(load or store, bytes, seconds) of jobs whose copies ended, since the last call."""
        copies, self._copies = self._copies, []
        return copies

    def _store_failed(self, job_id: int, slots: SlotLoadStoreSpec, why: str, level: int = logging.ERROR) -> None:
        logger.log(level, "store job %d: %s", job_id, why)
        self._not_started.append(NotStarted(self._rank, False, slots))
        self._ended.append(compat.TransferResult(job_id=job_id, success=True))

    def _load_failed(self, job_id: int, why: str) -> None:
        load = self._loads.pop(job_id)
        logger.error("load job %d: %s", job_id, why)
        self._not_started.append(NotStarted(self._rank, True, load.slots))
        self._note_failure(load, range(len(load.block_begin)))
        self._ended.append(compat.TransferResult(job_id=job_id, success=True))

    def _note_failure(self, load: _Load, items: Sequence[int]) -> None:
        self._failed_serials.add(load.serial)
        for item in items or range(len(load.block_begin)):
            begin = int(load.block_begin[item])
            self._failed_blocks.update(int(block) for block in load.block_ids[begin : begin + int(load.blocks[item])])

    def _submit(
        self,
        job_id: int,
        direction: CopyDirection,
        slots: SlotLoadStoreSpec,
        first: Any,
        counts: Any,
        begin: Any,
        blocks: Any,
    ) -> None:
        try:
            self.attached().submit(
                job_id, direction, slots.offsets, slots.generations, first, counts, begin, blocks, stream=self.stream()
            )
        except LmcacheNativeError as error:
            if direction == CopyDirection.SCATTER:
                self._load_failed(job_id, str(error))
            else:
                self._store_failed(job_id, slots, str(error), logging.DEBUG if isinstance(error, Unavailable) else logging.ERROR)


def chunk_spans(first_block: int, blocks: int, per_chunk: int) -> tuple[Any, Any, Any]:
    """`blocks` consecutive blocks of a request, from number `first_block`, cut at chunk borders.

    Per chunk: first block within the chunk, number of blocks, index of the first among the `blocks`.
    """
    skipped = first_block % per_chunk
    chunks = -(-(skipped + blocks) // per_chunk) if blocks else 0
    edges = np.arange(chunks + 1, dtype=np.int64) * per_chunk - skipped
    edges = np.clip(edges, 0, blocks)
    begin = edges[:-1]
    counts = np.diff(edges)
    first = (begin + skipped) % per_chunk
    return first.astype(np.uint32), counts.astype(np.uint32), begin.astype(np.uint32)
