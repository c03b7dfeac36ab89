"""The wheel as users get it: what is in it, what it needs, and that the same file runs on every CPython it promises.

    python tests/python/check_wheel.py [--wheel FILE] [--allow-missing]

Without --wheel, builds one from this tree (needs scikit-build-core and nanobind here: no build isolation). For each of the
CPython versions, found on PATH and in ~/.pyenv, makes a venv, installs the wheel with its one dependency and runs a smoke
test in it. A version that is not found fails the check unless --allow-missing is given.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
# What a C++ extension on Linux may ask of the system: libc and the C++ runtime, nothing else.
EXTENSION, PLUGIN = "lmcache_native/_native.abi3.so", "lmcache_native/liblmcn_gds.so"  # the plugin: built with LMCN_GDS only
ALLOWED_NEEDED = re.compile(r"^(lib(stdc\+\+|gcc_s|m|c|pthread|dl|rt)\.so\.\d+|ld-linux[-\w]*\.so\.\d+)$")

SMOKE = """
import hashlib, os, struct, sys, tempfile
import lmcache_native as native

heavy = [m for m in ("numpy", "torch", "vllm", "numba") if m in sys.modules]
assert not heavy, heavy
ns = native.make_namespace("a=1\\n")
assert ns == hashlib.sha256(b"a=1\\n").digest()
tokens = list(range(600))
key = hashlib.sha256(ns).digest()
for i, got in enumerate(native.ChunkHasher(ns, 256).hash(tokens)):
    key = hashlib.sha256(key + struct.pack("<256i", *tokens[i * 256 : (i + 1) * 256]) + struct.pack("<II", 256, 0)).digest()
    assert got == key
data = os.urandom(70_001)
with tempfile.TemporaryDirectory() as directory:
    options = dict(host_bytes=16 << 20, directory=directory + "/d", nvme_bytes=96 << 20, max_payload_bytes=1 << 20)
    with native.Store(**options) as store:
        assert store.nvme_ready, store.nvme_warning
        assert store.put(b"k", data) and store.get(b"k") == data
    with native.Store(**options) as store:
        assert store.get(b"k", timeout_s=30.0) == data
try:
    native.ChunkHasher(b"short")
except native.InvalidArgument as error:
    assert "32 bytes" in str(error)
else:
    raise AssertionError("no InvalidArgument")
print(sys.version.split()[0], native.__version__, native.build_info()["compiler"])
"""

# A build with CUDA where no device can be used: every call says so, with its type, and the rest works.
CUDA_SMOKE = """
import lmcache_native as native

info, status = native.build_info(), native.cuda_status()
assert info["cuda"] is True and info["cuda_toolkit"], info
assert status["built"] is True and status["devices"] == 0 and status["error"] in (35, 100), status
paged = native.PagedKvLayout.opaque([1 << 20], 4, 4096, 4096)
with native.Store(host_bytes=16 << 20) as store:
    try:
        native.PagedCopier.cuda(store, paged, native.SlotLayout.make(paged, 1))
    except native.CudaUnavailable as error:
        print("no device:", error)
    else:
        raise AssertionError("a copier without a device")
"""
MOST_CUDA_BYTES = 3 << 20


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode != 0:
        raise SystemExit(f"FAILED: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return str(done.stdout)


def build(folder: Path) -> Path:
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT)
    (wheel,) = folder.glob("lmcache_native-*.whl")
    return wheel


def check_contents(wheel: Path, folder: Path) -> None:
    if not re.fullmatch(r"lmcache_native-[\d.]+-cp310-abi3-(manylinux|linux)\w+\.whl", wheel.name):
        raise SystemExit(f"FAILED: {wheel.name} is no cp310-abi3 wheel")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(folder)
    libraries = [n for n in names if ".so" in Path(n).name or n.endswith((".a", ".o"))]
    if sorted(libraries) not in ([EXTENSION], [EXTENSION, PLUGIN]):
        raise SystemExit(f"FAILED: libraries in the wheel: {libraries}")
    for name in ("lmcache_native/py.typed", "lmcache_native/_native.pyi", "lmcache_native/__init__.py"):
        if name not in names:
            raise SystemExit(f"FAILED: {name} is not in the wheel")
    (metadata,) = (folder / n for n in names if n.endswith(".dist-info/METADATA"))
    required = [
        line.removeprefix("Requires-Dist: ")
        for line in metadata.read_text().splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    if [re.split(r"[^\w-]", r)[0] for r in required] != ["nanobind-backend"]:
        raise SystemExit(f"FAILED: the wheel requires {required}")
    sys.stdout.write(f"{wheel.name}: {wheel.stat().st_size / 1024:.0f} KiB, {len(names)} files, requires {required[0]}\n")


def check_library(library: Path, entry: str = "PyInit__native", also_needed: tuple[str, ...] = ()) -> None:
    """`entry`: what it is there for. `also_needed`: what the plugin may ask for and the extension may not."""
    dynamic = run("readelf", "-dW", library)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    wrong = [n for n in needed if not ALLOWED_NEEDED.match(n) and n not in also_needed]
    if not needed or wrong:
        raise SystemExit(f"FAILED: NEEDED of {library.name} has {wrong or 'nothing'}")
    if re.search(r"\((RPATH|RUNPATH)\)", dynamic):
        raise SystemExit(f"FAILED: {library.name} has a run path")
    if ".symtab" in run("readelf", "-SW", library):
        raise SystemExit(f"FAILED: {library.name} is not stripped")
    symbols = run("readelf", "--dyn-syms", "-W", library).splitlines()
    exported = [s.split()[-1] for s in symbols if re.search(r" (GLOBAL|WEAK) +DEFAULT +\d+ ", s)]
    foreign = [s for s in exported if re.match(r"(SHA256|EVP|OPENSSL|CRYPTO|io_uring|XXH|cuda|cu[A-Z])", s)]
    if entry not in exported or foreign:
        raise SystemExit(f"FAILED: exported symbols of {library.name} {foreign or 'lack ' + entry}")
    sys.stdout.write(f"{library.name}: {library.stat().st_size / 1024:.0f} KiB, NEEDED {' '.join(needed)}\n")


def check_plugin(library: Path) -> None:
    if library.exists():
        check_library(library, "lmcn_gds_plugin", ("libkvikio.so",))
        return
    sys.stdout.write(f"{library.name}: not in this wheel (LMCN_GDS)\n")


def interpreter(version: str) -> Path | None:
    candidates = [Path(p) for p in (shutil.which(f"python{version}"),) if p]
    candidates += sorted((Path.home() / ".pyenv/versions").glob(f"{version}.*/bin/python"))
    candidates.append(Path(sys.executable))
    for candidate in candidates:
        probe = subprocess.run(
            [candidate, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True,
            text=True,
            check=False,
        )
        if probe.returncode == 0 and probe.stdout.strip() == version:
            return candidate
    return None


def check_in(python: Path, wheel: Path, folder: Path, cuda: bool) -> None:
    run(python, "-m", "venv", folder)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    run(folder / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check", wheel, env=environment)
    sys.stdout.write("ok: " + run(folder / "bin/python", "-I", "-c", SMOKE, env=environment, cwd=folder))
    if cuda:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # no device, also where there is one
        sys.stdout.write("ok: " + run(folder / "bin/python", "-I", "-c", CUDA_SMOKE, env=environment, cwd=folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="check this file instead of building one")
    parser.add_argument("--allow-missing", action="store_true", help="pass although a CPython version is not here")
    parser.add_argument("--cuda", action="store_true", help="it must have been built with CUDA, and be no larger than 3 MiB")
    arguments = parser.parse_args()
    missing = []
    with tempfile.TemporaryDirectory(prefix="lmcn-wheel-") as name:
        folder = Path(name)
        wheel = arguments.wheel.resolve() if arguments.wheel else build(folder)
        check_contents(wheel, folder / "contents")
        if arguments.cuda and wheel.stat().st_size > MOST_CUDA_BYTES:
            raise SystemExit(f"FAILED: the wheel has {wheel.stat().st_size} bytes, must be at most {MOST_CUDA_BYTES}")
        check_library(folder / "contents" / EXTENSION)
        check_plugin(folder / "contents" / PLUGIN)
        for version in VERSIONS:
            python = interpreter(version)
            if python is None:
                missing.append(version)
                continue
            check_in(python, wheel, folder / f"venv-{version}", arguments.cuda)
    if missing:
        sys.stderr.write(f"MISSING: no CPython {', '.join(missing)} on this machine: the wheel was NOT run there\n")
    return 1 if missing and not arguments.allow_missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
