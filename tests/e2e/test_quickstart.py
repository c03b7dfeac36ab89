"""LMCache's quickstart with a real server: the command, the two overlapping requests, the log lines, as they are written there."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import prompts
import pytest
from same_answer import Answer, check_cold
from vllm_server import VllmServer

V1 = '{"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}'
BY_MODULE = (
    '{"kv_connector":"LMCacheNativeConnector","kv_connector_module_path":"lmcache_native.integration.vllm","kv_role":"kv_both"}'
)
NUMBER = r"\d+\.\d{4}"


def server(model: Path, log: Path, env: Mapping[str, str | None], args: Sequence[str]) -> VllmServer:
    """With blocks of 16 tokens, as in the quickstart."""
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(Path(__file__).parent / "small_blocks")])
    return VllmServer(
        model,
        env={"OMP_NUM_THREADS": "1", "PYTHONPATH": path, **env},
        args=["--block-size", "16", *args],
        log_path=log,
        python=sys.executable,
    )


def ask(running: VllmServer, prompt: list[int], max_tokens: int = 8) -> Answer:
    found = running.completions(prompt, max_tokens=max_tokens, logprobs=5, extra={"ignore_eos": True})
    return Answer(found.token_ids, found.top_logprobs, found.cached_tokens)


def overlapping(model: Path) -> tuple[list[int], list[int]]:
    """31 tokens, and 32 of which the first 28 are the same."""
    first = prompts.tokens(model, 1, 31)
    second = first[:28] + prompts.tokens(model, 2, 4)
    return first, second


def lines(running: VllmServer) -> list[str]:
    """What our package logged, without time and place."""
    return [found.group(1) for found in re.finditer(r"lmcache_native INFO: (.*) \(\w+\.py:\d+\)", running.log())]


def check_lines(found: list[str], first_tokens: int) -> None:
    """`first_tokens`: how many of the first request's 31 are stored."""
    start = next(index for index, line in enumerate(found) if line.startswith("Reqid: "))
    expected = [
        r"Reqid: \S+, Total tokens 31, LMCache hit tokens: 0, need to load: 0",
        rf"Storing KV cache for {first_tokens} out of {first_tokens} tokens \(skip_leading_tokens=0\) for request \S+",
        r"rank 0 attached: .*",
        rf"\[req_id=\S+\] Stored {first_tokens} out of total {first_tokens} tokens\. size: {NUMBER} GB, cost {NUMBER} ms, "
        rf"throughput: {NUMBER} GB/s; offload_time: {NUMBER} ms, put_time: {NUMBER} ms",
        r"Reqid: \S+, Total tokens 32, LMCache hit tokens: 24, need to load: 8",
        rf"\[req_id=\S+\] Retrieved 8 out of 24 required tokens \(from 32 total tokens\)\. size: {NUMBER} gb, cost {NUMBER} ms, "
        rf"throughput: {NUMBER} GB/s;",
        r"Storing KV cache for 8 out of 32 tokens \(skip_leading_tokens=24\) for request \S+",
        rf"\[req_id=\S+\] Stored 8 out of total 8 tokens\. size: {NUMBER} GB, cost {NUMBER} ms, throughput: {NUMBER} GB/s; "
        rf"offload_time: {NUMBER} ms, put_time: {NUMBER} ms",
    ]
    printed = found[start:]
    assert len(printed) >= len(expected), printed
    for line, pattern in zip(printed, expected, strict=False):
        assert re.fullmatch(pattern, line), f"{line!r} is not {pattern!r}"


@pytest.mark.parametrize(
    ("env", "args", "first_tokens"),
    [
        ({}, ["--kv-transfer-config", V1], 24),
        ({"LMCACHE_SAVE_UNFULL_CHUNK": "true"}, ["--kv-transfer-config", BY_MODULE], 31),
        ({}, ["--kv-offloading-backend", "lmcache", "--kv-offloading-size", "0.5", "--disable-hybrid-kv-cache-manager"], 24),
    ],
    ids=["LMCacheConnectorV1", "module path and tail", "kv-offloading-backend lmcache"],
)
def test_quickstart(
    smollm2: Path, tmp_path: Path, env: dict[str, str], args: list[str], first_tokens: int, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = overlapping(smollm2)
    with server(smollm2, tmp_path / "server.log", {"LMCACHE_CHUNK_SIZE": "8", **env}, args) as running:
        log = running.log()
        size = "0.50" if "--kv-offloading-size" in args else "5.00"
        assert f"host {size} GiB" in log
        assert "blocks of 16 tokens addressed by token" in log
        ask(running, first)
        loaded = ask(running, second)
        assert loaded.cached_tokens == 24
        by_source = running.cached_tokens_by_source()
        assert (by_source["device"], by_source["host"]) == (16, 8)
        check_lines(lines(running), first_tokens)
        with capsys.disabled():
            print("", *lines(running), sep="\n  ")
        running.reset_prefix_cache()
        again = ask(running, second)
        assert again.cached_tokens == 31  # four chunks are stored now; the last token is always computed
        running.reset_prefix_cache(external=True)
        cold = ask(running, second)
        print(check_cold(cold, loaded), check_cold(cold, again), sep="\n")
