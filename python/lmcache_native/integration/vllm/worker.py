"""NativeOffloadingWorker: one rank's side. Turns vLLM's jobs into jobs of a PagedCopier, and knows which blocks failed to load.

vLLM asserts that every job succeeds, so every job is reported as a success: a failed store is known by its slot's word, which the
scheduler's commit reads, and a failed load by its blocks or its job (take_failed_blocks, take_failed_jobs), which vLLM recomputes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmcache_native import ArenaAttachment, CopyDirection, PagedKvLayout, SlotLayout
from lmcache_native.errors import LmcacheNativeError, Unavailable
from lmcache_native.integration.vllm import compat
from lmcache_native.integration.vllm.copier_client import CopierClient
from lmcache_native.integration.vllm.group_copier import GroupCopier, GroupPart
from lmcache_native.integration.vllm.layout import PagedMemory
from lmcache_native.integration.vllm.slots import SlotLoadStoreSpec
from lmcache_native.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class NotStarted:
    """A job that never reached this rank's copier, so that its slots' words stay empty. Goes to the scheduler; must pickle."""

    rank: int
    load: bool
    slots: SlotLoadStoreSpec
    expected: bool = False  # a store of what the engine has given up already: nothing failed


@dataclass(frozen=True, slots=True)
class _Load:
    slots: SlotLoadStoreSpec
    block_ids: np.ndarray[Any, np.dtype[np.int32]]  # of all groups
    block_begin: list[int]  # per chunk, into block_ids
    blocks: list[int]


class NativeOffloadingWorker(compat.OffloadingWorker, CopierClient):  # type: ignore[misc]
    """One thread, the model runner's, calls everything."""

    def __init__(
        self,
        kv_caches: Any,
        *,
        engine_id: str,
        rank: int,
        ranks: int,
        blocks_per_chunk: int,
        copy_threads: int,
        replicated: bool = False,
    ) -> None:
        self.memories = PagedMemory.of_groups(kv_caches)
        self.tensors = [tensor.tensor for tensor in kv_caches.tensors]
        self.slot_layouts = [memory.slot_layout(blocks_per_chunk) for memory in self.memories]
        largest = max(range(len(self.memories)), key=lambda group: self.slot_layouts[group].rank_bytes)
        first = self.memories[0]
        CopierClient.__init__(
            self,
            engine_id=engine_id,
            rank=rank,
            ranks=ranks,
            device_type=first.device_type,
            device_index=first.device_index,
            paged_layout=self.memories[largest].paged_layout,
            slot_layout=self.slot_layouts[largest],  # the arena is served, and registered, for the largest group's chunks
            copy_threads=copy_threads,
            owner=self.tensors,
            replicated=replicated,
        )
        self._blocks_per_chunk = blocks_per_chunk
        self._loads: dict[int, _Load] = {}
        self._ended: list[Any] = []  # jobs that never reached the copier
        self._failed_blocks: set[int] = set()
        self._failed_jobs: set[int] = set()
        self._failed_serials: set[int] = set()
        self._not_started: list[NotStarted] = []
        self._copies: list[tuple[str, int, float]] = []

    def _layouts(self) -> list[tuple[PagedKvLayout, SlotLayout]]:
        return [(memory.paged_layout(), slot) for memory, slot in zip(self.memories, self.slot_layouts, strict=True)]

    def _make_copier(self, arena: ArenaAttachment) -> GroupCopier:
        return GroupCopier([self._paged_copier(arena, paged, slot) for paged, slot in self._layouts()])

    # ---- vLLM's interface ---------------------------------------------------------------------------------------------

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: SlotLoadStoreSpec) -> bool:
        """vLLM lists the blocks that still exist. Of a group whose earlier blocks the engine gives up, the first chunk may have
        lost its first blocks: it is left out. So are all of a group when others are missing, since it cannot be told which."""
        if not self.stores:
            self._ended.append(compat.TransferResult(job_id=job_id, success=True))
            return True
        parts = []
        per_chunk = self._blocks_per_chunk
        for group, blocks, first_block in _by_group(src_spec):
            slots = dst_spec.group(group)
            chunks, missing = len(slots), first_block % per_chunk
            if len(blocks) != chunks * per_chunk - missing:
                why = f"{len(blocks)} blocks from number {first_block} on for {chunks} chunks of {per_chunk}"
                level = logging.DEBUG if missing else logging.ERROR
                self._store_not_started(job_id, slots, f"group {group}: {why}", level, expected=missing > 0)
                continue
            if missing:
                why = f"group {group}: a chunk's first blocks are gone"
                self._store_not_started(job_id, slots.chunks(0, 1), why, logging.DEBUG, expected=True)
                slots, blocks, chunks = slots.chunks(1, chunks), blocks[per_chunk - missing :], chunks - 1
            if chunks:
                begin = np.arange(chunks, dtype=np.uint32) * per_chunk
                counts = np.full(chunks, per_chunk, dtype=np.uint32)
                parts.append(GroupPart(group, slots, np.zeros(chunks, dtype=np.uint32), counts, begin, blocks))
        self._submit(job_id, CopyDirection.GATHER, parts)
        return True

    def submit_load(self, job_id: int, src_spec: SlotLoadStoreSpec, dst_spec: Any) -> bool:
        spans = [
            (group, blocks, *chunk_spans(first_block, len(blocks), self._blocks_per_chunk))
            for group, blocks, first_block in _by_group(dst_spec)
        ]
        begins, counts_of, passed = [], [], 0
        for _, blocks, _, counts, begin in spans:
            begins += [passed + int(index) for index in begin]
            counts_of += [int(count) for count in counts]
            passed += len(blocks)
        self._loads[job_id] = _Load(src_spec, np.asarray(dst_spec.block_ids), begins, counts_of)
        chunks = tuple(len(counts) for _, _, _, counts, _ in spans)
        if chunks != src_spec.group_chunks:
            why = f"{passed} blocks span {'+'.join(map(str, chunks))} chunks, not {'+'.join(map(str, src_spec.group_chunks))}"
            self._load_failed(job_id, why if src_spec.group_chunks else "the scheduler could not lease its chunks")
            return True
        parts = [
            GroupPart(group, src_spec.group(group), first, counts, begin, blocks)
            for group, blocks, first, counts, begin in spans
            if len(counts)
        ]
        self._submit(job_id, CopyDirection.SCATTER, parts)
        return True

    def get_finished(self) -> list[Any]:
        results, self._ended = self._ended, []
        for done in self._copier.poll() if self._copier is not None else ():
            load = self._loads.pop(done.id, None)
            if not done.ok:
                logger.error("%s job %d: %s", "store" if load is None else "load", done.id, done.message)
                if load is not None:
                    self._note_failure(done.id, load, done.failed_items)
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

    def take_failed_jobs(self) -> set[int]:
        """Loads that failed, wholly or in part, since the last call; some may still be under way."""
        failed, self._failed_jobs = self._failed_jobs, set()
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

    def _store_not_started(self, job_id: int, slots: SlotLoadStoreSpec, why: str, level: int, *, expected: bool = False) -> None:
        logger.log(level, "store job %d: %s", job_id, why)
        if len(slots):
            self._not_started.append(NotStarted(self._rank, False, slots, expected))

    def _load_failed(self, job_id: int, why: str) -> None:
        """None of it was started."""
        load = self._loads.pop(job_id)
        logger.error("load job %d: %s", job_id, why)
        self._not_started.append(NotStarted(self._rank, True, load.slots))
        self._note_failure(job_id, load, ())
        self._end(job_id)

    def _end(self, job_id: int) -> None:
        self._ended.append(compat.TransferResult(job_id=job_id, success=True))

    def _note_failure(self, job_id: int, load: _Load, items: Sequence[int]) -> None:
        """`items`: chunks of the load; none: all."""
        self._failed_jobs.add(job_id)
        self._failed_serials.add(load.slots.serial)
        for item in items or range(len(load.block_begin)):
            begin = load.block_begin[item]
            self._failed_blocks.update(int(block) for block in load.block_ids[begin : begin + load.blocks[item]])

    def _submit(self, job_id: int, direction: CopyDirection, parts: list[GroupPart]) -> None:
        if not parts:
            self._loads.pop(job_id, None)
            self._end(job_id)
            return
        load = direction == CopyDirection.SCATTER
        try:
            refused = self.attached().submit(job_id, direction, parts, stream=self.stream())
        except LmcacheNativeError as error:
            if load:
                self._load_failed(job_id, str(error))
                return
            level = logging.DEBUG if isinstance(error, Unavailable) else logging.ERROR
            for part in parts:
                self._store_not_started(job_id, part.slots, str(error), level)
            self._end(job_id)
            return
        for one in refused:
            logger.error("%s job %d, KV cache group %d: %s", "load" if load else "store", job_id, one.part.group, one.error)
            self._not_started.append(NotStarted(self._rank, load, one.part.slots))
            if load:
                self._note_failure(job_id, self._loads[job_id], ())


def _by_group(spec: Any) -> Iterator[tuple[int, Any, int]]:
    """Of vLLM's GPULoadStoreSpec: group, its blocks, and the number within the request of the first of them."""
    blocks = np.asarray(spec.block_ids)
    begin = 0
    for group, (size, first_block) in enumerate(zip(spec.group_sizes, spec.block_indices, strict=True)):
        yield group, blocks[begin : begin + size], int(first_block)
        begin += size


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
