"""The wall clock may jump, so it decides nothing. One function reads it, for ages that people are shown and for how long ago the
last process noted its writes of the day (write_window_test.cpp: a clock set backwards forgets nothing)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
NATIVE = re.compile(
    r"system_clock|utc_clock|file_clock|CLOCK_REALTIME|CLOCK_TAI|gettimeofday|\btime\((nullptr|NULL|0)\)|timed_mutex"
)
PYTHON = re.compile(r"time\.time\b|time\.time_ns\b|from time import .*\btime\b|datetime|time\.localtime|time\.gmtime")


def readers(folders: tuple[str, ...], suffixes: tuple[str, ...], pattern: re.Pattern[str]) -> tuple[int, list[str]]:
    files = [file for folder in folders for file in (ROOT / folder).rglob("*") if file.suffix in suffixes]
    lines = [(file, line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return len(files), [f"{file.relative_to(ROOT)}: {line.strip()}" for file, line in lines if pattern.search(line)]


def test_no_native_source_reads_it() -> None:
    files, found = readers(("cpp", "cuda", "bindings"), (".cpp", ".hpp", ".cu", ".cuh"), NATIVE)
    assert files > 50
    assert [line.split(":")[0] for line in found] == ["cpp/src/nvme/format.cpp"]


def test_no_python_source_reads_it() -> None:
    files, found = readers(("python/lmcache_native",), (".py",), PYTHON)
    assert files > 20
    assert found == []


@pytest.mark.parametrize("line", ["std::chrono::system_clock::now()", "clock_gettime(CLOCK_REALTIME, &t)", "::time(nullptr)"])
def test_the_pattern_sees_what_would_be_wrong(line: str) -> None:
    assert NATIVE.search(line)
