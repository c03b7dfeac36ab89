"""The probe on the caches of a running engine: strides, proven once more against what a real prompt wrote."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import prompts
import pytest

from lmcache_native.integration.vllm import compat
from lmcache_native.integration.vllm.pages import TokenPages, describe, layout_id

PROMPT_TOKENS = 300


class Engine:
    """A plain engine in this process, without a connector."""

    def __init__(self, model: Path, **options: Any) -> None:
        from vllm import LLM

        self.model = model
        self.llm = LLM(model=str(model), enforce_eager=True, max_model_len=512, dtype="bfloat16", **options)
        core = self.llm.llm_engine.engine_core.engine_core
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.vllm_config = self.runner.vllm_config
        self.kv_cache_config = self.runner.kv_cache_config
        self.names = self.kv_cache_config.kv_cache_groups[0].layer_names
        self.layers = compat.get_layers_from_vllm_config(self.vllm_config, compat.AttentionLayerBase, self.names)
        self.caches = {name: layer.kv_cache for name, layer in self.layers.items()}

    def describe(self) -> TokenPages:
        return describe(self.vllm_config, self.kv_cache_config, self.caches)

    def answer(self, seed: int) -> list[int]:
        from vllm import SamplingParams, TokensPrompt

        prompt = TokensPrompt(prompt_token_ids=[token % 1000 for token in prompts.tokens(self.model, seed, PROMPT_TOKENS)])
        parameters = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
        (output,) = self.llm.generate([prompt], parameters, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    @contextlib.contextmanager
    def watch_writes(self) -> Iterator[list[tuple[str, Any, Any, Any]]]:
        """(layer, key, value, slots) of every cache write of the engine."""
        seen: list[tuple[str, Any, Any, Any]] = []
        for name, layer in self.layers.items():
            update = layer.impl.do_kv_cache_update

            def watching(layer: Any, key: Any, value: Any, cache: Any, slots: Any, name: str = name, update: Any = update) -> None:
                update(layer, key, value, cache, slots)
                seen.append((name, key.clone(), value.clone(), slots.clone()))

            layer.impl.do_kv_cache_update = watching
        try:
            yield seen
        finally:
            for layer in self.layers.values():
                del layer.impl.do_kv_cache_update

    def bytes(self) -> list[Any]:
        import torch

        return [cache.view(torch.int16).clone() for cache in self.caches.values()]

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.runner, self.layers, self.caches
        gc.collect()


def same(old: list[Any], new: list[Any]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(old, new, strict=True))


def check_against_writes(pages: TokenPages, names: list[str], writes: list[tuple[str, Any, Any, Any]]) -> int:
    """Reads each written element where `pages` say it lies. Returns how many tokens were compared."""
    import torch

    tokens = 0
    last: dict[tuple[str, int], tuple[Any, Any]] = {}  # a slot may be written again
    for name, key, value, slots in writes:
        for index, slot in enumerate(slots.tolist()):
            if slot >= 0:
                last[name, slot] = (key[index], value[index])
    for (name, slot), planes in last.items():
        layer = names.index(name)
        cache = pages.tensors[layer]
        block, token = divmod(slot, pages.kernel_block_tokens)
        for strides, wanted in zip(pages.strides[layer], planes, strict=True):
            places = strides.offset + block * strides.block + token * strides.token
            items = (cache.storage_offset() * 2 + places) // 2
            found = torch.as_strided(cache, wanted.shape, (strides.head // 2, strides.dim // 2), items)
            assert torch.equal(found.view(torch.int16), wanted.view(torch.int16)), f"{name}, slot {slot}"
        tokens += 1
    return tokens


@pytest.mark.parametrize("block_size", [32, None])
def test_tiny_engine(tiny: Path, block_size: int | None) -> None:
    options = {} if block_size is None else {"block_size": block_size}
    running = Engine(tiny, num_gpu_blocks_override=100, **options)
    try:
        before = running.bytes()
        pages = running.describe()
        assert same(before, running.bytes())
        assert pages.reason == ""
        assert not pages.opaque
        assert (pages.layers, pages.planes, pages.heads, pages.head_dim, pages.element) == (3, 2, 2, 64, "bfloat16")
        assert pages.block_tokens == (block_size or 128)
        assert pages.num_blocks == running.kv_cache_config.num_blocks
        assert layout_id(running.vllm_config, pages, []) == "kv:element=bfloat16;heads=2;head_dim=64;planes=2;layers=3"

        with running.watch_writes() as writes:
            running.answer(1)
        assert check_against_writes(pages, running.names, writes) >= 3 * PROMPT_TOKENS

        # Of a cache in use too, and nothing changes.
        before = running.bytes()
        assert running.describe().strides == pages.strides
        assert same(before, running.bytes())
        assert not same(before, [part * 0 for part in before])
    finally:
        running.close()


def test_real_model(smollm2: Path) -> None:
    running = Engine(smollm2)
    try:
        begin = time.perf_counter()
        pages = running.describe()
        seconds = time.perf_counter() - begin
        backends = compat.attention_backends(running.vllm_config, running.names)
        print(f"probed {pages.layers} layers in {seconds * 1e3:.0f} ms, {backends}")
        assert not pages.opaque, pages.reason
        assert (pages.layers, pages.heads, pages.head_dim, pages.block_tokens) == (30, 3, 64, 128)
        with running.watch_writes() as writes:
            running.answer(2)
        assert check_against_writes(pages, running.names, writes) >= 30 * PROMPT_TOKENS
    finally:
        running.close()
