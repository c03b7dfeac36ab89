"""What a configuration is: the checked values in base units, and the parsers that turn what a user wrote into them."""

from __future__ import annotations

import ast
import enum
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcache_native.errors import InvalidArgument, Unsupported

GIB = 1 << 30
ENV_PREFIX = "LMCACHE_"
EXTRA_PREFIX = "lmcache."

MAX_SHOWN = 500  # characters of a wrong value in a message

IO_ENGINES = ("auto", "io_uring", "threads")
ADMISSIONS = ("auto", "always", "second_touch")
VERIFY = ("off", "nvme", "all")
USE_GDS = ("auto", "on", "off")
UNLIMITED = (1 << 64) - 1
LOAD_FAILURE_POLICIES = ("recompute", "fail")
# What LMCache 0.5.6 and vLLM 0.32 together know.
HASH_ALGORITHMS = ("builtin", "sha256", "sha256_cbor", "sha256_cbor_64bit", "xxhash", "xxhash_cbor", "blake3")
HOST_LOCATION = "LocalCPUBackend"
NVME_LOCATION = "LocalDiskBackend"

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})
FLAG_WORDS = "one of 1, true, yes, on, 0, false, no, off"


class Profile(enum.Enum):
    """The connector a configuration is for: it decides the defaults and which keys have an effect."""

    OFFLOADING = "offloading"  # NativeOffloadingConnector: a host size is required, a chunk is the engine's block
    LMCACHE = "lmcache"  # LMCacheNativeConnector: LMCache's defaults, 5 GiB and 256 tokens


@dataclass(frozen=True, slots=True)
class NativeConfig:
    """Checked values, in base units. `directories` are the user's paths; each engine uses a directory of its own below one."""

    host_bytes: int
    directories: tuple[Path, ...] = ()
    striped: bool = True  # each engine uses all `directories`; else they take them in turn
    nvme_bytes: int = 0  # of all engines below all `directories` together
    directory_bytes: tuple[int, ...] = ()  # of all engines below each of `directories`, nvme_bytes in all; (): even shares
    chunk_tokens: int | None = None  # None: the engine's block
    cache_policy: str = "LRU"
    io_engine: str = "auto"
    admission: str = "auto"
    verify: str = "nvme"
    nvme_daily_bytes: int = 0  # of all engines; 0: as much as the file systems hold; UNLIMITED
    nvme_free_floor_bytes: int = 256 << 20
    write_deadline_s: float = 10.0
    region_bytes: int = 0  # 0: the store chooses
    promotion_deadline_s: float = 10.0
    promotion_budget_bytes: int = 0  # per request; 0: half of host_bytes
    request_ttl_s: float = 30.0
    fail_when_locked: bool = False
    lock_wait_s: float = 10.0
    nvme_io_timeout_s: float = 30.0
    allow_network_file_system: bool = False
    copy_threads: int = 1
    model_fingerprint: str | None = None
    load_failure_policy: str = "recompute"
    data_parallel_engines: int | None = None  # engines that share `directories` on this node; None: not said
    async_loading: bool = True
    layerwise: bool = False  # implies not async_loading
    save_decode: bool = False
    save_partial_chunk: bool = False
    min_retrieve_tokens: int = 0
    priority_limit: int | None = None  # requests of a larger priority value are not stored
    hit_miss_ratio: float | None = None  # 0..1: no more than this part of a prompt is ever a hit
    load_timeout_s: float = 10.0  # of a synchronous load
    kv_events: bool = False
    retrieve_nvme: bool = True  # False: what is on NVMe is not looked up
    skip_save: bool = False  # load only
    numa_nodes: tuple[int, ...] | None = None  # where host memory shall lie; None: not said
    numa_auto: bool = False  # the nodes of the engine's GPUs
    hugetlb: bool = False
    python_gc: bool = True
    log_requests: bool = False  # a line for each request at INFO, else at DEBUG
    instance_id: str | None = None
    use_gds: str = "auto"  # whether workers read NVMe by GPUDirect Storage: auto (where it is faster), on, off
    gds_buffer_bytes: int = 256 << 20  # device memory that records are read into

    @property
    def directory(self) -> Path | None:
        """The first of `directories`."""
        return self.directories[0] if self.directories else None


@dataclass(frozen=True, slots=True)
class Given:
    """A value and where it came from, for messages."""

    name: str
    value: object
    source: str

    def wrong(self, right: str) -> InvalidArgument:
        return InvalidArgument(self.must_be(right))

    def unsupported(self, right: str) -> Unsupported:
        return Unsupported(self.must_be(right))

    def must_be(self, right: str) -> str:
        shown = repr(self.value)
        if len(shown) > MAX_SHOWN:
            shown = f"{shown[:MAX_SHOWN]}... ({len(shown)} characters)"
        return f"{self.name}={shown} ({self.source}): must be {right}"


Parser = Callable[[Given], Any]


# ---- numbers ------------------------------------------------------------------------------------------------------------


def _number(given: Given, right: str) -> float:
    value = given.value
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise given.wrong(right)
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise given.wrong(right) from None
    if not math.isfinite(number):
        raise given.wrong(right)
    return number


# Above any machine, below where bytes and clock ticks stop fitting into 64 bits.
MAX_GIB = 1 << 24
MAX_SECONDS = 1_000_000_000

SIZE_WORDS = "a number of GiB greater than 0, for example 100"


def _within(given: Given, number: float, largest: int, unit: str) -> float:
    if number > largest:
        raise given.wrong(f"at most {largest} {unit}")
    return number


def _gib(given: Given, right: str, smallest_bytes: int) -> int:
    number = _number(given, right)
    if number < 0:
        raise given.wrong(right)
    count = int(_within(given, number, MAX_GIB, "GiB") * GIB)
    if count < smallest_bytes:
        raise given.wrong(right if number == 0 else f"{right}: this is less than a byte")
    return count


def size(given: Given) -> int:
    """GiB -> bytes."""
    return _gib(given, SIZE_WORDS, 1)


def size_or_zero(given: Given) -> int:
    """GiB -> bytes; the caller gives 0 its meaning."""
    return _gib(given, SIZE_WORDS, 0)


def sizes(given: Given) -> tuple[int, ...]:
    """A list of GiB, or text with commas -> bytes."""
    right = "a number of GiB greater than 0 for each directory of local_disk, for example 100,400"
    value = given.value
    if isinstance(value, str):
        value = _literal(value) if value.strip().startswith("[") else value.split(",")
    if not isinstance(value, (list, tuple)) or not value:
        raise given.wrong(right)
    return tuple(_gib(Given(given.name, word, given.source), right, 1) for word in value)


def reserve(given: Given) -> int:
    return _gib(given, "a number of GiB, 0 or more", 0)


def daily_size(given: Given) -> int:
    """GiB -> bytes."""
    if isinstance(given.value, str) and given.value.strip().lower() == "unlimited":
        return UNLIMITED
    right = "a number of GiB greater than 0, or unlimited"
    number = _number(given, right)
    if number <= 0 or number * GIB >= UNLIMITED:
        raise given.wrong(right)
    return int(number * GIB)


def striped(given: Given) -> bool:
    if given.value not in ("by_gpu", "by_engine"):
        raise given.wrong("one of by_gpu, by_engine")
    return given.value == "by_gpu"


def byte_count(given: Given) -> int:
    right = "a number of bytes greater than 0 (--kv-offloading-size takes GiB and fills it in)"
    number = _number(given, right)
    if number < 1:
        raise given.wrong(right)
    return int(_within(given, number, MAX_GIB * GIB, "bytes"))


def seconds(given: Given) -> float:
    right = "a number of seconds greater than 0"
    number = _number(given, right)
    if number <= 0:
        raise given.wrong(right)
    return _within(given, number, MAX_SECONDS, "seconds")


def seconds_or_zero(given: Given) -> float:
    right = "a number of seconds, 0 or more"
    number = _number(given, right)
    if number < 0:
        raise given.wrong(right)
    return _within(given, number, MAX_SECONDS, "seconds")


def milliseconds(given: Given) -> float:
    """ms -> seconds."""
    right = "a number of milliseconds greater than 0"
    number = _number(given, right)
    if number <= 0:
        raise given.wrong(right)
    return _within(given, number, MAX_SECONDS * 1000, "milliseconds") / 1000


def whole(first: int | None = None, last: int | None = None) -> Parser:
    if first is not None and last is not None:
        right = f"a whole number from {first} to {last}"
    elif first is not None:
        right = f"a whole number, {first} or more"
    else:
        right = "a whole number"

    def parse(given: Given) -> int:
        number = _number(given, right)
        if number != int(number) or (first is not None and number < first) or (last is not None and number > last):
            raise given.wrong(right)
        return int(number)

    return parse


def ratio(given: Given) -> float:
    right = "a number from 0 to 1"
    number = _number(given, right)
    if not 0 <= number <= 1:
        raise given.wrong(right)
    return number


# ---- words --------------------------------------------------------------------------------------------------------------


def flag(given: Given) -> bool:
    value = parse_flag(given.value)
    if value is None:
        raise given.wrong(FLAG_WORDS)
    return value


def parse_flag(value: object) -> bool | None:
    """True or False for the usual spellings, None for anything else."""
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in _TRUE:
        return True
    return False if text in _FALSE else None


def text(given: Given) -> str:
    if not isinstance(given.value, str) or not given.value.strip():
        raise given.wrong("a non-empty text")
    return given.value.strip()


def use_gds(given: Given) -> str:
    """LMCache's flag means: if it can be."""
    flag = parse_flag(given.value)
    word = str(given.value).strip().lower()
    if word in USE_GDS:
        return word
    if flag is None:
        raise given.wrong("one of auto, on, off (LMCache's true is auto, its false is off)")
    return "auto" if flag else "off"


def mebibytes(given: Given) -> int:
    """MiB -> bytes."""
    return int(whole(1, 1 << 20)(given)) << 20


def one_of(*choices: str) -> Parser:
    def parse(given: Given) -> str:
        if given.value not in choices:
            raise given.wrong("one of " + ", ".join(choices))
        return str(given.value)

    return parse


def numa_mode(given: Given) -> str | None:
    value = str(given.value).strip().lower()
    if value in ("null", "none"):
        return None
    if value not in ("auto", "manual"):
        raise given.wrong("one of auto, manual, null")
    return value


# ---- lists and mappings -------------------------------------------------------------------------------------------------


def _words(given: Given, right: str) -> list[str]:
    """A list, JSON text of one, or text with commas."""
    value = given.value
    if isinstance(value, str):
        value = _literal(value) if value.strip().startswith("[") else value.split(",")
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(word, str) for word in value):
        raise given.wrong(right)
    return [word.strip() for word in value]


def directories(given: Given) -> tuple[Path, ...]:
    """One path, a list, or text with commas; each may begin with file://. Absolute afterwards, in the user's order."""
    right = "a directory, for example /mnt/nvme/kv or file:///mnt/nvme/kv (or several, separated by commas)"
    if isinstance(given.value, str) and not given.value.strip():
        raise given.wrong("a non-empty text")
    paths = []
    for word in _words(given, right):
        path = word.removeprefix("file://")
        if "://" in path or not path or path.lower() in ("none", "null", "true", "false"):
            raise given.wrong(right)
        paths.append(_absolute(given, path))
    if len(set(paths)) != len(paths):
        raise given.wrong("different directories")
    return tuple(paths)


def _absolute(given: Given, path: str) -> Path:
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError("it holds a zero byte")
        return Path(os.path.abspath(os.path.expanduser(path)))
    except ValueError as error:
        raise given.wrong(f"a path: {error}") from error


def retrieves_nvme(given: Given) -> bool:
    """retrieve_locations -> whether NVMe is among them."""
    right = f"a list of {HOST_LOCATION} and {NVME_LOCATION}"
    names = _words(given, right)
    if HOST_LOCATION not in names or not set(names) <= {HOST_LOCATION, NVME_LOCATION}:
        raise given.unsupported(f"{HOST_LOCATION}, or {HOST_LOCATION} and {NVME_LOCATION}: there are no other locations")
    return NVME_LOCATION in names


def mapping(given: Given) -> Mapping[str, Any]:
    """A mapping, or text of one in JSON (or as Python writes it). Its names become text."""
    value = _literal(given.value) if isinstance(given.value, str) else given.value
    if not isinstance(value, Mapping):
        raise given.wrong('names and values, for example {"use_odirect": true}')
    return {str(name): item for name, item in value.items()}


def numa_nodes(given: Given) -> tuple[int, ...]:
    """{gpu: node} -> the nodes, each once, in ascending order."""
    right = "a mapping of GPU numbers to NUMA nodes, for example {0: 0, 1: 1}"
    value = _literal(given.value) if isinstance(given.value, str) else given.value
    if not isinstance(value, Mapping) or not value:
        raise given.wrong(right)
    node = whole(0, 1023)
    return tuple(sorted({node(Given(f"{given.name}[{gpu}]", item, given.source)) for gpu, item in value.items()}))


def _literal(value: str) -> object:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value  # not a list or mapping: the caller's message shows it
