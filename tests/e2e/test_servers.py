"""Real servers, the way users start them: plain --kv-offloading-size with LMCACHE_NATIVE=1, ended in all the ways they end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import exported
import per_request
import prompts
import pytest
from event_subscriber import EventSubscriber
from same_answer import Answer, check_cold, check_own_hit
from vllm_server import ServerError, VllmServer

HIT_TOKENS = 896


def server(model: Path, log: Path, env: Mapping[str, str | None], args: Sequence[str]) -> VllmServer:
    return VllmServer(model, env={"OMP_NUM_THREADS": "1", **env}, args=args, log_path=log, python=sys.executable)


def ask(running: VllmServer, prompt: list[int], max_tokens: int = 12) -> Answer:
    found = running.completions(prompt, max_tokens=max_tokens, logprobs=5, extra={"ignore_eos": True})
    return Answer(found.token_ids, found.top_logprobs, found.cached_tokens)


def until_clean(running: VllmServer) -> None:
    """Asks for one token at a time (metrics move with the engine's steps) until nothing is waiting to be written."""
    for attempt in range(200):
        ask(running, [100 + attempt, 7, 8], max_tokens=2)
        if running.metrics().get("lmcache_native_nvme_dirty_bytes", 1.0) == 0.0:
            return
    raise AssertionError("nvme_dirty_bytes never became 0\n" + running.log_tail())


class Life:
    """One store directory over three lives of the server: ended by SIGTERM, then by SIGKILL."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.directory = folder / "kv"
        self.model = model
        self.subscriber = EventSubscriber(folder / "events")
        self.server = server(
            model,
            folder / "server.log",
            {
                "LMCACHE_NATIVE": "1",
                "LMCACHE_LOCAL_DISK": f"file://{self.directory}",
                "LMCACHE_MAX_LOCAL_DISK_SIZE": "1",
                "LMCACHE_LOG_REQUESTS": "1",
            },
            ["--kv-offloading-size", "0.5", *self.subscriber.arguments()],
        )
        self.prompts = [prompts.tokens(model, seed, 900) for seed in (101, 102, 103)]
        self.own: list[Answer] = []
        self.cold: list[Answer] = []


@pytest.fixture(scope="module")
def life(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    found = Life(smollm2, tmp_path_factory.mktemp("life"))
    yield found
    found.server.kill9()


def test_first_life_host_hit(life: Life) -> None:
    life.server.start()
    assert "serving --kv-offloading-size: host 0.50 GiB" in life.server.log()
    assert str(life.directory / "vllm-dp0") in life.server.log()
    life.cold = [ask(life.server, prompt) for prompt in life.prompts]
    life.own = [ask(life.server, prompt) for prompt in life.prompts]
    life.server.reset_prefix_cache()
    for prompt, own, cold in zip(life.prompts, life.own, life.cold, strict=True):
        loaded = ask(life.server, prompt)
        assert loaded.cached_tokens == HIT_TOKENS
        check_own_hit(own, loaded)
        print(check_cold(cold, loaded))
    assert life.server.cached_tokens_by_source()["host"] == HIT_TOKENS * len(life.prompts)
    assert life.server.metrics()["lmcache_native_hit_chunks_total"] > 0


def test_exported_names_are_those_of_dashboard_and_document(life: Life) -> None:
    until_clean(life.server)
    found = exported.scrape(life.server)
    assert exported.problems(found) == []
    assert exported.lmcache_names(found)[0] == set()  # nobody asked for them
    asked = found.value("lmcache_native_prompt_tokens_total")
    engine = found.value("lmcache_native_engine_hit_tokens_total")
    assert found.value("lmcache_native_hit_tokens_total", tier="host") == 3 * HIT_TOKENS
    assert found.value("lmcache_native_miss_tokens_total", tier="host") == asked - engine - 3 * HIT_TOKENS
    assert found.value("lmcache_native_scatter_bytes_total") == found.value("vllm:kv_offload_load_bytes_total") > 0
    assert found.value("lmcache_native_gather_bytes_total") == found.value("vllm:kv_offload_store_bytes_total") > 0
    assert found.value("lmcache_native_load_seconds_count") == 3
    assert found.value("lmcache_native_info", connector="OffloadingConnector") == 1


def test_events_reach_a_subscriber(life: Life) -> None:
    stored = 3 * 7
    assert life.subscriber.receive_until(lambda so_far: len(so_far.media().get("STORAGE", ())) >= stored)
    media = life.subscriber.media()
    assert media["STORAGE"] <= media["CPU"]
    life.subscriber.close()


def test_per_request_controls(life: Life) -> None:
    asked = [prompts.tokens(life.model, seed, 205) for seed in range(111, 118)]
    per_request.check_controls(life.server, asked, 128)


def test_ordinary_stop_then_nvme(life: Life) -> None:
    until_clean(life.server)
    life.server.stop()
    life.server.start()
    for prompt, own in zip(life.prompts[:2], life.own[:2], strict=True):
        check_own_hit(own, ask(life.server, prompt))
    assert life.server.cached_tokens_by_source()["disk"] == HIT_TOKENS * 2


def test_kill_9_keeps_what_was_written(life: Life, capsys: pytest.CaptureFixture[str]) -> None:
    """All that was clean survives; of a prompt that ended just before the kill, what had not been written is lost."""
    last = prompts.tokens(life.model, 104, 900)
    cold = ask(life.server, last, max_tokens=4)
    life.server.kill9()
    life.server.start()
    for prompt, own in zip(life.prompts, life.own, strict=True):
        check_own_hit(own, ask(life.server, prompt))
    after = ask(life.server, last, max_tokens=4)
    with capsys.disabled():
        print(f"\nprefill of {len(last)} tokens, kill -9 after the answer: {after.cached_tokens} of {HIT_TOKENS} tokens survived")
    if after.cached_tokens:
        print(check_cold(cold, after))
    else:
        assert after.token_ids == cold.token_ids
    life.server.stop()


def test_tensor_parallel_with_chunks_of_two_blocks(tiny: Path, tmp_path: Path) -> None:
    """Two ranks fill each slot. The explicit connector, without the plugin."""
    transfer = (
        '{"kv_connector":"NativeOffloadingConnector","kv_connector_module_path":"lmcache_native.integration.vllm",'
        '"kv_role":"kv_both","kv_connector_extra_config":{"lmcache.chunk_size":256}}'
    )
    transfer = transfer.replace('"lmcache.chunk_size"', '"cpu_bytes_to_use":268435456,"lmcache.chunk_size"')
    with server(
        tiny,
        tmp_path / "server.log",
        {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "OMP_NUM_THREADS": None},
        ["--tensor-parallel-size", "2", "--kv-transfer-config", transfer, "--max-model-len", "1024"],
    ) as running:
        prompt = [5 + (index * 37) % 400 for index in range(700)]
        ask(running, prompt)
        own = ask(running, prompt[:640])  # a hit of 512 on the GPU: 640 is 5 blocks, the last token is always computed
        assert own.cached_tokens == 512
        running.reset_prefix_cache()
        check_own_hit(own, ask(running, prompt[:640]))
        assert running.cached_tokens_by_source()["host"] == 512

        # The first block of a chunk is on the GPU already: the load starts in the middle of a chunk.
        running.reset_prefix_cache()
        assert ask(running, prompt[:128] + prompt[300:400]).cached_tokens == 0
        check_own_hit(own, ask(running, prompt[:640]))
        by_source = running.cached_tokens_by_source()
        assert (by_source["host"], by_source["device"]) == (512 + 384, 512 + 128)
        assert "serving --kv-offloading-size" in running.log()
        assert running.log().count("attached:") == 2
        assert "one copy" not in running.log()  # each rank has heads of its own


def test_locked_directory_runs_without_nvme(tiny: Path, tmp_path: Path) -> None:
    import os

    from lmcache_native import Store

    directory = tmp_path / "kv" / "vllm-dp0"
    with (
        Store(host_bytes=16 << 20, directory=directory, nvme_bytes=256 << 20),
        server(
            tiny,
            tmp_path / "server.log",
            {
                "LMCACHE_NATIVE": "1",
                "LMCACHE_LOCAL_DISK": str(tmp_path / "kv"),
                "LMCACHE_MAX_LOCAL_DISK_SIZE": "0.25",
                "LMCACHE_LOCK_WAIT": "0.2",
                "LMCACHE_CHUNK_SIZE": "256",
            },
            ["--kv-offloading-size", "0.25", "--max-model-len", "1024"],
        ) as running,
    ):
        log = running.log()
        warnings = [line for line in log.splitlines() if "lmcache_native WARNING" in line]
        assert len(warnings) == 1
        assert f"pid {os.getpid()}" in warnings[0]
        prompt = [5 + (index * 37) % 400 for index in range(300)]
        ask(running, prompt)
        running.reset_prefix_cache()
        assert ask(running, prompt).cached_tokens == 256  # one chunk of two blocks


def test_wrong_value_stops_the_start_and_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    failing = server(
        tiny,
        tmp_path / "server.log",
        {"LMCACHE_NATIVE": "1", "LMCACHE_LOCAL_DISK": str(tmp_path / "kv"), "LMCACHE_MAX_LOCAL_DISK_SIZE": "minus one"},
        ["--kv-offloading-size", "0.25"],
    )
    with pytest.raises(ServerError, match="ended with"):
        failing.start()
    assert (
        "LMCACHE_MAX_LOCAL_DISK_SIZE='minus one' (environment): must be a number of GiB greater than 0, for example 100"
        in failing.log()
    )
    assert not (tmp_path / "kv").exists()
