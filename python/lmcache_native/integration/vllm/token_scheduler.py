"""The scheduler's side of LMCacheNativeConnector: which tokens to load and to store, in chunks that need not be whole blocks.

One thread, vLLM's scheduler, calls everything, and nothing waits: lookups, leases and commits touch memory only.

Invariants
T1  A block that a store reads is not written before the store has ended: stores of preempted requests, and stores that read a
    finished request's block which is handed out again, are flushed by the workers before the step that could write it.
T2  KV that may rest on a failed load is never published. Only a synchronous load can be computed upon: vLLM caches its blocks when
    it allocates them. When one fails, all stores under way are dropped, requests that have computed anything store nothing more,
    and vLLM's prefix cache is emptied: who computed upon those blocks, and may have finished since, is not known.
T3  At most one load of a chunk is under way: a request that needs what another is loading waits until vLLM has cached it.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lmcache_native import ChunkKeys, Presence, ReadLease, Store, WriteLease
from lmcache_native.config import NativeConfig
from lmcache_native.errors import InternalError, InvalidArgument, LmcacheNativeError, NotFound, ResourceExhausted
from lmcache_native.integration.vllm import compat, direct_loads, quickstart_log
from lmcache_native.integration.vllm.direct_loads import Placed
from lmcache_native.integration.vllm.kv_events import ChunkEvents
from lmcache_native.integration.vllm.namespace import Namespaces
from lmcache_native.integration.vllm.stats import Admission, StatsReporter, log_admission
from lmcache_native.integration.vllm.token_keys import TokenKeys, request_settings
from lmcache_native.integration.vllm.token_requests import Job, Match, RequestState
from lmcache_native.integration.vllm.transfer import TokenConnectorMetadata, TokenWorkerMetadata, TransferJob
from lmcache_native.logging import get_logger

logger = get_logger(__name__)

CLOSE_TIMEOUT_S = 2.0


class TokenScheduler:
    def __init__(
        self,
        config: NativeConfig,
        store: Store,
        namespaces: Namespaces,
        *,
        chunk_tokens: int,
        chunk_bytes: int,
        block_tokens: int,
        partial_chunks: bool,
        direct_loads: bool = False,
        forget_blocks: Callable[[], None],
        connector_name: str = "",
    ) -> None:
        """chunk_bytes: of all ranks. block_tokens: the engine's. partial_chunks: whether pages are addressed by token.
        direct_loads: the workers read from NVMe themselves. forget_blocks: empties vLLM's prefix cache. connector_name: for
        metrics."""
        self._direct_loads = direct_loads and config.retrieve_nvme
        self._forget_blocks = forget_blocks
        self._config = config
        self.store = store
        self.namespaces = namespaces
        self._chunk_tokens = chunk_tokens
        self._chunk_bytes = chunk_bytes
        self._block_tokens = block_tokens
        self._save_tails = config.save_partial_chunk and partial_chunks
        self._states: dict[str, RequestState] = {}
        self._jobs: dict[int, Job] = {}
        self._next_job = 1
        self._loading: dict[bytes, RequestState] = {}  # T3
        self._pending_blocks: dict[int, set[int]] = {}  # T1: block -> stores of finished requests that read it
        self._handed_out: set[int] = set()  # blocks, in this step
        self._new_loads: list[TransferJob] = []
        self._prefetched_bytes = 0
        self._events = ChunkEvents(store, chunk_tokens) if config.kv_events else None
        self._stats = StatsReporter(connector_name, config.verify)
        self._noted = self._stats.noted
        self._closed = False

    # ---- requests -----------------------------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        state = self._new_state(request)
        self._states[state.request_id] = state
        if state.may_load:
            self._prefetch(state)

    def _new_state(self, request: Any) -> RequestState:
        try:
            settings = request_settings(request.kv_transfer_params)
        except InvalidArgument as error:
            logger.warning("request %s is served without the cache: %s", request.request_id, error)
            self._noted.without_cache("parameters")
            return RequestState(request, None, None, may_load=False, may_save=False)
        namespace = self.namespaces.of(request.lora_request)
        if namespace is None:
            self._noted.without_cache("adapter")
            return RequestState(request, None, None, may_load=False, may_save=False)
        keys = TokenKeys(namespace.id, self._chunk_tokens, request, settings.tags)
        limit = self._config.priority_limit
        may_save = not (self._config.skip_save or settings.skip_save or (limit is not None and request.priority > limit))
        may_load = not request.skip_reading_prefix_cache
        return RequestState(request, namespace, keys, may_load=may_load, may_save=may_save, settings=settings)

    def _prefetch(self, state: RequestState) -> None:
        """Starts to promote what is on NVMe while the request queues; for as many requests as leave most of the arena to others."""
        assert state.keys is not None
        keys = state.keys.whole(state.request.num_tokens)
        found = self.store.lookup(keys)
        size = found.hit * self._chunk_bytes
        if found.nvme == 0 or not self._promotes or self._prefetched_bytes + size > self._config.host_bytes // 4:
            return
        self._begin_lookup(state).prefetch(keys)
        state.prefetched_bytes = size
        self._prefetched_bytes += size

    def _begin_lookup(self, state: RequestState) -> Any:
        if state.lookup is None:
            assert state.namespace is not None
            state.lookup = self.store.begin_request(
                state.namespace.id,
                promotion_budget_bytes=self._config.promotion_budget_bytes,
                promote=self._promotes,
                priority=state.settings.priority,
            )
        return state.lookup

    @property
    def _promotes(self) -> bool:
        return self._config.retrieve_nvme and not self._direct_loads

    def _end_lookup(self, state: RequestState) -> None:
        self._prefetched_bytes -= state.prefetched_bytes
        state.end_lookup()

    def request_finished(self, request: Any) -> dict[str, Any] | None:
        """Its blocks are about to be freed. What the response says of it, when the request asked for that."""
        state = self._states.get(request.request_id)
        if state is None:
            return None
        self._end_lookup(state)
        self._stop_loading(state)
        state.finished = True
        for job in state.jobs.values():
            if not job.is_load:
                for block in job.transfer.block_ids:
                    self._pending_blocks.setdefault(block, set()).add(job.transfer.id)
        self._forget_if_idle(state)
        return state.admission.response() if state.settings.report and state.admission is not None else None

    def _forget_if_idle(self, state: RequestState) -> None:
        if state.finished and not state.jobs and self._states.get(state.request_id) is state:
            del self._states[state.request_id]

    # ---- lookup -------------------------------------------------------------------------------------------------------

    def match(self, request: Any, computed_tokens: int) -> int | None:
        """Tokens beyond `computed_tokens` that can be loaded. None: ask again, something is on its way."""
        state = self._states.get(request.request_id)
        if state is None:
            return 0
        begin_s = time.monotonic()
        state.computed_tokens = computed_tokens
        tokens = self._match(state, computed_tokens)
        end_s = time.monotonic()
        self._noted.looked_up(end_s - begin_s)
        if tokens is None:
            state.asked_since_s = begin_s if state.asked_since_s is None else state.asked_since_s
        elif state.asked_since_s is not None:
            self._noted.answered_late(end_s - state.asked_since_s, vllm_too=True)
            state.asked_since_s = None
        return tokens

    def _match(self, state: RequestState, computed_tokens: int) -> int | None:
        request = state.request
        if state.keys is None or not state.may_load or not state.usable():
            return 0
        whole = state.keys.whole(request.num_tokens)
        tail = state.keys.tail(request.num_tokens) if self._save_tails else None
        first = computed_tokens // self._chunk_tokens
        needed = whole[first] if first < len(whole) else tail
        if needed is not None and self._another_loads(needed, state):
            return None
        hits, following = self._leading_hits(state, whole[first:])
        if following == Presence.MISS and state.prefetched_bytes:
            self._end_lookup(state)  # what was refused when the request arrived may be had now
            return self._match(state, computed_tokens)
        end = (first + hits) * self._chunk_tokens
        if tail is not None and first + hits == len(whole):
            tail_hits, following = self._leading_hits(state, [tail])
            end = request.num_tokens if tail_hits else end
        if following in (Presence.RETRY, Presence.PENDING) and self._may_wait(state):
            return None
        return self._matched(state, computed_tokens, first, end if hits or end == request.num_tokens else 0)

    def _leading_hits(self, state: RequestState, keys: Any) -> tuple[int, int]:
        lookup = self._begin_lookup(state)
        found: tuple[int, int] = lookup.lookup_tiers(keys) if self._direct_loads else lookup.lookup_prefix(keys)
        return found

    def _another_loads(self, key: bytes, state: RequestState) -> bool:
        other = self._loading.get(key)
        # Until its status changes, vLLM has not cached the loaded blocks.
        return other is not None and other is not state and other.request.status == compat.RequestStatus.WAITING_FOR_REMOTE_KVS

    def _may_wait(self, state: RequestState) -> bool:
        now = time.monotonic()
        if state.wait_until_s is None:
            state.wait_until_s = now + self._config.promotion_deadline_s
        return now < state.wait_until_s

    def _matched(self, state: RequestState, computed: int, first: int, end: int) -> int:
        """Applies the limits; remembers the match for the allocation that follows."""
        request = state.request
        if end > 0 and self._config.hit_miss_ratio is not None:
            end = min(end, int(request.num_tokens * self._config.hit_miss_ratio) // self._chunk_tokens * self._chunk_tokens)
        hit = end
        if hit <= computed and state.keys is not None:
            leading = self.store.lookup(state.keys.whole(computed)).hit * self._chunk_tokens
            hit = max(hit, leading)
        # The last token is always computed: sampling needs its logits.
        need: int = max(min(end, request.num_tokens - 1) - computed, 0)
        if (hit, need) != state.reported:
            state.reported = (hit, need)
            if state.keys is not None:
                self.store.touch(state.keys.whole(computed))  # what the engine has itself is in use, too
            quickstart_log.matched(state.request_id, request.num_tokens, hit, need, self._config.min_retrieve_tokens)
        if need < self._config.min_retrieve_tokens:
            need = 0
        state.match = Match(computed, computed + need, first) if need else None
        if not need:
            self._end_lookup(state)
        return need

    # ---- loads --------------------------------------------------------------------------------------------------------

    def allocated(self, request: Any, block_ids: Sequence[int], external_tokens: int) -> None:
        """vLLM gave the request blocks; `external_tokens` of them are to be loaded."""
        self._handed_out.update(block_ids)
        state = self._states.get(request.request_id)
        if state is None:
            return
        self._stop_loading(state)
        state.wait_until_s = None
        if external_tokens == 0:
            self._end_lookup(state)
            self._note_admission(state, 0)
            return
        match = state.match
        if match is None:
            raise InternalError(f"request {request.request_id}: {external_tokens} tokens to load, but none were offered")
        end = match.begin + external_tokens
        keys = self._keys_between(state, match.first_chunk, end)
        chunks = array("I", range(match.first_chunk, match.first_chunk + len(keys)))
        lease, slots = self._lease(state, keys, chunks)
        first_block = match.begin // self._block_tokens
        transfer = TransferJob(
            id=self._new_id(),
            request_id=state.request_id,
            begin=match.begin,
            end=end,
            chunks=slots.chunks,
            offsets=lease.slot_offsets() if lease is not None else array("Q"),
            generations=lease.generations() if lease is not None else array("I"),
            records=slots.records,
            first_block=first_block,
            block_ids=array("q", block_ids[first_block : -(-end // self._block_tokens)]),
            synchronous=not self._config.async_loading,
        )
        self._add_job(Job(state, transfer, lease, keys, self.store.rank_count))
        self._new_loads.append(transfer)
        self._note_admission(state, external_tokens)
        if self._config.async_loading:
            state.loading = keys
            self._loading.update(dict.fromkeys(keys, state))

    def _note_admission(self, state: RequestState, external_tokens: int) -> None:
        """Once a request: not when it comes back from its load, or after a preemption."""
        if state.admission is not None or state.keys is None:
            return
        nvme = self.sources(state.request, external_tokens).get(compat.CacheHitSource.DISK, 0)
        found = Admission(state.request.num_tokens, state.computed_tokens, external_tokens - nvme, nvme)
        state.admission = found
        self._noted.admitted(found)
        log_admission(state.request_id, found, show=self._config.log_requests)

    def _keys_between(self, state: RequestState, first_chunk: int, end: int) -> list[bytes]:
        """Of the chunks from first_chunk on that hold tokens before `end`; the last may be the request's partial one."""
        assert state.keys is not None
        total = state.request.num_tokens
        chunks = -(-end // self._chunk_tokens)
        keys = list(state.keys.whole(total)[first_chunk:chunks])
        if len(keys) < chunks - first_chunk:
            tail = state.keys.tail(total)
            assert tail is not None
            keys.append(tail)
        return keys

    def _lease(self, state: RequestState, keys: list[bytes], chunks: array[int]) -> tuple[ReadLease | None, Placed]:
        """vLLM has counted on the hit: what cannot be had any more becomes a load that fails."""
        placed = Placed(keys, chunks)
        try:
            if state.lookup is None or state.namespace is None:
                raise NotFound("its pins have ended")
            if self._direct_loads:
                placed = direct_loads.place(self.store, state.lookup, placed, state.namespace.id)
            return state.lookup.acquire(placed.keys, for_worker=True), placed
        except LmcacheNativeError as error:
            logger.warning("request %s: a hit could not be leased, it will be recomputed: %s", state.request_id, error)
            return None, Placed(keys, chunks)

    def sources(self, request: Any, external_tokens: int) -> dict[Any, int]:
        """The tiers of what is being loaded."""
        state = self._states.get(request.request_id)
        load = next((job for job in state.jobs.values() if job.is_load), None) if state is not None else None
        if state is None or load is None or state.lookup is None:
            return {compat.CacheHitSource.EXTERNAL_UNSPECIFIED: external_tokens} if external_tokens else {}
        _host, nvme = state.lookup.count_sources(load.keys)
        direct = len(load.transfer.records.chunks) if load.transfer.records is not None else 0
        disk_tokens = min((nvme + direct) * self._chunk_tokens, external_tokens)
        found = {compat.CacheHitSource.HOST: external_tokens - disk_tokens, compat.CacheHitSource.DISK: disk_tokens}
        return {source: tokens for source, tokens in found.items() if tokens}

    def _stop_loading(self, state: RequestState) -> None:
        for key in state.loading:
            if self._loading.get(key) is state:
                del self._loading[key]
        state.loading = []

    # ---- stores -------------------------------------------------------------------------------------------------------

    def build_meta(self, output: Any) -> TokenConnectorMetadata:
        """`output`: vLLM's SchedulerOutput of the step that was just planned."""
        flush = self._jobs_to_flush(output)
        stores = []
        for request_id, scheduled in output.num_scheduled_tokens.items():
            state = self._states.get(request_id)
            if state is not None and state.may_save and not state.all_saved:
                transfer = self._plan_store(state, scheduled, output.kv_connector_block_state)
                if transfer is not None:
                    stores.append(transfer)
        loads, self._new_loads = self._new_loads, []
        self._handed_out.clear()
        return TokenConnectorMetadata(loads, stores, flush)

    def _jobs_to_flush(self, output: Any) -> set[int]:
        flush: set[int] = set()
        for request_id in output.preempted_req_ids or ():
            if (state := self._states.get(request_id)) is not None:
                flush.update(job_id for job_id, job in state.jobs.items() if not job.is_load)
        if self._pending_blocks:
            for new in output.scheduled_new_reqs:
                self._handed_out.update(*new.block_ids)
            for blocks in output.scheduled_cached_reqs.new_block_ids:
                self._handed_out.update(*(blocks or ()))
            self._handed_out.update(copy.dst_block_id for copy in output.kv_cache_block_copies or ())
            for block in self._handed_out & self._pending_blocks.keys():
                flush |= self._pending_blocks[block]
        return flush

    def _plan_store(self, state: RequestState, scheduled_tokens: int, block_state: Any) -> TransferJob | None:
        """The chunks that this step completes. Drafts that speculation may reject are beyond request.num_tokens."""
        request = state.request
        known = request.num_tokens if self._config.save_decode else request.num_prompt_tokens
        ready = min(request.num_computed_tokens + scheduled_tokens, known)
        end = ready // self._chunk_tokens * self._chunk_tokens
        if self._save_tails and ready == request.num_prompt_tokens:
            end = ready
        if end <= state.saved_tokens:
            state.all_saved = ready == request.num_prompt_tokens and not self._config.save_decode and not request.resumable
            return None
        assert state.keys is not None
        assert state.namespace is not None
        offered = self._keys_from(state, state.saved_tokens // self._chunk_tokens, end)
        skipped = self.store.lookup(offered).hit
        first_chunk = state.saved_tokens // self._chunk_tokens + skipped
        offered = offered[skipped:]
        begin = first_chunk * self._chunk_tokens
        if not offered:
            state.saved_tokens = end
            return None
        try:
            lease = self.store.reserve(state.namespace.id, offered, self._chunk_bytes, for_worker=True)
        except ResourceExhausted:
            self._noted.allocation_failed()
            return None  # offered again in the request's next step
        if len(lease) == 0:
            state.saved_tokens = end
            return None
        lease.set_priority(state.settings.priority)
        quickstart_log.storing(state.request_id, begin, end, decoded=end > request.num_prompt_tokens)
        positions = lease.positions
        first_block = begin // self._block_tokens
        (block_ids,) = compat.scheduled_blocks(block_state, state.request_id)
        chunks = array("I", (first_chunk + position for position in positions))
        saved = min((chunks[-1] + 1) * self._chunk_tokens, end)
        transfer = TransferJob(
            id=self._new_id(),
            request_id=state.request_id,
            begin=begin,
            end=saved,
            chunks=chunks,
            offsets=lease.slot_offsets(),
            generations=lease.generations(),
            first_block=first_block,
            block_ids=array("q", block_ids[first_block : -(-saved // self._block_tokens)]),
        )
        self._add_job(Job(state, transfer, lease, [offered[position] for position in positions], self.store.rank_count))
        state.saved_tokens = saved
        return transfer

    def _keys_from(self, state: RequestState, first_chunk: int, end: int) -> Any:
        """ChunkKeys of whole chunks; a list when `end` is within one."""
        assert state.keys is not None
        whole: ChunkKeys = state.keys.whole(end)[first_chunk:]
        tail = state.keys.tail(end)
        return whole if tail is None else [*whole, tail]

    # ---- jobs that ended ----------------------------------------------------------------------------------------------

    def update(self, meta: TokenWorkerMetadata) -> None:
        for slots in meta.not_started:
            self.store.job_not_started(slots.rank, slots.offsets, slots.generations, load=slots.load)
        ended = [
            self._jobs[job_id] for job_id, report in meta.ended.items() if job_id in self._jobs and self._jobs[job_id].add(report)
        ]
        reports = [(job.transfer, job.report) for job in self._jobs.values() if job.is_load and job.report is not None]
        if any(transfer.synchronous and report.failed for transfer, report in reports):
            self._distrust_engine()
        for job in ended:
            assert job.report is not None
            kind = "load" if job.is_load else "store"
            self._noted.copied(kind, job.report.bytes, job.report.seconds)
            self._noted.transferred(kind, job.report.bytes, job.report.seconds)
            self._remove_job(job)
            if job.is_load:
                self._load_ended(job)
            else:
                self._store_ended(job)
            self._forget_if_idle(job.state)

    def _load_ended(self, job: Job) -> None:
        assert job.report is not None
        state, transfer = job.state, job.transfer
        if isinstance(job.lease, ReadLease):
            job.lease.release()
        self._end_lookup(state)
        tokens = transfer.end - transfer.begin
        self._noted.load_ended(tokens, time.monotonic() - job.begun_s, failed=job.report.failed)
        records = transfer.records
        if records is not None:
            direct_loads.forget_bad(self.store, records, job.report.bad_records)
            if job.report.no_more_records and self._direct_loads:
                logger.warning("workers read NVMe themselves no more; loads go through host memory")
                self._direct_loads = False
        if job.report.failed:
            state.may_load = False  # or it might fail for ever
            quickstart_log.load_failed(state.request_id, tokens, len(transfer.block_ids))
        else:
            quickstart_log.retrieved(
                state.request_id, tokens, transfer.end, state.request.num_tokens, job.report.bytes, job.report.seconds
            )

    def _store_ended(self, job: Job) -> None:
        """The ranks' words in the slots decide what is published."""
        assert job.report is not None
        assert isinstance(job.lease, WriteLease)
        slots = len(job.lease)  # 0: it was dropped
        if slots == 0:
            return
        if not job.state.usable():
            job.drop()
            return
        if self._events is not None:
            self._note_payloads(self._events, job)
        begin_s = time.perf_counter()
        published = job.lease.commit()
        publish_s = time.perf_counter() - begin_s
        if self._events is not None and published < slots:
            for key in job.keys:
                if self.store.lookup([key]).hit == 0:
                    self._events.forget(key)
        offered = self._tokens(job)
        tokens = offered if published == slots else published * self._chunk_tokens
        self._noted.store_ended(tokens, time.monotonic() - job.begun_s, failed=published < slots)
        quickstart_log.stored(
            job.state.request_id,
            tokens,
            offered,
            job.report.bytes * published // slots,
            job.report.seconds,
            publish_s,
            decoded=job.transfer.end > job.state.request.num_prompt_tokens,
        )

    def _tokens(self, job: Job) -> int:
        size = self._chunk_tokens
        return sum(min((chunk + 1) * size, job.transfer.end) - chunk * size for chunk in job.transfer.chunks)

    def _distrust_engine(self) -> None:
        """T2."""
        for job in self._jobs.values():
            if not job.is_load:
                job.drop()
        for state in self._states.values():
            if state.request.status != compat.RequestStatus.WAITING:
                state.may_save = False
        self._forget_blocks()

    def _new_id(self) -> int:
        self._next_job += 1
        return self._next_job

    def _add_job(self, job: Job) -> None:
        self._jobs[job.transfer.id] = job
        job.state.jobs[job.transfer.id] = job

    def _remove_job(self, job: Job) -> None:
        job_id = job.transfer.id
        del self._jobs[job_id]
        del job.state.jobs[job_id]
        if self._pending_blocks and job.state.finished:
            for block in job.transfer.block_ids:
                jobs = self._pending_blocks.get(block)
                if jobs is not None:
                    jobs.discard(job_id)
                    if not jobs:
                        del self._pending_blocks[block]

    # ---- the rest -----------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Jobs are under way: vLLM must go on stepping to hear of their end."""
        return bool(self._jobs)

    def reset(self) -> None:
        """Requests of before the reset may hold KV of other weights: they load and store nothing any more."""
        self.namespaces.raise_epoch()
        for state in self._states.values():
            self._prefetched_bytes -= state.prefetched_bytes
            state.forget()
        self._loading.clear()
        self.store.clear()
        if self._events is not None:
            self._events.cleared()

    def _note_payloads(self, events: ChunkEvents, job: Job) -> None:
        state, size = job.state, self._chunk_tokens
        assert state.keys is not None
        for chunk, key in zip(job.transfer.chunks, job.keys, strict=True):
            tokens = state.request.all_token_ids[chunk * size : min((chunk + 1) * size, job.transfer.end)]
            parent = state.keys.whole(chunk * size)[chunk - 1] if chunk else None
            events.describe(key, parent, tokens, state.request.lora_request)

    def take_events(self) -> Iterable[Any]:
        return self._events.take() if self._events is not None and not self._closed else ()

    def stats(self) -> Any:
        if self._closed or not self._stats.due():
            return None
        loads = sum(job.is_load for job in self._jobs.values())
        return self._stats.report(self.store, loads, len(self._jobs) - loads, direct_loads=self._direct_loads)

    def shutdown(self) -> None:
        if self._closed:
            return
        self._closed = True
        for state in self._states.values():
            state.forget()
        self._states.clear()
        self._jobs.clear()
        try:
            self.store.close(CLOSE_TIMEOUT_S)
        except LmcacheNativeError as error:
            logger.warning("closing the store: %s", error)
