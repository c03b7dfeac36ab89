"""Servers as they are deployed: several engines on one path, and a new server that starts while the old one still drains."""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from engine import InProcessEngine
from test_quickstart import V1
from test_quickstart import server as lmcache_server
from test_servers import server as offloading_server
from vllm_server import VllmServer

import lmcache_native as native

MIB = 1 << 20
CHUNK_TOKENS = 40
ENGINES = 2


def prompt(seed: int) -> list[int]:
    return [5 + (index * 37 + seed * 101 + index // 7 * seed) % 400 for index in range(700)]


def ask(running: VllmServer, tokens: list[int], engine: int | None = None) -> int:
    """How many tokens came from a cache."""
    return running.completions(tokens, max_tokens=2, extra={"ignore_eos": True}, engine=engine).cached_tokens


def of_engine(running: VllmServer, metric: str, engine: int) -> float:
    """Summed over the other labels; NaN: there is none."""
    wanted = re.compile(rf'lmcache_native_{metric}\{{.*engine="{engine}".*\}}')
    found = [value for name, value in running.metrics().items() if wanted.match(name)]
    return sum(found) if found else math.nan


def until(condition: Callable[[], bool], running: VllmServer, engine: int | None = None) -> None:
    """Asks for a few tokens meanwhile: metrics move with the engine's steps."""
    end = time.monotonic() + 120
    while not condition():
        ask(running, [9, 8, 7], engine)
        assert time.monotonic() < end, running.log_tail()
        time.sleep(0.05)


def until_clean(running: VllmServer, engine: int) -> None:
    def clean() -> bool:
        return of_engine(running, "nvme_dirty_bytes", engine) == 0 and of_engine(running, "nvme_live_bytes", engine) > 0

    until(clean, running, engine)


def allocated(folder: Path) -> int:
    return sum(entry.stat().st_blocks * 512 for entry in folder.iterdir())


class Deployment:
    """Two engines under LMCacheConnectorV1, one path, one limit of 256 MiB for both."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.directory = folder / "kv"
        self.model = model
        self.log = folder / "server.log"

    def server(self, api_servers: int) -> VllmServer:
        return lmcache_server(
            self.model,
            self.log,
            {
                "LMCACHE_CHUNK_SIZE": str(CHUNK_TOKENS),
                "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.0625",
                "LMCACHE_LOCAL_DISK": str(self.directory),
                "LMCACHE_MAX_LOCAL_DISK_SIZE": "0.25",
            },
            [
                *("--kv-transfer-config", V1, "--max-model-len", "1024", "--max-num-batched-tokens", "1024"),
                *("--data-parallel-size", str(ENGINES), "--api-server-count", str(api_servers)),
            ],
        )

    def folder(self, engine: int) -> Path:
        return self.directory / f"vllm-dp{engine}"


@pytest.fixture(scope="module")
def deployment(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    return Deployment(tiny, tmp_path_factory.mktemp("deployment"))


HIT_TOKENS = 680  # whole chunks; the last token is always computed


def test_two_engines_share_a_path_and_its_limit(deployment: Deployment) -> None:
    with deployment.server(api_servers=1) as running:
        for engine in range(ENGINES):
            assert f"NVMe {deployment.folder(engine)} 0.125 GiB (1/2 of 0.25): 0 chunks found" in running.log()
            assert ask(running, prompt(engine), engine) == 0
        assert ask(running, prompt(0), 1) == 0, "what one stores is not the other's"
        for engine in range(ENGINES):
            until_clean(running, engine)
    for engine in range(ENGINES):
        assert 0 < allocated(deployment.folder(engine)) <= 128 * MIB


def test_both_find_their_own_after_a_restart_beside_a_folder_of_none(deployment: Deployment) -> None:
    """And with two API servers. The folder was engine 2's, of three."""
    left = deployment.folder(2)
    with_a_third = native.Store(host_bytes=16 * MIB, directory=left, nvme_bytes=96 * MIB, max_payload_bytes=MIB)
    with_a_third.put(b"k", b"v" * 1000)
    with_a_third.close()
    held = allocated(left)
    with deployment.server(api_servers=2) as running:
        log = running.log()
        assert log.count("are held by folders that no engine of this server uses") == 1
        assert f"to have the space back: lmcache-native clear {left}" in log
        share = (256 * MIB - held) // 2 / (1 << 30)
        for engine in range(ENGINES):
            assert re.search(rf"NVMe {deployment.folder(engine)} {share:g} GiB \(1/2 of .*\): [1-9]\d* chunks found", log)
            assert ask(running, prompt(engine), engine) == HIT_TOKENS
            hits = functools.partial(of_engine, running, "hit_chunks_total", engine)
            until(lambda hits=hits: hits() == HIT_TOKENS / CHUNK_TOKENS, running, engine)
    assert sum(allocated(folder) for folder in deployment.directory.iterdir()) <= 256 * MIB


def test_a_new_server_takes_over_from_one_that_drains(tiny: Path, tmp_path: Path) -> None:
    """NativeOffloadingConnector; the old engine is in this process."""
    directory = tmp_path / "kv"
    old = InProcessEngine(tiny, directory)
    try:
        old.answer(prompt(1), max_tokens=2)
        old.drain()
        new = offloading_server(
            tiny,
            tmp_path / "server.log",
            {"LMCACHE_NATIVE": "1", "LMCACHE_LOCAL_DISK": str(directory), "LMCACHE_MAX_LOCAL_DISK_SIZE": "1"},
            ["--kv-offloading-size", "0.0625", "--max-model-len", "2048", "--max-num-batched-tokens", "2048"],
        )
        with new:
            assert f"NVMe {directory}/vllm-dp0 1 GiB: not in use" in new.log()
            assert "running without NVMe until its owner lets go: store directory" in new.log()
            assert ask(new, prompt(2)) == 0
            assert ask(new, prompt(1)) == 0
            new.reset_prefix_cache()
            assert ask(new, prompt(2)) == 640, "from host memory"
            until(lambda: of_engine(new, "nvme_waiting", 0) == 1, new)
            last = old.answer(prompt(3), max_tokens=2)  # written as late as can be
            old.drain()
            old.close()
            until(lambda: "taken over:" in new.log(), new)
            assert re.search(rf"NVMe {directory}/vllm-dp0 taken over: [1-9]\d* chunks found", new.log())
            answer = new.completions(prompt(3), max_tokens=2, extra={"ignore_eos": True})
            assert (answer.cached_tokens, answer.token_ids) == (640, last.token_ids)
            assert new.cached_tokens_by_source()["disk"] == 640
            until_clean(new, 0)
            assert of_engine(new, "nvme_waiting", 0) == 0
    finally:
        if hasattr(old, "llm"):
            old.close()
