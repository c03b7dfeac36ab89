"""What tests/fuzz/fuzz_config.py found: values of any kind end in a configuration that can be used or in a typed error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmcache_native.config import NativeConfig, Profile, explain, resolve
from lmcache_native.config.merge import evaluate
from lmcache_native.errors import InvalidArgument, Unsupported

SIZE: dict[str, Any] = {"max_local_cpu_size": 1}


def from_file(tmp_path: Path, text: str, extra: dict[str, Any] = SIZE, name: str = "config.yaml") -> NativeConfig:
    if name.endswith(".yaml"):
        pytest.importorskip("yaml")
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return resolve(extra, {"LMCACHE_CONFIG_FILE": str(path)}, profile=Profile.LMCACHE)


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("chunk_size", "many", 128),
        ("max_local_cpu_size", "-1", 2),
        ("fail_when_locked", "perhaps", True),
        ("retrieve_locations", "RemoteBackend", ["LocalCPUBackend"]),  # unsupported, not invalid
    ],
)
def test_a_wrong_value_that_a_later_source_overrides_is_a_warning(key: str, wrong: str, right: object) -> None:
    environ = {"LMCACHE_" + key.upper(): wrong}
    extra = SIZE | {key: right}
    with pytest.raises((InvalidArgument, Unsupported), match=wrong):
        resolve({name: value for name, value in extra.items() if name != key}, environ, profile=Profile.LMCACHE)
    found = evaluate(extra, environ, Profile.LMCACHE)
    assert found.config == resolve(extra, {}, profile=Profile.LMCACHE)
    (warning,) = found.warnings
    assert wrong in warning
    assert f"{key} (kv_connector_extra_config) wins over it" in warning


def test_the_size_flag_overrides_a_wrong_size_under_its_other_name() -> None:
    config = resolve({"cpu_bytes_to_use": 1 << 30}, {"LMCACHE_MAX_LOCAL_CPU_SIZE": "much"})
    assert config.host_bytes == 1 << 30


def test_a_wrong_value_of_a_later_source_is_an_error_whatever_an_earlier_one_says() -> None:
    with pytest.raises(InvalidArgument, match="chunk_size='many'"):
        resolve(SIZE | {"chunk_size": "many"}, {"LMCACHE_CHUNK_SIZE": "128"}, profile=Profile.LMCACHE)


@pytest.mark.parametrize("key", ["promotion_budget", "max_local_cpu_size", "region_size", "reserve_local_cpu_size"])
@pytest.mark.parametrize("number", [1e20, 1 << 64, "1e300", 1 << 25])
def test_sizes_that_do_not_fit_into_64_bits(key: str, number: object) -> None:
    with pytest.raises(InvalidArgument, match=rf"{key}=.*: must be at most 16777216 GiB"):
        resolve(SIZE | {key: number}, {}, profile=Profile.LMCACHE)


@pytest.mark.parametrize("key", ["promotion_budget", "region_size", "max_local_cpu_size"])
def test_a_size_of_less_than_a_byte_does_not_become_zero(key: str) -> None:
    with pytest.raises(InvalidArgument, match=f"{key}=1e-12.*less than a byte"):
        resolve(SIZE | {key: 1e-12}, {}, profile=Profile.LMCACHE)


@pytest.mark.parametrize("key", ["lock_wait", "request_ttl"])
def test_times_beyond_the_clock(key: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"{key}=1e\+300.*: must be at most 1000000000 seconds"):
        resolve(SIZE | {key: 1e300}, {}, profile=Profile.LMCACHE)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 3000,
        "{a: " * 3000,
        "x: 2020-13-45",
        "chunk_size: !!int x",
        "chunk_size: " + "9" * 5000,
        "x: !!timestamp y",
    ],
    ids=["lists", "mappings", "date", "int", "digits", "timestamp"],
)
def test_yaml_that_cannot_be_built(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidArgument, match="not YAML"):
        from_file(tmp_path, text)


def test_json_nested_deeply(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="not JSON"):
        from_file(tmp_path, "[" * 100_000, name="config.json")


def test_text_nested_deeply() -> None:
    with pytest.raises(InvalidArgument, match=r"^LMCACHE_EXTRA_CONFIG=.{500}\.\.\. \(.* characters\) \(environment\)"):
        resolve(SIZE, {"LMCACHE_EXTRA_CONFIG": "{'a':" * 50_000}, profile=Profile.LMCACHE)


@pytest.mark.parametrize("key", ["chunk_size", "remote_url", "save_decode_cache", "extra_config"])
def test_an_integer_that_cannot_be_written_in_decimal(tmp_path: Path, key: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"{key}.*: must not hold integers of more than 1000 digits"):
        from_file(tmp_path, f"{key}: 0x{'f' * 6000}")
    with pytest.raises(InvalidArgument, match=key):
        explain(SIZE | {key: [{"deep": 10**5000}]}, {}, Profile.LMCACHE)


def test_yaml_that_holds_itself(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="local_disk"):
        from_file(tmp_path, "local_disk: &d [*d]\nmax_local_disk_size: 1")


@pytest.mark.parametrize("path", ["/a\0b", "~\0", "/a\ud8ff"])
def test_a_path_that_no_file_system_takes(path: str) -> None:
    with pytest.raises(InvalidArgument, match=r"local_disk=.*: must be a path"):
        resolve(SIZE | {"local_disk": path, "max_local_disk_size": 1}, {})
    with pytest.raises(InvalidArgument, match="LMCACHE_CONFIG_FILE"):
        resolve(SIZE, {"LMCACHE_CONFIG_FILE": path})


def test_no_disk_makes_its_size_meaningless(tmp_path: Path) -> None:
    """LMCache's example files say both."""
    text = "local_disk: null\nmax_local_disk_size: 5\n"
    config = from_file(tmp_path, text)
    assert (config.directories, config.nvme_bytes) == ((), 0)
    found = evaluate(SIZE | {"local_disk": None, "max_local_disk_size": 5}, {}, Profile.LMCACHE)
    assert found.accepted == ["max_local_disk_size"]
    (line,) = [line for line in found.explained if line.key == "max_local_disk_size"]
    assert line.value == "0"
    assert line.source == "local_disk: null (kv_connector_extra_config)"
    with pytest.raises(InvalidArgument, match="left out without local_disk"):
        resolve(SIZE | {"max_local_disk_size": 5}, {})
