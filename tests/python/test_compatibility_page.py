"""docs/compatibility.md says what results.json says, and that is what the code claims."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from lmcache_native.integration.vllm import compat  # imports no part of vLLM

COMPAT = Path(__file__).parents[1] / "compat"


def runner() -> Any:
    spec = importlib.util.spec_from_file_location("compat_run", COMPAT / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUN = runner()
RELEASES: dict[str, str] = json.loads(RUN.RELEASES.read_text(encoding="utf-8"))
RESULTS: dict[str, Any] = json.loads(RUN.RESULTS.read_text(encoding="utf-8"))


def test_the_page_is_made_from_the_results() -> None:
    assert RUN.PAGE.read_text(encoding="utf-8") == RUN.page(RESULTS)


def test_what_is_claimed_was_run() -> None:
    assert {release: result["expected"] for release, result in RESULTS.items()} == RELEASES
    usable = [RUN.newest(), *(release for release, expected in RELEASES.items() if expected == RUN.USABLE)]
    assert sorted(map(RUN.short, usable), key=RUN.numbers) == list(compat.TESTED_VERSIONS)


@pytest.mark.parametrize("release", list(RESULTS))
def test_every_run_passed(release: str) -> None:
    result = RESULTS[release]
    assert RUN.passed(result)
    assert set(RUN.SAME_ANSWER) <= set(result["tests"]) or result["expected"] != RUN.USABLE
    assert all(bool(missing) == (result["expected"] != RUN.USABLE) for missing in result["missing"].values())


def test_a_run_that_failed_or_ran_nothing_is_no_pass() -> None:
    assert not RUN.passed({"tests": {"a": {"passed": 3, "failed": 1, "skipped": 0}}})
    assert not RUN.passed({"tests": {"a": {"passed": 0, "failed": 0, "skipped": 5}}})
