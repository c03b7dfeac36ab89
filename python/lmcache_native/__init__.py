"""KV-cache offload for LLM serving engines: GPU, pinned host memory and NVMe behind one native store.

    with lmcache_native.Store(host_bytes=1 << 30, directory="/nvme/kv", nvme_bytes=100 << 30) as store:
        store.put(b"key", array)
        store.get(b"key")

Importing this package imports neither numpy nor torch nor an engine.
"""

from lmcache_native._native import build_info, cuda_status
from lmcache_native.errors import (
    Aborted,
    Corruption,
    CudaUnavailable,
    DeadlineExceeded,
    FormatVersion,
    InternalError,
    InvalidArgument,
    IoError,
    LmcacheNativeError,
    Locked,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unsupported,
)
from lmcache_native.hashing import ChunkHasher, ChunkKeys, KeyDeriver, describe_namespace, make_namespace
from lmcache_native.store import (
    ArenaAttachment,
    CopyDirection,
    CopyDone,
    DeviceLoadDone,
    DeviceLoader,
    PagedCopier,
    PagedKvLayout,
    PlaneStrides,
    PrefixHit,
    Presence,
    Priority,
    ReadLease,
    Request,
    SlotLayout,
    Store,
    Tier,
    WriteLease,
)

__version__ = str(build_info()["version"])

__all__ = [
    "Aborted",
    "ArenaAttachment",
    "ChunkHasher",
    "ChunkKeys",
    "CopyDirection",
    "CopyDone",
    "Corruption",
    "CudaUnavailable",
    "DeadlineExceeded",
    "DeviceLoadDone",
    "DeviceLoader",
    "FormatVersion",
    "InternalError",
    "InvalidArgument",
    "IoError",
    "KeyDeriver",
    "LmcacheNativeError",
    "Locked",
    "NotFound",
    "PagedCopier",
    "PagedKvLayout",
    "PlaneStrides",
    "PrefixHit",
    "Presence",
    "Priority",
    "ReadLease",
    "Request",
    "ResourceExhausted",
    "SlotLayout",
    "Store",
    "Tier",
    "Unavailable",
    "Unsupported",
    "WriteLease",
    "__version__",
    "build_info",
    "cuda_status",
    "describe_namespace",
    "make_namespace",
]
