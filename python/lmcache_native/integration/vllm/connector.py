"""NativeOffloadingConnector: vLLM's OffloadingConnector with our spec, the worker-to-scheduler handshake that opens the store, and
loads that may fail."""

from __future__ import annotations

import inspect
import os
import time
from dataclasses import dataclass, field
from typing import Any

from lmcache_native.config import check_machine, resolve
from lmcache_native.errors import Unsupported
from lmcache_native.integration.vllm import compat, layout, namespace, spec, stats, support
from lmcache_native.integration.vllm.manager import ChunkGroup, NativeOffloadingManager
from lmcache_native.integration.vllm.opening import StoreOpening
from lmcache_native.integration.vllm.replicated import is_replicated
from lmcache_native.integration.vllm.worker import NativeOffloadingWorker, NotStarted
from lmcache_native.logging import get_logger

logger = get_logger(__name__)


@dataclass
class NativeWorkerMetadata(compat.OffloadingWorkerMetadata):  # type: ignore[misc]
    """Worker -> scheduler, each step with ended jobs: also the loads that failed (SlotLoadStoreSpec.serial), and the jobs that a
    rank could not start."""

    failed_loads: set[int] = field(default_factory=set)
    not_started: list[NotStarted] = field(default_factory=list)
    copies: list[tuple[str, int, float]] = field(default_factory=list)  # load or store, bytes, seconds; of each rank

    def aggregate(self, other: Any) -> NativeWorkerMetadata:
        merged = super().aggregate(other)
        return NativeWorkerMetadata(
            merged.completed_jobs,
            merged.transfer_stats,
            self.failed_loads | getattr(other, "failed_loads", set()),
            self.not_started + getattr(other, "not_started", []),
            self.copies + getattr(other, "copies", []),
        )


@dataclass(slots=True)
class _Asked:
    computed_tokens: int = 0
    since_s: float | None = None  # time.monotonic(): it was told to ask again


def _asked_by_a_connector() -> bool:
    """Whether the caller of our get_required_kvcache_layout is another connector's, as MultiConnector's is for those it holds. It
    stops the start when their answers differ. The configuration that it hands down is the child's: only the caller tells."""
    here = inspect.currentframe()
    ours = here.f_back if here is not None else None
    asking = ours.f_back if ours is not None else None
    return asking is not None and asking.f_code.co_name == "get_required_kvcache_layout"


class NativeOffloadingConnector(compat.OffloadingConnector):  # type: ignore[misc]
    """vLLM makes one in the scheduler's process and one in each worker."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        scheduler = role == compat.KVConnectorRole.SCHEDULER
        transfer = vllm_config.kv_transfer_config
        extra = transfer.kv_connector_extra_config
        if scheduler:
            compat.warn_if_untested()
        self._config = resolve(extra, os.environ, warn=scheduler)
        support.check_role(transfer.kv_role)
        support.check_parallelism(vllm_config.parallel_config)
        support.check_spec_name(extra, spec.NAME)
        self._groups = support.offloaded_groups(kv_cache_config)
        support.check_zeroing(kv_cache_config, vllm_config)
        self._windowed = [any(map(support.is_windowed, compat.uniform_specs(group.kv_cache_spec))) for group in self._groups]
        if not self._blocks_fail_alone and not compat.requests_may_fail():
            raise Unsupported(
                f"vLLM {compat.vllm_version()} cannot be told which requests failed to load, which several KV cache groups and "
                "windows need: use vLLM 0.30 or later with this model"
            )
        block_tokens = [int(group.kv_cache_spec.block_size) for group in self._groups]
        blocks = support.blocks_per_chunk(self._config.chunk_tokens, block_tokens, extra)
        if blocks is not None and "block_size" not in extra:
            extra["blocks_per_chunk"] = blocks
        extra["spec_name"] = spec.NAME
        # vLLM's default, "fail", would turn a cache's failed load into a failed request. Its own field cannot be told apart from
        # its default, so the choice is ours: load_failure_policy. Read by the scheduler right after this.
        transfer.kv_load_failure_policy = self._config.load_failure_policy
        if scheduler:
            check_machine(self._config)
            self._opening = StoreOpening(vllm_config, self._config)
        self._backends: list[str] = []
        self._load_jobs: dict[str, int] = {}  # by request
        self._failed_jobs: set[int] = set()
        self._asked: dict[str, _Asked] = {}  # requests that vLLM asked about and has not scheduled
        super().__init__(vllm_config, role, kv_cache_config)
        self._replicated = is_replicated(vllm_config, kv_cache_config)
        if self.connector_worker is not None:
            self.connector_worker.spec.replicated = self._replicated

    # ---- worker -------------------------------------------------------------------------------------------------------

    @property
    def _worker(self) -> NativeOffloadingWorker:
        worker = self.connector_worker.worker
        assert isinstance(worker, NativeOffloadingWorker)
        return worker

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """vLLM's own answer is never block outermost but for its hisparse, and never one whose pages are scattered."""
        required: str | None = super().get_required_kvcache_layout(vllm_config)
        if compat.chooses_cache_layout(vllm_config) or _asked_by_a_connector():
            return required
        return layout.block_outermost(vllm_config) or required

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        caches = [{name: kv_caches[name] for name in group.layer_names} for group in self._groups]
        layout.check_devices({name: cache for of_group in caches for name, cache in of_group.items()})
        super().register_kv_caches(kv_caches)
        for memory, of_group in zip(self._worker.memories, caches, strict=True):
            memory.check_holds(of_group)
        self._backends = compat.attention_backends(self._vllm_config, list(kv_caches))

    def get_handshake_metadata(self) -> layout.WorkerLayout:
        worker = self._worker
        first = worker.memories[0]
        return layout.WorkerLayout(
            rank=self._vllm_config.parallel_config.rank,
            layers=first.pieces,
            page_bytes=first.piece_bytes,
            rank_bytes=worker.slot_layout.rank_bytes,
            layout_id=layout.layout_id(self._vllm_config, first.device_type, self._backends),
            machine=layout.machine_id(),
            groups=tuple(
                layout.GroupLayout(memory.pages_text(), slot.rank_bytes)
                for memory, slot in zip(worker.memories, worker.slot_layouts, strict=True)
            ),
            replicated=self._replicated,
        )

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if not self._blocks_fail_alone:
            for job_id, job in self._get_connector_metadata().load_jobs.items():
                self._load_jobs[job.req_id] = job_id
        super().start_load_kv(forward_context, **kwargs)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Requests whose loads failed, in the step in which they are reported as received."""
        results = super().get_transfer_results(finished_req_ids)
        if self._blocks_fail_alone:
            return results
        self._failed_jobs |= self._worker.take_failed_jobs()
        for request in results.finished_recving:
            job = self._load_jobs.pop(request, None)
            if job in self._failed_jobs:
                self._failed_jobs.discard(job)
                results.failed_recving.add(request)
        return results

    @property
    def _blocks_fail_alone(self) -> bool:
        """Whether vLLM may recompute from a block that failed to load on, with what was loaded before it. Its numbers of blocks are
        not those of one group alone; and the tokens before it may need a window of others, that were not loaded."""
        return len(self._groups) == 1 and not self._windowed[0]

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Called right after get_finished: in the same step in which a failed load's request is reported as received."""
        failed = self._worker.take_failed_blocks()
        if self._blocks_fail_alone:
            self._worker.take_failed_jobs()
        return failed if self._blocks_fail_alone else set()

    def build_connector_worker_meta(self) -> NativeWorkerMetadata | None:
        if self.connector_worker is None:
            return None
        meta = super().build_connector_worker_meta()
        if meta is None:
            return None
        return NativeWorkerMetadata(
            meta.completed_jobs,
            meta.transfer_stats,
            self._worker.take_failed_serials(),
            self._worker.take_not_started(),
            self._worker.take_copies(),
        )

    # ---- scheduler ----------------------------------------------------------------------------------------------------

    @property
    def _manager(self) -> NativeOffloadingManager:
        manager = self.connector_scheduler.manager
        assert isinstance(manager, NativeOffloadingManager)
        return manager

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        """All workers have registered their KV caches: opens the store, before the first request."""
        world = self._vllm_config.parallel_config.world_size
        agreed = layout.agreed_layout(metadata, world, replicated=self._replicated)
        parts = agreed.parts(world)
        scheduler_config = self.connector_scheduler.config
        scheme = namespace.block_hash_scheme(
            self._vllm_config, self._config, self._groups, scheduler_config.tokens_per_hash, scheduler_config.blocks_per_chunk
        )
        description = namespace.describe(self._vllm_config, self._config, agreed, self._groups, scheme)
        store = self._opening.open(agreed.rank_bytes, replicated=agreed.replicated)
        groups = [
            ChunkGroup(of.rank_bytes * parts, windowed, config.tokens_per_chunk)
            for of, windowed, config in zip(agreed.groups, self._windowed, scheduler_config.kv_group_configs, strict=True)
        ]
        events = self._vllm_config.kv_events_config
        self._manager.open(
            store,
            description,
            groups,
            events=events is not None and events.enable_kv_cache_events,
            log_requests=self._config.log_requests,
            stats=stats.StatsReporter(self._vllm_config.kv_transfer_config.kv_connector, self._config.verify),
            promotion_deadline_s=self._config.promotion_deadline_s,
        )
        several = f"{len(groups)} KV cache groups, " if len(groups) > 1 else ""
        chunks = dict.fromkeys(f"{group.chunk_tokens} tokens, {group.payload_bytes} bytes" for group in groups)
        text = several + "chunk " + " + ".join(chunks) + layout.copies_text(agreed, world)
        self._opening.log_start(store, "--kv-offloading-size", text)
        logger.info("namespace %s", self._manager.namespace_hex)
        logger.debug("namespace is of:\n%s", namespace.canonical_text(description))

    def on_new_request(self, request: Any) -> None:
        self._manager.announce_adapter(request.lora_request)
        super().on_new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        begin_s = time.monotonic()
        tokens, asynchronous = super().get_num_new_matched_tokens(request, num_computed_tokens)
        asked = self._asked.setdefault(request.request_id, _Asked())
        asked.computed_tokens = num_computed_tokens
        if tokens is None:
            asked.since_s = begin_s if asked.since_s is None else asked.since_s
        elif asked.since_s is not None:
            self._manager.noted.answered_late(time.monotonic() - asked.since_s, vllm_too=False)
            asked.since_s = None
        return tokens, asynchronous

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        asked = self._asked.pop(request.request_id, None)
        context = compat.request_context(self.connector_scheduler, request.request_id)
        if context is not None and num_external_tokens == 0:
            self._manager.nothing_to_load(context)
        if asked is None or context is None:
            return
        nvme = 0
        if num_external_tokens and compat.tells_sources():
            nvme = self.get_external_cache_hit_sources(request, num_external_tokens).get(compat.CacheHitSource.DISK, 0)
        prompt = request.num_tokens
        self._manager.admitted(request.request_id, prompt, asked.computed_tokens, num_external_tokens, nvme, context)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._with_report(request, *super().request_finished(request, block_ids))

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        return self._with_report(request, *super().request_finished_all_groups(request, block_ids))

    def _with_report(self, request: Any, delayed: bool, parameters: dict[str, Any] | None) -> tuple[bool, dict[str, Any] | None]:
        self._asked.pop(request.request_id, None)
        context = compat.request_context(self.connector_scheduler, request.request_id)
        report = None if context is None else self._manager.response(context)
        return delayed, parameters if report is None else {**(parameters or {}), **report}

    def update_connector_output(self, connector_output: Any) -> None:
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, NativeWorkerMetadata):
            self._manager.loads_failed(meta.failed_loads)
            self._manager.not_started(meta.not_started)
            for kind, size_bytes, seconds in meta.copies:
                self._manager.noted.copied(kind, size_bytes, seconds)
        super().update_connector_output(connector_output)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        return stats.NativeStats() if data is None else stats.NativeStats(data=data)

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> Any:
        """In the front end, whose configuration no connector has touched."""
        vllm_config.kv_transfer_config.kv_connector_extra_config["spec_name"] = spec.NAME
        return stats.prom_metrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
