"""Types in the signatures of the native module."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from lmcache_native._native import ChunkKeys


class SupportsDLPack(Protocol):
    """numpy.ndarray, torch.Tensor, ..."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...


#: Token ids: int sequences are converted, 1-D contiguous int32 or int64 CPU memory is read in place.
TokenArray: TypeAlias = "Sequence[int] | Buffer | SupportsDLPack"
#: Integers: sequences, or 1-D contiguous (u)int32 or (u)int64 CPU memory.
IntArray: TypeAlias = "Sequence[int] | Buffer | SupportsDLPack"
#: Where a store keeps chunks on NVMe: one directory, several that it stripes over, or none.
Directories: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None"
#: Any contiguous CPU memory, whatever its dtype.
ByteBuffer: TypeAlias = "Buffer | SupportsDLPack"
#: Chunk keys: ChunkKeys are shared, sequences of 32-byte bytes are copied.
Keys: TypeAlias = "ChunkKeys | Sequence[bytes]"


class PrefixHit(NamedTuple):
    """Leading keys that a store has: hit = host + nvme."""

    hit: int
    host: int
    nvme: int
