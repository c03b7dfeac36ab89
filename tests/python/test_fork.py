"""A process that owns a store forks: its child exits like any other, and keeps nothing when the parent is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lmcache_native as native
from conftest import StoreMaker

OPEN = """
import multiprocessing, os, signal, sys, time
import lmcache_native as n
store = n.Store(host_bytes=16 << 20, directory=sys.argv[1], nvme_bytes=96 << 20, max_payload_bytes=1 << 20, lock_wait_s=0.0,
                fail_when_locked=True)
ns = n.make_namespace('a=1\\n')
store.put(b'k', b'v' * 1000, namespace=ns)
store.serve('engine', 1 << 10)
key = n.KeyDeriver(ns).derive(b'k')
read = store.acquire(ns, [key])
view = read.payload(0)
write = store.reserve_engine_keys(ns, [b'other'], 100)
request = store.begin_request(ns)
request.lookup(b'k')
"""


def run(script: str, directory: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", OPEN + script, str(directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "LMCN_RUNTIME_DIR": str(tmp_path / "run")}


CHILDREN = {
    "sys.exit": "pid = os.fork()\nif pid == 0:\n    sys.exit(7)\nassert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7\n",
    "dropped one by one": (
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    write.commit(); request.end(); read.release(); del view, read, write, request\n"
        "    store.close(); del store\n"
        "    sys.exit(7)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7\n"
    ),
    "multiprocessing": (
        "child = multiprocessing.get_context('fork').Process(target=sys.exit, args=(7,))\n"
        "child.start(); child.join()\n"
        "assert child.exitcode == 7\n"
    ),
    "preexec_fn": (
        "import subprocess\n"
        "command = [sys.executable, '-c', 'import sys; sys.exit(7)']\n"
        "assert subprocess.run(command, preexec_fn=os.getpid).returncode == 7\n"
    ),
}


@pytest.mark.parametrize("how", CHILDREN)
def test_a_child_exits_and_the_parent_goes_on(tmp_path: Path, environment: dict[str, str], how: str) -> None:
    after = (
        "signal.alarm(0)\n"
        "request.end(); write.abort(); read.release()\n"
        "assert os.path.exists(os.environ['LMCN_RUNTIME_DIR'] + '/engine.sock')\n"
        "store.put(b'l', b'w' * 1000, namespace=ns); store.flush(20)\n"
        "assert store.get(b'k', namespace=ns) == b'v' * 1000 and store.get(b'l', namespace=ns) == b'w' * 1000\n"
        "try:\n"
        "    n.Store(host_bytes=16 << 20, directory=sys.argv[1], nvme_bytes=96 << 20, lock_wait_s=0.0, fail_when_locked=True)\n"
        "except n.Locked:\n"
        "    print('locked')\n"
    )
    ran = run(f"signal.alarm(90)\n{CHILDREN[how]}{after}", tmp_path / "nvme", environment)
    assert (ran.returncode, ran.stdout) == (0, "locked\n"), ran.stderr


def test_a_child_refuses_to_use_the_store(tmp_path: Path, environment: dict[str, str]) -> None:
    script = (
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    signal.alarm(60)\n"
        "    try:\n"
        "        store.put(b'm', b'x', namespace=ns)\n"
        "    except n.Unavailable as error:\n"
        "        assert 'parent process' in str(error)\n"
        "        assert store.lookup([key]) == (0, 0, 0) and 'parent process' in store.nvme_warning\n"
        "        sys.exit(7)\n"
        "    sys.exit(1)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7\n"
    )
    ran = run(script, tmp_path / "nvme", environment)
    assert ran.returncode == 0, ran.stderr


def test_a_child_that_outlives_its_killed_parent_keeps_nothing(
    make_store: StoreMaker, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCN_RUNTIME_DIR", environment["LMCN_RUNTIME_DIR"])
    script = (
        "store.flush(20)\n"
        "if os.fork() == 0:\n"
        "    print('child', os.getpid(), flush=True)\n"  # told by itself: it has let go of what it must not keep
        "    sys.stdin.read()\n"
        "    sys.exit(0)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", OPEN + script, str(tmp_path / "nvme")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        assert parent.stdin is not None
        child = int(parent.stdout.readline().split()[1])
        parent.send_signal(signal.SIGKILL)
        parent.wait(timeout=60)
        os.kill(child, 0)
        options: dict[str, Any] = {"directory": tmp_path / "nvme", "nvme_bytes": 96 << 20, "max_payload_bytes": 1 << 20}
        store = make_store(**options, lock_wait_s=0.0, fail_when_locked=True)
        assert store.nvme_ready
        store.serve("engine", 1 << 10)
        assert store.get(b"k", namespace=native.make_namespace("a=1\n")) == b"v" * 1000
        parent.stdin.close()
        assert parent.stdout.read() == ""  # the child has ended
