"""Where values come from: every source against every other, LMCache's files and variables as they are, all errors at once."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmcache_native.config import GIB, NativeConfig, Profile, explain, resolve
from lmcache_native.errors import InvalidArgument, Unsupported

pytestmark = pytest.mark.unit

Sources = tuple[dict[str, Any], dict[str, str]]  # kv_connector_extra_config, environment


def no_sources(tmp_path: Path, value: Any) -> Sources:
    return {}, {}


def in_file(tmp_path: Path, value: Any) -> Sources:
    file = tmp_path / "lmcache.json"
    file.write_text(json.dumps({"max_local_cpu_size": value}))
    return {}, {"LMCACHE_CONFIG_FILE": str(file)}


def in_environment(tmp_path: Path, value: Any) -> Sources:
    return {}, {"LMCACHE_MAX_LOCAL_CPU_SIZE": str(value)}


def in_extra_config(tmp_path: Path, value: Any) -> Sources:
    return {"max_local_cpu_size": value}, {}


def in_extra_config_with_prefix(tmp_path: Path, value: Any) -> Sources:
    return {"lmcache.max_local_cpu_size": value}, {}


def as_size_flag(tmp_path: Path, value: Any) -> Sources:
    return {"cpu_bytes_to_use": value * GIB}, {}


Source = Callable[[Path, Any], Sources]
WEAK_TO_STRONG: list[Source] = [no_sources, in_file, in_environment, in_extra_config, as_size_flag]
PAIRS = [*itertools.combinations(WEAK_TO_STRONG, 2), (in_environment, in_extra_config_with_prefix)]


@pytest.mark.parametrize(("weak", "strong"), PAIRS, ids=lambda source: source.__name__)
def test_the_later_source_wins(tmp_path: Path, weak: Source, strong: Source) -> None:
    weak_extra, weak_environ = weak(tmp_path, 2)
    extra, environ = strong(tmp_path, 3)
    for merged in (weak_extra | extra, extra | weak_extra):
        assert resolve(merged, weak_environ | environ, profile=Profile.LMCACHE).host_bytes == 3 * GIB


def test_all_at_once(tmp_path: Path) -> None:
    extra: dict[str, Any] = {}
    environ: dict[str, str] = {}
    for size, source in enumerate(WEAK_TO_STRONG, 1):
        more_extra, more_environ = source(tmp_path, size)
        extra |= more_extra
        environ |= more_environ
        default = 5 * GIB
        found = resolve(extra, environ, profile=Profile.LMCACHE).host_bytes
        assert found == (default if source is no_sources else size * GIB)


def test_a_later_source_takes_an_unsupported_key_back(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"enable_p2p": true, "p2p_host": "h"}')
    environ = {"LMCACHE_CONFIG_FILE": str(file)}
    with pytest.raises(Unsupported, match=r"enable_p2p=True .*a\.json"):
        resolve({}, environ, profile=Profile.LMCACHE)
    resolve({}, environ | {"LMCACHE_ENABLE_P2P": "false"}, profile=Profile.LMCACHE)


def test_empty_variables_and_nulls_are_absent(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"chunk_size": 64}')
    environ = {"LMCACHE_CONFIG_FILE": str(file), "LMCACHE_CHUNK_SIZE": ""}
    assert resolve({"chunk_size": None}, environ, profile=Profile.LMCACHE).chunk_tokens == 64


def test_unknown_names(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"max_local_dsk_size": 1}')
    with pytest.raises(InvalidArgument, match=r"a\.json: key 'max_local_dsk_size' is not known; did you mean max_local_disk_size"):
        resolve({}, {"LMCACHE_CONFIG_FILE": str(file)}, profile=Profile.LMCACHE)
    with pytest.raises(InvalidArgument, match=r"'lmcache\.chunksize' is not known; did you mean chunk_size"):
        resolve({"lmcache.chunksize": 1}, {}, profile=Profile.LMCACHE)


def test_keys_of_one_place_are_not_known_in_another(tmp_path: Path) -> None:
    for name in ("cpu_bytes_to_use", "track_usage", "use_odirect", "mp.host"):
        file = tmp_path / "a.json"
        file.write_text(json.dumps({name: 1}))
        with pytest.raises(InvalidArgument, match="is not known"):
            resolve({}, {"LMCACHE_CONFIG_FILE": str(file)}, profile=Profile.LMCACHE)


# ---- errors -------------------------------------------------------------------------------------------------------------


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"remote_url": "redis://h", "remote_serde": "cachegen", "unheard_of": 1}')
    environ = {"LMCACHE_CONFIG_FILE": str(file), "LMCACHE_CHUNK_SIZE": "none", "LMCACHE_CHUNK_SZE": "1"}
    with pytest.raises(InvalidArgument) as caught:
        resolve({"local_cpu": False, "hit_miss_ratio": 7}, environ, profile=Profile.LMCACHE)
    message = str(caught.value)
    assert message.startswith("5 problems in the configuration:\n- ")
    for part in (
        "key 'unheard_of' is not known",
        "LMCACHE_CHUNK_SIZE='none' (environment): must be a whole number",
        "hit_miss_ratio=7 (kv_connector_extra_config): must be a number from 0 to 1",
        "local_cpu=False (kv_connector_extra_config): must be true",
        f"remote_url='redis://h' ({file}): must be left out",
        "(with it: remote_serde)",
        "did you mean LMCACHE_CHUNK_SIZE?",
    ):
        assert part in message


def test_a_wrong_value_has_no_second_error_of_its_consequences() -> None:
    with pytest.raises(InvalidArgument) as caught:
        resolve({"local_disk": "/kv", "max_local_disk_size": "x", "cpu_bytes_to_use": "y"}, {})
    assert str(caught.value).startswith("2 problems")


def test_what_is_only_unsupported_is_unsupported() -> None:
    with pytest.raises(Unsupported):
        resolve({"gds_path": "/x"}, {}, profile=Profile.LMCACHE)
    with pytest.raises(InvalidArgument):
        resolve({"gds_path": "/x", "chunk_size": 0}, {}, profile=Profile.LMCACHE)


def test_unsupported_can_be_ignored() -> None:
    extra = {"gds_path": "/x", "gds_buffer_size": 4096, "use_layerwise": True, "retrieve_locations": ["X"], "cpu_bytes_to_use": GIB}
    ignoring = {"LMCACHE_NATIVE_IGNORE_UNSUPPORTED": "1"}
    assert resolve(extra, ignoring) == NativeConfig(host_bytes=GIB)
    with pytest.raises(Unsupported):
        resolve(extra, {"LMCACHE_NATIVE_IGNORE_UNSUPPORTED": "0"})
    with pytest.raises(InvalidArgument, match="LMCACHE_NATIVE_IGNORE_UNSUPPORTED='maybe'"):
        resolve(extra, {"LMCACHE_NATIVE_IGNORE_UNSUPPORTED": "maybe"})
    with pytest.raises(InvalidArgument, match="chunk_size") as caught:
        resolve(extra | {"chunk_size": 0}, ignoring)
    assert "gds_path" not in str(caught.value).splitlines()[0]


def test_ignored_is_one_warning() -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    root = logging.getLogger("lmcache_native")
    root.addHandler(handler)
    try:
        environ = {"LMCACHE_NATIVE_IGNORE_UNSUPPORTED": "yes", "LMCACHE_GDS_PATH": "/x"}
        resolve({"enable_p2p": True}, environ, profile=Profile.LMCACHE, warn=True)
    finally:
        root.removeHandler(handler)
    (line,) = lines
    assert line.startswith("WARNING unsupported and ignored: ")
    assert "LMCACHE_GDS_PATH='/x'" in line
    assert "enable_p2p=True" in line


# ---- as LMCache's users have them ---------------------------------------------------------------------------------------


def yaml_file(tmp_path: Path, text: str) -> dict[str, str]:
    pytest.importorskip("yaml")
    file = tmp_path / "lmcache.yaml"
    file.write_text(text)
    return {"LMCACHE_CONFIG_FILE": str(file)}


HOST_ONLY = """
# Basic configurations
chunk_size: 256
local_cpu: true
use_layerwise: true
max_local_cpu_size: 20   # GB
save_unfull_chunk: false
"""
DISK = """
chunk_size: 256
local_cpu: False
max_local_cpu_size: 10
local_disk: "file:///mnt/kv/"
max_local_disk_size: 50
extra_config:
  use_odirect: True
  disk_io_threads: 8
"""
DECODE = """
chunk_size: 256
local_device: "cpu"

# Whether save the kv cache for decoded tokens
save_decode_cache: True
"""
NULLS = """
local_disk: null
max_local_disk_size: 0
remote_url: null
remote_serde: naive
enable_p2p: false
p2p_init_ports: null
controller_pull_url: ~
pipelined_backend: False
retrieve_locations:
  - LocalCPUBackend
"""
REMOTE = """
chunk_size: 256
local_cpu: False
max_local_cpu_size: 10
remote_url: "lm://localhost:65432"
remote_serde: "cachegen"
"""
PEER_TO_PEER = """
chunk_size: 256
local_cpu: True
max_local_cpu_size: 5
enable_async_loading: True
enable_p2p: True
p2p_host: "localhost"
p2p_init_ports: 8200
p2p_lookup_ports: 8201
transfer_channel: "nixl"
enable_controller: True
lmcache_instance_id: "lmcache_instance_1"
controller_pull_url: "localhost:8300"
controller_reply_url: "localhost:8400"
lmcache_worker_ports: 8500
extra_config:
  lookup_backoff_time: 0.001
"""


def test_files_that_work_as_they_are(tmp_path: Path) -> None:
    def load(text: str) -> NativeConfig:
        return resolve({}, yaml_file(tmp_path, text), profile=Profile.LMCACHE)

    assert load(HOST_ONLY) == NativeConfig(host_bytes=20 * GIB, chunk_tokens=256, layerwise=True, async_loading=False)
    disk = NativeConfig(host_bytes=10 * GIB, chunk_tokens=256, directories=(Path("/mnt/kv"),), nvme_bytes=50 * GIB)
    assert load(DISK) == disk
    assert load(DECODE).save_decode
    assert load(NULLS) == NativeConfig(host_bytes=5 * GIB, chunk_tokens=256, retrieve_nvme=False)
    assert load("") == NativeConfig(host_bytes=5 * GIB, chunk_tokens=256)


def test_a_file_with_a_remote_store_says_what_to_change(tmp_path: Path) -> None:
    environ = yaml_file(tmp_path, REMOTE)
    with pytest.raises(InvalidArgument) as caught:
        resolve({}, environ, profile=Profile.LMCACHE)
    message = str(caught.value)
    assert "local_cpu=False" in message
    assert "remote_url='lm://localhost:65432'" in message
    assert "local_disk" in message


def test_a_file_with_peers_is_refused_or_ignored_whole(tmp_path: Path) -> None:
    environ = yaml_file(tmp_path, PEER_TO_PEER)
    with pytest.raises(Unsupported) as caught:
        resolve({}, environ, profile=Profile.LMCACHE)
    message = str(caught.value)
    assert message.startswith("2 problems")
    assert "p2p_init_ports" in message
    found = resolve({}, environ | {"LMCACHE_NATIVE_IGNORE_UNSUPPORTED": "1"}, profile=Profile.LMCACHE)
    assert found == NativeConfig(host_bytes=5 * GIB, chunk_tokens=256, instance_id="lmcache_instance_1")


def test_variables_that_work_as_they_are() -> None:
    environ = {
        "LMCACHE_CHUNK_SIZE": "256",
        "LMCACHE_LOCAL_CPU": "False",
        "LMCACHE_MAX_LOCAL_CPU_SIZE": "70",
        "LMCACHE_MAX_LOCAL_DISK_SIZE": "70",
        "LMCACHE_LOCAL_DISK": '"file:///local/end-to-end-tests/local/"',
        "LMCACHE_ENABLE_ASYNC_LOADING": "True",
        "LMCACHE_EXTRA_CONFIG": '{"lookup_backoff_time": 0.01, "use_odirect": True}',
        "LMCACHE_SAVE_UNFULL_CHUNK": "False",
        "LMCACHE_USE_EXPERIMENTAL": "True",
        "PYTHONHASHSEED": "0",
    }
    found = resolve({"discard_partial_chunks": False}, environ, profile=Profile.LMCACHE)
    assert (found.host_bytes, found.nvme_bytes) == (70 * GIB, 70 * GIB)
    assert found.directory == Path("/local/end-to-end-tests/local")


# ---- explain ------------------------------------------------------------------------------------------------------------


def explained(
    extra: dict[str, Any], environ: dict[str, str], profile: Profile = Profile.LMCACHE
) -> dict[str, tuple[str, str, str]]:
    return {line.key: line[1:] for line in explain(extra, environ, profile)}


def test_explain_names_value_source_and_kind() -> None:
    environ = {"LMCACHE_CHUNK_SIZE": "64", "LMCACHE_LOOKUP_TIMEOUT_MS": "250", "LMCACHE_TRACK_USAGE": "false"}
    found = explained({"cpu_bytes_to_use": 2 * GIB, "max_local_cpu_size": 9, "lmcache.use_layerwise": True}, environ)
    assert found["max_local_cpu_size"] == ("2", "--kv-offloading-size", "done")
    assert found["chunk_size"] == ("64", "environment", "done")
    assert found["promotion_deadline"] == ("0.25", "lookup_timeout_ms, environment", "done")
    assert found["enable_async_loading"] == ("false", "use_layerwise (default)", "done")
    assert found["track_usage"] == ("false", "environment", "accepted")
    assert found["lock_wait"] == ("10", "default", "done")
    assert "remote_url" not in found


def test_explain_shows_every_field_of_its_connector_and_no_other() -> None:
    lmcache, offloading = explained({}, {}), explained({"cpu_bytes_to_use": GIB}, {}, Profile.OFFLOADING)
    assert "use_layerwise" in lmcache
    assert "use_layerwise" not in offloading
    assert lmcache["chunk_size"][0] == "256"
    assert offloading["chunk_size"][0] == "the engine's block"


def test_explain_marks_what_was_ignored() -> None:
    environ = {"LMCACHE_NATIVE_IGNORE_UNSUPPORTED": "1", "LMCACHE_GDS_PATH": "/x", "LMCACHE_REMOTE_SERDE": "kivi"}
    found = explained({"save_decode_cache": True, "cpu_bytes_to_use": GIB}, environ, Profile.OFFLOADING)
    assert found["gds_path"] == ("/x", "environment", "unsupported")
    assert found["save_decode_cache"] == ("true", "kv_connector_extra_config", "unsupported")
    assert found["remote_serde"] == ("kivi", "environment", "accepted")


def test_explain_fails_as_resolve_does() -> None:
    with pytest.raises(Unsupported, match="gds_path"):
        explain({"gds_path": "/x"}, {}, Profile.LMCACHE)
