"""LMCacheNativeConnector's scheduler side and workers over one real store, under a small engine of our own that calls them in
vLLM's order. KV is a function of all tokens up to its own, so that each forward pass can check every byte that it would read."""

from __future__ import annotations

import contextlib
import itertools
import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from token_parts import BLOCK, DIM, HEADS, LAYERS, PLANES, HeldCopier, adapter, pages, sampled
from vllm import SamplingParams
from vllm.v1.request import Request, RequestStatus

from lmcache_native import ChunkHasher, ChunkKeys, DeviceLoader, Store
from lmcache_native.config import NativeConfig
from lmcache_native.integration.vllm.namespace import Namespaces
from lmcache_native.integration.vllm.pages import TokenPages
from lmcache_native.integration.vllm.record_loader import RecordLoader
from lmcache_native.integration.vllm.token_scheduler import TokenScheduler
from lmcache_native.integration.vllm.token_worker import TokenWorker
from lmcache_native.integration.vllm.transfer import JobReport, TokenConnectorMetadata, TokenWorkerMetadata


@dataclass
class Step:
    """What was planned, and what the workers said."""

    scheduled: dict[str, int] = field(default_factory=dict)
    begin: dict[str, int] = field(default_factory=dict)
    sampling: set[str] = field(default_factory=set)
    new: list[Any] = field(default_factory=list)
    cached_new: list[Any] = field(default_factory=list)
    meta: TokenConnectorMetadata = field(default_factory=TokenConnectorMetadata)
    received: list[str] = field(default_factory=list)  # one per rank
    failed_blocks: set[int] = field(default_factory=set)
    report: TokenWorkerMetadata | None = None


class Engine:
    """Blocks are handed out again the moment they are free, oldest first; block 0 is never used. `ahead`: as vLLM's asynchronous
    scheduling, each step is planned before what the last one gave is known. `direct`: the workers read from NVMe. `replicated`: all
    ranks compute the same KV, and it is stored once."""

    def __init__(
        self,
        *,
        chunk: int,
        ranks: int = 1,
        blocks: int = 40,
        host_bytes: int = 4 << 20,
        directory: Path | None = None,
        ahead: bool = False,
        direct: bool = False,
        replicated: bool = False,
        step_tokens: int = 50,
        **config: Any,
    ) -> None:
        self.config = NativeConfig(host_bytes=host_bytes, chunk_tokens=chunk, **config)
        self.ahead = ahead
        self.replicated = replicated
        parts = 1 if replicated else ranks
        self.step_tokens = step_tokens  # of one request: chunked prefill
        self.pages = [pages(blocks) for _ in range(ranks)]
        engine_id = f"test-{uuid.uuid4()}"
        self.workers = [
            TokenWorker(
                memory,
                ["a", "b"],
                chunk_tokens=chunk,
                engine_id=engine_id,
                rank=rank,
                ranks=ranks,
                copy_threads=1,
                load_timeout_s=self.config.load_timeout_s,
                layerwise=self.config.layerwise,
                loader=record_loader(memory, chunk, 0 if replicated else rank, parts, directory) if direct and directory else None,
                replicated=replicated,
            )
            for rank, memory in enumerate(self.pages)
        ]
        rank_bytes = self.workers[0].slot_layout.rank_bytes
        store = Store(
            host_bytes=host_bytes,
            rank_count=ranks,
            replicated=replicated,
            max_payload_bytes=rank_bytes * parts,
            directory=directory,
            nvme_bytes=128 << 20 if directory else 0,
        )
        store.serve(engine_id, rank_bytes)
        self.scheduler = TokenScheduler(
            self.config,
            store,
            Namespaces({"test": "1"}),
            chunk_tokens=chunk,
            chunk_bytes=rank_bytes * parts,
            block_tokens=BLOCK,
            partial_chunks=True,
            direct_loads=direct,
            forget_blocks=self.forget_blocks,
        )
        self.free = list(range(1, blocks))
        self.cached: dict[int, int] = {}  # hash of a whole block's prefix -> block
        self.blocks: dict[str, list[int]] = {}
        self.requests: dict[str, Request] = {}
        self.received: set[str] = set()
        self.failed: set[str] = set()
        self.preempted: set[str] = set()
        self.hit_tokens: dict[str, int] = {}
        self.copies: list[Any] = []  # the next step's kv_cache_block_copies
        self.steps: list[Step] = []  # run, not yet applied
        self._names = itertools.count()
        self._received_ranks: dict[str, int] = {}
        self._garbage: set[int] = set()  # blocks of loads that failed, which vLLM has not heard of

    # ---- what a user does ---------------------------------------------------------------------------------------------

    def ask(self, tokens: list[int], max_tokens: int = 1, fields: dict[str, Any] | None = None, **parameters: Any) -> str:
        """`fields`: of vLLM's Request. `parameters`: kv_transfer_params, with _ for . in their names' first place."""
        name = f"r{next(self._names)}"
        named = {key.replace("lmcache_", "lmcache.", 1): value for key, value in parameters.items()}
        sampling = SamplingParams(max_tokens=max_tokens, extra_args={"kv_transfer_params": named} if named else None)
        request = Request(name, list(tokens), sampling, None, **fields or {})
        self.requests[name] = request
        self.scheduler.on_new_request(request)
        return name

    def answered(self, tokens: list[int], max_tokens: int = 1, fields: dict[str, Any] | None = None, **parameters: Any) -> int:
        """Runs it to its end, the engine having forgotten what it had; tokens that came from the connector."""
        self.forget_blocks()
        return self.answered_warm(tokens, max_tokens, fields, **parameters)

    def answered_warm(self, tokens: list[int], max_tokens: int = 1, fields: dict[str, Any] | None = None, **parameters: Any) -> int:
        name = self.ask(tokens, max_tokens, fields, **parameters)
        self.drain()
        return self.hit_tokens.get(name, 0)

    def abort(self, name: str) -> None:
        request = self.requests[name]
        waiting = request.status == RequestStatus.WAITING_FOR_REMOTE_KVS and name not in self.received
        request.status = RequestStatus.FINISHED_ABORTED
        self.scheduler.request_finished(request)
        if not waiting:  # else the worker may still write: freed when it reports
            self._free(name)

    def preempt(self, name: str) -> None:
        request = self.requests[name]
        assert request.status == RequestStatus.RUNNING
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_output_placeholders = 0
        request.num_stale_output_tokens = request.num_in_flight_tokens
        request.num_preemptions += 1
        self._release(name)
        self.preempted.add(name)

    def forget_blocks(self) -> None:
        self.cached.clear()

    def settle(self) -> None:
        """The workers' copies of until now end, and the scheduler hears of it."""
        self.step()
        for worker in self.workers:
            worker.wait_ended(list(self.scheduler._jobs))
        self.step()

    def drain(self) -> None:
        give_up_s = time.monotonic() + 10
        while self.requests or self.scheduler.busy:
            assert time.monotonic() < give_up_s, f"still not done: {self.requests}, {self.scheduler._jobs}"
            self.step()
        while self.steps:
            self._apply(self.steps.pop(0))
        assert not self.requests
        assert not self.scheduler.busy

    # ---- a step, in vLLM's order --------------------------------------------------------------------------------------

    def step(self) -> Step:
        step = self._plan()
        self._run(step)
        self.steps.append(step)
        while len(self.steps) > int(self.ahead):
            self._apply(self.steps.pop(0))
        return step

    def _plan(self) -> Step:
        step = Step()
        running = [name for name, request in self.requests.items() if request.status == RequestStatus.RUNNING]
        others = [name for name in self.requests if name not in running]
        before = set(self.preempted)
        for name in running:
            if self.requests[name].status == RequestStatus.RUNNING:  # not preempted by those before it
                self._schedule(name, step)
        if self.preempted == before:
            for name in others:
                self._schedule(name, step)
        output = SimpleNamespace(
            num_scheduled_tokens=step.scheduled,
            scheduled_new_reqs=step.new,
            scheduled_cached_reqs=SimpleNamespace(new_block_ids=step.cached_new),
            preempted_req_ids=self.preempted,
            kv_cache_block_copies=self.copies or None,
            kv_connector_block_state=SimpleNamespace(get_block_ids=lambda name: (list(self.blocks[name]),)),
        )
        step.meta = self.scheduler.build_meta(output)
        self.preempted, self.copies = set(), []
        for name, tokens in step.scheduled.items():
            request = self.requests[name]
            step.begin[name] = request.num_computed_tokens
            request.num_computed_tokens += tokens
            request.num_in_flight_tokens += tokens
            if request.num_computed_tokens == request.num_tokens + request.num_output_placeholders:
                request.num_output_placeholders += 1
                step.sampling.add(name)
        return step

    def _run(self, step: Step) -> None:
        synchronous = any(job.synchronous for job in step.meta.loads)
        for rank, worker in enumerate(self.workers):
            worker.begin_step(step.meta)
            if synchronous:
                worker.start_loads(step.meta)
            if self.config.layerwise:
                worker.wait_for_layer("a")
                worker.wait_for_layer("b")
            self._forward(rank, step)
            if not synchronous:
                worker.start_loads(step.meta)
            worker.end_step(step.meta)
            step.received.extend(worker.take_received())
            step.failed_blocks |= worker.take_failed_blocks()
            report = worker.take_report()
            if report is not None:
                step.report = report if step.report is None else step.report.aggregate(report)
        self._garbage.clear()

    def _schedule(self, name: str, step: Step) -> None:
        request = self.requests[name]
        if request.status == RequestStatus.FINISHED_ABORTED or request.num_stale_output_tokens:
            return
        if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            if name not in self.received:
                return
            self.received.discard(name)
            if name in self.failed:
                self.failed.discard(name)
                if request.num_computed_tokens == 0:
                    self._release(name)
            self._cache_blocks(name, request.num_computed_tokens)
            request.status = RequestStatus.PREEMPTED if request.num_preemptions else RequestStatus.WAITING
        if request.status == RequestStatus.RUNNING:
            if request.num_computed_tokens < request.num_prompt_tokens + request.max_tokens - 1:
                self._schedule_tokens(name, step)
            return
        external = 0
        if name not in self.blocks:
            local = self._local_hit(request)
            matched = self.scheduler.match(request, len(local) * BLOCK)
            if matched is None:
                return
            external = matched
            waits = external > 0 and self.config.async_loading
            if waits and len(self.free) < self._reserved() + self._missing(request, 0):
                return
            total = len(local) * BLOCK + external
            tokens = 0 if waits else min(request.num_tokens - total, self.step_tokens)
            if not self._allocate(name, local, -(-(total + tokens) // BLOCK)):
                return
            request.num_computed_tokens = total
            self.hit_tokens[name] = self.hit_tokens.get(name, 0) + external
            self.scheduler.allocated(request, list(self.blocks[name]), external)
            self.scheduler.sources(request, external)
            if waits:
                request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
                return
            step.new.append(SimpleNamespace(block_ids=(list(self.blocks[name]),)))
            self._schedule_tokens(name, step)
        else:
            total = request.num_computed_tokens
            if not self._allocate(name, self.blocks[name], -(-min(total + self.step_tokens, request.num_tokens) // BLOCK)):
                return
            self.scheduler.allocated(request, list(self.blocks[name]), 0)
            step.new.append(SimpleNamespace(block_ids=(list(self.blocks[name]),)))
            self._schedule_tokens(name, step)
        request.status = RequestStatus.RUNNING

    def _schedule_tokens(self, name: str, step: Step) -> None:
        request = self.requests[name]
        end = request.num_tokens + request.num_output_placeholders
        tokens = min(end - request.num_computed_tokens, self.step_tokens)
        if tokens == 0:
            return
        before = len(self.blocks[name])
        while not self._allocate(name, self.blocks[name], -(-(request.num_computed_tokens + tokens) // BLOCK)):
            running = [
                other
                for other, found in self.requests.items()
                if found.status == RequestStatus.RUNNING and other not in step.scheduled
            ]
            self.preempt(running[-1])
            if running[-1] == name:
                return
        step.cached_new.append((self.blocks[name][before:],))
        step.scheduled[name] = tokens
        self._cache_blocks(name, min(request.num_computed_tokens + tokens, request.num_tokens))

    def _forward(self, rank: int, step: Step) -> None:
        for name, tokens in step.scheduled.items():
            done = step.begin[name]
            garbage = bool(self._garbage.intersection(self.blocks[name][: -(-done // BLOCK)]))
            if not garbage:
                self.check(rank, name, done)
            else:  # what is computed from garbage is garbage
                self._garbage.update(self.blocks[name][done // BLOCK : -(-(done + tokens) // BLOCK)])
            self._write(rank, name, done, done + tokens, garbage=garbage)

    def _apply(self, step: Step) -> None:
        failed_now = self._handle_failed_blocks(step)
        for name, tokens in step.scheduled.items():
            request = self.requests.get(name)
            if request is None:
                continue
            stale = request.num_stale_output_tokens > 0
            request.num_in_flight_tokens -= tokens
            request.num_stale_output_tokens -= tokens if stale else 0
            if name in failed_now or name not in step.sampling:
                continue
            if not stale:
                request.num_output_placeholders -= 1
            request.append_output_token_ids(sampled(request.num_tokens))
            if request.num_output_tokens >= request.max_tokens:
                request.status = RequestStatus.FINISHED_STOPPED
                self.scheduler.request_finished(request)
                self._free(name)
        if step.report is not None:
            self.scheduler.update(step.report)
        for name in step.received:
            self._received_ranks[name] = self._received_ranks.get(name, 0) + 1
            if self._received_ranks[name] == len(self.workers):
                del self._received_ranks[name]
                if self.requests[name].status == RequestStatus.FINISHED_ABORTED:
                    self._free(name)
                else:
                    self.received.add(name)

    def _handle_failed_blocks(self, step: Step) -> set[str]:
        """As vLLM: a request goes back to its first block that failed; of requests that share it, only the first recomputes it."""
        failed: set[str] = set()
        marked: set[int] = set()
        waiting = [name for name, request in self.requests.items() if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS]
        running = [name for name, request in self.requests.items() if request.status == RequestStatus.RUNNING]
        for name in waiting + running:
            request = self.requests[name]
            before = request.num_computed_tokens - step.scheduled.get(name, 0)
            bad = [index for index, block in enumerate(self.blocks[name][: -(-before // BLOCK)]) if block in step.failed_blocks]
            if bad:
                failed.add(name)
                own = [index for index in bad if self.blocks[name][index] not in marked]
                marked.update(self.blocks[name][index] for index in bad)
                request.num_computed_tokens = own[0] * BLOCK if own else before
                request.num_output_placeholders = 0
        self.failed |= failed.intersection(waiting)
        return failed.intersection(running)

    # ---- blocks -------------------------------------------------------------------------------------------------------

    def _missing(self, request: Request, have: int) -> int:
        return max(-(-(request.num_tokens + 1) // BLOCK) - have, 0)

    def _reserved(self) -> int:
        """What requests that hold blocks still need to be computed."""
        return sum(self._missing(self.requests[name], len(blocks)) for name, blocks in self.blocks.items())

    def _allocate(self, name: str, have: list[int], wanted: int) -> bool:
        if len(have) + len([block for block in self.free if block not in have]) < wanted:
            return False
        blocks = list(have)
        for block in have:
            if block in self.free:
                self.free.remove(block)
        while len(blocks) < wanted:
            block = self.free.pop(0)
            self.cached = {key: value for key, value in self.cached.items() if value != block}
            blocks.append(block)
        self.blocks[name] = blocks
        return True

    def _release(self, name: str) -> None:
        held = {block for other, blocks in self.blocks.items() if other != name for block in blocks}
        for block in reversed(self.blocks.pop(name, [])):
            if block not in held:
                self.free.append(block)

    def _free(self, name: str) -> None:
        self._release(name)
        self.received.discard(name)
        self.failed.discard(name)
        del self.requests[name]

    def _prefix(self, request: Request, tokens: int) -> int:
        return hash((request.cache_salt, adapter(request), *request.all_token_ids[:tokens]))

    def _local_hit(self, request: Request) -> list[int]:
        found = []
        for end in range(BLOCK, request.num_tokens, BLOCK):
            block = self.cached.get(self._prefix(request, end))
            if block is None:
                break
            found.append(block)
        return found

    def _cache_blocks(self, name: str, tokens: int) -> None:
        for index in range(tokens // BLOCK):
            self.cached.setdefault(self._prefix(self.requests[name], (index + 1) * BLOCK), self.blocks[name][index])

    # ---- KV -----------------------------------------------------------------------------------------------------------

    def expected(self, rank: int, name: str, tokens: int) -> np.ndarray:
        """(layers, tokens, planes, heads, dim): of each token, by the adapter and all tokens up to it."""
        request = self.requests[name]
        rank = 0 if self.replicated else rank
        chain, values = 17 + adapter(request), []
        for index in range(tokens):
            token = request.all_token_ids[index] if index < request.num_tokens else sampled(index)
            chain = (chain * 1_000_003 + token + 1) % 2_147_483_647
            values.append(chain)
        base = np.array(values, dtype=np.int64).reshape(1, -1, 1, 1, 1)
        place = np.arange(LAYERS * PLANES * HEADS * DIM).reshape(LAYERS, 1, PLANES, HEADS, DIM)
        return ((base * 31 + place * 7 + rank * 12_345) % 32_749).astype(np.int16)

    def check(self, rank: int, name: str, tokens: int) -> None:
        place = np.arange(tokens)
        blocks = np.array(self.blocks[name], dtype=np.int64)[place // BLOCK]
        for layer, expected in enumerate(self.expected(rank, name, tokens)):
            found = self.pages[rank].tensors[layer].numpy()[blocks, :, place % BLOCK]
            wrong = np.nonzero((found != expected).any(axis=(1, 2, 3)))[0]
            assert not len(wrong), f"{name}, rank {rank}, layer {layer}: of {tokens} tokens these are wrong: {wrong.tolist()}"

    def _write(self, rank: int, name: str, begin: int, end: int, *, garbage: bool) -> None:
        place = np.arange(begin, end)
        blocks = np.array(self.blocks[name], dtype=np.int64)[place // BLOCK]
        for layer, expected in enumerate(self.expected(rank, name, end)):
            values = 0x77 if garbage else expected[begin:]
            self.pages[rank].tensors[layer].numpy()[blocks, :, place % BLOCK] = values

    # ---- failures -----------------------------------------------------------------------------------------------------

    def hold(self, only: str | None = None, generator: random.Random | None = None, rank: int = 0) -> HeldCopier:
        """From now on this rank's jobs are under way for long."""
        held = HeldCopier(self.workers[rank].attached(), only, generator)
        self.workers[rank]._copier = held  # type: ignore[assignment]
        return held

    def fail_loads(self, generator: random.Random, probability: float, ranks: Iterable[int] | None = None) -> None:
        """From now on, a load fails in a rank with this probability: one chunk of it is garbage and reported."""
        for rank in range(len(self.workers)) if ranks is None else ranks:
            self._fail_loads_of(rank, self.workers[rank], generator, probability)

    def heal_loads(self) -> None:
        for worker in self.workers:
            worker.__dict__.pop("_ended", None)
            worker.__dict__.pop("start_loads", None)

    def _fail_loads_of(self, rank: int, worker: TokenWorker, generator: random.Random, probability: float) -> None:
        ended, start = worker._ended, worker.start_loads
        spoiled: dict[int, int] = {}  # synchronous loads: which chunk

        def failing(job_id: int, report: JobReport, failed_items: Any) -> None:
            load = worker._loads.get(job_id)
            if load is not None and not report.failed:
                item = spoiled.pop(job_id, None)
                if not load.job.synchronous and generator.random() < probability:
                    item = generator.randrange(len(load.job.items))
                    self._spoil(rank, load.job, item)
                if item is not None:
                    report, failed_items = JobReport(1, report.bytes, report.seconds, failed=True), [item]
            ended(job_id, report, failed_items)

        def spoiling(meta: TokenConnectorMetadata) -> None:
            start(meta)
            for job in meta.loads:
                if job.synchronous and job.id in worker._loads and generator.random() < probability:
                    if worker._layerwise:
                        worker._wait_for_loads([job.id])
                    spoiled[job.id] = generator.randrange(len(job.items))
                    self._garbage.update(self._spoil(rank, job, spoiled[job.id]))

        worker._ended = failing  # type: ignore[method-assign]
        worker.start_loads = spoiling  # type: ignore[method-assign]

    def _spoil(self, rank: int, job: Any, item: int) -> set[int]:
        size = self.workers[rank].chunk_tokens
        chunk = job.items[item]
        place = np.arange(max(chunk * size, job.begin), min((chunk + 1) * size, job.end))
        blocks = np.array(job.block_ids)[place // BLOCK - job.first_block]
        for tensor in self.pages[rank].tensors:
            tensor.numpy()[blocks, :, place % BLOCK] = 0x55
        return set(blocks.tolist())

    # ---- the end ------------------------------------------------------------------------------------------------------

    @property
    def stats(self) -> dict[str, int]:
        return self.scheduler.store.stats()

    def check_nothing_is_left(self) -> None:
        scheduler = self.scheduler
        assert (scheduler._states, scheduler._jobs, scheduler._loading, scheduler._pending_blocks) == ({}, {}, {}, {})
        assert (scheduler._handed_out, scheduler._new_loads, scheduler._prefetched_bytes) == (set(), [], 0)
        for worker in self.workers:
            assert (worker._loads, worker._deferred, worker._received, worker._failed_blocks) == ({}, [], set(), set())
        assert sorted(self.free) == list(range(1, self.pages[0].num_blocks))
        scheduler.store.flush(10.0)
        deadline = time.monotonic() + 10
        while self.stats["host_pinned_slots"] or self.stats["host_quarantined_slots"]:  # the keeper looks in its own time
            assert time.monotonic() < deadline, f"left: {self.stats}"
            time.sleep(0.01)

    def close(self) -> None:
        for worker in self.workers:
            worker.shutdown()
        self.scheduler.shutdown()


def record_loader(memory: TokenPages, chunk: int, rank: int, ranks: int, directory: Path) -> RecordLoader:
    loader = DeviceLoader.host(
        memory.paged_layout(),
        memory.slot_layout(chunk),
        rank=rank,
        rank_count=ranks,
        buffer_bytes=1 << 20,
        in_flight=4,
        owner=memory.tensors,
    )
    return RecordLoader(loader, [directory])


@contextlib.contextmanager
def engines() -> Iterator[Callable[..., Engine]]:
    """Makes engines; in the end, each gets to the end of what it was asked, and nothing may be left."""
    made: list[Engine] = []

    def make(**options: Any) -> Engine:
        made.append(Engine(**options))
        return made[-1]

    yield make
    for engine in made:
        for worker in engine.workers:
            if isinstance(worker._copier, HeldCopier):
                worker._copier.end()
        engine.drain()
        engine.check_nothing_is_left()
        engine.close()


def keys_of(engine: Engine, tokens: list[int]) -> ChunkKeys:
    return ChunkHasher(engine.scheduler.namespaces.plain(), engine.scheduler._chunk_tokens).hash(tokens)


def in_store(engine: Engine, tokens: list[int]) -> int:
    """Leading chunks that can be looked up."""
    return int(engine.scheduler.store.lookup(keys_of(engine, tokens)).hit)
