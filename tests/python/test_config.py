"""Configuration: precedence, typed errors that name field, value and what is right, and nothing touched on the way."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lmcache_native import config
from lmcache_native.config import GIB, UNLIMITED, NativeConfig, check_machine, resolve
from lmcache_native.errors import InvalidArgument
from lmcache_native.logging import get_logger

pytestmark = pytest.mark.unit

SIZE = {"cpu_bytes_to_use": 2.0 * GIB}  # what --kv-offloading-size 2 becomes


@pytest.fixture
def log() -> Iterator[list[str]]:
    """Messages of the package's logger."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Collect()
    root = get_logger("lmcache_native")
    root.addHandler(handler)
    yield lines
    root.removeHandler(handler)


def wrong(extra: dict[str, object], environ: dict[str, str] | None = None) -> str:
    with pytest.raises(InvalidArgument) as caught:
        resolve(extra, environ or {})
    return str(caught.value)


def test_size_flag_alone_is_a_host_only_store() -> None:
    assert resolve(SIZE, {}) == NativeConfig(host_bytes=2 * GIB)


def test_lmcache_environment() -> None:
    found = resolve(
        SIZE, {"LMCACHE_LOCAL_DISK": "file:///mnt/kv/", "LMCACHE_MAX_LOCAL_DISK_SIZE": "0.5", "LMCACHE_CHUNK_SIZE": "256"}
    )
    assert found.directory == Path("/mnt/kv")
    assert found.nvme_bytes == GIB // 2
    assert found.chunk_tokens == 256


def test_relative_path_is_taken_from_the_working_directory() -> None:
    found = resolve(SIZE | {"local_disk": "file://kv", "max_local_disk_size": 1}, {})
    assert found.directory == Path(os.getcwd()) / "kv"


def test_extra_config_beats_environment_beats_file(tmp_path: Path) -> None:
    file = tmp_path / "lmcache.json"
    file.write_text('{"chunk_size": 64, "lock_wait": 1, "request_ttl": 5, "enable_blending": false}')
    environ = {"LMCACHE_CONFIG_FILE": str(file), "LMCACHE_CHUNK_SIZE": "128", "LMCACHE_LOCK_WAIT": "2"}
    found = resolve(SIZE | {"lmcache.chunk_size": 512}, environ)
    assert (found.chunk_tokens, found.lock_wait_s, found.request_ttl_s) == (512, 2.0, 5.0)


def test_yaml_file(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    file = tmp_path / "lmcache.yaml"
    file.write_text("max_local_cpu_size: 3\nlocal_disk: null\n")
    assert resolve({}, {"LMCACHE_CONFIG_FILE": str(file)}).host_bytes == 3 * GIB


def test_size_flag_beats_max_local_cpu_size_in_any_order() -> None:
    for extra in (SIZE | {"max_local_cpu_size": 9}, {"max_local_cpu_size": 9} | SIZE):
        assert resolve(extra, {"LMCACHE_MAX_LOCAL_CPU_SIZE": "7"}).host_bytes == 2 * GIB


def test_both_spellings_of_keys_and_all_native_keys() -> None:
    found = resolve(
        SIZE
        | {
            "lmcache.local_disk": "/kv",
            "max_local_disk_size": "1.5",
            "io_engine": "threads",
            "region_size": 0.25,
            "promotion_deadline": 0.5,
            "promotion_budget": 1,
            "request_ttl": 60,
            "fail_when_locked": "yes",
            "lock_wait": 0,
            "local_disk_io_timeout": "2.5",
            "local_disk_allow_network": "yes",
            "copy_threads": 4,
            "model_fingerprint": "v7",
            "load_failure_policy": "fail",
            "data_parallel_engines": 2,
            "cache_policy": "LRU",
        },
        {},
    )
    assert found == NativeConfig(
        host_bytes=2 * GIB,
        directories=(Path("/kv"),),
        nvme_bytes=3 * GIB // 2,
        io_engine="threads",
        region_bytes=GIB // 4,
        promotion_deadline_s=0.5,
        promotion_budget_bytes=GIB,
        request_ttl_s=60.0,
        fail_when_locked=True,
        lock_wait_s=0.0,
        nvme_io_timeout_s=2.5,
        allow_network_file_system=True,
        copy_threads=4,
        model_fingerprint="v7",
        load_failure_policy="fail",
        data_parallel_engines=2,
    )


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "big", "1GiB"])
def test_sizes_name_variable_value_and_right(value: str) -> None:
    message = wrong(SIZE, {"LMCACHE_LOCAL_DISK": "/kv", "LMCACHE_MAX_LOCAL_DISK_SIZE": value})
    assert "LMCACHE_MAX_LOCAL_DISK_SIZE" in message
    assert repr(value) in message
    assert "number of GiB greater than 0" in message


@pytest.mark.parametrize("value", [0, 0.0, -5, float("nan"), True, None, "x"])
def test_host_size(value: object) -> None:
    message = wrong({"cpu_bytes_to_use": value})
    assert "--kv-offloading-size" in message
    assert repr(value) in message


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("chunk_size", 0, "whole number"),
        ("chunk_size", 12.5, "whole number"),
        ("chunk_size", 10**400, "whole number"),
        ("io_engine", "uring", "auto, io_uring, threads"),
        ("fail_when_locked", "maybe", "true"),
        ("promotion_deadline", 0, "greater than 0"),
        ("lock_wait", -1, "0 or more"),
        ("local_disk_io_timeout", 0, "greater than 0"),
        ("local_disk_allow_network", "perhaps", "true"),
        ("load_failure_policy", "retry", "recompute, fail"),
        ("copy_threads", 65, "1 to 64"),
        ("local_disk", "s3://bucket/kv", "a directory"),
        ("local_disk", "/a,s3://bucket", "a directory"),
        ("local_disk", "/a,/a", "different directories"),
        ("local_disk", "", "non-empty"),
        ("local_disk", [], "a directory"),
        ("local_disk", 7, "a directory"),
        ("model_fingerprint", 7, "text"),
    ],
)
def test_wrong_values(key: str, value: object, right: str) -> None:
    message = wrong(SIZE | {key: value})
    assert key in message
    assert repr(value) in message
    assert right in message


def test_path_and_size_need_each_other() -> None:
    assert "max_local_disk_size" in wrong(SIZE, {"LMCACHE_LOCAL_DISK": "/kv"})
    assert "local_disk" in wrong(SIZE, {"LMCACHE_MAX_LOCAL_DISK_SIZE": "1"})


def test_no_host_size_says_how_to_give_one() -> None:
    assert "--kv-offloading-size" in wrong({})


def test_unknown_extra_key_is_an_error_with_the_nearest_name() -> None:
    assert "did you mean max_local_disk_size?" in wrong(SIZE | {"max_local_disk_sze": 1})
    assert "did you mean blocks_per_chunk?" in wrong(SIZE | {"block_per_chunk": 1})
    assert "did you mean" not in wrong(SIZE | {"zzz": 1})


def test_vllm_keys_pass() -> None:
    keys = {"block_size": 256, "spec_name": "NativeOffloadingSpec", "offload_prompt_only": False, "self_describing_kv_events": True}
    assert resolve(SIZE | keys, {}).host_bytes == 2 * GIB


def test_what_is_ignored_is_named_once(log: list[str]) -> None:
    extra = SIZE | {"store_threshold": 2, "enable_telemetry": False, "lmcache.mp.host": "x", "lmcache.enable_async_loading": False}
    environ = {"LMCACHE_NATIVE": "1", "LMCACHE_LOG_LEVEL": "INFO", "LMCACHE_EC_CHUNK_SIZE": "1"}
    resolve(extra, environ)
    assert log == []
    resolve(extra, environ, warn=True)
    accepted = "LMCACHE_EC_CHUNK_SIZE, lmcache.enable_async_loading, lmcache.mp.host"
    assert log == ["ignored, no meaning here: store_threshold", "without effect, and not needed here: " + accepted]


def test_unknown_environment_is_a_warning_with_the_nearest_name(log: list[str]) -> None:
    resolve(SIZE, {"LMCACHE_CHUNK_SIZ": "8"}, warn=True)
    assert log == ["environment variable LMCACHE_CHUNK_SIZ is not known; did you mean LMCACHE_CHUNK_SIZE?"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[1]", "names and values"),
        ("a.json", "{", "not JSON"),
        ("a.json", '{"chnk_size": 1}', "did you mean chunk_size?"),
        ("a.yaml", "a: [", "not YAML"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    if name.endswith(".yaml"):
        pytest.importorskip("yaml")
    file = tmp_path / name
    file.write_text(text)
    assert message in wrong(SIZE, {"LMCACHE_CONFIG_FILE": str(file)})


def test_missing_file(tmp_path: Path) -> None:
    assert "No such file" in wrong(SIZE, {"LMCACHE_CONFIG_FILE": str(tmp_path / "none.yaml")})


# ---- the machine --------------------------------------------------------------------------------------------------------


def test_machine_accepts_a_path_that_is_not_there_and_creates_nothing(tmp_path: Path) -> None:
    check_machine(NativeConfig(host_bytes=GIB, directories=(tmp_path / "a" / "b",), nvme_bytes=1 << 20))
    assert list(tmp_path.iterdir()) == []


def test_host_size_beyond_memory() -> None:
    with pytest.raises(InvalidArgument, match=r"host size .* may use .* of memory"):
        check_machine(NativeConfig(host_bytes=config.memory_limit_bytes() + 1))


def test_nvme_limit_beyond_the_file_system(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"max_local_disk_size=1e\+06.*GiB in all"):
        check_machine(NativeConfig(host_bytes=GIB, directories=(tmp_path,), nvme_bytes=10**6 * GIB))


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "kv").write_text("")
    with pytest.raises(InvalidArgument, match="is not a directory"):
        check_machine(NativeConfig(host_bytes=GIB, directories=(tmp_path / "kv" / "deeper",), nvme_bytes=1 << 20))


def test_a_place_nobody_may_write() -> None:
    with pytest.raises(InvalidArgument, match="no permission to write in /proc"):
        check_machine(NativeConfig(host_bytes=GIB, directories=(Path("/proc/sys/kernel/kv"),), nvme_bytes=1 << 20))


def test_every_directory_is_checked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="is not a directory"):
        check_machine(NativeConfig(host_bytes=GIB, directories=(tmp_path / "kv", tmp_path / "file"), nvme_bytes=1 << 20))


def test_directories_on_one_file_system_share_its_size(tmp_path: Path) -> None:
    both = (tmp_path / "a", tmp_path / "b")
    total = shutil.disk_usage(tmp_path).total
    with pytest.raises(InvalidArgument, match="GiB in all"):
        check_machine(NativeConfig(host_bytes=GIB, directories=both, nvme_bytes=total + 2))
    # Of three engines two are in `a` and one in `b`: everything fits exactly.
    check_machine(
        NativeConfig(host_bytes=GIB, directories=both, nvme_bytes=total - total % 3, data_parallel_engines=3, striped=False)
    )
    check_machine(NativeConfig(host_bytes=GIB, directories=both, nvme_bytes=total))


def test_engines_divide_the_limit() -> None:
    whole = NativeConfig(host_bytes=GIB, directories=(Path("/kv"),), nvme_bytes=10 * GIB)
    assert config.engine_directories(whole, 1) == (Path("/kv/vllm-dp1"),)
    assert config.engine_nvme_bytes(whole, 4) * 4 <= whole.nvme_bytes
    assert config.engine_directories(NativeConfig(host_bytes=GIB), 0) == ()
    assert config.engine_daily_bytes(whole, 4) == shutil.disk_usage("/").total // 4
    assert config.engine_daily_bytes(NativeConfig(host_bytes=GIB), 4) == 0
    assert config.engine_daily_bytes(replace(whole, nvme_daily_bytes=GIB), 4) == GIB // 4
    assert config.engine_daily_bytes(replace(whole, nvme_daily_bytes=UNLIMITED), 4) == UNLIMITED


def test_engines_stripe_over_all_directories() -> None:
    several = NativeConfig(host_bytes=GIB, directories=(Path("/a"), Path("/b")), nvme_bytes=GIB)
    assert config.engine_directories(several, 1) == (Path("/a/vllm-dp1"), Path("/b/vllm-dp1"))


def test_engines_take_directories_in_turn() -> None:
    several = NativeConfig(host_bytes=GIB, directories=(Path("/a"), Path("/b")), nvme_bytes=GIB, striped=False)
    assert several.directory == Path("/a")
    assert NativeConfig(host_bytes=GIB).directory is None
    found = [config.engine_directories(several, i) for i in range(3)]
    assert found == [(Path("/a/vllm-dp0"),), (Path("/b/vllm-dp1"),), (Path("/a/vllm-dp2"),)]


def test_available_memory_is_some_of_what_there_is() -> None:
    assert 0 < config.available_memory_bytes() < config.memory_limit_bytes()


def test_page_cache_of_a_control_group_is_available(tmp_path: Path) -> None:
    from lmcache_native.config.machine import _inactive_file_bytes

    stat = tmp_path / "memory.stat"
    assert _inactive_file_bytes(stat) == 0
    stat.write_text("anon 5\ninactive_file 4096\n")
    assert _inactive_file_bytes(stat) == 4096
    stat.write_text("inactive_file 4096\ntotal_inactive_file 8192\n")  # version 1: with all below it
    assert _inactive_file_bytes(stat) == 8192


@pytest.mark.parametrize("word", ["None", "null", "true"])
def test_a_word_is_not_a_directory(word: str) -> None:
    with pytest.raises(InvalidArgument, match=f"LMCACHE_LOCAL_DISK='{word}'"):
        resolve({"max_local_cpu_size": 1, "max_local_disk_size": 1}, {"LMCACHE_LOCAL_DISK": word})
