"""A store with its workers inside what containers impose (tests/env/confined.py), and two containers that share a directory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache_native.config import memory_limit_bytes

CONFINED = Path(__file__).resolve().parent.parent / "env" / "confined.py"
MIB = 1 << 20
UID = 54321

# More than /dev/shm holds goes through host memory; a worker in a process of its own reads and writes it.
STORE = """
import json, os, pwd, resource, subprocess, sys
import lmcache_native as n
MIB = 1 << 20
folder = sys.argv[1]
try:
    pwd.getpwuid(os.getuid()); named = True
except KeyError:
    named = False
def used(path):
    found = os.statvfs(path)
    return (found.f_blocks - found.f_bfree) * found.f_frsize
before = used('/dev/shm')
options = dict(host_bytes=128 * MIB, directory=folder + '/kv', nvme_bytes=512 * MIB, max_payload_bytes=4 * MIB,
               nvme_free_floor_bytes=0, nvme_daily_bytes=2**64 - 1, admission='always')
store = n.Store(**options)
ns = n.make_namespace('a=1\\n')
payload = [bytes([i]) * (3 * MIB) for i in range(36)]
for i, content in enumerate(payload):
    assert store.put(b'%d' % i, content, namespace=ns)
shm = used('/dev/shm') - before
store.flush(60)
store.serve('container', 4096)
worker = subprocess.run([sys.executable, '-c', '''
import sys
import lmcache_native as n
at = n.ArenaAttachment.attach(engine_id='container', rank=0, rank_bytes=4096, timeout_s=30.0)
print(at.bytes)
'''], capture_output=True, text=True, check=True)
sockets = sorted(os.listdir('/tmp/lmcache-native-%d' % os.getuid()))
note, ready = store.io_engine_note, store.nvme_ready
store.close()
again = n.Store(**options)
assert again.stats()['recovered_chunks'] == len(payload), again.stats()
for i, content in enumerate(payload):
    assert again.get(b'%d' % i, namespace=ns, timeout_s=30.0) == content
again.close()
print(json.dumps(dict(
    uid=os.getuid(), named=named, home='HOME' in os.environ, root_writable=os.access('/', os.W_OK),
    run_user=os.path.exists('/run/user'),
    shm_size=os.statvfs('/dev/shm').f_blocks * os.statvfs('/dev/shm').f_frsize, shm=shm, ready=ready, note=note,
    sockets=sockets, memlock=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], attached=int(worker.stdout))))
"""


def _confined(folder: Path, *more: str) -> list[str]:
    return [sys.executable, str(CONFINED), "--writable", str(folder), *more, "--"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not below pytest's folders, which are private."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make what a container has")
    made = Path(tempfile.mkdtemp(prefix="lmcn-container-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)
    shutil.rmtree(f"/tmp/lmcache-native-{UID}", ignore_errors=True)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "LMCN_RUNTIME_DIR"}


def _ran(command: list[str]) -> dict[str, Any]:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=_environment())
    if ran.returncode == 77:
        pytest.skip(ran.stderr)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


@pytest.mark.parametrize("refused", ["", "EPERM", "ENOSYS"])
def test_a_store_and_its_worker(folder: Path, refused: str) -> None:
    found = _ran([*_confined(folder, "--io-uring", refused), sys.executable, "-c", STORE, str(folder)])
    assert (found["uid"], found["named"], found["home"]) == (UID, False, False)
    assert (found["root_writable"], found["run_user"]) == (False, False)
    assert (found["shm_size"], found["memlock"]) == (64 * MIB, 8 * MIB)
    assert found["shm"] == 0, "host memory is a memfd: the size of /dev/shm is no limit"
    assert found["attached"] >= 128 * MIB
    assert found["sockets"] == ["container.sock"]
    assert found["ready"]
    if refused:
        assert found["note"].startswith("threads"), found["note"]
        assert "io_uring" in found["note"]


OPEN = """
import json, os, pathlib, sys, time
import lmcache_native as n
store = n.Store(host_bytes=16 << 20, directory=sys.argv[1] + '/kv', nvme_bytes=96 << 20, max_payload_bytes=1 << 20,
                lock_wait_s=0.0)
"""

HOLD = (
    OPEN
    + """
assert store.nvme_ready
store.put(b'k', b'v' * 1000)
store.flush(30)
print('held', flush=True)
sys.stdin.readline()
store.put(b'last', b'w' * 1000)
store.close()
"""
)

WAIT = (
    OPEN
    + """
boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text()
waiting, warning = store.stats()['nvme_waiting'], store.nvme_warning
print(json.dumps([os.getpid(), boot, store.nvme_ready, waiting, warning, store.get(b'k') is None]), flush=True)
sys.stdin.readline()
while store.stats()['nvme_waiting']:
    time.sleep(0.01)
found = store.get(b'k', timeout_s=30.0), store.get(b'last', timeout_s=30.0)
print(json.dumps([store.nvme_ready, store.nvme_warning, found == (b'v' * 1000, b'w' * 1000)]))
store.close()
"""
)


@contextlib.contextmanager
def _container(folder: Path, script: str) -> Iterator[subprocess.Popen[str]]:
    """With processes, network, host name and IPC of its own."""
    own = ["unshare", "--pid", "--fork", "--kill-child", "--net", "--ipc", "--uts", "--mount-proc"]
    command = [*own, *_confined(folder), sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment()
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        _, errors = process.communicate(timeout=60)
        if process.returncode in (1, 77) and "Operation not permitted" in errors:
            pytest.skip(errors)
        raise AssertionError(errors)
    return line


def _go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_two_containers_share_a_directory(folder: Path) -> None:
    with _container(folder, HOLD) as old:
        assert _line(old) == "held\n"
        with _container(folder, WAIT) as new:
            pid, boot, ready, waiting, warning, missed = json.loads(_line(new))
            assert pid < 10, "a pid namespace of its own"
            assert boot == Path("/proc/sys/kernel/random/boot_id").read_text(), "one machine"
            assert (ready, waiting, missed) == (False, 1, True)
            assert "in use by" in warning
            _go_on(old)
            assert old.wait(60) == 0
            _go_on(new)
            assert json.loads(_line(new)) == [True, "", True]
            assert new.wait(60) == 0


@contextlib.contextmanager
def _memory_group(limit_bytes: int) -> Iterator[Path]:
    """A control group below this process' own. Skips where none can be made."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top = Path("/sys/fs/cgroup") / ("memory" if controllers else "")
            group = Path(f"{top}{path}") / f"lmcn-test-{os.getpid()}"
            limit = group / ("memory.limit_in_bytes" if controllers else "memory.max")
            try:
                group.mkdir()
            except OSError:
                continue
            try:
                limit.write_text(str(limit_bytes))
                yield group
                return
            except OSError:
                continue
            finally:
                group.rmdir()
    pytest.skip("no control group for memory can be made here")


def test_a_host_size_beyond_the_containers_memory_is_refused() -> None:
    script = (
        "from lmcache_native.config import NativeConfig, check_machine, memory_limit_bytes\n"
        "try:\n"
        "    check_machine(NativeConfig(host_bytes=300 << 20))\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
        "check_machine(NativeConfig(host_bytes=200 << 20))\n"
    )
    assert memory_limit_bytes() > 256 * MIB
    with _memory_group(256 * MIB) as group:
        join = ["sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "sh"]
        ran = subprocess.run([*join, sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("InvalidArgument host size 0.29 GiB"), ran.stdout
    assert "may use 0.25 GiB of memory" in ran.stdout
