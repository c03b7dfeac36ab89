"""Models of other shapes than the one of the other tests, through a real engine: grouped heads, several KV cache groups (full
attention, sliding windows, chunked local attention), a quantised cache, layers with pages of different sizes. The answer with
loaded KV is the answer without, from host memory, from NVMe and after a restart; a wrong byte of any group is another answer.

The models are small and their weights random (tests/env/make_models.py), but their answers depend on all of the prompt's KV.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from checked_bytes import checked_bytes
from engine import Engine, InProcessEngine
from same_answer import Answer, check_own_hit
from token_engine import TokenEngine

BLOCK_TOKENS = 32
PROMPT_TOKENS = 900
HIT_TOKENS = 896
HOST_BYTES = 4 << 20
CROWDED_BLOCKS = 120  # of which a prompt of 900 tokens takes about 40
FILLERS = 10  # prompts of 900 tokens push one out, of each shape


@dataclass(frozen=True)
class Shape:
    """How a model is served, and what its prompt of 900 tokens is to be: chunks by KV cache group."""

    model: str
    chunks: tuple[int, ...]
    connector: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    reopened: bool = False
    by_tokens: bool = False  # LMCacheNativeConnector
    page_sizes: int = 1  # different ones within a group


# Of a window of 128 tokens only what the next token sees is loaded: four blocks.
SHAPES = {
    "llama": Shape("tiny-llama", (28,)),
    "qwen3": Shape("tiny-qwen3", (28,)),
    "gemma3": Shape("tiny-gemma3", (4, 4, 28), reopened=True),
    "gemma3 in chunks of 2 blocks": Shape(
        "tiny-gemma3",
        (2, 2, 14),
        connector={"chunk_size": 2 * BLOCK_TOKENS},
        options={"num_gpu_blocks_override": CROWDED_BLOCKS, "max_num_batched_tokens": 256, "prefix_cache_retention_interval": 64},
    ),
    "gemma3 of windows alone": Shape("tiny-gemma3", (4,), options={"hf_overrides": {"layer_types": ["sliding_attention"] * 6}}),
    # What these layers see begins with the latest multiple of 256 tokens.
    "llama4": Shape("tiny-llama4", (4, 4, 4, 28), environment={"VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE": "1"}),
    "llama in fp8 but for two layers": Shape(
        "tiny-llama",
        (28,),
        options={"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0", "3"]},
        page_sizes=2,
        reopened=True,
    ),
    "llama by tokens": Shape("tiny-llama", (14,), connector={"chunk_size": 2 * BLOCK_TOKENS}, by_tokens=True),
    "gemma3 in fp8": Shape("tiny-gemma3", (4, 4, 28), options={"kv_cache_dtype": "fp8_e5m2"}),
}


def model(name: str) -> Path:
    """As tests/env/make_models.py calls it."""
    variable = "LMCN_MODEL_" + name.replace("-", "_").upper()
    path = os.environ.get(variable, "")
    if not path:
        pytest.fail(f"{variable} is not set (tests/env/model.sh makes the model)")
    return Path(path)


class Served:
    """One shape's engine."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.shape, self._directory = name, SHAPES[name], directory
        if "kv_cache_dtype" in self.shape.options and not _quantises():
            pytest.skip("vLLM's CPU backend quantises the KV cache on x86 with AVX-512 only")
        self.engine: Any = self._start()

    def _start(self) -> Engine:
        shape = self.shape
        with pytest.MonkeyPatch.context() as patch:
            for name, value in shape.environment.items():
                patch.setenv(name, value)
            return self._started(shape)

    def _started(self, shape: Shape) -> Engine:
        if shape.by_tokens:
            host = {"max_local_cpu_size": HOST_BYTES / (1 << 30)}
            return TokenEngine(model(shape.model), self._directory, block_size=BLOCK_TOKENS, **host, **shape.connector)
        return InProcessEngine(
            model(shape.model),
            self._directory,
            host_bytes=HOST_BYTES,
            connector=shape.connector,
            block_size=BLOCK_TOKENS,
            **shape.options,
        )

    def restart(self) -> None:
        self.engine.drain()
        self.engine.store.flush(30.0)
        self.engine.close()
        self.engine = self._start()

    def own_hit(self, prompt: list[int]) -> Answer:
        """The answer on the engine's own prefix cache; afterwards that is empty, and the connector has the prompt."""
        engine = self.engine
        engine.answer(prompt, max_tokens=1)
        own = engine.answer(prompt)
        assert own.cached_tokens == HIT_TOKENS
        engine.forget_gpu()
        return own


def _quantises() -> bool:
    import torch

    return bool(torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported())


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    found = Served(request.param, tmp_path_factory.mktemp("shape") / "kv")
    yield found
    found.engine.close()


def loads(engine: Engine, prompt: list[int], own: Answer, tier: str, chunks: tuple[int, ...]) -> None:
    """The prompt's chunks come from this tier, no more of them than are needed, and answer as the engine's own hit."""
    before = engine.stats()
    check_own_hit(own, engine.answer(prompt))
    after = engine.stats()
    assert after[f"hits_{tier}"] - before[f"hits_{tier}"] == sum(chunks)
    engine.drain()


def test_same_answer_from_either_tier(served: Served) -> None:
    engine, prompt = served.engine, served.engine.prompt(1, PROMPT_TOKENS)
    groups = engine.vllm_scheduler.kv_cache_config.kv_cache_groups
    assert len(groups) == len(served.shape.chunks)
    if not served.shape.by_tokens:
        assert {len({page.bytes for page in memory.pages}) for memory in engine.worker.memories} == {served.shape.page_sizes}
    own = served.own_hit(prompt)
    loads(engine, prompt, own, "host", served.shape.chunks)
    engine.evict_to_nvme(FILLERS)
    loads(engine, prompt, own, "nvme", served.shape.chunks)


def test_a_wrong_byte_of_any_group_is_another_answer(served: Served) -> None:
    if served.shape.by_tokens:
        pytest.skip("test_token_answers.py shows it of this connector")
    engine, prompt = served.engine, served.engine.prompt(2, PROMPT_TOKENS)
    own = served.own_hit(prompt)
    for group in range(len(served.shape.chunks)):
        with engine.wrong_byte(group):
            wrong = engine.answer(prompt)
        engine.forget_gpu()
        assert wrong.cached_tokens == HIT_TOKENS
        assert wrong.top_logprobs != own.top_logprobs, f"group {group}"
    check_own_hit(own, engine.answer(prompt))


def test_longer_prompt_extends_what_was_loaded(served: Served) -> None:
    """The blocks that follow loaded ones are computed on them, stored, and loaded in their turn."""
    engine, prompt = served.engine, served.engine.prompt(3, PROMPT_TOKENS)
    served.own_hit(prompt)
    longer = prompt + engine.prompt(4, 200)
    assert engine.answer(longer).cached_tokens == HIT_TOKENS
    engine.drain()
    own = engine.answer(longer)
    engine.forget_gpu()
    assert own.cached_tokens == 1088
    check_own_hit(own, engine.answer(longer))


def test_same_answer_after_a_restart(served: Served) -> None:
    if not served.shape.reopened:
        pytest.skip("a restart is no different for this shape")
    prompt = served.engine.prompt(5, PROMPT_TOKENS)
    own = served.own_hit(prompt)
    served.restart()
    loads(served.engine, prompt, own, "nvme", served.shape.chunks)


# ---- windows ----------------------------------------------------------------------------------------------------------------


def test_a_lost_chunk_of_one_group_shortens_the_hit(served: Served) -> None:
    """Of a prompt whose beginning was another's prompt, of which all groups have what they need."""
    if served.name != "gemma3":
        pytest.skip("one shape with several groups shows it")
    engine, stored = served.engine, served.engine.stored_keys()
    for group, chunk in ((0, 25), (1, 27), (2, 20)):
        prompt = engine.prompt(10 + group, PROMPT_TOKENS)
        engine.answer(prompt[:500], max_tokens=1)
        engine.drain()
        stored.clear()
        shorter = engine.answer(prompt)  # on the engine's own hit
        assert shorter.cached_tokens == 480
        engine.drain()
        engine.forget_gpu()
        engine.lose(stored[group][chunk - 28])
        check_own_hit(shorter, engine.answer(prompt))
        engine.forget_gpu()
        assert engine.answer(prompt).cached_tokens == HIT_TOKENS, "what was computed again was stored again"
        engine.forget_gpu()


def test_every_byte_of_a_crowd(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that begin alike, more than the engine has blocks for, in steps of 256 tokens: windows move on while they are
    stored, requests are preempted, blocks are handed out again."""
    if served.name != "gemma3 in chunks of 2 blocks":
        pytest.skip("one shape with windows, and chunks of several blocks, shows it")
    engine = served.engine
    engine.forget_all()
    beginnings = [engine.prompt(30 + number, 700) for number in range(3)]
    preemptions = 0
    preempt = engine.vllm_scheduler._preempt_request

    def counting(*args: Any, **kwargs: Any) -> None:
        nonlocal preemptions
        preemptions += 1
        preempt(*args, **kwargs)

    monkeypatch.setattr(engine.vllm_scheduler, "_preempt_request", counting)
    with checked_bytes(engine) as checked:
        for turn in range(3):
            choose = random.Random(turn)
            prompts = [
                choose.choice(beginnings)[: choose.randrange(150, 700)]
                + engine.prompt(100 * turn + number, choose.randrange(20, 300))
                for number in range(8)
            ]
            engine.answers(prompts + beginnings, max_tokens=40)
            engine.forget_gpu()
    print(checked.stored_blocks, checked.loaded_blocks, checked.incomplete_chunks, preemptions)
    assert preemptions > 0
    assert checked.stored_blocks > 0
    assert checked.loaded_blocks > 0


def test_a_load_that_fails_in_part_is_computed_from_the_start(served: Served) -> None:
    """Before a block of a window that failed lie others that were not loaded."""
    chunks = {"gemma3": (0, 5, 20), "gemma3 of windows alone": (2,)}
    if served.name not in chunks:
        pytest.skip("shapes with windows show it; test_failures.py those without")
    engine = served.engine
    for chunk in chunks[served.name]:
        prompt = engine.prompt(20 + chunk, PROMPT_TOKENS)
        cold = engine.answer(prompt)
        engine.forget_gpu()
        with engine.failing_loads(chunk):
            recomputed = engine.answer(prompt)
        assert (recomputed.token_ids, recomputed.top_logprobs) == (cold.token_ids, cold.top_logprobs), chunk
        engine.forget_gpu()
        assert engine.answer(prompt).cached_tokens == HIT_TOKENS
        engine.forget_gpu()
