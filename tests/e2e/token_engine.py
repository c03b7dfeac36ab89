"""One vLLM engine in this process with LMCacheNativeConnector, and hooks on both of its sides."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine import Done, Engine, HeldCopier, Proxy, _replaced

sys.path.insert(0, str(Path(__file__).parent / "small_blocks"))
import lmcn_small_blocks

ENGINE_OPTIONS = (
    "async_scheduling",
    "attention_config",
    "block_size",
    "enable_lora",
    "kv_cache_dtype",
    "max_model_len",
    "num_gpu_blocks_override",
    "tensor_parallel_size",
)


class TokenEngine(Engine):
    """LMCacheNativeConnector. Chunks of 40 tokens over blocks of 16: neither divides the other. Host memory holds about 70 of
    SmolLM2's chunks."""

    CHUNK_TOKENS = 40
    BLOCK_TOKENS = 16

    def __init__(self, model: Path, directory: Path | None, **extra: Any) -> None:
        """`extra`: ENGINE_OPTIONS, and kv_connector_extra_config."""
        from vllm import LLM

        lmcn_small_blocks.register()
        engine_options = {"max_model_len": 2048, "block_size": self.BLOCK_TOKENS} | {
            key: extra.pop(key) for key in ENGINE_OPTIONS if key in extra
        }
        self.model = model
        self.directory = directory
        config: dict[str, Any] = {"chunk_size": self.CHUNK_TOKENS, "max_local_cpu_size": 1 / 16}
        if directory is not None:
            config |= {"local_disk": str(directory), "max_local_disk_size": 1, "region_size": 1 / 16}
        self.llm = LLM(
            model=str(model),
            enforce_eager=True,
            max_num_batched_tokens=2048,
            dtype="bfloat16",
            kv_transfer_config={
                "kv_connector": "LMCacheNativeConnector",
                "kv_connector_module_path": "lmcache_native.integration.vllm",
                "kv_role": "kv_both",
                "kv_connector_extra_config": config | extra,
            },
            **engine_options,
        )

    # ---- parts --------------------------------------------------------------------------------------------------------

    @property
    def scheduler(self) -> Any:
        """The TokenScheduler."""
        return self.connector.scheduler

    @property
    def worker(self) -> Any:
        """The TokenWorker."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group().worker

    @property
    def store(self) -> Any:
        return self.scheduler.store

    def hit_tokens(self, prompt_tokens: int) -> int:
        """Of a prompt that is wholly stored: whole chunks."""
        return (prompt_tokens - 1) // self.CHUNK_TOKENS * self.CHUNK_TOKENS

    # ---- watching and meddling ----------------------------------------------------------------------------------------

    def tokens_of(self, block_ids: Any, begin: int, end: int, first_block: int) -> np.ndarray:
        """The KV of tokens [begin, end) as the engine has it: uint16 (layers, heads, tokens, K and V dims), read by the packing of
        the CPU backend and not by strides that the product found. block_ids[0] is block number first_block."""
        rows = []
        for tensor in self.worker.pages.tensors:
            _blocks, heads, block_tokens, both = tensor.shape
            pages = tensor[list(map(int, block_ids))].contiguous().view(torch.int16).numpy().view(np.uint16)
            pages = pages.reshape(len(block_ids), heads, block_tokens * both)
            half = block_tokens * both // 2
            keys = pages[:, :, :half].reshape(len(block_ids), heads, both // 2, block_tokens).transpose(1, 0, 3, 2)
            values = pages[:, :, half:].reshape(len(block_ids), heads, block_tokens, both // 2).transpose(1, 0, 2, 3)
            joined = np.concatenate([keys, values], axis=-1).reshape(heads, -1, both)
            offset = first_block * block_tokens
            rows.append(joined[:, begin - offset : end - offset])
        return np.stack(rows)

    @contextlib.contextmanager
    def watch_loads(self) -> Iterator[list[np.ndarray]]:
        """The KV of each load, taken when the worker reports it, before anything can use or change it."""
        loaded: list[np.ndarray] = []
        with self._loads_end_with(lambda job: loaded.append(self.tokens_of(job.block_ids, job.begin, job.end, job.first_block))):
            yield loaded

    @contextlib.contextmanager
    def watch_stores(self) -> Iterator[list[np.ndarray]]:
        """The KV of each store, as it is when the store is submitted."""
        worker = self.worker
        stored: list[np.ndarray] = []
        submit = worker._submit

        def watching(job: Any, *, load: bool) -> None:
            if not load:
                stored.append(self.tokens_of(job.block_ids, job.begin, job.end, job.first_block))
            submit(job, load=load)

        with _replaced(worker, _submit=watching):
            yield stored

    @contextlib.contextmanager
    def wrong_kv(self, source: np.ndarray) -> Iterator[None]:
        """Every load ends with this KV (as tokens_of gives it) in its blocks, though the right one was verified and copied."""
        with self._loads_end_with(lambda job: self._overwrite(job, job.begin, job.end, source)):
            yield

    def _overwrite(self, job: Any, begin: int, end: int, source: np.ndarray) -> None:
        """Tokens [begin, end), as far as `source` goes."""
        for layer, tensor in enumerate(self.worker.pages.tensors):
            _blocks, heads, block_tokens, both = tensor.shape
            half = block_tokens * both // 2
            flat = tensor.view(torch.int16).view(tensor.shape[0], heads, block_tokens * both)
            for token in range(begin, min(end, begin + source.shape[2])):
                block = int(job.block_ids[token // block_tokens - job.first_block])
                place = token % block_tokens
                row = torch.from_numpy(source[layer, :, token - begin].view(np.int16).copy())
                flat[block, :, :half].view(heads, both // 2, block_tokens)[:, :, place] = row[:, : both // 2]
                flat[block, :, half:].view(heads, block_tokens, both // 2)[:, place] = row[:, both // 2 :]

    @contextlib.contextmanager
    def failing_loads(self, item: int) -> Iterator[None]:
        """The copier reports chunk `item` of every load as failed, and garbage is where it should be."""
        worker = self.worker
        copier = worker.attached()

        def poll() -> list[Any]:
            ended = []
            for done in copier.poll():
                if done.id in worker._loads:
                    self._spoil(worker._loads[done.id].job, item)
                    done = Done(done.id, done.bytes, done.seconds, ok=False, failed_items=[item], message="planted")
                ended.append(done)
            return ended

        with _replaced(worker, _copier=Proxy(copier, poll=poll)):
            yield

    @contextlib.contextmanager
    def counted(self, method: str) -> Iterator[list[Any]]:
        """The first argument of each call of the worker's `method`."""
        calls: list[Any] = []
        original = getattr(self.worker, method)

        def counting(argument: Any) -> Any:
            calls.append(argument)
            return original(argument)

        with _replaced(self.worker, **{method: counting}):
            yield calls

    @contextlib.contextmanager
    def garbage_before_the_step(self, item: int) -> Iterator[None]:
        """As failing_loads, for synchronous loads: the garbage is there before the forward pass that reads it."""
        worker = self.worker
        start_loads = worker.start_loads

        def spoiling(meta: Any) -> None:
            start_loads(meta)
            worker.wait_ended(job.id for job in meta.loads)
            for job in meta.loads:
                self._spoil(job, item)

        with self.failing_loads(item), _replaced(worker, start_loads=spoiling):
            yield

    def _spoil(self, job: Any, item: int) -> None:
        _blocks, heads, _tokens, both = self.worker.pages.tensors[0].shape
        garbage = np.full((len(self.worker.pages.tensors), heads, self.CHUNK_TOKENS, both), 0x3F80, dtype=np.uint16)  # 1.0
        begin = max(job.chunks[item] * self.CHUNK_TOKENS, job.begin)
        self._overwrite(job, begin, min((job.chunks[item] + 1) * self.CHUNK_TOKENS, job.end), garbage)

    @contextlib.contextmanager
    def _loads_end_with(self, action: Callable[[Any], None]) -> Iterator[None]:
        """action(job) when the worker reports a load, before anything can use it."""
        worker = self.worker
        ended = worker._ended

        def watching(job_id: int, report: Any, failed_items: Any) -> None:
            load = worker._loads.get(job_id)
            if load is not None:
                action(load.job)
            ended(job_id, report, failed_items)

        with _replaced(worker, _ended=watching):
            yield

    @contextlib.contextmanager
    def held_copies(self, only: str | None = None) -> Iterator[HeldCopier]:
        """Copies (`only`: "store" or "load") are handed to the copier only when asked for, or waited for."""
        worker = self.worker
        held = HeldCopier(worker.attached(), only)
        with _replaced(worker, _copier=held):
            try:
                yield held
            finally:
                self._let_all_go(held)

    def _let_all_go(self, held: HeldCopier) -> None:
        while self.vllm_scheduler.has_requests():  # a step submits the stores of the one before
            held.let_go()
            self.llm.llm_engine.step()
