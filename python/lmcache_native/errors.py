"""What a call of lmcache_native raises.

One class per failure of the C++ core, each also a built-in exception where one means the same. `code` is the stable name that
logs and metrics use; `sys_errno` is the operating system's error number, or 0.
"""

from __future__ import annotations

from typing import ClassVar


class LmcacheNativeError(Exception):
    """Base of all errors of this package."""

    code: ClassVar[str] = "internal"
    message: str
    sys_errno: int

    def __init__(self, message: str, sys_errno: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.sys_errno = sys_errno

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[type[LmcacheNativeError], tuple[str, int]]:
        return type(self), (self.message, self.sys_errno)


class InvalidArgument(LmcacheNativeError, ValueError):
    """A value is wrong; the message names it and what would be right."""

    code = "invalid_argument"


class NotFound(LmcacheNativeError, KeyError):
    """No such chunk, lease or job."""

    code = "not_found"


class ResourceExhausted(LmcacheNativeError):
    """A hard bound was reached: arena, NVMe limit, queue or budget."""

    code = "resource_exhausted"


class Unavailable(LmcacheNativeError):
    """A facility is missing here: CUDA, io_uring, a closed store."""

    code = "unavailable"


class CudaUnavailable(Unavailable):
    """CUDA is missing: not built in, no driver, no device, or not the part of it that was asked for."""


class DeadlineExceeded(LmcacheNativeError, TimeoutError):
    """The operation did not end within its time."""

    code = "deadline_exceeded"


class Corruption(LmcacheNativeError):
    """Bytes that are not provably the right ones."""

    code = "corruption"


class IoError(LmcacheNativeError, OSError):
    """The device or file system failed; `errno` and `sys_errno` say how."""

    code = "io_error"

    def __init__(self, message: str, sys_errno: int = 0) -> None:
        super().__init__(message, sys_errno)
        self.errno = sys_errno or None


class FormatVersion(LmcacheNativeError):
    """An on-disk format that this build does not know."""

    code = "format_version"


class Locked(LmcacheNativeError):
    """Another process owns the directory or the engine id."""

    code = "locked"


class Aborted(LmcacheNativeError):
    """The operation was withdrawn: lease dropped, store cleared, shutdown."""

    code = "aborted"


class Unsupported(LmcacheNativeError, NotImplementedError):
    """Valid, but not implemented for this combination."""

    code = "unsupported"


class InternalError(LmcacheNativeError):
    """A broken invariant of ours; please report it."""

    code = "internal"
