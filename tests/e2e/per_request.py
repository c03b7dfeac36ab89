"""What a request may ask of the cache (kv_transfer_params, cache_salt), over HTTP: the same for both connectors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from vllm_server import ServerError


def complete(server: Any, prompt: Sequence[int], parameters: Mapping[str, object] | None = None, **extra: object) -> dict[str, Any]:
    body = {"model": server.model, "prompt": list(prompt), "max_tokens": 2, "temperature": 0.0, **extra}
    if parameters is not None:
        body["kv_transfer_params"] = dict(parameters)
    answer: dict[str, Any] = server._json("POST", "/v1/completions", body)
    return answer


def cached(server: Any, prompt: Sequence[int], parameters: Mapping[str, object] | None = None, **extra: object) -> int:
    """Tokens that came from the connector: the engine's own prefix cache is emptied before."""
    server.reset_prefix_cache()
    found = complete(server, prompt, parameters, **extra)["usage"]["prompt_tokens_details"] or {}
    return int(found.get("cached_tokens") or 0)


def check_controls(server: Any, prompts: Sequence[Sequence[int]], hit_tokens: int) -> None:
    """`prompts`: seven that the cache does not have. `hit_tokens`: of one that it has."""
    salted, tagged, unsaved, reported, low, wrong, high = prompts

    assert cached(server, salted, cache_salt="a") == 0
    assert cached(server, salted, cache_salt="b") == 0
    assert cached(server, salted) == 0
    assert cached(server, salted, cache_salt="a") == hit_tokens

    assert cached(server, tagged, {"lmcache.tag.user": "x"}) == 0
    assert cached(server, tagged, {"lmcache.tag.user": "y"}) == 0
    assert cached(server, tagged) == 0
    assert cached(server, tagged, {"lmcache.tag.user": "x"}) == hit_tokens

    assert cached(server, unsaved, {"lmcache.skip_save": True}) == 0
    assert cached(server, unsaved, {"lmcache.skip_save": "true"}) == 0
    assert cached(server, unsaved) == 0
    assert cached(server, unsaved) == hit_tokens

    for parameters in ({"lmcache.priority": "low"}, {"lmcache.priority": "HIGH"}):
        prompt = low if parameters["lmcache.priority"] == "low" else high
        assert cached(server, prompt, parameters) == 0
        assert cached(server, prompt, parameters) == hit_tokens

    check_report(server, reported, hit_tokens)
    check_wrong_values(server, wrong)


def check_report(server: Any, prompt: Sequence[int], hit_tokens: int) -> None:
    report = {"lmcache.report": True}
    assert cached(server, prompt) == 0
    server.reset_prefix_cache()
    assert complete(server, prompt).get("kv_transfer_params") is None  # nobody asked
    server.reset_prefix_cache()
    found = complete(server, prompt, report)["kv_transfer_params"]["lmcache_native"]
    assert found == {"prompt_tokens": len(prompt), "hit_tokens": {"engine": 0, "host": hit_tokens, "nvme": 0}}
    again = complete(server, prompt, report)["kv_transfer_params"]["lmcache_native"]["hit_tokens"]
    assert again["engine"] > 0  # whole blocks of the engine's; what a chunk holds beyond them may be loaded
    assert again["host"] < hit_tokens <= again["engine"] + again["host"]
    line = rf"request cmpl-\S+: {len(prompt)} prompt tokens, hit engine 0, host {hit_tokens}, NVMe 0"
    assert re.search(line, server.log()), server.log_tail()


def check_wrong_values(server: Any, prompt: Sequence[int]) -> None:
    for name, value, right in (
        ("lmcache.priority", "urgent", "low, normal or high"),
        ("lmcache.priority", 3, "low, normal or high"),
        ("lmcache.skip_save", "perhaps", "true or false"),
        ("lmcache.report", 7, "true or false"),
        ("lmcache.tag.user", {"a": 1}, "text or a number"),
    ):
        with pytest.raises(ServerError) as refused:
            complete(server, prompt, {name: value})
        assert "HTTP 400" in str(refused.value)
        assert name in str(refused.value)
        assert right in str(refused.value)
    assert complete(server, prompt, {"lmcache.unknown": 1, "other": {"a": []}})["usage"]["prompt_tokens"] == len(prompt)
