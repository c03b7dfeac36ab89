"""`lmcache-native`: odd paths, ages, readers and interruptions."""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from lmcache_native import _native
from lmcache_native.cli import main
from lmcache_native.cli.stores import find_stores, parse_age
from lmcache_native.errors import InvalidArgument, NotFound

pytestmark = pytest.mark.unit

CLEARED = {
    "records": 1,
    "bytes": 4096,
    "regions_dropped": 0,
    "regions_of_unknown_age": 0,
    "unreadable_headers": 0,
    "unreadable_regions": 0,
    "read_errors": 0,
    "freed_bytes": 0,
}


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    path = tmp_path / "kv"
    path.mkdir()
    (path / "superblock").touch()
    return path


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="PATH is empty"):
        find_stores("")


def test_a_directory_that_may_not_be_looked_into_may_be_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shut = tmp_path / "shut"
    shut.mkdir()
    stat = os.stat

    def refuse(path: Any, *args: Any, **more: Any) -> os.stat_result:
        if Path(path).parent == shut:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **more)

    monkeypatch.setattr(os, "stat", refuse)
    assert find_stores(str(tmp_path)) == [str(shut)]


def test_a_lock_alone_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "apt").mkdir()
    (tmp_path / "apt" / "LOCK").touch()
    with pytest.raises(NotFound):
        find_stores(str(tmp_path))


@pytest.mark.parametrize("text", ["9" * 400 + "s", f"{2**64}s", "99999999999999999999w"])
def test_an_age_beyond_all_is_wrong_usage(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="longest age"):
        parse_age(text)


class _Shut(io.StringIO):
    def flush(self) -> None:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_reader_that_left_does_not_hide_bad_records(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {"key": "0" * 64, "region": 0, "page": 1, "pages": 2, "check": "payload", "detail": "x"}
    tally = {"records": 1, "bytes": 8192}
    report = {"total": tally, "verified": tally, "bad": [bad], "notes": [], "namespaces": []}
    monkeypatch.setattr(_native, "verify_store", lambda *_: dict(report))
    for arguments in ([], ["--json"]):
        monkeypatch.setattr(sys, "stdout", _Shut())
        assert main(["verify", str(store_path), *arguments]) == 1


@pytest.mark.parametrize("field", ["unreadable_regions", "read_errors"])
def test_a_clear_that_could_not_read_all_is_a_problem(
    store_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], field: str
) -> None:
    monkeypatch.setattr(_native, "clear_store", lambda *_, **__: dict(CLEARED))
    assert main(["clear", str(store_path), "--older-than", "1h"]) == 0
    assert "PROBLEM" not in capsys.readouterr().out
    monkeypatch.setattr(_native, "clear_store", lambda *_, **__: {**CLEARED, field: 1})
    assert main(["clear", str(store_path), "--older-than", "1h"]) == 1
    assert "PROBLEM" in capsys.readouterr().out


@pytest.mark.parametrize(("command", "called"), [("inspect", "inspect_store"), ("clear", "clear_store")])
def test_ctrl_c_is_no_traceback(
    store_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, called: str
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_native, called, interrupted)
    assert main([command, str(store_path)]) == 130
    assert "interrupted" in capsys.readouterr().err
