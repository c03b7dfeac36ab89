"""What every worker's side shares: a PagedCopier on the scheduler's arena, attached at the first job."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lmcache_native import ArenaAttachment, PagedCopier, PagedKvLayout, SlotLayout
from lmcache_native.errors import DeadlineExceeded, LmcacheNativeError, Unavailable
from lmcache_native.integration.vllm.replicated import stores
from lmcache_native.logging import get_logger

logger = get_logger(__name__)

SLOT_HEADER_BYTES = 4096  # before the ranks' parts of a slot
ATTACH_TIMEOUT_S = 10.0
ATTACH_AGAIN_AFTER_S = 60.0
ATTACH_AGAIN_TIMEOUT_S = 0.1
WAIT_WARNING_S = 10.0
PREPARE_TIMEOUT_S = 0.05


class CopierClient:
    """One thread, the model runner's, calls everything. `owner`: the tensors behind the paged memory, kept as long as the copier
    lives. `stores`: whether this rank fills a part of a slot; where it does not, a store copies nothing and has ended."""

    def __init__(
        self,
        *,
        engine_id: str,
        rank: int,
        ranks: int,
        device_type: str,
        device_index: int,
        paged_layout: Callable[[], PagedKvLayout],
        slot_layout: SlotLayout,
        copy_threads: int,
        owner: object,
        replicated: bool = False,
    ) -> None:
        """`replicated`: all ranks share one part of a slot, which rank 0 fills."""
        self.slot_layout = slot_layout
        self._engine_id = engine_id
        self._rank = rank
        self._replicated = replicated
        self.stores = stores(rank, replicated=replicated)
        self._slot_bytes = SLOT_HEADER_BYTES + (1 if replicated else ranks) * slot_layout.rank_bytes
        self._device_type = device_type
        self._device_index = device_index
        self._paged_layout = paged_layout
        self._copy_threads = copy_threads
        self._owner = owner
        self._copier: Any = None  # what _make_copier() makes
        self._attach_at_s = 0.0
        self._attach_failed = False
        self._prepare()

    def _prepare(self) -> None:
        """When the engine registers its memory, before it serves: which way copies take."""
        if self._device_type != "cuda":
            return
        try:
            for paged, slot in self._layouts():
                PagedCopier.prepare_cuda(paged, slot, device=self._device_index, timeout_s=PREPARE_TIMEOUT_S)
        except LmcacheNativeError as error:
            logger.warning("rank %d: copies were not measured: %s", self._rank, error)

    def _layouts(self) -> Sequence[tuple[PagedKvLayout, SlotLayout]]:
        """Of all that is copied."""
        return [(self._paged_layout(), self.slot_layout)]

    def attached(self) -> Any:
        """The copier; at the first job, attaches to the scheduler's arena. Unavailable while that fails, quickly after the first
        time."""
        if self._copier is not None:
            return self._copier
        now = time.monotonic()
        if now < self._attach_at_s:
            raise Unavailable("not attached to the scheduler's arena")
        self._attach_at_s = now + ATTACH_AGAIN_AFTER_S
        timeout_s = ATTACH_AGAIN_TIMEOUT_S if self._attach_failed else ATTACH_TIMEOUT_S
        try:
            arena = ArenaAttachment.attach(
                self._engine_id, self._rank, self.slot_layout.rank_bytes, timeout_s, replicated=self._replicated
            )
            self._copier = self._make_copier(arena)
        except LmcacheNativeError as error:
            self._attach_failed = True
            logger.error("rank %d could not attach to the scheduler's arena: %s", self._rank, error)
            raise Unavailable(f"not attached to the scheduler's arena: {error}") from error
        details = self._copier.details
        logger.info(
            "rank %d attached: %.2f GiB arena of pid %d, copies by %s%s",
            self._rank,
            arena.bytes / 2**30,
            arena.owner_pid,
            self._copier.name,
            f": {details}" if details else "",
        )
        return self._copier

    def wait_ended(self, job_ids: Iterable[int]) -> None:
        """vLLM reuses the jobs' blocks afterwards, so it must not end before they have."""
        if self._copier is not None:
            self.wait_until_ended(self._copier, sorted(job_ids))

    @staticmethod
    def wait_until_ended(part: Any, ids: Sequence[int]) -> None:
        """`part`: a PagedCopier, or a loader."""
        while ids:
            try:
                part.wait(ids, WAIT_WARNING_S)
                return
            except DeadlineExceeded:
                logger.warning("jobs %s still under way after %.0f s", ids, WAIT_WARNING_S)

    def detach(self) -> None:
        """Waits for jobs under way."""
        self._copier = None

    def stream(self) -> int:
        """The cudaStream_t that the engine's writes are on; 0 on the CPU. Ask at each submit: the runner's stream is the current
        one of the thread that calls the connector, and may be another at each step. Asking waits for nothing."""
        if self._device_type != "cuda":
            return 0
        import torch

        return int(torch.cuda.current_stream(self._device_index).cuda_stream)

    def _make_copier(self, arena: ArenaAttachment) -> Any:
        return self._paged_copier(arena, self._paged_layout(), self.slot_layout)

    def _paged_copier(self, arena: ArenaAttachment, paged: PagedKvLayout, slot: SlotLayout) -> PagedCopier:
        if self._device_type == "cuda":
            return PagedCopier.cuda(
                arena,
                paged,
                slot,
                rank=self._rank,
                device=self._device_index,
                slot_bytes=self._slot_bytes,
                replicated=self._replicated,
                owner=self._owner,
            )
        return PagedCopier.host(
            arena, paged, slot, rank=self._rank, threads=self._copy_threads, replicated=self._replicated, owner=self._owner
        )
