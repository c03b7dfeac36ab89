"""LMCacheNativeConnector's scheduler side and workers over one real store, under a small engine of our own that calls them in
vLLM's order. KV is a function of all tokens up to its own, so that each forward pass can check every byte that it would read."""

from __future__ import annotations

import itertools
import random
import time
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.request import Request, RequestStatus

from lmcache_native import Store
from lmcache_native.config import NativeConfig
from lmcache_native.integration.vllm.namespace import Namespaces
from lmcache_native.integration.vllm.pages import TokenPages
from lmcache_native.integration.vllm.probe import Strides
from lmcache_native.integration.vllm.token_scheduler import TokenScheduler
from lmcache_native.integration.vllm.token_worker import TokenWorker
from lmcache_native.integration.vllm.transfer import JobReport, TokenWorkerMetadata

BLOCK = 16
LAYERS, PLANES, HEADS, DIM = 2, 2, 2, 8
TOKEN_BYTES = HEADS * DIM * 2


def pages(blocks: int) -> TokenPages:
    tensors = tuple(torch.zeros(blocks, PLANES, BLOCK, HEADS, DIM, dtype=torch.int16) for _ in range(LAYERS))
    planes = tuple(
        Strides(offset=plane * BLOCK * TOKEN_BYTES, block=PLANES * BLOCK * TOKEN_BYTES, token=TOKEN_BYTES, head=DIM * 2, dim=2)
        for plane in range(PLANES)
    )
    return TokenPages(
        layers=LAYERS,
        planes=PLANES,
        token_bytes=TOKEN_BYTES,
        block_tokens=BLOCK,
        num_blocks=blocks,
        opaque=False,
        element="bfloat16",
        heads=HEADS,
        head_dim=DIM,
        device_type="cpu",
        device_index=0,
        reason="",
        tensors=tensors,
        strides=(planes,) * LAYERS,
    )


class Engine:
    """Blocks are handed out again the moment they are free, oldest first; block 0 is never used."""

    def __init__(
        self,
        *,
        chunk: int,
        ranks: int = 1,
        blocks: int = 40,
        host_bytes: int = 4 << 20,
        directory: Path | None = None,
        **config: Any,
    ) -> None:
        self.config = NativeConfig(host_bytes=host_bytes, chunk_tokens=chunk, **config)
        self.pages = [pages(blocks) for _ in range(ranks)]
        engine_id = f"test-{uuid.uuid4()}"
        self.workers = [
            TokenWorker(
                memory,
                ["a", "b"],
                chunk_tokens=chunk,
                engine_id=engine_id,
                rank=rank,
                copy_threads=1,
                load_timeout_s=self.config.load_timeout_s,
                layerwise=self.config.layerwise,
            )
            for rank, memory in enumerate(self.pages)
        ]
        rank_bytes = self.workers[0].slot_layout.rank_bytes
        store = Store(
            host_bytes=host_bytes,
            rank_count=ranks,
            max_payload_bytes=rank_bytes * ranks,
            directory=directory,
            nvme_bytes=128 << 20 if directory else 0,
        )
        store.serve(engine_id, rank_bytes)
        self.scheduler = TokenScheduler(
            self.config,
            store,
            Namespaces({"test": "1"}),
            chunk_tokens=chunk,
            chunk_bytes=rank_bytes * ranks,
            block_tokens=BLOCK,
            partial_chunks=True,
        )
        self.free = list(range(1, blocks))
        self.cached: dict[int, int] = {}  # hash of a whole block's prefix -> block
        self.blocks: dict[str, list[int]] = {}
        self.requests: dict[str, Request] = {}
        self.received: set[str] = set()
        self.failed: set[str] = set()
        self.preempted: set[str] = set()
        self.hit_tokens: dict[str, int] = {}
        self._names = itertools.count()
        self.spoil: Any = None  # (rank, job) -> item to spoil, or None

    # ---- what a user does ---------------------------------------------------------------------------------------------

    def ask(self, tokens: list[int], max_tokens: int = 1, **parameters: Any) -> str:
        name = f"r{next(self._names)}"
        sampling = SamplingParams(max_tokens=max_tokens, extra_args={"kv_transfer_params": parameters} if parameters else None)
        request = Request(name, list(tokens), sampling, None)
        self.requests[name] = request
        self.scheduler.on_new_request(request)
        return name

    def answered(self, tokens: list[int], max_tokens: int = 1, **parameters: Any) -> int:
        """Runs it to its end; tokens that came from the connector."""
        name = self.ask(tokens, max_tokens, **parameters)
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
        self._release(name)
        self.preempted.add(name)

    def forget_blocks(self) -> None:
        self.cached.clear()

    def drain(self, steps: int = 3000) -> None:
        for _ in range(steps):
            if not self.requests and not self.scheduler.busy:
                return
            self.step()
        raise AssertionError(f"still not done: {self.requests}, {self.scheduler._jobs}")

    # ---- a step, in vLLM's order --------------------------------------------------------------------------------------

    def step(self) -> None:
        scheduled: dict[str, int] = {}
        new: list[Any] = []
        cached_new: list[Any] = []
        for name, request in list(self.requests.items()):
            tokens = self._schedule(name, request, new, cached_new)
            if tokens:
                scheduled[name] = tokens
        output = SimpleNamespace(
            num_scheduled_tokens=scheduled,
            scheduled_new_reqs=new,
            scheduled_cached_reqs=SimpleNamespace(new_block_ids=cached_new),
            preempted_req_ids=self.preempted,
            kv_cache_block_copies=None,
            kv_connector_block_state=SimpleNamespace(get_block_ids=lambda name: (list(self.blocks[name]),)),
        )
        meta = self.scheduler.build_meta(output)
        self.preempted = set()
        reports: list[TokenWorkerMetadata] = []
        failed_blocks: set[int] = set()
        synchronous = any(job.synchronous for job in meta.loads)
        remaining: dict[str, int] = {}
        for rank, worker in enumerate(self.workers):
            worker.begin_step(meta)
            if synchronous:
                worker.start_loads(meta)
            self._forward(rank, scheduled)
            if not synchronous:
                worker.start_loads(meta)
            worker.end_step(meta)
            for name in worker.take_received():
                remaining[name] = remaining.get(name, 0) + 1
            failed_blocks |= worker.take_failed_blocks()
            report = worker.take_report()
            if report is not None:
                reports.append(report)
        self._after(scheduled, failed_blocks, remaining, reports)

    def _schedule(self, name: str, request: Request, new: list[Any], cached_new: list[Any]) -> int:
        if request.status == RequestStatus.FINISHED_ABORTED:
            return 0
        if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            if name not in self.received:
                return 0
            self.received.discard(name)
            request.status = RequestStatus.WAITING
            if name in self.failed:
                self.failed.discard(name)
                if request.num_computed_tokens == 0:
                    self._release(name)
            self._cache_blocks(name, request.num_computed_tokens)
        external = 0
        if name not in self.blocks:
            local = self._local_hit(request)
            matched = self.scheduler.match(request, len(local) * BLOCK)
            if matched is None:
                return 0
            external = matched
            total = len(local) * BLOCK + external
            wanted = -(-(total if external and self.config.async_loading else request.num_tokens) // BLOCK)
            if not self._allocate(name, local, wanted):
                return 0
            request.num_computed_tokens = total
            self.hit_tokens[name] = self.hit_tokens.get(name, 0) + external
            self.scheduler.allocated(request, list(self.blocks[name]), external)
            if external and self.config.async_loading:
                request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
                return 0
            new.append(SimpleNamespace(block_ids=(list(self.blocks[name]),)))
        else:
            before = len(self.blocks[name])
            if not self._allocate(name, self.blocks[name], -(-request.num_tokens // BLOCK)):
                return 0
            cached_new.append((self.blocks[name][before:],))
            if request.status == RequestStatus.WAITING:
                self.scheduler.allocated(request, list(self.blocks[name]), 0)
        request.status = RequestStatus.RUNNING
        return min(request.num_tokens - request.num_computed_tokens, 50)  # chunked prefill

    def _forward(self, rank: int, scheduled: dict[str, int]) -> None:
        for name, tokens in scheduled.items():
            request = self.requests[name]
            done = request.num_computed_tokens
            if name not in self._tainted():
                self.check(rank, name, done)
            self._write(rank, name, done, done + tokens)

    def _tainted(self) -> set[str]:
        """Requests whose synchronous load failed in this step: what they compute is thrown away."""
        return {load.job.request_id for worker in self.workers for load in worker._loads.values() if self.spoil is not None}

    def _after(
        self, scheduled: dict[str, int], failed_blocks: set[int], received: dict[str, int], reports: list[TokenWorkerMetadata]
    ) -> None:
        self._received_ranks = getattr(self, "_received_ranks", {})
        failed_now: set[str] = set()
        for name, request in self.requests.items():
            for index, block in enumerate(self.blocks.get(name, ())):
                if block in failed_blocks and index * BLOCK < request.num_computed_tokens and block not in self.cached.values():
                    request.num_computed_tokens = index * BLOCK
                    failed_now.add(name)
                    break
        self.failed |= {name for name in failed_now if self.requests[name].status == RequestStatus.WAITING_FOR_REMOTE_KVS}
        for name, tokens in scheduled.items():
            if name not in failed_now:
                self._advance(name, tokens)
        merged = None
        for report in reports:
            merged = report if merged is None else merged.aggregate(report)
        if merged is not None:
            self.scheduler.update(merged)
        for name, ranks in received.items():
            self._received_ranks[name] = self._received_ranks.get(name, 0) + ranks
            if self._received_ranks[name] == len(self.workers):
                del self._received_ranks[name]
                if self.requests[name].status == RequestStatus.FINISHED_ABORTED:
                    self._free(name)
                else:
                    self.received.add(name)

    def _advance(self, name: str, tokens: int) -> None:
        request = self.requests[name]
        if request.status != RequestStatus.RUNNING:
            return
        request.num_computed_tokens += tokens
        self._cache_blocks(name, request.num_computed_tokens)
        if request.num_computed_tokens == request.num_tokens:
            request.append_output_token_ids(1000 + request.num_tokens % 7)
            if request.num_output_tokens >= request.max_tokens:
                request.status = RequestStatus.FINISHED_STOPPED
                self.scheduler.request_finished(request)
                self._free(name)

    # ---- blocks -------------------------------------------------------------------------------------------------------

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
        del self.requests[name]

    def _prefix(self, request: Request, tokens: int) -> int:
        return hash(tuple(request.all_token_ids[:tokens]))

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

    def expected(self, rank: int, tokens: list[int]) -> np.ndarray:
        """(layers, planes, tokens, heads, dim): of each token, by all tokens up to it."""
        chain, values = 17, []
        for token in tokens:
            chain = (chain * 1_000_003 + token + 1) % 2_147_483_647
            values.append(chain)
        base = np.array(values, dtype=np.int64).reshape(1, 1, -1, 1, 1)
        place = np.arange(LAYERS * PLANES * HEADS * DIM).reshape(LAYERS, PLANES, 1, HEADS, DIM)
        return ((base * 31 + place * 7 + rank * 12_345) % 32_749).astype(np.int16)

    def check(self, rank: int, name: str, tokens: int) -> None:
        expected = self.expected(rank, self.requests[name].all_token_ids[:tokens])
        for token in range(tokens):
            block = self.blocks[name][token // BLOCK]
            for layer, tensor in enumerate(self.pages[rank].tensors):
                found = tensor[block, :, token % BLOCK].numpy()
                assert (found == expected[layer, :, token]).all(), f"{name}, rank {rank}: token {token} of {tokens} is wrong"

    def _write(self, rank: int, name: str, begin: int, end: int) -> None:
        expected = self.expected(rank, self.requests[name].all_token_ids[:end])
        for token in range(begin, end):
            block = self.blocks[name][token // BLOCK]
            for layer, tensor in enumerate(self.pages[rank].tensors):
                tensor[block, :, token % BLOCK] = torch.from_numpy(expected[layer, :, token].copy())

    # ---- failures -----------------------------------------------------------------------------------------------------

    def fail_loads(self, generator: random.Random, probability: float) -> None:
        """From now on, a load of a rank fails with this probability: one chunk of it is garbage and reported."""
        for rank, worker in enumerate(self.workers):
            self._fail_loads_of(rank, worker, generator, probability)

    def _fail_loads_of(self, rank: int, worker: TokenWorker, generator: random.Random, probability: float) -> None:
        ended = worker._ended

        def failing(job_id: int, report: JobReport, failed_items: Any) -> None:
            load = worker._loads.get(job_id)
            if load is not None and not report.failed and generator.random() < probability:
                job = load.job
                item = generator.randrange(len(job.chunks))
                size = worker.chunk_tokens
                for token in range(max(job.chunks[item] * size, job.begin), min((job.chunks[item] + 1) * size, job.end)):
                    for tensor in self.pages[rank].tensors:
                        tensor[job.block_ids[token // BLOCK - job.first_block], :, token % BLOCK] = 0x55
                report, failed_items = JobReport(1, report.bytes, report.seconds, failed=True), [item]
            ended(job_id, report, failed_items)

        worker._ended = failing  # type: ignore[method-assign]

    # ---- the end ------------------------------------------------------------------------------------------------------

    def check_nothing_is_left(self) -> None:
        scheduler = self.scheduler
        assert (scheduler._states, scheduler._jobs, scheduler._loading, scheduler._pending_blocks) == ({}, {}, {}, {})
        assert scheduler._prefetched_bytes == 0
        scheduler.store.flush(10.0)
        deadline = time.monotonic() + 10
        stats = scheduler.store.stats()
        while (
            stats["host_pinned_slots"] or stats["host_quarantined_slots"]
        ):  # the keeper looks at the workers' words in its own time
            assert time.monotonic() < deadline, f"left: {stats}"
            time.sleep(0.01)
            stats = scheduler.store.stats()

    def close(self) -> None:
        for worker in self.workers:
            worker.shutdown()
        self.scheduler.shutdown()
