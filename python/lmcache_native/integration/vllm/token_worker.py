"""One rank's side of LMCacheNativeConnector: turns the scheduler's jobs into jobs of a PagedCopier, and knows which failed.

Stores of a step are submitted at the start of the next one, so that their cost is not between the forward pass and sampling. A
failed store is known by its slot's word, which the scheduler's commit reads; a failed load by its blocks, which vLLM recomputes.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from lmcache_native.errors import DeadlineExceeded, LmcacheNativeError, Unavailable
from lmcache_native.integration.vllm.copier_client import CopierClient
from lmcache_native.integration.vllm.pages import TokenPages
from lmcache_native.integration.vllm.record_loader import RecordLoader
from lmcache_native.integration.vllm.transfer import (
    JobReport,
    NotStarted,
    TokenConnectorMetadata,
    TokenWorkerMetadata,
    TransferJob,
    blocks_of_item,
    copy_items,
)
from lmcache_native.logging import get_logger

logger = get_logger(__name__)


@dataclass(slots=True)
class _Load:
    """Has a part in the copier, one in the loader, or both; its reports are kept until the last has ended."""

    job: TransferJob
    cancel_at_s: float  # time.monotonic()
    parts: int
    report: JobReport | None = None
    failed_items: list[int] = field(default_factory=list)


class TokenWorker(CopierClient):
    """One thread, the model runner's, calls everything."""

    def __init__(
        self,
        pages: TokenPages,
        layer_names: Sequence[str],
        *,
        chunk_tokens: int,
        engine_id: str,
        rank: int,
        ranks: int,
        copy_threads: int,
        load_timeout_s: float,
        layerwise: bool,
        loader: RecordLoader | None = None,
        replicated: bool = False,
    ) -> None:
        """`loader`: for loads with records. `replicated`: as CopierClient's."""
        super().__init__(
            engine_id=engine_id,
            rank=rank,
            ranks=ranks,
            device_type=pages.device_type,
            device_index=pages.device_index,
            paged_layout=pages.paged_layout,
            slot_layout=pages.slot_layout(chunk_tokens),
            copy_threads=copy_threads,
            owner=pages.tensors,
            replicated=replicated,
        )
        self.pages = pages
        self.chunk_tokens = chunk_tokens
        # Layers that share a cache count once in `pages`, so that these numbers may be too large, never too small.
        self._layer_of = {name: min(index, pages.layers - 1) for index, name in enumerate(layer_names)}
        self._load_timeout_s = load_timeout_s
        self._layerwise = layerwise
        self._loader = loader
        self._deferred: list[TransferJob] = []
        self._loads: dict[int, _Load] = {}
        self._layer_loads: list[int] = []  # synchronous loads that this step's layers wait for
        self._received: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._report = TokenWorkerMetadata()

    @property
    def reads_nvme(self) -> bool:
        """Whether it takes loads with records."""
        return self._loader is not None

    # ---- a step, in vLLM's order --------------------------------------------------------------------------------------

    def begin_step(self, meta: TokenConnectorMetadata) -> None:
        """Before anything of this step writes a block."""
        for job in self._deferred:
            self._submit(job, load=False)
        self._deferred.clear()
        self.wait_ended(meta.flush)

    def start_loads(self, meta: TokenConnectorMetadata) -> None:
        """Before the forward pass when it needs a load of this step, else after it was launched."""
        now = time.monotonic()
        for job in meta.loads:
            with_slots = len(job.chunks) > 0
            self._loads[job.id] = _Load(job, now + self._load_timeout_s, with_slots + (job.records is not None))
            if with_slots:
                self._submit(job, load=True)
            if job.records is not None:
                self._submit_records(job)
        needed = [job.id for job in meta.loads if job.synchronous and job.id in self._loads]
        if self._layerwise:
            self._layer_loads = needed
        else:
            self._wait_for_loads(needed)

    def wait_for_layer(self, layer_name: str) -> None:
        """The forward pass is about to read this layer. A load that failed is reported after it, and its blocks recomputed."""
        layer = self._layer_of.get(layer_name)
        if layer is None or self._copier is None:
            return
        for job_id in self._layer_loads:
            left_s = max(self._loads[job_id].cancel_at_s - time.monotonic(), 0.0)
            try:
                self._copier.wait_layers(job_id, layer + 1, timeout_s=left_s, stream=self.stream())
            except LmcacheNativeError:  # late, or it failed: not before it has stopped writing
                self._wait_for_loads([job_id])

    def end_step(self, meta: TokenConnectorMetadata) -> None:
        """After the forward pass was launched."""
        self._finish_layer_loads()
        if self.stores:
            self._deferred.extend(meta.stores)
        else:
            for job in meta.stores:
                self._report.ended[job.id] = JobReport(1, 0, 0.0, failed=False)

    def _finish_layer_loads(self) -> None:
        loads, self._layer_loads = self._layer_loads, []
        self._wait_for_loads(loads)

    def take_received(self) -> set[str]:
        """Requests whose asynchronous loads ended since the last call, also those that failed. Call before the other take_ ones."""
        # With speculation vLLM's V1 runner asks before it ends the step: no load of this one may be open then.
        self._finish_layer_loads()
        self._poll()
        self._cancel_late_loads()
        received, self._received = self._received, set()
        return received

    def take_failed_blocks(self) -> set[int]:
        """The engine's blocks whose load failed, since the last call."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_report(self) -> TokenWorkerMetadata | None:
        """Jobs that ended since the last call."""
        report, self._report = self._report, TokenWorkerMetadata()
        return report if report.ended or report.not_started else None

    def shutdown(self) -> None:
        self.detach()
        self._loader = None
        self._deferred.clear()
        self._loads.clear()

    # ---- jobs ---------------------------------------------------------------------------------------------------------

    def _submit(self, job: TransferJob, *, load: bool) -> None:
        try:
            if len(job.offsets) != len(job.chunks):
                raise Unavailable("the scheduler could not lease its chunks")
            items = copy_items(job, self.pages, self.chunk_tokens)
            self.attached().submit(
                job.id,
                "load" if load else "store",
                job.offsets,
                job.generations,
                items.first_tokens,
                items.tokens,
                items.block_begin,
                self.pages.block_ids(job.block_ids),
                items.token_in_block,
                stream=self.stream(),
                layer_by_layer=load and job.synchronous and self._layerwise,
            )
        except LmcacheNativeError as error:
            level = logging.ERROR if load or not isinstance(error, Unavailable) else logging.DEBUG
            logger.log(level, "%s job %d of request %s: %s", "load" if load else "store", job.id, job.request_id, error)
            self._report.not_started.append(NotStarted(self._rank, load, job.offsets, job.generations))
            self._part_ended(job.id, JobReport(1, 0, 0.0, failed=True), range(len(job.chunks)))

    def _submit_records(self, job: TransferJob) -> None:
        assert job.records is not None
        first = len(job.chunks)
        try:
            if self._loader is None:
                raise Unavailable("this worker reads no records")
            items = copy_items(job, self.pages, self.chunk_tokens, job.records.chunks)
            self._loader.submit(
                job.id,
                job.records,
                items,
                self.pages.block_ids(job.block_ids),
                stream=self.stream(),
                timeout_s=self._load_timeout_s,
            )
        except LmcacheNativeError as error:
            logger.error("load job %d of request %s, from NVMe: %s", job.id, job.request_id, error)
            report = JobReport(1, 0, 0.0, failed=True, no_more_records=True)
            self._part_ended(job.id, report, range(first, len(job.items)))

    def _wait_for_loads(self, job_ids: Sequence[int]) -> None:
        """At most until their deadline; what is late then is cancelled, and ends as failed."""
        for job_id in job_ids:
            load = self._loads[job_id]
            try:
                for part in (self._copier, self._loader if load.job.records is not None else None):
                    if part is not None:
                        part.wait([job_id], max(load.cancel_at_s - time.monotonic(), 0.0))
            except DeadlineExceeded:
                self._cancel(job_id)
                self.wait_ended([job_id])

    def _cancel_late_loads(self) -> None:
        now = time.monotonic()
        for job_id, load in self._loads.items():
            if now > load.cancel_at_s:
                load.cancel_at_s = float("inf")
                self._cancel(job_id)

    def _cancel(self, job_id: int) -> None:
        logger.warning("load job %d took longer than %.1f s (blocking_timeout_secs): cancelled", job_id, self._load_timeout_s)
        if self._copier is not None:
            self._copier.cancel(array("Q", [job_id]))
        if self._loader is not None:
            self._loader.cancel(array("Q", [job_id]))

    def wait_ended(self, job_ids: Iterable[int]) -> None:
        ids = list(job_ids)
        super().wait_ended(ids)
        if self._loader is not None:
            self.wait_until_ended(self._loader, ids)

    def _poll(self) -> None:
        for done in self._copier.poll() if self._copier is not None else ():
            if not done.ok:
                logger.error("%s job %d: %s", "load" if done.id in self._loads else "store", done.id, done.message)
            self._part_ended(done.id, JobReport(1, done.bytes, done.seconds, failed=not done.ok), done.failed_items)
        if self._loader is not None:
            self._poll_loader(self._loader)

    def _poll_loader(self, loader: RecordLoader) -> None:
        for done in loader.poll():
            if not done.ok:
                logger.error("load job %d, from NVMe: %s", done.id, done.message)
            first = len(self._loads[done.id].job.chunks)
            bad = tuple(done.bad_items)
            no_more = loader.given_up or len(bad) < len(done.failed_items)
            report = JobReport(1, done.bytes, done.seconds, not done.ok, bad, no_more)
            self._part_ended(done.id, report, [first + item for item in done.failed_items])

    def _part_ended(self, job_id: int, report: JobReport, failed_items: Sequence[int]) -> None:
        load = self._loads.get(job_id)
        if load is not None:
            load.parts -= 1
            load.failed_items += failed_items
            load.report = report if load.report is None else replace(load.report.merged(report), ranks=1)
            if load.parts > 0:
                return
            report, failed_items = load.report, load.failed_items
        self._ended(job_id, report, failed_items)

    def _ended(self, job_id: int, report: JobReport, failed_items: Sequence[int]) -> None:
        self._report.ended[job_id] = report
        load = self._loads.pop(job_id, None)
        if load is None:
            return
        job = load.job
        if not job.synchronous:
            self._received.add(job.request_id)
        if report.failed:
            for item in failed_items or range(len(job.items)):
                self._failed_blocks |= blocks_of_item(job, item, self.chunk_tokens, self.pages.block_tokens)
