"""One vLLM engine in this process, with hooks on both sides of the connector."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import prompts
from same_answer import Answer

GIB = 1 << 30
BLOCK_TOKENS = 128


class Engine:
    """What tests do with either connector. Small host memory, so that a few other prompts push one out to NVMe."""

    model: Path
    llm: Any
    store: Any  # the connector's
    _next_filler = 10_000

    # ---- parts --------------------------------------------------------------------------------------------------------

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def vllm_scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def connector(self) -> Any:
        """The scheduler's connector."""
        return self.vllm_scheduler.connector

    def stats(self) -> dict[str, int]:
        return dict(self.store.stats())

    # ---- requests -----------------------------------------------------------------------------------------------------

    def prompt(self, seed: int, length: int = 900) -> list[int]:
        return prompts.tokens(self.model, seed, length)

    def answer(self, prompt: list[int], max_tokens: int = 12, **extra: Any) -> Answer:
        (found,) = self.answers([prompt], max_tokens, **extra)
        return found

    def answers(self, prompts_: list[list[int]], max_tokens: int = 12, **extra: Any) -> list[Answer]:
        """All at once. `extra`: cache_salt for the prompt; lora_request; the rest for the sampling parameters."""
        from vllm import SamplingParams, TokensPrompt

        salt = {"cache_salt": extra.pop("cache_salt")} if "cache_salt" in extra else {}
        lora = extra.pop("lora_request", None)
        parameters = SamplingParams(max_tokens=max_tokens, temperature=0.0, logprobs=5, ignore_eos=True, **extra)
        outputs = self.llm.generate(
            [TokensPrompt(prompt_token_ids=prompt, **salt) for prompt in prompts_], parameters, use_tqdm=False, lora_request=lora
        )
        return [
            Answer(
                token_ids=list(output.outputs[0].token_ids),
                top_logprobs=[{token: row.logprob for token, row in top.items()} for top in output.outputs[0].logprobs],
                cached_tokens=output.num_cached_tokens,
            )
            for output in outputs
        ]

    def drain(self) -> None:
        """Steps until vLLM has no transfer under way."""
        while self.vllm_scheduler.has_requests():
            self.llm.llm_engine.step()

    def forget_gpu(self) -> None:
        """Empties the engine's own prefix cache, not the connector's."""
        self.drain()
        assert self.llm.reset_prefix_cache(reset_connector=False)

    def forget_all(self) -> None:
        self.drain()
        assert self.llm.reset_prefix_cache(reset_connector=True)

    def evict_to_nvme(self, prompts_: int = 4) -> None:
        """Fills host memory with so many other prompts, after everything has been written behind."""
        self.drain()
        self.store.flush(30.0)
        for _ in range(prompts_):
            self._next_filler += 1
            self.answer(self.prompt(self._next_filler), max_tokens=1)
            self.drain()
            self.store.flush(30.0)
        self.forget_gpu()

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()


class InProcessEngine(Engine):
    """NativeOffloadingConnector. Host memory holds about 20 chunks of 128 tokens."""

    HOST_BYTES = 64 << 20

    def __init__(
        self, model: Path, directory: Path, *, host_bytes: int = HOST_BYTES, connector: dict[str, Any] | None = None, **more: Any
    ) -> None:
        """`connector`: more of kv_connector_extra_config. `more`: for vLLM's LLM."""
        from vllm import LLM

        self.model = model
        self.directory = directory
        self.llm = LLM(
            model=str(model),
            enforce_eager=True,
            max_model_len=2048,
            **{"max_num_batched_tokens": 2048, "dtype": "bfloat16", **more},
            kv_transfer_config={
                "kv_connector": "NativeOffloadingConnector",
                "kv_connector_module_path": "lmcache_native.integration.vllm",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {
                    "cpu_bytes_to_use": host_bytes,
                    "local_disk": str(directory),
                    "max_local_disk_size": 1,
                    "region_size": 1 / 16,
                    **(connector or {}),
                },
            },
        )

    # ---- parts --------------------------------------------------------------------------------------------------------

    @property
    def manager(self) -> Any:
        return self.connector.connector_scheduler.manager

    @property
    def worker(self) -> Any:
        """The worker's NativeOffloadingWorker."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group().connector_worker.worker

    @property
    def store(self) -> Any:
        return self.manager.store

    # ---- watching and meddling ----------------------------------------------------------------------------------------

    def pages(self, block_ids: Any) -> list[np.ndarray]:
        """The bytes of all layers' pages of each block."""
        tensors = self.worker.tensors
        return [np.concatenate([tensor[int(block)].numpy().reshape(-1) for tensor in tensors]) for block in block_ids]

    @contextlib.contextmanager
    def watch_loads(self) -> Iterator[list[np.ndarray]]:
        """Pages of loaded blocks, taken when the worker reports the load, before anything can use or change them."""
        loaded: list[np.ndarray] = []
        with self._loads_end_with(lambda spec: loaded.extend(self.pages(spec.block_ids))):
            yield loaded

    @contextlib.contextmanager
    def watch_stores(self) -> Iterator[list[np.ndarray]]:
        """Pages of stored blocks, as they are when the store is submitted."""
        worker = self.worker
        stored: list[np.ndarray] = []
        submit = worker.submit_store

        def watching(job_id: int, src_spec: Any, dst_spec: Any) -> bool:
            stored.extend(self.pages(src_spec.block_ids))
            return bool(submit(job_id, src_spec, dst_spec))

        with _replaced(worker, submit_store=watching):
            yield stored

    @contextlib.contextmanager
    def wrong_kv(self, pages: list[np.ndarray]) -> Iterator[None]:
        """Every load ends with these pages in its blocks, though the right ones were verified and copied."""
        worker = self.worker
        with self._loads_end_with(lambda spec: self._overwrite(worker.tensors, spec.block_ids, pages)):
            yield

    @contextlib.contextmanager
    def wrong_byte(self, group: int) -> Iterator[None]:
        """Every load ends with one other byte in the last block of this KV cache group: an element of a key, far from what it
        was."""

        def overwrite(spec: Any) -> None:
            page = self.worker.memories[group].pages[0]
            block = int(spec.block_ids[sum(spec.group_sizes[: group + 1]) - 1])
            (tensor,) = [tensor for tensor in self.worker.tensors if tensor.data_ptr() == page.base]
            element = tensor[block].numpy()[1:2]
            element[0] = 0x42 if element[0] != 0x42 else 0xC2  # of bf16: the upper half of 32 to 127; of fp8: 3

        with self._loads_end_with(overwrite):
            yield

    def stored_keys(self) -> dict[int, list[bytes]]:
        """By KV cache group: the engine keys that vLLM has offered for storing, in order. Watches from the first call on."""
        if not hasattr(self, "_stored_keys"):
            self._stored_keys: dict[int, list[bytes]] = {}
            prepare_store = self.manager.prepare_store

            def watching(keys: Any, req_context: Any) -> Any:
                for key in keys:
                    self._stored_keys.setdefault(int.from_bytes(key[-4:], "big"), []).append(key)
                return prepare_store(keys, req_context)

            self.manager.prepare_store = watching
        return self._stored_keys

    def lose(self, key: bytes) -> None:
        """One chunk is gone, from host memory and from NVMe."""
        from lmcache_native import KeyDeriver

        namespace = bytes.fromhex(self.manager.namespace_hex)
        (chunk,) = KeyDeriver(namespace).derive_all([key])
        assert self.store.erase(chunk)

    @contextlib.contextmanager
    def failing_loads(self, item: int) -> Iterator[None]:
        """The copier reports chunk `item` of every load as failed, and its block holds garbage."""
        worker = self.worker
        copier = worker.attached()

        def poll() -> list[Any]:
            ended = []
            for done in copier.poll():
                load = worker._loads.get(done.id)
                if load is not None:
                    garbage = [np.full_like(self.pages(load.block_ids[:1])[0], 0x55)]
                    self._overwrite(worker.tensors, load.block_ids[item : item + 1], garbage)
                    done = Done(done.id, done.bytes, done.seconds, ok=False, failed_items=[item], message="planted")
                ended.append(done)
            return ended

        with _replaced(worker, _copier=Proxy(copier, poll=poll)):
            yield

    @contextlib.contextmanager
    def _loads_end_with(self, action: Callable[[Any], None]) -> Iterator[None]:
        """action(vLLM's GPULoadStoreSpec) when the worker reports a load, before anything can use it."""
        worker = self.worker
        target_of: dict[int, Any] = {}
        submit, get_finished = worker.submit_load, worker.get_finished

        def watching_submit(job_id: int, src_spec: Any, dst_spec: Any) -> bool:
            target_of[job_id] = dst_spec
            return bool(submit(job_id, src_spec, dst_spec))

        def watching_get_finished() -> list[Any]:
            results = list(get_finished())
            for result in results:
                if result.job_id in target_of:
                    action(target_of.pop(result.job_id))
            return results

        with _replaced(worker, submit_load=watching_submit, get_finished=watching_get_finished):
            yield

    @staticmethod
    def _overwrite(tensors: list[Any], block_ids: Any, pages: list[np.ndarray]) -> None:
        import torch

        for block, page in zip(block_ids, pages, strict=False):
            for tensor, part in zip(tensors, np.split(page, len(tensors)), strict=True):
                tensor[int(block)].copy_(torch.from_numpy(part).view(tensor[int(block)].shape))

    @contextlib.contextmanager
    def held_copies(self) -> Iterator[HeldCopier]:
        """Copies are handed to the copier only when asked for, or waited for."""
        worker = self.worker
        held = HeldCopier(worker.attached())
        with _replaced(worker, _copier=held):
            yield held
            held.let_go()
            self.drain()


@dataclass
class Done:
    """Stands for a CopyDone."""

    id: int
    bytes: int
    seconds: float
    ok: bool
    failed_items: list[int]
    message: str


class Proxy:
    """A PagedCopier with some methods replaced."""

    def __init__(self, copier: Any, **methods: Any) -> None:
        self._copier = copier
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._copier, name)


class HeldCopier:
    """A PagedCopier, or a GroupCopier, whose jobs (`only`: those of this direction) are accepted and under way for as long as the
    test likes."""

    def __init__(self, copier: Any, only: str | None = None) -> None:
        self._copier = copier
        self._only = only
        self.held: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        if self._only not in (None, args[1]):
            return self._copier.submit(*args, **kwargs)
        self.held.append((args, kwargs))
        return []  # parts that were refused

    def let_go(self) -> None:
        while self.held:
            args, kwargs = self.held.pop(0)
            self._copier.submit(*args, **kwargs)

    def wait(self, ids: Any, timeout_s: float) -> None:
        self.let_go()
        self._copier.wait(ids, timeout_s)

    def poll(self) -> Any:
        return self._copier.poll()


@contextlib.contextmanager
def _replaced(target: Any, **attributes: Any) -> Iterator[None]:
    before = {name: target.__dict__.get(name, _replaced) for name in attributes}
    for name, value in attributes.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is _replaced:
                delattr(target, name)
            else:
                setattr(target, name, value)
