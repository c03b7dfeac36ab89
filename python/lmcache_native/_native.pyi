"""
lmcache-native's C++ core. Import lmcache_native, which re-exports all of it.
"""

import array
from collections.abc import Callable, Iterator, Sequence
import enum
import types
from typing import Any, Final, Literal, overload

import lmcache_native._types


def build_info() -> dict[str, str | int | bool]:
    """
    How this extension was built: version, compiler, build_type, cuda_choice (what LMCN_CUDA asked for), cuda (what the build
    chose), cuda_toolkit, cuda_archs, liburing, xxhash, openssl (linked statically), format_version (of slots and the NVMe log).
    """

def cuda_status() -> dict[str, str | int | bool]:
    """
    Whether CUDA can be used here: built, devices, error (cudaError_t of the probe; 35: no driver), message. Never raises.
    """

def io_engine_note() -> str:
    """
    Which I/O engine a store opened here would get, and why: makes one, with a ring set up and tried where there is io_uring, and
    drops it. InvalidArgument: LMCN_IO_ENGINE is wrong. Unavailable: it asks for an engine that cannot be had.
    """

class ChunkKeys:
    """
    Immutable array of n 32-byte chunk keys, n x 32 bytes of memory. Slices with step 1 share it. Thread-safe; picklable.
    numpy.asarray(keys) is a read-only uint8 array of shape (n, 32) on the same memory.
    """

    @staticmethod
    def from_bytes(data: bytes) -> ChunkKeys:
        """
        Keys from n*32 bytes, copied. InvalidArgument when the length is no multiple of 32.
        """

    def tobytes(self) -> bytes:
        """The n*32 bytes, copied."""

    def view(self) -> memoryview:
        """
        Read-only memoryview of shape (n, 32), format 'B', on the keys' own memory, which it keeps alive.
        """

    def __len__(self) -> int: ...

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> ChunkKeys: ...

    def __iter__(self) -> Iterator[bytes]: ...

    def __eq__(self, other: object, /) -> bool: ...

    def __hash__(self) -> int: ...

    def __repr__(self) -> str: ...

    def __getstate__(self) -> bytes: ...

    def __setstate__(self, arg: bytes, /) -> None: ...

    @property
    def __array_interface__(self) -> dict[str, object]:
        """For numpy: shape (n, 32), uint8, read-only."""

def make_namespace(description: str) -> bytes:
    """
    Namespace (32 bytes) of a canonical description: 'name=value\\n' lines sorted by name. lmcache_native.describe_namespace makes one.
    """

class ChunkHasher:
    """
    Tokens to chunk keys: a SHA-256 chain over whole chunks of `chunk_tokens` tokens.

    key[i] = SHA256(key[i-1] || tokens as int32 little-endian || extra[i] || u32 token count || u32 extra bytes), key[-1] = SHA256(namespace).
    Immutable; may be shared between threads.
    """

    def __init__(self, namespace: bytes, chunk_tokens: int = 256) -> None:
        """
        namespace: 32 bytes of make_namespace(). InvalidArgument when chunk_tokens < 1.
        """

    @property
    def chunk_tokens(self) -> int:
        """Tokens per chunk."""

    @property
    def root(self) -> bytes:
        """key[-1], the parent of a prompt's first chunk: 32 bytes."""

    def hash(self, tokens: lmcache_native._types.TokenArray, extra_keys: Sequence[bytes] | None = None, parent: bytes | None = None) -> ChunkKeys:
        """
        Keys of all whole chunks of `tokens`; a tail shorter than a chunk is ignored.

        tokens: list[int], tuple[int, ...] or a 1-D contiguous int32/int64 CPU buffer or DLPack object (numpy, torch, array, memoryview),
        which is read in place: it must not change during the call. int64 and int32 give the same keys.
        extra_keys: one bytes object per whole chunk (LoRA, multimodal hashes, salts). parent: the key before the first chunk.
        InvalidArgument names the position of a token outside int32, or the type that was given. Releases the GIL while hashing.
        """

    def step(self, parent: bytes, tokens: lmcache_native._types.TokenArray, extra: bytes = b'') -> bytes:
        """
        One step of the chain: the 32-byte key of a chunk of any number of tokens after `parent` (root: at the start of a prompt).
        So a tail shorter than chunk_tokens has a key of its own, by its tokens and their count; of chunk_tokens tokens it is what hash()
        gives. tokens, extra: as of hash(). Keeps the GIL.
        """

class KeyDeriver:
    """
    Engine key (a block hash) to chunk key: SHA256(namespace || u32 length || engine key). Immutable; thread-safe.
    """

    def __init__(self, namespace: bytes) -> None: ...

    def derive(self, engine_key: bytes) -> bytes:
        """The 32-byte chunk key."""

    def derive_all(self, engine_keys: Sequence[bytes]) -> ChunkKeys:
        """Chunk keys of many engine keys. Releases the GIL."""

class PlaneStrides:
    """
    Byte strides of one plane (K, V, or MLA's only one) of one layer: element (block b, token t, head h, dim d) lies at
    base + offset + b*block + t*token + h*head + d*dim.
    """

    def __init__(self, *, offset: int = 0, block: int, token: int, head: int, dim: int) -> None: ...

    @property
    def offset(self) -> int: ...

    @property
    def block(self) -> int: ...

    @property
    def token(self) -> int: ...

    @property
    def head(self) -> int: ...

    @property
    def dim(self) -> int: ...

class PagedKvLayout:
    """
    How one rank's paged KV cache lies in memory. Holds addresses, owns nothing: the memory must outlive every copier made
    with it (PagedCopier's `owner` can keep it alive).
    """

    @staticmethod
    def opaque(bases: lmcache_native._types.IntArray, num_blocks: int, page_bytes: int, block_stride: int) -> PagedKvLayout:
        """
        Pages copied as they are: layer l's block b is the page_bytes bytes at address bases[l] + b*block_stride. A 'token' of such a
        layout is a whole block. InvalidArgument when a size is not positive or pages overlap.
        """

    @staticmethod
    def strided(*, layers: Sequence[tuple[int, Sequence[PlaneStrides]]], num_blocks: int, block_tokens: int, heads: int, head_dim: int, element_bytes: int) -> PagedKvLayout:
        """
        layers: per layer its base address and the strides of its 1 or 2 planes. heads: KV heads of this rank.
        InvalidArgument names what is inconsistent.
        """

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_tokens(self) -> int:
        """Tokens per block; 1 when opaque."""

    @property
    def heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def element_bytes(self) -> int: ...

    @property
    def layers(self) -> int:
        """Number of layers."""

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one plane of one layer."""

class SlotLayout:
    """
    Where each layer's part begins in one rank's part of a slot: [layer][plane][token][head][dim], a layer 4 KiB-aligned when it is
    >= 64 KiB. One rank's part is a multiple of 4 KiB.
    """

    @staticmethod
    def make(paged: PagedKvLayout, chunk_tokens: int) -> SlotLayout:
        """
        chunk_tokens: tokens (opaque: blocks) per chunk. InvalidArgument when < 1.
        """

    @staticmethod
    def from_sizes(*, layers: int, planes: int, token_bytes: int, chunk_tokens: int) -> SlotLayout:
        """
        The same from sizes alone, for the scheduler's side, which knows no addresses. token_bytes: of one plane of one layer.
        """

    @property
    def layer_offset(self) -> list[int]:
        """Bytes from the start of the rank's part, per layer."""

    @property
    def chunk_tokens(self) -> int:
        """Tokens (opaque: blocks) per chunk."""

    @property
    def plane_bytes(self) -> int:
        """Bytes of one plane of one layer."""

    @property
    def rank_bytes(self) -> int:
        """Bytes of one rank's part; a slot's payload is rank_count times this."""

class Priority(enum.IntEnum):
    """What becomes of a request's chunks where not all can be had."""

    LOW = 0
    """
    Leave host memory first, until another uses them; to NVMe only when used or stored again.
    """

    NORMAL = 1

    HIGH = 2
    """Written to NVMe also while writes are dear; promoted first."""

class WriteLease:
    """
    Right to fill slots. As a context manager, or when it is dropped, it aborts unless commit() ran: nothing becomes visible.
    Keeps the store's arena alive. One thread at a time.
    """

    def __len__(self) -> int: ...

    @property
    def positions(self) -> array.array[int]:
        """uint32 per slot: which of the reserved keys it is for, ascending."""

    def slot_offsets(self) -> array.array[int]:
        """
        uint64 per slot: its offset in the arena, in bytes. Picklable; PagedCopier.submit takes it as it is.
        """

    def generations(self) -> array.array[int]:
        """uint32 per slot: its generation. Picklable."""

    @property
    def payload_bytes(self) -> int:
        """Bytes of each slot's payload, all parts."""

    def payload(self, index: int) -> memoryview:
        """
        Writable memoryview (payload_bytes,) of slot `index`, in the arena itself. It keeps the lease object alive, but must not be written
        after commit() or abort().
        """

    def fill(self, index: int, data: lmcache_native._types.ByteBuffer) -> None:
        """
        Copies a contiguous buffer of exactly payload_bytes into slot `index`, without the GIL.
        """

    def mark_filled(self, index: int, rank: int = 0) -> None:
        """
        Says that this process filled the rank's part of slot `index`. Workers' copiers say so themselves.
        """

    def set_priority(self, priority: Priority) -> None:
        """Of all its chunks. Before commit()."""

    def commit(self) -> int:
        """
        Publishes every slot whose parts are all filled, drops the others, returns how many were published. The lease is empty afterwards.
        """

    def abort(self) -> None:
        """Drops all slots. Idempotent."""

    def __enter__(self) -> WriteLease: ...

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: types.TracebackType | None, /) -> None: ...

class ReadLease:
    """
    Right to read slots: while it lives they are neither evicted nor reused. Ends with release(), as a context manager, or when it is
    dropped. Keeps the store's arena alive. One thread at a time.
    """

    def __len__(self) -> int: ...

    def slot_offsets(self) -> array.array[int]:
        """
        uint64 per slot: its offset in the arena, in bytes. Picklable; PagedCopier.submit takes it as it is.
        """

    def generations(self) -> array.array[int]:
        """uint32 per slot: its generation. Picklable."""

    def payload(self, index: int) -> memoryview:
        """
        Read-only memoryview of slot `index`'s payload, in the arena itself. It keeps the lease object alive; after release() its bytes may
        become another chunk's.
        """

    def copy_to(self, index: int, out: lmcache_native._types.ByteBuffer) -> None:
        """
        Copies slot `index`'s payload into a writable contiguous buffer of exactly its size, without the GIL.
        """

    def tobytes(self, index: int) -> bytes:
        """A copy of slot `index`'s payload."""

    def release(self) -> None:
        """Ends the lease. Idempotent."""

    def __enter__(self) -> ReadLease: ...

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: types.TracebackType | None, /) -> None: ...

def byte_view(data: lmcache_native._types.ByteBuffer) -> memoryview:
    """
    Read-only memoryview of shape (nbytes,), format 'B', on any contiguous CPU buffer or DLPack object, which it keeps alive.
    """

class Presence(enum.IntEnum):
    """What Request.lookup() returns, as int."""

    MISS = 0
    """Absent, or refused for this request."""

    HIT = 1
    """In host memory, verified, pinned for this request."""

    PENDING = 2
    """Being stored by someone; look again later."""

    RETRY = 3
    """Being promoted from NVMe for this request; look again later."""

class Tier(enum.IntEnum):
    """What Request.source() returns, as int."""

    NONE = 0

    HOST = 1

    NVME = 2

class Request:
    """
    One engine request's view: key-by-key lookups with a memo, promotions within a budget, pins. Pins are dropped by end(), when the
    object is dropped, or after request_ttl_s without a lookup. Memory only: no call waits for I/O.
    """

    def lookup(self, engine_key: bytes) -> int:
        """
        Presence (int) of an engine key. A promotion from NVMe starts on the first lookup; HIT only when read, verified and pinned.
        """

    def lookup_key(self, key: bytes) -> int:
        """Presence (int) of a 32-byte chunk key."""

    def source(self, engine_key: bytes) -> int:
        """
        Tier (int) that the last HIT of this engine key came from; NVME after a promotion.
        """

    def source_key(self, key: bytes) -> int:
        """The same of a 32-byte chunk key."""

    def lookup_prefix(self, keys: lmcache_native._types.Keys) -> tuple[int, int]:
        """
        How many leading keys are HIT now, each looked up and pinned as by lookup_key(), and the Presence (int) of the first one that is
        not, which has been looked up too (HIT when all are). Cheap when repeated: 16,000 hits take about 0.1 ms.
        """

    def lookup_tiers(self, keys: lmcache_native._types.Keys) -> tuple[int, int]:
        """
        The same for who reads records itself (Store.locate): a key on NVMe alone is a hit as well, and not pinned. Of a request with promote=False.
        """

    def count_sources(self, keys: lmcache_native._types.Keys) -> tuple[int, int]:
        """How many of the keys' last HITs came from (host memory, NVMe)."""

    def prefetch(self, keys: lmcache_native._types.Keys) -> int:
        """
        Starts promotion of all leading keys within the budget; returns the length of that prefix (what may become a hit).
        """

    def acquire(self, keys: lmcache_native._types.Keys, *, for_worker: bool = False) -> ReadLease:
        """
        Lease of keys that are all hits now; NotFound names the first that is not in host memory. for_worker: the slots stay busy until every
        rank's scatter has ended, even when the lease is dropped before.
        """

    def acquire_engine_keys(self, engine_keys: Sequence[bytes], for_worker: bool = False) -> ReadLease:
        """acquire() by the engine's own keys."""

    def end(self) -> None:
        """
        Drops the pins. Idempotent; every other call raises Aborted afterwards.
        """

class Store:
    """
    The three tiers' owner: index, host arena, NVMe log. Lives in the process that decides (vLLM's scheduler, your server).

    Any method may be called from any thread. lookup, reserve and leases touch memory only; what can wait takes timeout_s (seconds).
    A chunk can be looked up only after commit() found every rank's part filled.
    """

    def __init__(self, *, host_bytes: int, directory: lmcache_native._types.Directories = None, nvme_bytes: int = 0, rank_count: int = 1, max_payload_bytes: int = 0, region_bytes: int = 0, io_engine: str = 'auto', cache_policy: str = 'LRU', fail_when_locked: bool = False, lock_wait_s: float = 10.0, populate_threads: int = 2, promotion_deadline_s: float = 10.0, promotion_budget_bytes: int = 0, request_ttl_s: float = 30.0, numa_nodes: lmcache_native._types.IntArray = (), hugetlb: bool = False, directory_bytes: lmcache_native._types.IntArray = (), nvme_free_floor_bytes: int = 268435456, nvme_daily_bytes: int = 0, admission: str = 'auto', verify: str = 'nvme', write_deadline_s: float = 10.0, nvme_io_timeout_s: float = 30.0, allow_network_file_system: bool = False, replicated: bool = False) -> None:
        """
        host_bytes: hard limit of the host arena, >= 4 MiB. directory, nvme_bytes: the NVMe tier, a path or up to seven that chunks are
        striped over, and the hard limit of all; without a directory the store is memory only. directory_bytes: the limit of each, else they
        share evenly. rank_count: ranks that fill and read each slot, 1..64. max_payload_bytes: largest chunk, all parts (0: 64 MiB).
        region_bytes: 0 chooses from nvme_bytes. io_engine: auto | io_uring | threads. cache_policy: LRU | S3FIFO | LFU | FIFO | MRU.
        fail_when_locked: raise Locked when another process owns the directory after lock_wait_s. False: the store opens within a second
        with host memory only, and takes the directory over when its owner lets go (stats()['nvme_waiting'] is 1 until then).
        promotion_*, request_ttl_s: defaults of requests; budget 0: half of host_bytes. numa_nodes: where the arena's memory comes
        from: one node (while it has memory), several in turn, or the kernel's choice. hugetlb: the arena must be of reserved huge
        pages; ResourceExhausted says how many to reserve. False: huge pages where they can be had.
        nvme_free_floor_bytes: never taken of a file system. nvme_daily_bytes: hard limit of writes within 24 hours (0: the file systems'
        size). admission: auto | always | second_touch. verify: off | nvme | all. write_deadline_s: a chunk that waited longer for its
        write is given up. (lmcn/store.hpp says more.)
        nvme_io_timeout_s: a device that answers nothing for so long is quarantined. allow_network_file_system: directory may be on
        a network or cluster file system (docs/security.md lists them), where neither the lock nor what was synced is sure to hold.
        replicated: all ranks hold the same KV; a slot then has one part, which rank 0 alone fills and every rank reads.
        Raises InvalidArgument, ResourceExhausted, Unavailable, Locked, FormatVersion, IoError.
        """

    def lookup(self, keys: lmcache_native._types.Keys) -> lmcache_native._types.PrefixHit:
        """
        How many leading keys are present: (hit, host, nvme), hit = host + nvme. Memory only; touches and pins nothing.
        """

    def reserve(self, namespace: bytes, keys: lmcache_native._types.Keys, payload_bytes: int, *, for_worker: bool = False) -> WriteLease:
        """
        Slots of payload_bytes (all ranks) for those of `keys` that are absent from host memory and not being stored; leading ones when not
        all fit. An empty lease when all are present. ResourceExhausted when none fits. for_worker: worker processes fill the slots
        (a dropped lease leaves them quarantined until every rank's word is there); otherwise payload(), fill() and mark_filled() do. Memory only.
        """

    def reserve_engine_keys(self, namespace: bytes, engine_keys: Sequence[bytes], payload_bytes: int, *, for_worker: bool = False) -> WriteLease:
        """reserve() by the engine's own keys, derived natively (KeyDeriver)."""

    def begin_request(self, namespace: bytes, *, promotion_budget_bytes: int = 0, promotion_deadline_s: float = 0.0, promote: bool = True, priority: Priority = Priority.NORMAL) -> Request:
        """
        One engine request's lookups, promotions and pins. 0: the store's budget and deadline. promote false: what is on NVMe alone is a miss. priority: whose promotions are read first.
        """

    def acquire(self, namespace: bytes, keys: lmcache_native._types.Keys, timeout_s: float = 10.0) -> ReadLease:
        """
        Promotes what is only on NVMe, waits at most timeout_s, and leases the leading part that could be had. NotFound when not even the
        first key could.
        """

    def touch(self, keys: lmcache_native._types.Keys) -> None:
        """Marks the keys as recently used."""

    def locate(self, keys: lmcache_native._types.Keys) -> list[tuple[int, int, int, int, int]]:
        """
        Where those of `keys` that are on NVMe lie, for a reader of its own: (position in keys, index of the directory, byte offset in its
        data.000, bytes of the slot image, region sequence). Nothing holds them there: the reader checks the header's key, namespace and region
        sequence and the payload's checksums. Counts as a hit. Memory only.
        """

    def count_writes(self, path: int, written_bytes: int) -> None:
        """
        Counts bytes that somebody else wrote to the drive of directory number `path` into the day's limit.
        """

    def record_failed(self, key: bytes, path: int, offset_bytes: int, region_sequence: int) -> None:
        """
        For who read a record where locate() said and found that it does not hold: forgotten, unless another has taken its place since.
        """

    def erase(self, key: bytes) -> bool:
        """Drops one chunk (32-byte key) from every tier. False: it was absent."""

    def clear(self) -> None:
        """
        Drops everything: at once in memory, on NVMe within milliseconds. Slots under leases stay until those end.
        """

    def serve(self, engine_id: str, rank_bytes: int) -> None:
        """
        Lets worker processes attach to the arena (ArenaAttachment.attach) under engine_id. rank_bytes: one rank's part of a slot
        (SlotLayout.rank_bytes). Locked when a live process serves that id.
        """

    def job_not_started(self, rank: int, slot_offsets: lmcache_native._types.IntArray, generations: lmcache_native._types.IntArray, *, load: bool) -> None:
        """
        For a worker that reports that it could not start a job on these slots, and so will never write its words: writes them for it,
        else the slots would stay quarantined for ever. Slots of another generation are passed over.
        """

    def flush(self, timeout_s: float = 60.0) -> None:
        """
        Waits until all committed chunks are on NVMe (or dropped) and synced. DeadlineExceeded names what is left.
        """

    def close(self, timeout_s: float = 10.0) -> None:
        """
        Flushes for at most timeout_s, writes a checkpoint, unlocks the directory. Idempotent. Every later call raises Unavailable. Leases
        and requests that are still alive keep the arena mapped until they end.
        """

    @property
    def closed(self) -> bool:
        """True after close()."""

    @property
    def rank_count(self) -> int:
        """Ranks that read each slot."""

    @property
    def part_count(self) -> int:
        """
        Parts of a slot, each filled by the rank of its number: rank_count, or 1 in a store that is replicated.
        """

    @property
    def event_fd(self) -> int:
        """
        Descriptor (eventfd, non-blocking) that is readable after promotions ended; read 8 bytes to re-arm. Owned by the store.
        """

    @property
    def arena_bytes(self) -> int:
        """Size of the host arena."""

    @property
    def nvme_ready(self) -> bool:
        """Whether the NVMe tier is in use."""

    @property
    def nvme_warning(self) -> str:
        """Empty, or one line: why NVMe is not used."""

    @property
    def io_engine_note(self) -> str:
        """Which I/O engine runs, and why."""

    def stats(self) -> dict[str, int]:
        """Counters since open and gauges of now, by the names of metrics.hpp."""

    def watch_changes(self) -> None:
        """From now on take_changes() has something to give."""

    def take_changes(self) -> list[tuple[bytes, Tier, bool]]:
        """
        (key, tier, stored) of each chunk that came into a tier, or (stored false) left it, since the last call, in order. At most a million
        are kept. clear() is not told, and drops what is pending.
        """

    def latencies(self) -> dict[str, list[tuple[int, float]]]:
        """
        Since open: promotion, read, verify, write_wait, write -> for each bucket of latency_bounds_s, and the one beyond the last,
        how many durations fell into it and their sum in seconds.
        """

    latency_bounds_s: Final[tuple[float, ...]] = ...
    """Inclusive upper bounds of the buckets of latencies(), in seconds."""

class ArenaAttachment:
    """
    The arena of the process that owns the store, mapped in this worker. Dropping it (and every copier made with it) unmaps it and tells
    the owner that the rank is gone.
    """

    @staticmethod
    def attach(engine_id: str, rank: int, rank_bytes: int, timeout_s: float = 30.0, replicated: bool = False) -> ArenaAttachment:
        """
        Waits at most timeout_s for an owner that serves engine_id, without the GIL. rank_bytes: one rank's part of a slot, and replicated:
        whether all ranks share it; both are checked against the owner's. DeadlineExceeded names the socket path; InvalidArgument names both values that differ.
        """

    def close(self) -> None:
        """Gives up this reference; copiers keep theirs. Idempotent."""

    @property
    def bytes(self) -> int:
        """Size of the arena."""

    @property
    def owner_pid(self) -> int: ...

class CopyDirection(enum.Enum):
    GATHER = 0
    """Paged memory to slot: 'store'."""

    SCATTER = 1
    """Slot to paged memory: 'load'."""

class CopyDone:
    """How one job of a PagedCopier ended."""

    @property
    def id(self) -> int: ...

    @property
    def ok(self) -> bool: ...

    @property
    def bytes(self) -> int:
        """Bytes copied."""

    @property
    def seconds(self) -> float:
        """From start of copying to end."""

    @property
    def failed_items(self) -> list[int]:
        """Indexes into the job's slots."""

    @property
    def message(self) -> str:
        """Why, when not ok."""

    def __repr__(self) -> str: ...

class PagedCopier:
    """
    Moves bytes between an engine's paged memory and slots. Thread-safe; submit() and poll() never wait for a copy. After a job it writes its
    rank's word into each slot: that is what publishing trusts. Dropping it waits for the jobs under way.
    """

    @staticmethod
    def host(arena: Store | ArenaAttachment, paged: PagedKvLayout, slot: SlotLayout, *, rank: int = 0, threads: int = 1, non_temporal_bytes: int = 262144, replicated: bool = False, owner: object = None) -> PagedCopier:
        """
        Copier for paged memory that this process can address. threads: copy threads. non_temporal_bytes: gathers of jobs at least this large
        bypass the cache. replicated: as the store's; loads then read the one part, and a store by another rank than 0 is InvalidArgument.
        owner: any object to keep alive with the copier (the tensors behind `paged`).
        """

    @staticmethod
    def cuda(arena: Store | ArenaAttachment, paged: PagedKvLayout, slot: SlotLayout, *, rank: int = 0, device: int = 0, slot_bytes: int = 0, replicated: bool = False, owner: object = None) -> PagedCopier:
        """
        Copier for paged memory on a CUDA device, ordered by events. How bytes move is what prepare_cuda() found (see `details`), unless LMCN_COPY_PATH is
        memcpy, batch, kernel or staged. slot_bytes: of a slot image, if known: the arena is registered with CUDA in pieces that hold whole slots.
        replicated: as host()'s.
        CudaUnavailable when built without CUDA or without driver or device. InvalidArgument: `paged` is not memory of the device, or LMCN_COPY_PATH
        has another value.
        """

    @staticmethod
    def prepare_cuda(paged: PagedKvLayout, slot: SlotLayout, *, device: int = 0, timeout_s: float = 0.05) -> bool:
        """
        Measures how bytes move the fastest, for a later cuda() with these layouts: beside everything else, on memory of its own; waits for it, without
        the GIL, for at most timeout_s. Whether it has ended; if not, a copier begins with plain copies and takes what is found between two jobs.
        Raises as cuda().
        """

    def submit(self, id: int, direction: Literal['store', 'load'] | CopyDirection, slot_offsets: lmcache_native._types.IntArray, generations: lmcache_native._types.IntArray, first_tokens: lmcache_native._types.IntArray | None, tokens: lmcache_native._types.IntArray, block_begin: lmcache_native._types.IntArray, block_ids: lmcache_native._types.IntArray, token_in_block: lmcache_native._types.IntArray | None = None, stream: int = 0, layer_by_layer: bool = False) -> None:
        """
        Starts one job, item i of which copies tokens[i] tokens (opaque layouts: blocks) from first_tokens[i] of the chunk in the slot at
        slot_offsets[i]; block_ids[block_begin[i]] is the engine block that holds the first of them, token_in_block[i] its place there.
        None: zeros. id: unique among unfinished jobs. stream: the cudaStream_t to order after (0: legacy default). Sequences or 1-D integer
        buffers. layer_by_layer (loads only): layer after layer of all items, for wait_layers(). InvalidArgument, and nothing copied, when
        something is out of bounds.
        """

    def poll(self) -> list[CopyDone]:
        """
        Jobs that ended since the last call, each exactly once. Unavailable, when there are none: a CUDA device answers nothing but errors, and
        loads that it may still execute will never end.
        """

    def wait(self, ids: lmcache_native._types.IntArray, timeout_s: float = 30.0) -> None:
        """
        Waits, without the GIL, until none of the jobs is under way; results still come through poll(). DeadlineExceeded. Unavailable: as poll().
        """

    def wait_layers(self, id: int, layers: int, timeout_s: float = 30.0, stream: int = 0) -> None:
        """
        Of a job submitted with layer_by_layer: the leading `layers` layers of all its items are in place. On the host waits for that, without
        the GIL; with CUDA makes `stream` (a cudaStream_t; 0: legacy default) wait for it, and this thread only until the copies have been
        handed to the device. Returns at once for a job that ended well. Aborted: the job failed (its CopyDone says more; it may write until
        it is polled). DeadlineExceeded; NotFound: no such job; InvalidArgument: not layer by layer, or too many layers.
        """

    def cancel(self, ids: lmcache_native._types.IntArray) -> None:
        """
        Makes the jobs end soon, and returns at once: items not yet started fail, with 'cancelled' in CopyDone.message. Each job still comes
        through poll() once, after which nothing of it is written any more. Unknown and ended ids are ignored.
        """

    @property
    def name(self) -> str:
        """
        'host', or 'cuda-' and 'memcpy', 'batch', 'kernel' or 'staged': for stores and loads, joined by '+' where they differ.
        """

    @property
    def details(self) -> str:
        """
        For a log, in one line: why these paths (the GB/s of each that was measured), what fell back and why, how much of the arena is registered
        with CUDA by now. '' when there is nothing to say.
        """

class DeviceLoadDone:
    """How one job of a DeviceLoader ended."""

    @property
    def id(self) -> int: ...

    @property
    def ok(self) -> bool: ...

    @property
    def bytes(self) -> int:
        """Bytes of pages written."""

    @property
    def seconds(self) -> float:
        """From the start of the first record to the end of the last."""

    @property
    def failed_items(self) -> list[int]:
        """Indexes into the job's records."""

    @property
    def bad_items(self) -> list[int]:
        """
        Those of failed_items whose record does not hold; what else failed says nothing of the record.
        """

    @property
    def message(self) -> str:
        """Why the first of them failed."""

def load_gds_plugin(path: str) -> str:
    """
    Opens liblmcn_gds.so, once in a process, and returns the version of kvikio that it was built for. What it needs is loaded
    before (libkvikio.load_library()). Unavailable says what is missing. lmcache_native.gds does both.
    """

def probe_gds(directory: str, *, plugin: str = '', device: int = -1, bytes: int = 268435456, in_flight: int = 8, measure_without_gds: bool = True) -> dict[str, str | float | bool]:
    """
    Writes and reads a private scratch file in `directory`, which is removed, by O_DIRECT and, with `plugin`, by kvikio: mode
    (gds, compat, none), reason, gds_read, gds_write, host_read, host_write (10^9 bytes per second; 0: not measured), use_gds
    (whether GDS is real and reads faster). measure_without_gds=False: nothing is written where GDS is not real. IoError: the
    directory cannot hold the file.
    """

class DeviceLoader:
    """
    Brings records of the NVMe log into an engine's paged memory without a slot: file, staging memory, verified there, pages.
    Thread-safe; submit() and poll() wait for no I/O. Nothing of a record reaches a page before all of what was read of it was verified.
    Dropping it waits for reads under way.
    """

    @staticmethod
    def host(paged: PagedKvLayout, slot: SlotLayout, *, rank: int = 0, rank_count: int = 1, buffer_bytes: int = 268435456, in_flight: int = 8, files: int = 1, owner: object = None) -> DeviceLoader:
        """
        For paged memory that this process can address. buffer_bytes: staging memory. in_flight: records read at once. files: how many
        files records lie in; each has its share of the reads at once, so that one on a silent drive holds up no other. owner: any object
        to keep alive with the loader (the tensors behind `paged`).
        """

    @staticmethod
    def cuda(paged: PagedKvLayout, slot: SlotLayout, *, device: int = 0, plugin: str = '', rank: int = 0, rank_count: int = 1, buffer_bytes: int = 268435456, in_flight: int = 8, files: int = 1, allow_compat: bool = False, owner: object = None) -> DeviceLoader:
        """
        For paged memory on a CUDA device. plugin: path of liblmcn_gds.so, for GPUDirect Storage; else through host memory. allow_compat: whether kvikio
        without GDS will do. Unavailable: no CUDA, or no GDS. ResourceExhausted: no memory for staging on the device.
        """

    def submit(self, id: int, files: list[str], file_indexes: lmcache_native._types.IntArray, offsets: lmcache_native._types.IntArray, image_bytes: lmcache_native._types.IntArray, keys: lmcache_native._types.Keys, namespace: bytes, region_sequences: lmcache_native._types.IntArray, first_tokens: lmcache_native._types.IntArray, tokens: lmcache_native._types.IntArray, block_begin: lmcache_native._types.IntArray, block_ids: lmcache_native._types.IntArray, token_in_block: lmcache_native._types.IntArray, stream: int = 0, timeout_s: float = 30.0) -> None:
        """
        Starts one job, item i of which is the record at offsets[i] of files[file_indexes[i]], as Store.locate() gives it; the other arguments
        as in PagedCopier.submit(). Items not verified within timeout_s fail. InvalidArgument, and nothing loaded, when something is out of bounds.
        """

    def poll(self) -> list[DeviceLoadDone]:
        """
        Jobs that ended since the last call, each exactly once. Unavailable, when there are none: a CUDA device answers nothing but errors, and
        loads that it may still execute will never end.
        """

    def wait(self, ids: lmcache_native._types.IntArray, timeout_s: float = 30.0) -> None:
        """
        Waits, without the GIL, until none of the jobs is under way; results still come through poll(). DeadlineExceeded.
        """

    def cancel(self, ids: lmcache_native._types.IntArray) -> None:
        """
        Items not yet verified fail soon; returns at once. Each job still comes through poll() once, after which nothing of it is written any more.
        """

    def notes(self) -> list[str]:
        """
        Lines for the log since the last call: that GDS failed and was given up.
        """

    @property
    def name(self) -> str:
        """
        Of all paths, the one furthest from GDS: 'gds', 'gds-compat' or 'host'; 'none' while nothing was read and it is not known.
        """

    @property
    def paths(self) -> dict[str, tuple[str, str]]:
        """
        What last read each file: (name as above, how that is known or why it is not GDS), by path. As cuFile says for the file.
        """

    @property
    def gds_given_up(self) -> bool:
        """It reads through host memory now, though it was made to do better."""

def inspect_store(path: str, namespaces: bool = False) -> dict[str, Any]:
    """
    What a store directory that nobody has open holds. Writes nothing, reads no payload; with `namespaces` one page per record.
    Locked names the pid of whoever has it open; NotFound, InvalidArgument, FormatVersion, Corruption: not a store that can be read.
    Times are seconds since 1970, 0 where unknown.
    """

def verify_store(path: str, progress: Callable[[int, int, int, int], None] | None = None) -> dict[str, Any]:
    """
    Reads every record of a store directory that nobody has open and checks it as a load would. Writes nothing. `bad` has what does not hold.
    progress(records, of_records, bytes, of_bytes): about ten times a second; what it raises, or a signal's handler, ends the call.
    Errors as of inspect_store().
    """

def clear_store(path: str, *, older_than_s: int | None = None, namespace: bytes | None = None) -> dict[str, Any]:
    """
    Takes records out of a store directory that nobody has open, for good: all of them, or those of regions opened at least older_than_s
    ago, or those of one namespace (32 bytes). Errors as of inspect_store(); after IoError call it again.
    """
