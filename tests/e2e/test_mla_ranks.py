"""A model of multi-head latent attention on two ranks: both hold the same KV, one copy of it is stored, and both load that.

vLLM's MLA for the CPU has no prefix cache of its own to compare with, and its prefill rounds otherwise than its decoding. So the
answer to a prompt is compared with the answer to the prompt and its first token, when the prompt is loaded: from there on both are
decoded, one on KV that was computed, one on KV that was loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import GIB, InProcessEngine
from same_answer import Answer
from test_model_shapes import model
from token_engine import TokenEngine

from lmcache_native import ChunkHasher

PROMPT_TOKENS = 640  # whole chunks of either connector
TOKEN_BYTES = 2 * (512 + 64) * 2  # two layers, a latent and its rotated part, bf16
HOST_BYTES = 8 << 20
FILLERS = 8
CHUNK_TOKENS = {"native": 32, "tokens": 40}


class TwoRanks:
    def __init__(self, kind: str, directory: Path) -> None:
        self.kind, self._directory = kind, directory
        self.chunk_tokens = CHUNK_TOKENS[kind]
        self.engine: Any = self._start()

    def _start(self) -> Any:
        # The machine decides otherwise between two backends for MLA, with blocks of other sizes.
        options = {"tensor_parallel_size": 2, "attention_config": {"backend": "CPU_MLA"}}
        if self.kind == "native":
            chunk = {"chunk_size": self.chunk_tokens}
            return InProcessEngine(model("tiny-deepseek"), self._directory, host_bytes=HOST_BYTES, connector=chunk, **options)
        chunk = {"chunk_size": self.chunk_tokens, "max_local_cpu_size": HOST_BYTES / GIB}
        return TokenEngine(model("tiny-deepseek"), self._directory, **chunk, **options)

    def restart(self) -> None:
        self.engine.drain()
        self.engine.store.flush(30.0)
        self.engine.close()
        self.engine = self._start()

    def loaded(self, prompt: list[int], cold: Answer) -> Answer:
        found: Answer = self.engine.answer(prompt + cold.token_ids[:1], max_tokens=len(cold.token_ids) - 1)
        self.engine.drain()
        return found

    def check(self, prompt: list[int], cold: Answer, tier: str) -> None:
        before = self.engine.stats()
        found = self.loaded(prompt, cold)
        assert (cold.cached_tokens, found.cached_tokens) == (0, PROMPT_TOKENS)
        assert found.token_ids == cold.token_ids[1:]
        assert found.top_logprobs == cold.top_logprobs[1:]
        assert self.engine.stats()[f"hits_{tier}"] - before[f"hits_{tier}"] == PROMPT_TOKENS // self.chunk_tokens

    def cold(self, seed: int) -> tuple[list[int], Answer]:
        prompt = self.engine.prompt(seed, PROMPT_TOKENS)
        answer = self.engine.answer(prompt)
        self.engine.drain()
        return prompt, answer


@pytest.fixture(scope="module", params=CHUNK_TOKENS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    before = dict(os.environ)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    os.environ.pop("OMP_NUM_THREADS", None)
    found = None
    try:
        found = TwoRanks(request.param, tmp_path_factory.mktemp("ranks") / "kv")
        yield found
    finally:
        if found is not None:
            found.engine.close()
        os.environ.clear()
        os.environ.update(before)


def test_one_copy_serves_both_ranks_from_either_tier(ranks: TwoRanks) -> None:
    engine = ranks.engine
    assert (engine.store.rank_count, engine.store.part_count) == (2, 1)
    before = engine.stats()
    prompt, cold = ranks.cold(1)
    stored = {name: value - before[name] for name, value in engine.stats().items()}
    assert stored["committed_chunks"] == PROMPT_TOKENS // ranks.chunk_tokens
    ranks.check(prompt, cold, "host")
    engine.evict_to_nvme(FILLERS)
    ranks.check(prompt, cold, "nvme")


def test_bytes_are_those_of_one_rank(ranks: TwoRanks) -> None:
    engine = ranks.engine
    engine.store.flush(30.0)
    before = engine.stats()
    ranks.cold(2)
    engine.store.flush(30.0)
    written = engine.stats()["demoted_bytes"] - before["demoted_bytes"]
    chunks = PROMPT_TOKENS // ranks.chunk_tokens
    payload = -(-TOKEN_BYTES * ranks.chunk_tokens // 4096) * 4096
    assert written == chunks * (4096 + payload)


def test_same_answer_after_a_restart(ranks: TwoRanks) -> None:
    if ranks.kind != "native":
        pytest.skip("a restart is no different for the other connector")
    prompt, cold = ranks.cold(3)
    ranks.restart()
    ranks.check(prompt, cold, "nvme")


def test_another_ranks_kv_would_be_seen(ranks: TwoRanks) -> None:
    """The check above fails when one chunk of twenty is another's."""
    if ranks.kind != "tokens":
        pytest.skip("chunks' keys are known of the connector that makes them of tokens")
    engine = ranks.engine
    store, namespace = engine.store, engine.scheduler.namespaces.plain()
    prompt, cold = ranks.cold(4)
    other, _ = ranks.cold(5)
    hasher = ChunkHasher(namespace, ranks.chunk_tokens)
    victim, wrong = hasher.hash(prompt)[7:8], hasher.hash(other)[7:8]
    with store.acquire(namespace, wrong, 10.0) as lease:
        payload = lease.tobytes(0)
    assert store.erase(victim[0])
    with store.reserve(namespace, victim, len(payload)) as lease:
        lease.fill(0, payload)
        lease.mark_filled(0)
        assert lease.commit() == 1
    found = ranks.loaded(prompt, cold)
    assert found.cached_tokens == PROMPT_TOKENS
    assert found.top_logprobs != cold.top_logprobs[1:]
