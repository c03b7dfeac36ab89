"""The store with its Python conveniences: put, get, `with`."""

from __future__ import annotations

from types import TracebackType
from typing import TypeVar, overload

from lmcache_native import _native
from lmcache_native._native import (
    ArenaAttachment,
    CopyDirection,
    CopyDone,
    DeviceLoadDone,
    DeviceLoader,
    KeyDeriver,
    PagedCopier,
    PagedKvLayout,
    PlaneStrides,
    Presence,
    ReadLease,
    Request,
    SlotLayout,
    Tier,
    WriteLease,
    make_namespace,
)
from lmcache_native._types import ByteBuffer, PrefixHit
from lmcache_native.errors import NotFound, ResourceExhausted

__all__ = [
    "DEFAULT_NAMESPACE",
    "ArenaAttachment",
    "CopyDirection",
    "CopyDone",
    "DeviceLoadDone",
    "DeviceLoader",
    "PagedCopier",
    "PagedKvLayout",
    "PlaneStrides",
    "PrefixHit",
    "Presence",
    "ReadLease",
    "Request",
    "SlotLayout",
    "Store",
    "Tier",
    "WriteLease",
]

#: Of put() and get() when the caller names none.
DEFAULT_NAMESPACE: bytes = make_namespace("scheme=put\n")

BufferT = TypeVar("BufferT", bound=ByteBuffer)


class Store(_native.Store):
    __doc__ = _native.Store.__doc__

    def __enter__(self) -> Store:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def put(self, key: bytes, data: ByteBuffer, *, namespace: bytes = DEFAULT_NAMESPACE) -> bool:
        """Stores a copy of `data` (any contiguous CPU buffer: bytes, numpy, torch) under `key`.

        True: stored. False: not stored, because `key` is there already (chunks never change), someone is storing it, or all
        memory is pinned. The bytes and their exact length come back, dtype and shape do not.
        A store with several parts takes only lengths that its part_count divides. InvalidArgument when `data` is empty.
        """
        view = _native.byte_view(data)
        try:
            lease = self.reserve_engine_keys(namespace, [key], view.nbytes)
        except ResourceExhausted:
            return False
        with lease:
            if len(lease) == 0:
                return False
            lease.fill(0, view)
            for rank in range(self.part_count):
                lease.mark_filled(0, rank)
            return lease.commit() == 1

    @overload
    def get(self, key: bytes, *, namespace: bytes = ..., timeout_s: float = ...) -> bytes | None: ...

    @overload
    def get(self, key: bytes, out: BufferT, *, namespace: bytes = ..., timeout_s: float = ...) -> BufferT | None: ...

    def get(
        self,
        key: bytes,
        out: BufferT | None = None,
        *,
        namespace: bytes = DEFAULT_NAMESPACE,
        timeout_s: float = 10.0,
    ) -> bytes | BufferT | None:
        """The bytes that put() stored under `key`, or None on a miss.

        `out`: a writable contiguous CPU buffer of exactly that length, filled and returned instead of new bytes. Waits at most
        timeout_s for a promotion from NVMe; a deadline that passes is a miss.
        """
        try:
            lease = self.acquire(namespace, [KeyDeriver(namespace).derive(key)], timeout_s)
        except NotFound:
            return None
        with lease:
            if out is None:
                return lease.tobytes(0)
            lease.copy_to(0, out)
            return out
