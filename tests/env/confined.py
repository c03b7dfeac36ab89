"""Runs a command as a strict container would: an ordinary user that has no name and no home, little locked memory, a root that
cannot be written, 64 MiB of /dev/shm, no /run/user, and no io_uring where asked. By the kernel's own means; needs root, and exits
with 77 where it may not do it.

    python confined.py --writable DIR [--io-uring EPERM] [--shm-mib 64] -- COMMAND [ARGUMENT...]
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import resource
import stat
import struct
import sys
from pathlib import Path

UID = 54321  # nobody's
MEMLOCK_BYTES = 8 << 20
SHM_MIB = 64  # docker's
CANNOT = 77

_CLONE_NEWNS = 0x20000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_MOVE, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 8192, 16384, 1 << 18
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_IO_URING_CALLS = (425, 426, 427)  # setup, enter, register: the same on every machine
_libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    check(
        _libc.mount(source.encode(), target.encode(), kind.encode() or None, flags, data.encode() or None),
        f"mount {source} on {target}",
    )


def reachable(needed: list[Path]) -> None:
    """Lets anyone through to `needed` where a folder above is private (/root), in this mount namespace."""
    hidden: dict[Path, list[Path]] = {}
    for path in needed:
        closed = [above for above in reversed(path.parents) if not above.stat().st_mode & stat.S_IXOTH]
        if closed:
            child = closed[0] / path.relative_to(closed[0]).parts[0]
            hidden.setdefault(closed[0], [])
            if child not in hidden[closed[0]]:
                hidden[closed[0]].append(child)
    for number, (folder, children) in enumerate(hidden.items()):
        aside = [Path(f"/run/aside{number}-{index}") for index in range(len(children))]
        for child, place in zip(children, aside, strict=True):
            place.mkdir()
            mount(str(child), str(place), flags=_MS_BIND | _MS_REC)
        mount("tmpfs", str(folder), "tmpfs", data="mode=755")
        for child, place in zip(children, aside, strict=True):
            child.mkdir()
            mount(str(place), str(child), flags=_MS_MOVE)


def refuse_io_uring(error: int) -> None:
    """What container runtimes' seccomp profiles do."""
    load = struct.pack("HBBI", 0x20, 0, 0, 0)  # the call's number
    last = len(_IO_URING_CALLS) - 1
    jumps = [struct.pack("HBBI", 0x15, last - at + 1, 0, number) for at, number in enumerate(_IO_URING_CALLS)]
    allow, refuse = struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000), struct.pack("HBBI", 0x06, 0, 0, 0x00050000 | error)
    program = ctypes.create_string_buffer(b"".join([load, *jumps, allow, refuse]))
    head = struct.pack("HxxxxxxP", len(_IO_URING_CALLS) + 3, ctypes.addressof(program))
    check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, head, 0, 0), "PR_SET_SECCOMP")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--writable", required=True, type=Path, help="a folder that stays writable, given to the user")
    parser.add_argument("--io-uring", default="", help="the error that io_uring's calls end with, EPERM or ENOSYS")
    parser.add_argument("--shm-mib", type=int, default=SHM_MIB, help="size of /dev/shm")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    needed = [Path(sys.prefix), Path(sys.base_prefix), *map(Path, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    try:
        check(_libc.unshare(_CLONE_NEWNS), "unshare")
        mount("", "/", flags=_MS_REC | _MS_PRIVATE)
        mount("tmpfs", "/run", "tmpfs", data="mode=755")
        mount("tmpfs", "/dev/shm", "tmpfs", data=f"mode=1777,size={arguments.shm_mib}m")
        reachable([path for path in needed if path.is_absolute() and path.exists()])
        for path in (Path("/tmp"), arguments.writable):
            mount(str(path), str(path), flags=_MS_BIND | _MS_REC)
        mount("", "/", flags=_MS_REMOUNT | _MS_BIND | _MS_RDONLY)
        os.chown(arguments.writable, UID, UID)
        os.setgroups([])
        os.setresgid(UID, UID, UID)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (MEMLOCK_BYTES, MEMLOCK_BYTES))
        os.setresuid(UID, UID, UID)
        if arguments.io_uring:
            refuse_io_uring(getattr(errno, arguments.io_uring))
    except PermissionError as error:
        sys.exit(f"{error}") if os.geteuid() == UID else sys.stderr.write(f"not here: {error}\n")
        sys.exit(CANNOT)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HOME", "XDG_", "USER", "LOGNAME"))}
    os.chdir("/")
    os.execvpe(arguments.command[0], arguments.command, environment)


if __name__ == "__main__":
    main()
