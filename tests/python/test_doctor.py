"""`lmcache-native doctor`: on this machine as it is, and on others shown by files of their kernels."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import lmcache_native as native
from lmcache_native import gds
from lmcache_native.cli import doctor, machine_facts, main
from lmcache_native.cli.machine_facts import Fact, Roots
from lmcache_native.config import Profile

pytestmark = pytest.mark.unit

WITH_CUDA = bool(native.build_info()["cuda"])


@pytest.fixture(autouse=True)
def _no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("LMCACHE_", "LMCN_")):
            monkeypatch.delenv(name)


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    """A machine of which the kernel shows nothing."""
    made = Roots(proc=tmp_path / "proc", sys=tmp_path / "sys", boot=tmp_path / "boot", dev=tmp_path / "dev")
    for place in (made.proc, made.sys, made.boot, made.dev):
        place.mkdir()
    return made


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def one(facts: list[Fact], name: str) -> Fact:
    (found,) = [fact for fact in facts if fact.name == name]
    return found


# ---- the command --------------------------------------------------------------------------------------------------------


def test_here_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json", "--path", str(tmp_path)])
    told = json.loads(capsys.readouterr().out)
    assert told["version"] == native.__version__
    assert code == (1 if told["changes"] else 0)
    assert told["changes"] == [fact for fact in told["facts"] if fact["change"]]
    assert not [fact for fact in told["facts"] if fact["found"] in ("failed", "no answer")]
    names = {fact["name"] for fact in told["facts"]}
    assert names >= {
        "driver", "devices", "CUDA of the build", "kvikio", "cuFile", "storage to GPU", "direct loads", "file system",
        "O_DIRECT", "io_uring", "huge pages of shared memory", "reserved huge pages", "locked memory limit", "NUMA nodes",
        "/dev/shm", "cgroup limit", "vllm", "sglang", "lmcache", "max_local_cpu_size",
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_here_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--path", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert f"path {tmp_path}" in lines
    assert ("nothing to change" in lines) == (code == 0)
    assert ("to change" in lines) == (code == 1)
    marked = [line for line in lines[: lines.index("to change" if code else "nothing to change")] if line.startswith("! ")]
    assert bool(marked) == (code == 1)


def test_a_wrong_configuration_is_something_to_change(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_MAX_LOCAL_CPU_SIZE", "plenty")
    assert main(["doctor", "--json"]) == 1
    changes = json.loads(capsys.readouterr().out)["changes"]
    assert any("plenty" in change["change"] for change in changes)


def test_the_configured_paths_are_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCACHE_LOCAL_DISK", str(tmp_path / "store"))
    monkeypatch.setenv("LMCACHE_MAX_LOCAL_DISK_SIZE", "1")
    monkeypatch.setenv("LMCACHE_MAX_LOCAL_CPU_SIZE", "0.25")
    main(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)["facts"]
    assert [fact for fact in facts if fact["area"] == f"path {tmp_path / 'store'}" and fact["name"] == "O_DIRECT"]
    (size,) = [fact for fact in facts if fact["name"] == "max_local_cpu_size"]
    assert (size["found"], "environment" in size["used"].lower()) == ("0.25", True)


def test_imports_no_engine_and_ends_while_a_question_hangs() -> None:
    program = """
import sys, threading
from lmcache_native.cli import doctor
hangs = [("a", "hangs", threading.Event().wait)]
facts = doctor.ask([*hangs, *doctor.probes(doctor.Roots(), [], None)], 10.0)
assert facts[0].found == "no answer" and facts[0].change, facts[0]
assert len(facts) > 12
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "vllm", "sglang", "lmcache", "numpy", "kvikio"}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_a_configuration_file_that_hangs_is_no_answer_and_the_others_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody_writes = tmp_path / "config.json"
    os.mkfifo(nobody_writes)
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(nobody_writes))
    program = f"""
import sys
from lmcache_native.cli import doctor, main
doctor.TIMEOUT_S = 2.0
sys.exit(main(["doctor", "--json", "--path", {str(tmp_path)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    facts = json.loads(done.stdout)["facts"]
    (configuration,) = [fact for fact in facts if fact["area"] == "configuration"]
    assert configuration["found"] == "no answer"
    assert {fact["area"] for fact in facts} >= {"gpu", f"path {tmp_path}", "io", "memory", "engines"}


def test_each_question_fails_alone() -> None:
    def raises() -> list[Fact]:
        raise RuntimeError("the device is on fire")

    released = threading.Event()
    hangs: Callable[[], list[Fact]] = lambda: [Fact("c", "late", str(released.wait()))]  # noqa: E731
    well = [Fact("b", "well", "so it is")]
    try:
        facts = doctor.ask([("a", "fire", raises), ("b", "well", lambda: well), ("c", "late", hangs)], 0.2)
    finally:
        released.set()
    assert facts[0].found == "failed"
    assert "the device is on fire" in facts[0].change
    assert facts[1:2] == well
    assert facts[2].found == "no answer"
    assert "0.2 s" in facts[2].change


# ---- GPU ----------------------------------------------------------------------------------------------------------------


def test_no_driver_is_nothing_to_change(roots: Roots) -> None:
    fact = one(machine_facts.gpu_driver(roots), "driver")
    if native.cuda_status()["devices"] == 0:
        assert (fact.found, fact.change) == ("not found", "")


@pytest.mark.skipif(native.cuda_status()["devices"] != 0, reason="a GPU is here")
def test_a_driver_that_gives_no_device(roots: Roots) -> None:
    put(
        roots.proc / "driver/nvidia/version",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\nGCC version: gcc version 12\n",
    )
    fact = one(machine_facts.gpu_driver(roots), "driver")
    assert fact.found == "NVIDIA 580.159.04"
    assert ("CUDA finds no device" if WITH_CUDA else "LMCN_CUDA=ON") in fact.change


def test_devices_by_name(roots: Roots) -> None:
    put(roots.proc / "driver/nvidia/gpus/0000:01:00.0/information", "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 3\n")
    assert one(machine_facts.gpu_devices(roots), "devices").found == "1: NVIDIA H100 80GB HBM3"


def test_the_way_from_storage_to_the_gpu(roots: Roots) -> None:
    def way() -> Fact:
        return one(machine_facts.gpu_direct_storage(roots, {}), "storage to GPU")

    assert (way().found, "CONFIG_PCI_P2PDMA unknown" in way().used) == ("compat", True)
    put(roots.proc / "sys/kernel/osrelease", "6.8.0-gds\n")
    put(roots.boot / "config-6.8.0-gds", "# CONFIG_PCI_P2PDMA is not set\n")
    assert (way().found, "no CONFIG_PCI_P2PDMA" in way().used) == ("compat", True)
    put(roots.boot / "config-6.8.0-gds", "CONFIG_PCI=y\nCONFIG_PCI_P2PDMA=y\n")
    assert way().found == "compat"  # the driver's half is missing
    put(roots.proc / "driver/nvidia/params", 'RegistryDwords: "RMForceStaticBar1=1;ForceP2P=0"\n')
    assert way().found == "P2PDMA"
    (roots.boot / "config-6.8.0-gds").unlink()
    (roots.proc / "config.gz").write_bytes(gzip.compress(b"CONFIG_PCI_P2PDMA=y\n"))
    assert way().found == "P2PDMA"
    put(roots.proc / "driver/nvidia-fs/version", "version: 2.24\n")
    assert (way().found, way().used) == ("nvidia-fs", "version: 2.24")


def test_cufile_where_the_loader_is_told_to_look(roots: Roots, tmp_path: Path) -> None:
    put(tmp_path / "lib/libcufile.so.0", "")
    facts = machine_facts.gpu_direct_storage(roots, {"LD_LIBRARY_PATH": str(tmp_path / "lib")})
    assert one(facts, "cuFile").found == str(tmp_path / "lib/libcufile.so.0")


def direct(profile: Profile = Profile.LMCACHE, **keys: str) -> Fact:
    given = {f"LMCACHE_{key.upper()}": value for key, value in keys.items()}
    _facts, found = machine_facts.configuration(given, profile)
    assert found is not None
    return one(machine_facts.direct_loads(found.config, profile), "direct loads")


def test_why_there_are_no_direct_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = {"local_disk": str(tmp_path), "max_local_disk_size": "1"}
    assert (direct().found, direct().used) == ("off", "no path on NVMe (local_disk)")
    assert direct(**disk, use_gds="off").used == "use_gds=off"
    assert "use_layerwise" in direct(**disk, use_layerwise="true").used
    assert "this connector" in direct(Profile.OFFLOADING, max_local_cpu_size="1").used
    monkeypatch.setattr(native, "cuda_status", lambda: {"devices": 0})
    assert (direct(**disk).used, direct(**disk).change) == ("no CUDA device", "")
    assert "no engine starts here: no CUDA device" in direct(**disk, use_gds="on").change

    monkeypatch.setattr(native, "cuda_status", lambda: {"devices": 1})
    monkeypatch.setattr(gds, "PLUGIN", "no-such-plugin.so")
    assert "no-such-plugin.so is not there" in direct(**disk).used
    monkeypatch.setattr(gds, "load_plugin", lambda: "plugin")
    assert (direct(**disk).found, direct(**disk).change) == ("possible", "")


# ---- storage ------------------------------------------------------------------------------------------------------------


def mounts(roots: Roots, *lines: tuple[str, str, str]) -> None:
    put(
        roots.proc / "self/mountinfo",
        "".join(f"{30 + i} 1 8:{i} / {place} rw - {kind} {source} rw\n" for i, (place, kind, source) in enumerate(lines)),
    )


def test_the_mount_of_a_path(roots: Roots, tmp_path: Path) -> None:
    place = tmp_path / "with space"
    place.mkdir()
    mounts(
        roots,
        ("/", "ext4", "/dev/vda"),
        (str(place).replace(" ", "\\040"), "nfs4", "host:/export"),
        (str(place).replace(" ", "\\040"), "xfs", "/dev/nvme0n1"),
        (str(tmp_path / "with"), "9p", "share"),
    )
    assert machine_facts.file_system(place, roots) == ("xfs", "/dev/nvme0n1")  # the last mount hides the one before
    assert machine_facts.file_system(tmp_path, roots) == ("ext4", "/dev/vda")
    assert machine_facts.file_system(tmp_path, Roots(proc=tmp_path / "none")) == ("unknown", "?")


@pytest.mark.parametrize(("kind", "allowed", "expected"), [("nfs4", False, True), ("nfs4", True, False), ("ext4", False, False)])
def test_a_network_file_system(roots: Roots, tmp_path: Path, kind: str, allowed: bool, expected: bool) -> None:
    mounts(roots, ("/", kind, "somewhere"))
    fact = one(machine_facts.store_path(tmp_path, roots, allowed), "file system")
    assert ("local_disk_allow_network" in fact.change) == expected
    assert fact.used == ("network file system" if kind == "nfs4" else "local")


def test_o_direct_is_tried_and_leaves_nothing(tmp_path: Path) -> None:
    fact = one(machine_facts.store_path(tmp_path, Roots(), False), "O_DIRECT")
    assert fact.found in ("works", "refused")
    assert bool(fact.change) == (fact.found == "refused")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_not_there_yet_is_not_made(tmp_path: Path) -> None:
    fact = one(machine_facts.store_path(tmp_path / "a/b", Roots(), False), "file system")
    assert f"(of {tmp_path}; the rest would be made)" in fact.found
    assert list(tmp_path.iterdir()) == []


def test_memory_is_no_place_for_a_store() -> None:
    shm = Path("/dev/shm")
    if machine_facts.file_system(shm, Roots())[0] != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs here")
    assert "tmpfs is memory" in one(machine_facts.store_path(shm, Roots(), False), "file system").change


def test_a_file_system_that_refuses_o_direct() -> None:
    fact = machine_facts._direct("path /proc", Path("/proc"))
    assert fact.found.startswith("not tried")
    assert "a file cannot be made in /proc" in fact.change


# ---- I/O and memory -----------------------------------------------------------------------------------------------------


def test_io_uring(roots: Roots, monkeypatch: pytest.MonkeyPatch) -> None:
    here = one(machine_facts.io_uring(Roots()), "io_uring")
    assert here.used.startswith(("io_uring (", "threads ("))
    assert bool(here.change) == here.used.startswith("threads (")
    refused = "threads (4): no io_uring here: io_uring_setup: Operation not permitted (1)"
    put(roots.proc / "sys/kernel/io_uring_disabled", "2\n")
    fact = one(machine_facts.io_uring(roots, refused), "io_uring")
    assert (fact.found, fact.change) == ("disabled", "sysctl kernel.io_uring_disabled=0")
    put(roots.proc / "sys/kernel/io_uring_disabled", "0\n")
    assert "seccomp" in one(machine_facts.io_uring(roots, refused), "io_uring").change
    monkeypatch.setenv("LMCN_IO_ENGINE", "threads")  # as asked: nothing to change
    asked = one(machine_facts.io_uring(roots), "io_uring")
    assert (asked.used, asked.change) == ("threads (4): LMCN_IO_ENGINE=threads", "")


def test_huge_pages(roots: Roots) -> None:
    put(roots.sys / "kernel/mm/transparent_hugepage/shmem_enabled", "always within_size [advise] never deny force\n")
    put(roots.sys / "kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "128\n")
    put(roots.sys / "kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "96\n")
    facts = machine_facts.huge_pages(roots)
    shared = one(facts, "huge pages of shared memory")
    assert shared.found == "advise"
    assert bool(shared.change) == shared.used.startswith("0 B ")
    assert one(facts, "reserved huge pages").found == "128 of 2 MiB, 96 free"


def test_numa_nodes(roots: Roots) -> None:
    assert one(machine_facts.numa_nodes(roots), "NUMA nodes").found == "not found"
    for node, mib in ((10, 3072), (2, 2048)):
        put(roots.sys / f"devices/system/node/node{node}/meminfo", f"Node {node} MemTotal:  {mib * 1024} kB\n")
    assert one(machine_facts.numa_nodes(roots), "NUMA nodes").found == "2 (2: 2.0 GiB, 10: 3.0 GiB)"


def test_the_tightest_cgroup_limit(roots: Roots) -> None:
    assert one(machine_facts.cgroup_limit(roots), "cgroup limit").found == "none"
    put(roots.proc / "self/cgroup", "4:cpu,memory:/v1\n0::/a/b\nnonsense\n")
    put(roots.sys / "fs/cgroup/a/b/memory.max", "max\n")
    put(roots.sys / "fs/cgroup/a/memory.max", f"{8 << 30}\n")
    fact = one(machine_facts.cgroup_limit(roots), "cgroup limit")
    assert fact.found == f"8.0 GiB ({roots.sys}/fs/cgroup/a/memory.max)"
    put(roots.sys / "fs/cgroup/memory/v1/memory.limit_in_bytes", f"{4 << 30}\n")
    put(roots.sys / "fs/cgroup/memory/memory.limit_in_bytes", f"{2**63 - 4096}\n")  # version 1's "none"
    assert one(machine_facts.cgroup_limit(roots), "cgroup limit").found.startswith("4.0 GiB")


def test_shared_memory(roots: Roots) -> None:
    assert "not found" in one(machine_facts.shared_memory(roots), "/dev/shm").found
    (roots.dev / "shm").mkdir()
    assert "free" in one(machine_facts.shared_memory(roots), "/dev/shm").found


# ---- engines and configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "tested"), [("0.32.1", True), ("0.33.0", False), ("0.320.0", False)])
def test_engines_by_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, tested: bool) -> None:
    put(tmp_path / f"vllm-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    put(tmp_path / "lmcache-0.4.dist-info/METADATA", "Metadata-Version: 2.1\nName: lmcache\nVersion: 0.4\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    facts = machine_facts.engines()
    assert one(facts, "vllm").found == f"vllm {version}"
    assert (one(facts, "vllm").change == "") == tested
    assert "LMCACHE_NATIVE=1" in one(facts, "lmcache").used


def test_a_configuration_that_does_not_fit_the_machine() -> None:
    facts, found = machine_facts.configuration({"LMCACHE_MAX_LOCAL_CPU_SIZE": "1000000"}, Profile.LMCACHE)
    assert found is not None
    assert "this machine may use" in one(facts, "on this machine").change
