"""Configurations of any content end in a NativeConfig that can be used or in an error of this package, never in another exception.

    python tests/fuzz/fuzz_config.py [LIBFUZZER ARGUMENTS...]

needs atheris and an installed lmcache_native. A finding ends it; the input is kept as crash-... and can be given as an argument.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["lmcache_native.config"]):
    from lmcache_native.config import NativeConfig, Profile, explain, resolve
    from lmcache_native.config.sources import TABLE
from lmcache_native.errors import InvalidArgument, LmcacheNativeError, Unsupported

difflib.get_close_matches = lambda *_args, **_options: []  # takes most of the time and is not ours

SCRATCH = Path(tempfile.mkdtemp(prefix="lmcn_fuzz_"))  # stays: the fuzzer ends the process; run.sh removes it

NAMES = [*sorted({row.name.removesuffix("*") for row in TABLE.rows}), "no_such_key", "", "lmcache.chunk_size", "extra_config"]
NUMBERS = [0, 1, -1, 2, 5, 0.5, 1e-12, 1e9, 1e20, 1e300, 1 << 63, 1 << 64, 10**400, 16**6000, math.inf, math.nan, -0.0, True, False]
TEXTS = [
    *("", " ", "null", "None", "true", "off", "auto", "manual", "1", "1e20", "1e400", "nan", "-inf", "0x10", "1_000", "\u0661"),
    *("/kv", "~", "~nobody-of-that-name/x", "file:///kv", "a,b", "a,,b", "/a,/a", "[", "{", "[]", "{}", '["/a"]', "{'0': 0}"),
    *("\0", "~\0", "/a\0b", "\ud800", "~\ud800", '"quoted"', "'", "[" * 3000, "{'a':" * 500, "9" * 5000, "LRU", "LocalDiskBackend"),
]
YAML = [
    *("a: [", "? [a]\n: b", "- 1", "x: 2020-13-45", "chunk_size: !!int x", "chunk_size: !!float x", "&a [*a]", "a: &a [*a]"),
    *("[" * 3000, "{a: " * 2000, "chunk_size: " + "9" * 5000, "extra_config: &e {a: *e}", "<<: 3", "%YAML 9"),
    *("chunk_size: 0x" + "f" * 6000, "{0x" + "f" * 6000 + ": 1}", "!!python/object:x {}", "local_disk: &d [*d]"),
    *("x: 0001-01-01T00:00:00-99:99", "chunk_size: 1:99", "x: !!binary \u00fc", "x: !!timestamp y", "\ufeff"),
]

# A value of each kind that is right alone, for what overrides a wrong one.
RIGHT: dict[str, Any] = {
    "max_local_cpu_size": 2,
    "chunk_size": 128,
    "promotion_budget": 1,
    "region_size": 0.5,
    "io_engine": "threads",
    "lock_wait": 3,
    "cache_policy": "FIFO",
    "request_ttl": 9,
    "copy_threads": 2,
    "fail_when_locked": True,
}


def value(data: Any, depth: int = 0) -> Any:
    kind = data.ConsumeIntInRange(0, 9 if depth < 3 else 5)
    if kind == 0:
        return None
    if kind in (1, 2):
        return data.PickValueInList(NUMBERS)
    if kind in (3, 4):
        return data.PickValueInList(TEXTS)
    if kind == 5:
        return text(data)
    if kind == 6:
        return data.ConsumeFloat() if data.ConsumeBool() else data.ConsumeInt(9)
    if kind == 7:
        return [value(data, depth + 1) for _ in range(data.ConsumeIntInRange(0, 3))]
    return {name(data): value(data, depth + 1) for _ in range(data.ConsumeIntInRange(0, 3))}


def name(data: Any) -> str:
    return text(data) if data.ConsumeIntInRange(0, 15) == 0 else str(data.PickValueInList(NAMES))


def text(data: Any) -> str:
    return str(data.ConsumeUnicode(data.ConsumeIntInRange(0, 12)))


def named(data: Any) -> dict[str, Any]:
    return {name(data): value(data) for _ in range(data.ConsumeIntInRange(0, 4))}


def as_json(content: dict[str, Any]) -> str:
    digits = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(content)
    finally:
        sys.set_int_max_str_digits(digits)


def write_file(data: Any) -> str | None:
    kind = data.ConsumeIntInRange(0, 6)
    if kind <= 1:
        return None
    if kind == 2:
        content = text(data) + data.PickValueInList(YAML) + text(data)
    elif kind == 3:
        content = "\n".join(f"{key}: {data.PickValueInList(TEXTS)}" for key in named(data))
    else:
        content = as_json(named(data))  # YAML too, nearly always
    path = SCRATCH / ("config.json" if kind == 6 else "config.yaml")
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    return str(path)


def environment(data: Any) -> dict[str, str]:
    environ = {
        "LMCACHE_" + name(data).upper(): str(data.PickValueInList(TEXTS)) if data.ConsumeBool() else text(data)
        for _ in range(data.ConsumeIntInRange(0, 3))
    }
    environ.pop("LMCACHE_CONFIG_FILE", None)
    path = write_file(data)
    if path is not None:
        environ["LMCACHE_CONFIG_FILE"] = path
    return environ


def check_usable(config: NativeConfig) -> None:
    """What the C++ side takes without an error of its own type conversion."""
    assert 1 <= config.host_bytes < 1 << 62
    for count in (config.nvme_bytes, config.region_bytes, config.promotion_budget_bytes):
        assert isinstance(count, int), config
        assert 0 <= count < 1 << 62, config
    for seconds in (config.promotion_deadline_s, config.request_ttl_s, config.lock_wait_s, config.load_timeout_s):
        assert 0 <= seconds <= 1e9, config
    assert not config.directory_bytes or sum(config.directory_bytes) == config.nvme_bytes, config
    assert len(config.directory_bytes) in (0, len(config.directories)), config
    assert bool(config.directories) == (config.nvme_bytes > 0), config
    for directory in config.directories:
        assert directory.is_absolute(), config
        assert b"\0" not in os.fsencode(directory), config
    assert 1 <= config.copy_threads <= 1 << 16
    assert config.hit_miss_ratio is None or 0 <= config.hit_miss_ratio <= 1


def outcome(extra: dict[str, Any], environ: dict[str, str], profile: Profile) -> NativeConfig | None:
    try:
        config = resolve(extra, environ, profile=profile)
    except (InvalidArgument, Unsupported):
        return None
    check_usable(config)
    return config


def check_overridden(data: Any, profile: Profile) -> None:
    """A weaker source's value of a key changes nothing where a stronger one gives that key."""
    key = data.PickValueInList(sorted(RIGHT))
    strong = {"max_local_cpu_size": 1, key: RIGHT[key]}
    alone = resolve(strong, {}, profile=profile)
    weak = str(data.PickValueInList(TEXTS)) if data.ConsumeBool() else text(data)
    found = resolve(strong, {"LMCACHE_" + key.upper(): weak}, profile=profile)
    assert found == alone, (key, weak)


def test_one_input(raw: bytes) -> None:
    data = atheris.FuzzedDataProvider(raw)
    profile = data.PickValueInList(list(Profile))
    if data.ConsumeIntInRange(0, 7) == 0:
        check_overridden(data, profile)
        return
    extra = named(data)
    if data.ConsumeBool():
        extra.setdefault("max_local_cpu_size", 1)
    environ = environment(data)
    config = outcome(extra, environ, profile)
    try:
        lines = explain(extra, environ, profile)
        assert config is not None
        assert all(isinstance(part, str) for line in lines for part in line)
    except LmcacheNativeError:
        assert config is None


def main() -> None:
    arguments = [sys.argv[0], "-max_total_time=60", "-timeout=120", "-max_len=512", "-len_control=0", *sys.argv[1:]]
    atheris.Setup(arguments, test_one_input)
    atheris.Fuzz()  # ends the process


if __name__ == "__main__":
    main()
