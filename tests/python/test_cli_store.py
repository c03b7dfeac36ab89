"""`lmcache-native inspect`, `verify` and `clear` on real stores."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import lmcache_native as native
from lmcache_native.cli import main

pytestmark = pytest.mark.unit

MIB = 1 << 20
PAYLOAD_BYTES = 200_000
RED, BLUE = native.make_namespace("test=red\n"), native.make_namespace("test=blue\n")

HOLDER = """
import sys
import lmcache_native
store = lmcache_native.Store(host_bytes=16 << 20, directory=sys.argv[1], nvme_bytes=96 << 20, max_payload_bytes=1 << 20)
assert store.nvme_ready, store.nvme_warning
print("open", flush=True)
sys.stdin.read()
"""


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str | Path) -> Ran:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        found = capsys.readouterr()
        return Ran(code, found.out, found.err)

    return call


def payload(name: str) -> bytes:
    return (name.encode() * (PAYLOAD_BYTES // len(name) + 1))[:PAYLOAD_BYTES]


def open_store(path: Path) -> native.Store:
    return native.Store(host_bytes=16 * MIB, directory=path, nvme_bytes=96 * MIB, max_payload_bytes=MIB, fail_when_locked=True)


def fill(path: Path, red: int = 6, blue: int = 4) -> None:
    with open_store(path) as store:
        for i in range(red):
            assert store.put(f"red-{i}".encode(), payload(f"red-{i}"), namespace=RED)
        for i in range(blue):
            assert store.put(f"blue-{i}".encode(), payload(f"blue-{i}"), namespace=BLUE)
        store.flush()  # hits count from then on
        assert store.get(b"red-0", namespace=RED) is not None


def have(path: Path) -> tuple[int, int]:
    """How many red and blue chunks a new process of the store would find, each with its right bytes."""
    counts = []
    with open_store(path) as store:
        for colour, namespace in (("red", RED), ("blue", BLUE)):
            found = 0
            for i in range(6):
                data = store.get(f"{colour}-{i}".encode(), namespace=namespace)
                if data is not None:
                    assert data == payload(f"{colour}-{i}")
                    found += 1
            counts.append(found)
    return counts[0], counts[1]


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    path = tmp_path / "kv" / "vllm-dp0"
    fill(path)
    return path


def contents(path: Path) -> dict[str, tuple[int, bytes]]:
    return {entry.name: (entry.stat().st_mtime_ns, entry.read_bytes()) for entry in path.iterdir()}


def flip_payload_byte(path: Path, text: bytes) -> None:
    """Flips a byte in the first record whose payload has `text`."""
    data = (path / "data.000").read_bytes()
    at = data.index(text) + 50_000
    with (path / "data.000").open("r+b") as file:
        file.seek(at)
        file.write(bytes([data[at] ^ 1]))


@pytest.fixture
def holder(store_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the store open."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(store_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=60) == 0


# ---- inspect ------------------------------------------------------------------------------------------------------------


def test_inspect_json(run: Run, store_path: Path) -> None:
    before = contents(store_path)
    ran = run("inspect", store_path, "--namespaces", "--json")
    assert ran.code == 0, ran.err
    assert contents(store_path) == before, "inspect wrote something"
    (found,) = ran.json()["stores"]
    assert found["path"] == str(store_path)
    assert found["format_version"] == native.build_info()["format_version"]
    assert found["limit_bytes"] == 96 * MIB
    assert 0 < found["live_bytes"] < found["allocated_bytes"] <= 96 * MIB
    assert found["records"] == found["totals"]["records"] == 10
    assert found["totals"]["first_bytes"] == found["live_bytes"]
    assert found["write_amplification"] == 1.0
    assert {one["namespace"]: one["records"] for one in found["namespaces"]} == {RED.hex(): 6, BLUE.hex(): 4}
    assert sum(one["records"] for one in found["ages"]) == 10
    assert found["ages"][-1] == {"class": "unknown", "below_s": None, "records": 0, "bytes": 0}
    assert sum(one["records"] for one in found["hits"] if one["from"] >= 1) == 1, "red-0 was hit"
    assert sum(region["records"] for region in found["regions"]) == 10
    assert found["problems"] == []


def test_inspect_text_of_one(run: Run, store_path: Path) -> None:
    ran = run("inspect", store_path, "--namespaces", "--regions")
    assert ran.code == 0, ran.err
    assert "10 in 2.0 MiB" in ran.out
    assert "write amplification 1.00" in ran.out
    assert RED.hex() in ran.out
    assert "#" * 40 in ran.out
    assert "\x1b" not in ran.out
    assert max(len(line) for line in ran.out.splitlines()) < 140


def test_inspect_sums_a_folder(run: Run, store_path: Path) -> None:
    fill(store_path.parent / "vllm-dp1", red=2, blue=1)
    (store_path.parent / "not-a-store").mkdir()
    found = run("inspect", store_path.parent, "--json").json()
    assert [Path(one["path"]).name for one in found["stores"]] == ["vllm-dp0", "vllm-dp1"]
    assert found["total"]["records"] == 13
    assert found["total"]["limit_bytes"] == 192 * MIB
    text = run("inspect", store_path.parent).out
    assert text.splitlines()[-1].split()[:2] == ["sum", "13"]


def test_inspect_says_that_the_checkpoint_is_bad(run: Run, store_path: Path) -> None:
    with (store_path / "index.ckpt").open("r+b") as file:
        file.seek(4200)
        file.write(b"\xff")
    ran = run("inspect", store_path, "--json")
    assert ran.code == 1
    (found,) = ran.json()["stores"]
    assert "checksum" in found["problems"][0]
    assert found["records"] == 10, "found by reading the log"


# ---- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "verify", "clear"])
def test_a_store_in_use_is_refused(run: Run, store_path: Path, holder: subprocess.Popen[str], command: str) -> None:
    ran = run(command, store_path)
    assert ran.code == 2
    assert ran.out == ""
    assert f"in use by pid {holder.pid}" in ran.err
    as_json = run(command, store_path, "--json")
    assert as_json.code == 2
    assert as_json.json()["error"]["code"] == "locked"
    folder = run(command, store_path.parent, "--json")
    assert folder.code == 2


def test_after_the_refusals_all_is_there(run: Run, store_path: Path) -> None:
    with open_store(store_path):
        assert run("clear", store_path).code == 2
    assert have(store_path) == (6, 4)


@pytest.mark.parametrize("command", ["inspect", "verify", "clear"])
def test_what_is_no_store_is_refused(run: Run, store_path: Path, tmp_path: Path, command: str) -> None:
    def refused(path: Path | str, *words: str) -> None:
        ran = run(command, path)
        assert (ran.code, ran.out) == (2, "")
        for word in words:
            assert word in ran.err

    link = tmp_path / "link"
    link.symlink_to(store_path)
    refused(link, "symbolic link")
    refused(f"{link}/", "symbolic link")
    refused(tmp_path, "symbolic link")
    link.unlink()
    refused(tmp_path / "absent", "no such directory")
    refused(tmp_path, "holds no store")
    assert not (tmp_path / "absent").exists()
    (tmp_path / "file").write_bytes(b"")
    refused(tmp_path / "file", "not a directory")

    before = contents(store_path)
    superblock = store_path / "superblock"
    whole = superblock.read_bytes()
    superblock.write_bytes(whole[:8] + b"\x63" + whole[9:])
    refused(store_path, "format version 99", "Use the lmcache-native that wrote it")
    superblock.write_bytes(whole[:-1])
    refused(store_path, "superblock")
    superblock.write_bytes(whole)
    store_path.chmod(0o755)
    refused(store_path, "0700")
    store_path.chmod(0o700)
    assert {name: data for name, (_, data) in contents(store_path).items()} == {name: data for name, (_, data) in before.items()}
    if os.geteuid() == 0:
        os.chown(store_path, 12345, 12345)
        refused(store_path, "belongs to uid 12345")
        os.chown(store_path, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--older-than", "7"], "write a number and s, m, h, d or w"),
        (["--older-than", "-1d"], "expected one argument"),
        (["--namespace", "abc"], "64 hexadecimal digits"),
        (["--older-than", "1d", "--namespace", "0" * 64], "not allowed with"),
    ],
)
def test_wrong_usage(run: Run, store_path: Path, arguments: list[str], word: str) -> None:
    ran = run("clear", store_path, *arguments)
    assert ran.code == 2
    assert word in ran.err
    assert have(store_path) == (6, 4)


@pytest.mark.parametrize("command", ["inspect", "verify", "clear"])
def test_help_has_the_exit_codes(run: Run, command: str) -> None:
    ran = run(command, "--help")
    assert ran.code == 0
    assert "exit codes: 0 done and well, 1 problems found, 2" in ran.out


# ---- verify -------------------------------------------------------------------------------------------------------------


def test_verify_of_a_good_store(run: Run, store_path: Path) -> None:
    before = contents(store_path)
    ran = run("verify", store_path)
    assert ran.code == 0
    assert "10 of 10 chunks hold" in ran.out
    assert "100 %" in ran.err
    assert contents(store_path) == before, "verify wrote something"


def test_verify_names_the_record_with_a_flipped_byte(run: Run, store_path: Path) -> None:
    flip_payload_byte(store_path, b"blue-2blue-2")
    key = native.KeyDeriver(BLUE).derive(b"blue-2").hex()
    ran = run("verify", store_path, "--json")
    assert ran.code == 1
    (report,) = ran.json()["stores"]
    (bad,) = report["bad"]
    assert (bad["key"], bad["check"]) == (key, "payload")
    assert report["verified"]["records"] == 9
    assert {one["namespace"]: one["records"] for one in report["namespaces"]} == {RED.hex(): 6, BLUE.hex(): 3}
    text = run("verify", store_path)
    assert text.code == 1
    assert key in text.out
    assert have(store_path) == (6, 3), "a load finds the same"


def test_ctrl_c_ends_verify(store_path: Path) -> None:
    program = """
import os, signal, sys
from lmcache_native import _native
from lmcache_native.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
verify = _native.verify_store
def interrupted(path, progress):
    os.kill(os.getpid(), signal.SIGINT)
    return verify(path, progress)
_native.verify_store = interrupted
sys.exit(main(["verify", sys.argv[1]]))
"""
    done = subprocess.run([sys.executable, "-c", program, str(store_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode in (130, -signal.SIGINT), done.stderr
    assert "interrupted; nothing was changed" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_progress_raises_ends_verify(store_path: Path) -> None:
    def stop(*_: int) -> None:
        raise ZeroDivisionError("enough")

    with pytest.raises(ZeroDivisionError, match="enough"):
        native._native.verify_store(str(store_path), stop)
    assert have(store_path) == (6, 4), "the lock was let go"


# ---- clear --------------------------------------------------------------------------------------------------------------


def test_clear_all(run: Run, store_path: Path) -> None:
    taken = run("inspect", store_path, "--json").json()["stores"][0]["allocated_bytes"]
    ran = run("clear", store_path, "--json")
    assert ran.code == 0
    (report,) = ran.json()["stores"]
    assert report["records"] == 10
    assert report["freed_bytes"] > taken // 2
    assert have(store_path) == (0, 0)
    fill(store_path)
    assert have(store_path) == (6, 4)


@pytest.mark.parametrize("lost", [False, True])
def test_clear_a_namespace(run: Run, store_path: Path, lost: bool) -> None:
    ran = run("clear", store_path, "--namespace", RED.hex())
    assert ran.code == 0
    assert "6 chunks" in ran.out
    if lost:
        (store_path / "index.ckpt").unlink()
    found = run("inspect", store_path, "--namespaces", "--json").json()["stores"][0]
    assert [one["namespace"] for one in found["namespaces"]] == [BLUE.hex()]
    assert run("verify", store_path).code == 0
    assert have(store_path) == (0, 4)
    fill(store_path)
    assert have(store_path) == (6, 4)


def test_clear_by_age(run: Run, store_path: Path) -> None:
    assert "0 chunks" in run("clear", store_path, "--older-than", "1h").out
    assert have(store_path) == (6, 4)
    assert "10 chunks" in run("clear", store_path, "--older-than", "0s").out
    (store_path / "index.ckpt").unlink(missing_ok=True)
    assert have(store_path) == (0, 0)
