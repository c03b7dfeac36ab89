"""Real servers with LMCache's connector name and configuration: restart, kill -9, other blocks, another model at the same path,
eight clients on a small arena, tensor parallelism."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import exported
import per_request
import prompts
import pytest
from event_subscriber import EventSubscriber
from same_answer import Answer, check_cold, check_own_hit
from test_quickstart import V1, ask, server
from test_servers import until_clean
from vllm_server import ServerError, VllmServer

LENGTH = 885
CHUNK_TOKENS = 40
HIT_TOKENS = 880  # whole chunks, and whole blocks of 16


class Life:
    """One store directory over several lives of the server, configured by a file as LMCache's users have it."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model = folder / "model"
        shutil.copytree(model, self.model)
        self.directory = folder / "kv"
        config = folder / "lmcache.json"
        settings = {
            "chunk_size": CHUNK_TOKENS,
            "local_cpu": True,
            "max_local_cpu_size": 0.5,
            "local_disk": f"file://{self.directory}/",
            "max_local_disk_size": 1,
            "remote_url": None,
            "enable_blending": False,
            "log_requests": True,
            "enable_kv_events": True,
        }
        config.write_text(json.dumps(settings))
        self.subscriber = EventSubscriber(folder / "events")
        self.server = self.started_with(self.subscriber.arguments())
        self.prompts = [prompts.tokens(model, seed, LENGTH) for seed in (201, 202, 203)]
        self.cold: list[Answer] = []
        self.own: list[Answer] = []

    def started_with(self, args: list[str]) -> VllmServer:
        folder = self.directory.parent
        return server(
            self.model,
            folder / "server.log",
            {"LMCACHE_CONFIG_FILE": str(folder / "lmcache.json"), "LMCACHE_NATIVE_COMPAT_METRICS": "1"},
            ["--kv-transfer-config", V1, *args],
        )


@pytest.fixture(scope="module")
def life(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    found = Life(smollm2, tmp_path_factory.mktemp("token_life"))
    yield found
    found.server.kill9()
    found.subscriber.close()


def test_first_life(life: Life) -> None:
    life.server.start()
    assert f"NVMe {life.directory}/vllm-dp0 1 GiB" in life.server.log()
    life.cold = [ask(life.server, prompt) for prompt in life.prompts]
    life.own = [ask(life.server, prompt) for prompt in life.prompts]
    assert [own.cached_tokens for own in life.own] == [HIT_TOKENS] * 3
    life.server.reset_prefix_cache()
    for prompt, own, cold in zip(life.prompts, life.own, life.cold, strict=True):
        loaded = ask(life.server, prompt)
        check_own_hit(own, loaded)
        print(check_cold(cold, loaded))
    assert life.server.cached_tokens_by_source()["host"] == HIT_TOKENS * 3
    loaded_bytes = 3 * 22 * CHUNK_TOKENS * 23040  # SmolLM2: 23,040 bytes of KV a token
    for _ in range(200):
        until_clean(life.server)  # metrics move with the engine's steps
        metrics = life.server.metrics()
        if metrics.get("vllm:kv_offload_load_bytes_total", 0.0) >= loaded_bytes:
            break
    assert metrics["vllm:kv_offload_store_bytes_total"] == loaded_bytes
    assert metrics["vllm:kv_offload_load_bytes_total"] == loaded_bytes
    assert metrics["lmcache_native_hit_chunks_total"] == 3 * 22


def test_exported_names_are_those_of_dashboard_and_document(life: Life) -> None:
    until_clean(life.server)
    found = exported.scrape(life.server)
    assert exported.problems(found) == []
    filled, documented = exported.lmcache_names(found)
    assert filled == documented
    asked = found.value("lmcache_native_prompt_tokens_total")
    engine = found.value("lmcache_native_engine_hit_tokens_total")
    assert found.value("lmcache_native_hit_tokens_total", tier="host") == 3 * HIT_TOKENS
    assert found.value("lmcache_native_hit_tokens_total", tier="nvme") == 0
    assert found.value("lmcache_native_miss_tokens_total", tier="host") == asked - engine - 3 * HIT_TOKENS
    assert found.value("lmcache_native_load_seconds_count") == 3
    assert found.value("lmcache_native_scatter_bytes_total") == found.value("vllm:kv_offload_load_bytes_total")
    assert found.value("lmcache_native_nvme_write_seconds_count") == found.value("lmcache_native_nvme_written_chunks_total") == 66
    assert found.value("lmcache_native_info", connector="LMCacheConnectorV1", verify="nvme") == 1
    assert found.value("lmcache:num_hit_tokens_total") == 3 * HIT_TOKENS
    assert found.value("lmcache:local_cache_usage") == found.value("lmcache_native_host_used_bytes") > 0


def test_events_reach_a_subscriber(life: Life) -> None:
    stored = 3 * 22
    assert life.subscriber.receive_until(lambda so_far: len(so_far.media().get("STORAGE", ())) >= stored)
    media = life.subscriber.media()
    assert len(media["CPU"]) >= stored
    assert media["STORAGE"] <= media["CPU"]
    first = next(event for event in life.subscriber.events if type(event).__name__ == "BlockStored" and event.medium == "STORAGE")
    assert list(first.token_ids) == life.prompts[0][:CHUNK_TOKENS]
    assert first.block_size == CHUNK_TOKENS


def test_per_request_controls(life: Life) -> None:
    asked = [prompts.tokens(life.model, seed, 205) for seed in range(211, 218)]
    per_request.check_controls(life.server, asked, 200)  # 192 would be whole blocks


def test_restart_and_kill_9(life: Life) -> None:
    until_clean(life.server)
    life.server.stop()
    life.server.start()
    for prompt, own in zip(life.prompts, life.own, strict=True):
        check_own_hit(own, ask(life.server, prompt))
    assert life.server.cached_tokens_by_source()["disk"] == HIT_TOKENS * 3
    life.server.kill9()
    life.server.start()
    for prompt, own in zip(life.prompts, life.own, strict=True):
        check_own_hit(own, ask(life.server, prompt))
    life.server.stop()


def test_engine_with_other_blocks_reads_the_same_chunks(life: Life) -> None:
    """Chunks are canonical: they do not depend on the engine's block. (Where the CPU backend packs blocks of 64 tokens otherwise,
    as with AMX, they are opaque pages with keys of their own, and the hit is a miss.)"""
    with life.started_with(["--block-size", "64"]) as running:
        loaded = ask(running, life.prompts[0])
        if "blocks of 64 tokens addressed by token" in running.log():
            assert loaded.cached_tokens == HIT_TOKENS
        else:
            assert "copied as whole blocks, chunk_size 64 instead of 40" in running.log()
            assert loaded.cached_tokens == 0
        print(check_cold(life.cold[0], loaded) if loaded.cached_tokens else "opaque pages")


def test_retrained_model_at_the_same_path_misses(life: Life) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    (weights,) = life.model.glob("*.safetensors")
    tensors = load_file(weights)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if "layers.3.self_attn" in name:
            tensors[name] = tensor + torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * tensor.std()
    save_file(tensors, weights, metadata={"format": "pt"})
    life.server.start()
    again = ask(life.server, life.prompts[0])
    assert again.cached_tokens == 0
    assert again.top_logprobs != life.cold[0].top_logprobs  # had it hit, this is what would have been mixed up
    life.server.stop()


def test_eight_clients_on_a_small_arena(smollm2: Path, tmp_path: Path) -> None:
    """64 MiB hold 70 chunks, less than four of the prompts; one prompt is larger than all of it. Everyone gets the right answer."""
    lengths = [885, 1500, 885, 3500, 600, 885, 1200, 885]
    asked = [prompts.tokens(smollm2, 300 + index % 5, length) for index, length in enumerate(lengths)]
    environment = {
        "LMCACHE_CHUNK_SIZE": str(CHUNK_TOKENS),
        "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.0625",
        "LMCACHE_LOCAL_DISK": str(tmp_path / "kv"),
        "LMCACHE_MAX_LOCAL_DISK_SIZE": "1",
    }
    with server(smollm2, tmp_path / "server.log", environment, ["--kv-transfer-config", V1]) as running:
        running.reset_prefix_cache()
        cold = []
        for prompt in asked:
            running.reset_prefix_cache(external=True)
            cold.append(ask(running, prompt))
        failures: list[str] = []

        def client(index: int) -> None:
            try:
                for turn in range(4):
                    which = (index + turn) % len(asked)
                    check_cold(cold[which], ask(running, asked[which]))
            except (AssertionError, ServerError) as error:
                failures.append(f"client {index}: {error}")

        for _round in range(2):
            clients = [threading.Thread(target=client, args=(index,)) for index in range(8)]
            for thread in clients:
                thread.start()
            for thread in clients:
                thread.join()
            assert failures == []
            running.reset_prefix_cache()
        metrics = running.metrics()
        assert metrics["lmcache_native_evicted_chunks_total"] > 0
        assert metrics["vllm:num_requests_running"] == 0
        assert metrics["vllm:num_requests_waiting"] == 0


def test_tensor_parallel(tiny: Path, tmp_path: Path) -> None:
    """Two ranks fill each slot; chunks of 24 tokens over blocks of 16. The log tells of a store once, not once a rank."""
    with server(
        tiny,
        tmp_path / "server.log",
        {
            "VLLM_CPU_OMP_THREADS_BIND": "0|1",
            "OMP_NUM_THREADS": None,
            "LMCACHE_CHUNK_SIZE": "24",
            "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.25",
        },
        ["--tensor-parallel-size", "2", "--kv-transfer-config", V1, "--max-model-len", "1024"],
    ) as running:
        prompt = [5 + (index * 37) % 400 for index in range(677)]
        cold = ask(running, prompt)
        own = ask(running, prompt)
        assert own.cached_tokens == 672  # 28 chunks, 42 blocks
        running.reset_prefix_cache()
        check_own_hit(own, ask(running, prompt))
        print(check_cold(cold, own))
        assert running.cached_tokens_by_source()["host"] == 672
        log = running.log()
        assert log.count("attached:") == 2
        assert "one copy" not in log  # each rank has heads of its own
        assert len(re.findall(r"Stored 672 out of total 672 tokens", log)) == 1
