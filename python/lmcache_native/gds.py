"""GPUDirect Storage: whether it can be used here, and whether it should be.

    python -m lmcache_native.gds /mnt/nvme/kv --device 0

docs/gds.md says what it needs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

from lmcache_native import _native
from lmcache_native.errors import LmcacheNativeError, Unavailable

PLUGIN = "liblmcn_gds.so"


@dataclass(frozen=True, slots=True)
class GdsProbe:
    """What the probe of a directory found. Rates are in 10^9 bytes per second; 0: not measured."""

    mode: str  # "gds" | "compat": through host memory in spite of it | "none"
    reason: str  # why the mode is not "gds", or how it is known that it is
    gds_read: float
    gds_write: float
    host_read: float
    host_write: float
    use_gds: bool  # it is real, and reads more than a tenth faster


@dataclass(frozen=True, slots=True)
class GdsChoice:
    """Whether to read by GPUDirect Storage, and why. `probe`: None when nothing was probed."""

    use: bool
    why: str
    probe: GdsProbe | None = None


def load_plugin(path: str | None = None) -> str:
    """Loads kvikio and the plugin (`path`, else the one in this package) and returns the plugin's path. Unavailable says what is
    missing. Safe to call again."""
    plugin = Path(path) if path is not None else Path(__file__).with_name(PLUGIN)
    if not plugin.is_file():
        raise Unavailable(f"GPUDirect Storage: {plugin} is not there: this build has no plugin (LMCN_GDS)")
    try:
        libkvikio = importlib.import_module("libkvikio")
    except ImportError as error:
        raise Unavailable("GPUDirect Storage: the package libkvikio is missing: pip install 'libkvikio-cu13==26.10.*'") from error
    try:
        libkvikio.load_library()
    except Exception as error:  # it looks for CUDA's libraries and says in several ways that one is missing
        raise Unavailable(f"GPUDirect Storage: libkvikio does not load: {error}") from error
    _native.load_gds_plugin(str(plugin))
    return str(plugin)


def probe(
    directory: str,
    *,
    device: int = -1,
    plugin: str | None = None,
    file_bytes: int = 256 << 20,
    in_flight: int = 8,
    measure_without_gds: bool = True,
) -> GdsProbe:
    """Writes and reads a scratch file of `file_bytes` in `directory` both ways; without the plugin only through host memory, and
    `reason` then says what is missing. `device`: the CUDA device, -1 for host memory. With `measure_without_gds` false nothing is
    written where GDS is not real. IoError: the directory cannot hold the file."""
    missing = ""
    path = ""
    try:
        path = load_plugin(plugin)
    except Unavailable as error:
        missing = str(error)
    found = _native.probe_gds(
        directory,
        plugin=path,
        device=device,
        bytes=file_bytes,
        in_flight=in_flight,
        measure_without_gds=measure_without_gds,
    )
    return GdsProbe(
        mode=str(found["mode"]),
        reason=missing or str(found["reason"]),
        gds_read=float(found["gds_read"]),
        gds_write=float(found["gds_write"]),
        host_read=float(found["host_read"]),
        host_write=float(found["host_write"]),
        use_gds=bool(found["use_gds"]),
    )


def choose(
    use_gds: str, directory: str, *, device: int, plugin: str | None = None, file_bytes: int = 256 << 20, in_flight: int = 8
) -> GdsChoice:
    """What `use_gds` (auto, on, off) means here. off loads nothing; else judge() of a probe."""
    if use_gds == "off":
        return GdsChoice(False, "use_gds=off")
    return judge(use_gds, directory, probe(directory, device=device, plugin=plugin, file_bytes=file_bytes, in_flight=in_flight))


def judge(use_gds: str, directory: str, found: GdsProbe) -> GdsChoice:
    """auto takes GDS when it is real and clearly faster. on takes it when it is real, and raises Unavailable with what is missing
    when it is not."""
    rates = f"GDS reads {found.gds_read:.2f} GB/s, host memory {found.host_read:.2f} GB/s"
    if found.mode != "gds":
        if use_gds == "on":
            raise Unavailable(f"use_gds=on: there is no GPUDirect Storage in {directory}: {found.reason}")
        return GdsChoice(False, f"use_gds=auto: no GPUDirect Storage in {directory}: {found.reason}", found)
    if use_gds == "on" or found.use_gds:
        return GdsChoice(True, f"use_gds={use_gds}: {found.reason}; {rates}", found)
    return GdsChoice(False, f"use_gds=auto: not more than a tenth faster than host memory: {rates}", found)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lmcache_native.gds", description="Probes a directory for GPUDirect Storage.")
    parser.add_argument("directory")
    parser.add_argument("--device", type=int, default=-1, help="CUDA device; -1 (default): host memory, which GDS cannot read into")
    parser.add_argument("--mib", type=int, default=256, help="size of the scratch file (default 256)")
    parser.add_argument("--plugin", help=f"path of {PLUGIN} (default: the package's)")
    given = parser.parse_args(arguments)
    try:
        found = probe(given.directory, device=given.device, plugin=given.plugin, file_bytes=given.mib << 20)
    except LmcacheNativeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"mode        {found.mode}: {found.reason}\n")
    for name, rate in (
        ("host read", found.host_read),
        ("host write", found.host_write),
        ("GDS read", found.gds_read),
        ("GDS write", found.gds_write),
    ):
        sys.stdout.write(f"{name:<11} {f'{rate:.2f} GB/s' if rate else 'not measured'}\n")
    sys.stdout.write(f"use_gds=auto would take {'GDS' if found.use_gds else 'host memory'}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
