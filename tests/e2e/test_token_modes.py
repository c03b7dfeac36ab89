"""LMCacheNativeConnector in its other modes, each an engine of its own: synchronous loads, layer by layer, failed loads that fail
the request, preemption, LoRA adapters."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from same_answer import Answer, check_cold, check_own_hit
from test_token_failures import add, check_nothing_is_left, finish
from token_engine import TokenEngine

LENGTH = 885
HIT_TOKENS = 880


@contextlib.contextmanager
def engine(model: Path, directory: Path | None = None, **extra: Any) -> Iterator[TokenEngine]:
    running = TokenEngine(model, directory, **extra)
    try:
        yield running
        check_nothing_is_left(running)
    finally:
        running.close()


@pytest.mark.parametrize("extra", [{"enable_async_loading": False}, {"use_layerwise": True}], ids=["synchronous", "layerwise"])
def test_loads_within_the_step(smollm2: Path, tmp_path: Path, extra: dict[str, Any]) -> None:
    with engine(smollm2, tmp_path / "kv", async_scheduling=False, **extra) as running:
        prompt = running.prompt(1, LENGTH)
        cold = running.answer(prompt)
        own = running.answer(prompt)
        for evict in (running.forget_gpu, running.evict_to_nvme):
            evict()
            with running.watch_loads() as kv, running.counted("wait_for_layer") as layers_waited_for:
                loaded = running.answer(prompt)
            assert kv[0].shape[2] == HIT_TOKENS
            assert len(layers_waited_for) >= 30  # vLLM calls it in every layer of every step
            check_own_hit(own, loaded)
            print(check_cold(cold, loaded))

        # A load that fails: the step computed on garbage, so its request starts again, and nothing it stored is published.
        running.forget_gpu()
        longer = prompt + running.prompt(2, 200)
        with running.garbage_before_the_step(3), running.watch_stores() as stored:
            recomputed = running.answer(longer)
            running.drain()
        running.forget_gpu()
        with running.watch_stores() as again:
            assert running.answer(longer).cached_tokens == HIT_TOKENS
            running.drain()
        running.forget_gpu()
        with running.watch_loads() as kv:
            assert running.answer(longer).cached_tokens == 1080
        assert (len(stored), len(again)) == (1, 1)
        assert not (stored[0] == again[0]).all()
        assert (kv[0][:, :, HIT_TOKENS:] == again[0]).all()
        running.forget_all()
        cold = running.answer(longer)
        print(check_cold(cold, recomputed))

        # Its request is aborted before it was computed again: the garbage is in none of vLLM's cached blocks.
        running.forget_gpu()
        with running.garbage_before_the_step(3):
            add(running, "aborted", longer)
            running.llm.llm_engine.step()  # loads, computes on the garbage, and hears of the failure
            running.llm.llm_engine.abort_request(["aborted"])
            running.drain()
        print(check_cold(cold, running.answer(longer)))


def test_failed_load_fails_the_request_when_asked_to(smollm2: Path) -> None:
    with engine(smollm2, load_failure_policy="fail") as running:
        prompt = running.prompt(1, LENGTH)
        running.answer(prompt)
        running.forget_gpu()
        with running.failing_loads(0):
            add(running, "failing", prompt)
            reasons = []
            while running.llm.llm_engine.has_unfinished_requests():
                reasons += [output.outputs[0].finish_reason for output in running.llm.llm_engine.step() if output.finished]
        assert reasons == ["error"]
        running.forget_gpu()
        assert running.answer(prompt).cached_tokens == HIT_TOKENS


def test_opaque_pages_are_copied_as_whole_blocks(smollm2: Path, tmp_path: Path) -> None:
    """A quantised cache is not addressed by token: chunk_size 40 becomes two blocks of 32. The prompt is stored to its end, and all
    but its last token is loaded, which lies within a block."""
    with engine(smollm2, tmp_path / "kv", kv_cache_dtype="fp8", block_size=32) as running:
        assert running.worker.pages.opaque
        assert running.worker.chunk_tokens == 64
        prompt = running.prompt(1, 640)
        cold = running.answer(prompt)
        own = running.answer(prompt)
        for evict in (running.forget_gpu, running.evict_to_nvme):
            evict()
            loaded = running.answer(prompt)
            assert loaded.cached_tokens == 639
            check_own_hit(own, loaded)
            print(check_cold(cold, loaded))


def test_preemption(smollm2: Path) -> None:
    """70 blocks of 16 tokens for four requests of 300 tokens that generate 100 each: the engine must preempt, and hands out blocks
    that stores under way still read (they are held until the workers are told to flush them)."""
    with engine(smollm2, max_model_len=1024, num_gpu_blocks_override=70, save_decode_cache=True) as running:
        prompts = [running.prompt(10 + index, 300) for index in range(4)]
        cold = [running.answer(prompt, max_tokens=100) for prompt in prompts]
        running.forget_all()
        preemptions = 0
        preempt = running.vllm_scheduler._preempt_request

        def counting(*args: Any, **kwargs: Any) -> None:
            nonlocal preemptions
            preemptions += 1
            preempt(*args, **kwargs)

        running.vllm_scheduler._preempt_request = counting
        with running.held_copies(only="store"):
            for index, prompt in enumerate(prompts):
                add(running, f"r{index}", prompt, max_tokens=100)
            found = finish(running)
        assert preemptions > 0
        for index in range(4):
            check_tokens(cold[index], found[f"r{index}"])
        for index, prompt in enumerate(prompts):  # what was stored is right
            running.forget_gpu()
            check_tokens(cold[index], running.answer(prompt, max_tokens=100).token_ids)
        # Decoded tokens are stored too, and a longer chat finds them.
        running.forget_gpu()
        history = prompts[0] + found["r0"]
        assert running.answer([*history, 17], max_tokens=1).cached_tokens >= 360


def check_tokens(cold: Answer, token_ids: list[int]) -> None:
    print(check_cold(cold, Answer(token_ids, [], 0)))


def make_adapter(directory: Path, model: Path, seed: int) -> Path:
    """A LoRA adapter on all query and value projections that changes answers."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, rank = config["hidden_size"], 4
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    outputs = {"q_proj": config["num_attention_heads"] * head_dim, "v_proj": config["num_key_value_heads"] * head_dim}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, size in outputs.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, hidden, generator=generator) * 0.05
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(size, rank, generator=generator) * 0.05
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"})
    )
    return directory


def test_adapters_have_keys_of_their_own(smollm2: Path, tmp_path: Path) -> None:
    """With and without an adapter, and with one whose weights were trained again at the same path: never each other's KV."""
    from vllm.lora.request import LoRARequest

    with engine(smollm2, tmp_path / "kv", enable_lora=True) as running:
        prompt = running.prompt(1, LENGTH)
        first = LoRARequest("adapter", 1, str(make_adapter(tmp_path / "adapter", smollm2, seed=1)))
        plain = running.answer(prompt)
        running.forget_gpu()
        adapted = running.answer(prompt, lora_request=first)
        assert (plain.cached_tokens, adapted.cached_tokens) == (0, 0)
        assert adapted.top_logprobs != plain.top_logprobs
        running.forget_gpu()
        assert running.answer(prompt, lora_request=first).cached_tokens == HIT_TOKENS
        running.forget_gpu()
        running.llm.llm_engine.remove_lora(1)
        make_adapter(tmp_path / "adapter", smollm2, seed=2)
        again = running.answer(prompt, lora_request=LoRARequest("adapter", 2, str(tmp_path / "adapter")))
        assert again.cached_tokens == 0
        assert again.top_logprobs != adapted.top_logprobs


def test_two_drives(smollm2: Path, tmp_path: Path) -> None:
    """Chunks are striped over both and found again after a restart; without one of them the engine starts, and computes what is
    gone."""
    drives = [tmp_path / "a", tmp_path / "b"]
    nvme = {"local_disk": [str(drive) for drive in drives], "local_disk_sizes": [0.5, 0.75], "region_size": 1 / 16, "verify": "all"}
    with engine(smollm2, None, **nvme) as running:
        prompt = running.prompt(9, LENGTH)
        running.answer(prompt)
        own = running.answer(prompt)
        running.forget_gpu()
        check_own_hit(own, running.answer(prompt))  # from host memory, checked
        running.evict_to_nvme()
        check_own_hit(own, running.answer(prompt))
        assert running.stats()["nvme_paths"] == 2
        assert running.stats()["corrupt_host_chunks"] == 0
    with engine(smollm2, None, **nvme) as running:
        assert running.answer(prompt).cached_tokens == HIT_TOKENS
    shutil.rmtree(drives[1] / "vllm-dp0")
    (drives[1] / "vllm-dp0").mkdir(mode=0o700)
    (drives[1] / "vllm-dp0" / "LOCK").mkdir()  # EISDIR, as a drive that is not well
    with engine(smollm2, None, **nvme) as running:
        assert running.stats()["nvme_lost_paths"] == 1
        again = running.answer(prompt)
        assert again.cached_tokens < HIT_TOKENS
        assert again.token_ids == own.token_ids
        running.evict_to_nvme()
        assert running.answer(prompt).cached_tokens == HIT_TOKENS  # all on the other drive now
