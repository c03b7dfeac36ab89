"""Each key of LMCache that we say something about: its effect, why it has none, or its refusal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lmcache_native.config import (
    GIB,
    UNLIMITED,
    NativeConfig,
    Profile,
    engine_directory_bytes,
    engine_nvme_bytes,
    machine,
    resolve,
)
from lmcache_native.config.sources import TABLE
from lmcache_native.config.table import FEATURES_PAGE, Key, Kind, Place
from lmcache_native.errors import InvalidArgument, Unsupported

pytestmark = pytest.mark.unit

DISK: dict[str, Any] = {"local_disk": "/kv", "max_local_disk_size": 10}
DEFAULT = NativeConfig(host_bytes=5 * GIB, chunk_tokens=256)


def lmcache(environ: dict[str, str] | None = None, **extra: Any) -> NativeConfig:
    return resolve(extra, environ or {}, profile=Profile.LMCACHE)


def offloading(environ: dict[str, str] | None = None, **extra: Any) -> NativeConfig:
    return resolve({"cpu_bytes_to_use": GIB} | extra, environ or {})


def wrong(environ: dict[str, str] | None = None, **extra: Any) -> str:
    with pytest.raises(InvalidArgument) as caught:
        lmcache(environ, **extra)
    return str(caught.value)


def refused(environ: dict[str, str] | None = None, profile: Profile = Profile.LMCACHE, **extra: Any) -> str:
    size = {"cpu_bytes_to_use": GIB} if profile is Profile.OFFLOADING else {}
    with pytest.raises(Unsupported) as caught:
        resolve(size | extra, environ or {}, profile=profile)
    return str(caught.value)


# ---- all 108 ------------------------------------------------------------------------------------------------------------

# LMCache 0.5.6: name, default, and a value that asks for something.
LMCACHE_KEYS: dict[str, tuple[Any, Any]] = {
    "chunk_size": (256, 64),
    "local_cpu": (True, True),
    "max_local_cpu_size": (5.0, 2),
    "local_cpu_use_hugepages": (False, True),
    "reserve_local_cpu_size": (0.0, 0.001),
    "local_disk": (None, None),
    "local_disk_path_sharding": ("by_gpu", "by_gpu"),
    "max_local_disk_size": (0.0, 0),
    "remote_url": (None, "redis://host:6379"),
    "remote_serde": ("naive", "cachegen"),
    "use_layerwise": (False, True),
    "save_decode_cache": (False, True),
    "pre_caching_hash_algorithm": ("builtin", "sha256_cbor"),
    "enable_blending": (False, True),
    "blend_recompute_ratios": (None, [0.15]),
    "blend_thresholds": (None, [0.5]),
    "blend_check_layers": (None, [1]),
    "blend_min_tokens": (256, 128),
    "blend_special_str": (" # # ", "|"),
    "retrieve_locations": (None, ["LocalCPUBackend"]),
    "store_location": (None, "LocalCPUBackend"),
    "enable_p2p": (False, True),
    "p2p_host": (None, "h"),
    "p2p_init_ports": (None, [1]),
    "p2p_lookup_ports": (None, [1]),
    "mp_host": (None, "localhost"),
    "mp_port": (5555, 5556),
    "enable_controller": (False, True),
    "lmcache_instance_id": (None, "one"),
    "controller_pull_url": (None, "u"),
    "controller_reply_url": (None, "u"),
    "lmcache_worker_ports": (None, [1]),
    "lmcache_worker_ids": (None, [0]),
    "lmcache_worker_heartbeat_delay_time": (10, 20),
    "lmcache_worker_heartbeat_time": (None, 5),
    "enable_pd": (False, True),
    "pd_role": (None, "sender"),
    "pd_buffer_size": (None, 1),
    "pd_buffer_device": (None, "cuda"),
    "pd_peer_host": (None, "h"),
    "pd_peer_init_port": (None, [1]),
    "pd_peer_alloc_port": (None, [1]),
    "pd_peer_query_port": (None, [1]),
    "pd_proxy_host": (None, "h"),
    "pd_proxy_port": (None, 1),
    "pd_allocation_timeout_sec": (float("inf"), 1.0),
    "pd_shutdown_timeout_sec": (5.0, 1.0),
    "pd_condition_poll_interval_sec": (0.005, 0.1),
    "pd_max_prefill_len": (0, 1),
    "pd_backend_mode": ("async", "sync"),
    "pd_skip_proxy_notification": (False, True),
    "pd_bidirectional": (False, True),
    "transfer_channel": (None, "nixl"),
    "nixl_backends": (None, ["UCX"]),
    "nixl_buffer_size": (None, 1),
    "nixl_buffer_device": (None, "cpu"),
    "gds_path": (None, None),
    "gds_path_sharding": ("by_gpu", "other"),
    "gds_buffer_size": (None, 4096),
    "maru_path": (None, "maru://x"),
    "maru_pool_size": (4.0, 8.0),
    "use_gds": (True, False),
    "gds_backend": ("cufile", "hipfile"),
    "audit_actual_remote_url": (None, "u"),
    "internal_api_server_host": ("127.0.0.1", "0.0.0.0"),
    "extra_config": (None, {"use_odirect": True}),
    "save_unfull_chunk": (False, True),
    "blocking_timeout_secs": (10, 20),
    "external_lookup_client": (None, "mooncakestore://x"),
    "py_enable_gc": (True, False),
    "cache_policy": ("LRU", "LFU"),
    "numa_mode": (None, "auto"),
    "enable_async_loading": (False, True),
    "internal_api_server_enabled": (False, True),
    "internal_api_server_port_start": (6999, 7000),
    "priority_limit": (None, 3),
    "internal_api_server_include_index_list": (None, [0]),
    "internal_api_server_socket_path_prefix": (None, "/tmp/x"),
    "runtime_plugin_locations": (None, ["/p"]),
    "storage_plugins": (None, ["p"]),
    "remote_storage_plugins": (None, ["p"]),
    "lookup_timeout_ms": (3000, 100),
    "min_retrieve_tokens": (0, 10),
    "hit_miss_ratio": (None, 0.5),
    "lookup_server_worker_ids": (None, [0]),
    "enable_scheduler_bypass_lookup": (False, True),
    "script_allowed_imports": (None, ["os"]),
    "run_script_api_enabled": (False, True),
    "enable_lazy_memory_allocator": (False, True),
    "lazy_memory_initial_ratio": (0.2, 0.5),
    "lazy_memory_expand_trigger_ratio": (0.5, 0.6),
    "lazy_memory_step_ratio": (0.1, 0.2),
    "lazy_memory_safe_size": (0.0, 1.0),
    "enable_chunk_statistics": (False, True),
    "chunk_statistics_auto_start_statistics": (False, True),
    "chunk_statistics_auto_exit_timeout_hours": (0.0, 1.0),
    "chunk_statistics_auto_exit_target_unique_chunks": (0, 1),
    "chunk_statistics_strategy": ("memory_bloom_filter", "file_hash"),
    "enable_kv_events": (False, True),
    "use_gpu_connector_v3": (False, True),
    "pin_timeout_sec": (300, 5),
    "pin_check_interval_sec": (30, 5),
    "remote_config_url": (None, "http://x"),
    "app_id": (None, "a"),
    "enable_hidden_state_cache": (False, True),
    "max_hidden_state_cpu_size": (2.0, 1.0),
    "hidden_state_layers": (None, [0]),
    "hidden_states_retrieve_mode": ("prefix_strict", "skip_missing_chunks"),
}


def test_the_table_has_all_of_them_with_lmcaches_defaults() -> None:
    assert len(LMCACHE_KEYS) == 108
    found = {name: TABLE.find(name, Place.ANYWHERE) for name in LMCACHE_KEYS}
    assert [name for name, key in found.items() if key is None or key.name != name] == []
    # The one default that differs on purpose.
    others = {name for name, key in found.items() if key is not None and key.default != LMCACHE_KEYS[name][0]}
    assert others == {"enable_async_loading"}


@pytest.mark.parametrize("profile", list(Profile))
@pytest.mark.parametrize("spell", [lambda v: v, str], ids=["values", "texts"])
def test_a_file_that_spells_out_lmcaches_defaults_changes_nothing_else(profile: Profile, spell: Any) -> None:
    extra: dict[str, Any] = {name: spell(default) for name, (default, _) in LMCACHE_KEYS.items() if default is not None}
    found = resolve(extra, {}, profile=profile)
    # What LMCache's defaults say and ours do not: its timeouts; and synchronous loads where the connector knows them.
    assert found == NativeConfig(
        host_bytes=5 * GIB,
        chunk_tokens=256,
        promotion_deadline_s=3.0,
        request_ttl_s=300.0,
        async_loading=profile is Profile.OFFLOADING,
    )


@pytest.mark.parametrize("name", [name for name, (default, _) in LMCACHE_KEYS.items() if default is None])
def test_null_is_absent(name: str) -> None:
    assert lmcache(**{name: None}) == DEFAULT


@pytest.mark.parametrize("name", sorted(LMCACHE_KEYS))
def test_a_value_is_honoured_accepted_or_refused_as_the_table_says(name: str) -> None:
    key = TABLE.find(name, Place.ANYWHERE)
    assert key is not None
    asking = {name: LMCACHE_KEYS[name][1]}
    if key.kind is not Kind.UNSUPPORTED:
        lmcache(**asking)
    elif key.needs:
        lmcache(**asking)
        for master in key.needs:
            row = TABLE.find(master, Place.ANYWHERE)
            anywhere = row is not None
            asked: object = "/x" if row is not None and row.kind is Kind.DONE else True
            given = {master: asked} if anywhere else {"extra_config": {master: asked}}
            message = refused(**asking, **given)
            assert message.startswith(master if anywhere else f"extra_config.{master}")
            assert (f"(with it: {name})" in message) == (asking[name] is not False)
    else:
        message = refused(**asking)
        assert message.startswith(f"{name}={asking[name]!r} (kv_connector_extra_config): must be left out")
        assert key.instead in message
        assert "LMCACHE_NATIVE_IGNORE_UNSUPPORTED=1" in message


# ---- host memory --------------------------------------------------------------------------------------------------------


def test_lmcaches_defaults() -> None:
    assert lmcache() == DEFAULT


def test_huge_pages() -> None:
    assert lmcache(local_cpu_use_hugepages=True).hugetlb
    assert offloading({"LMCACHE_LOCAL_CPU_USE_HUGEPAGES": "True"}).hugetlb


def test_reserve_makes_host_memory_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 10 * GIB)
    assert lmcache(max_local_cpu_size=8, reserve_local_cpu_size=4).host_bytes == 6 * GIB
    assert lmcache(max_local_cpu_size=8, reserve_local_cpu_size=1).host_bytes == 8 * GIB
    assert offloading({"LMCACHE_RESERVE_LOCAL_CPU_SIZE": "9.5"}).host_bytes == GIB // 2
    assert lmcache(reserve_local_cpu_size=10 - 4 / 1024).host_bytes == 4 << 20


@pytest.mark.parametrize("reserve", [10 - 3.9 / 1024, 10, 11])
def test_reserve_that_leaves_too_little(monkeypatch: pytest.MonkeyPatch, reserve: float) -> None:
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 10 * GIB)
    message = wrong(reserve_local_cpu_size=reserve)
    assert f"reserve_local_cpu_size={reserve!r}" in message
    assert "at most 9.996" in message


def test_reserve_of_this_machine_is_read_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> int:
        raise AssertionError("read")

    monkeypatch.setattr(machine, "available_memory_bytes", never)
    assert lmcache(reserve_local_cpu_size=0) == DEFAULT
    assert "0 or more" in wrong(reserve_local_cpu_size=-1)


def test_local_cpu_false_stages_local_disk() -> None:
    found = lmcache(local_cpu=False, max_local_cpu_size=2, **DISK)
    assert (found.host_bytes, found.directory, found.nvme_bytes) == (2 * GIB, Path("/kv"), 10 * GIB)
    message = wrong({"LMCACHE_LOCAL_CPU": "False"})
    assert message.startswith("LMCACHE_LOCAL_CPU='False' (environment): must be")
    assert "local_disk" in message


def test_numa() -> None:
    assert lmcache(numa_mode="auto").numa_auto
    manual = lmcache(numa_mode="manual", extra_config={"gpu_to_numa_mapping": {"0": 1, 1: 0, "2": 1}})
    assert (manual.numa_nodes, manual.numa_auto) == ((0, 1), False)
    text = offloading({"LMCACHE_NUMA_MODE": "manual", "LMCACHE_EXTRA_CONFIG": '{"gpu_to_numa_mapping": "{0: 3}"}'})
    assert text.numa_nodes == (3,)
    assert lmcache(numa_mode="null") == DEFAULT
    assert lmcache(extra_config={"gpu_to_numa_mapping": {0: 1}}) == DEFAULT


def test_numa_wrong() -> None:
    assert "numa_mode='manual'" in wrong(numa_mode="manual")
    assert "gpu_to_numa_mapping" in wrong(numa_mode="manual")
    assert "auto, manual, null" in wrong(numa_mode="both")
    for mapping in ({}, {"0": -1}, {"0": "x"}, [0], "zero"):
        assert "gpu_to_numa_mapping" in wrong(numa_mode="manual", extra_config={"gpu_to_numa_mapping": mapping})


# ---- NVMe ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    ["/a,/b", "file:///a, file:///b/", ["/a", "/b"], ["file:///a", "/b"], '["/a", "/b"]'],
)
def test_several_directories(value: object) -> None:
    assert lmcache(local_disk=value, max_local_disk_size=1).directories == (Path("/a"), Path("/b"))


def test_writes_to_nvme() -> None:
    nvme = {"local_disk": "/kv", "max_local_disk_size": 1}
    assert lmcache(**nvme).nvme_daily_bytes == 0
    assert lmcache(**nvme, local_disk_daily_writes=2).nvme_daily_bytes == 2 * GIB
    assert lmcache(**nvme, local_disk_daily_writes="Unlimited").nvme_daily_bytes == UNLIMITED
    for value in (0, -1, "much", 1e20):
        assert "unlimited" in wrong(**nvme, local_disk_daily_writes=value)
    found = lmcache(**nvme, local_disk_admission="second_touch", verify="all", local_disk_min_free=3, local_disk_write_deadline=2)
    assert (found.admission, found.verify, found.nvme_free_floor_bytes, found.write_deadline_s) == (
        "second_touch",
        "all",
        3 * GIB,
        2,
    )
    assert "second_touch" in wrong(**nvme, local_disk_admission="never")
    assert "off, nvme, all" in wrong(**nvme, verify="yes")
    assert lmcache(**nvme).striped
    assert not lmcache(**nvme, local_disk_path_sharding="by_engine").striped
    assert "by_engine" in wrong(**nvme, local_disk_path_sharding="by_rank")


def test_sizes_of_directories() -> None:
    two: dict[str, Any] = {"local_disk": "/a,/b"}
    for value in ("1,2.5", "[1, 2.5]", [1, 2.5], ["1", "2.5"]):
        found = lmcache(**two, local_disk_sizes=value)
        assert (found.directory_bytes, found.nvme_bytes) == ((GIB, int(2.5 * GIB)), int(3.5 * GIB)), value
    assert lmcache(**two, local_disk_sizes="1,2.5", max_local_disk_size=3.5).nvme_bytes == int(3.5 * GIB)
    assert lmcache(**two, max_local_disk_size=3).directory_bytes == ()
    assert engine_directory_bytes(lmcache(**two, local_disk_sizes="1,2"), 2) == (GIB // 2, GIB)
    assert engine_nvme_bytes(lmcache(**two, local_disk_sizes="1,2"), 2) == 3 * GIB // 2
    assert "2 sizes, one for each directory" in wrong(**two, local_disk_sizes="1,2,3")
    assert "4 in all, as max_local_disk_size" in wrong(**two, local_disk_sizes="1,2", max_local_disk_size=4)
    assert "by_engine" in wrong(**two, local_disk_sizes="1,2", local_disk_path_sharding="by_engine")
    assert "left out without local_disk" in wrong(local_disk_sizes="1,2")
    for bad in ("1,", "0,1", "", [], 5, "1,-2", {"a": 1}):
        assert "for example 100,400" in wrong(**two, local_disk_sizes=bad), bad
    off = lmcache(local_disk=None, local_disk_sizes="1,2")
    assert (off.directories, off.directory_bytes, off.nvme_bytes) == ((), (), 0)


def test_quotes_left_in_the_environment() -> None:
    environ = {"LMCACHE_LOCAL_DISK": '"file:///local/kv/"', "LMCACHE_MAX_LOCAL_DISK_SIZE": "'5'"}
    assert lmcache(environ).directory == Path("/local/kv")


def test_sharding_knows_by_gpu_only() -> None:
    lmcache(local_disk_path_sharding="by_gpu", **DISK)
    assert "local_disk_path_sharding='by_rank' (kv_connector_extra_config): must be one of by_gpu, by_engine" in wrong(
        local_disk_path_sharding="by_rank"
    )


def test_disk_size_of_zero_is_absent_only_without_a_disk() -> None:
    assert lmcache(max_local_disk_size=0.0) == DEFAULT
    assert "max_local_disk_size=0.0" in wrong(local_disk="/kv", max_local_disk_size=0.0)


# ---- chunks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["builtin", "sha256", "sha256_cbor", "xxhash", "xxhash_cbor", "blake3"])
def test_any_known_hash_changes_nothing(name: str) -> None:
    assert lmcache(pre_caching_hash_algorithm=name) == DEFAULT


def test_unknown_hash() -> None:
    assert "pre_caching_hash_algorithm='md5'" in wrong(pre_caching_hash_algorithm="md5")


@pytest.mark.parametrize("name", ["LFU", "S3FIFO", "s3fifo"])
def test_cache_policy_reaches_the_store(name: str) -> None:
    assert lmcache(cache_policy=name).cache_policy == name


# ---- loading ------------------------------------------------------------------------------------------------------------


def test_async_loading_is_off_only_when_told() -> None:
    assert lmcache().async_loading
    assert lmcache(enable_async_loading=True).async_loading
    assert not lmcache({"LMCACHE_ENABLE_ASYNC_LOADING": "False"}).async_loading
    assert offloading(enable_async_loading=False).async_loading


def test_layerwise_is_synchronous() -> None:
    found = lmcache({"LMCACHE_USE_LAYERWISE": "true"})
    assert (found.layerwise, found.async_loading) == (True, False)
    assert lmcache(use_layerwise=True, enable_async_loading=False).layerwise
    message = wrong({"LMCACHE_USE_LAYERWISE": "true"}, enable_async_loading="1")
    assert "enable_async_loading='1' (kv_connector_extra_config): must be left out or false" in message
    assert "LMCACHE_USE_LAYERWISE='true' (environment)" in message


def test_min_retrieve_tokens() -> None:
    assert lmcache(min_retrieve_tokens="512").min_retrieve_tokens == 512
    assert "0 or more" in wrong(min_retrieve_tokens=-1)


def test_hit_miss_ratio() -> None:
    assert [lmcache(hit_miss_ratio=r).hit_miss_ratio for r in (0, 0.25, "1")] == [0.0, 0.25, 1.0]
    for value in (-0.1, 1.1, "half"):
        assert "from 0 to 1" in wrong(hit_miss_ratio=value)


def test_retrieve_locations() -> None:
    assert not lmcache(retrieve_locations=["LocalCPUBackend"], **DISK).retrieve_nvme
    assert lmcache({"LMCACHE_RETRIEVE_LOCATIONS": "LocalCPUBackend,LocalDiskBackend"}, **DISK).retrieve_nvme
    for value in (["LocalDiskBackend"], ["LocalCPUBackend", "RemoteBackend"], "GdsBackend"):
        message = refused(retrieve_locations=value)
        assert f"retrieve_locations={value!r} (kv_connector_extra_config): must be LocalCPUBackend" in message
    assert "a list of" in wrong(retrieve_locations=[])


def test_timeouts() -> None:
    assert lmcache(blocking_timeout_secs=100).load_timeout_s == 100.0
    assert offloading(blocking_timeout_secs=100) == NativeConfig(host_bytes=GIB)
    assert lmcache(lookup_timeout_ms=250).promotion_deadline_s == 0.25
    assert lmcache(pin_timeout_sec=60).request_ttl_s == 60.0
    for key in ("blocking_timeout_secs", "lookup_timeout_ms", "pin_timeout_sec"):
        assert f"{key}=0" in wrong(**{key: 0})


def test_our_name_of_a_timeout_wins_within_a_source_and_the_later_source_between_them() -> None:
    assert lmcache(promotion_deadline=2, lookup_timeout_ms=9000).promotion_deadline_s == 2.0
    assert lmcache(lookup_timeout_ms=9000, promotion_deadline=2).promotion_deadline_s == 2.0
    assert lmcache({"LMCACHE_REQUEST_TTL": "7"}, pin_timeout_sec=8).request_ttl_s == 8.0
    assert lmcache({"LMCACHE_PIN_TIMEOUT_SEC": "7"}, request_ttl=8).request_ttl_s == 8.0


# ---- saving -------------------------------------------------------------------------------------------------------------


def test_what_is_saved() -> None:
    assert lmcache(save_decode_cache=True).save_decode
    assert lmcache(save_unfull_chunk=True).save_partial_chunk
    assert not lmcache(save_unfull_chunk=True, discard_partial_chunks=True).save_partial_chunk
    assert lmcache(discard_partial_chunks=False, save_unfull_chunk=True).save_partial_chunk


def test_priority_limit() -> None:
    assert [lmcache(priority_limit=n).priority_limit for n in (0, -3, "7")] == [0, -3, 7]
    assert "whole number" in wrong(priority_limit=1.5)


def test_force_skip_save() -> None:
    assert lmcache({"LMCACHE_FORCE_SKIP_SAVE": "1"}).skip_save
    assert lmcache(force_skip_save=True).skip_save
    assert not lmcache({"LMCACHE_FORCE_SKIP_SAVE": "false"}).skip_save


def test_store_location_must_name_what_is_configured() -> None:
    assert lmcache(store_location="LocalCPUBackend") == DEFAULT
    lmcache(store_location="LocalDiskBackend", **DISK)
    assert "must be LocalDiskBackend" in refused(store_location="LocalCPUBackend", **DISK)
    assert "must be LocalCPUBackend" in refused(store_location="LocalDiskBackend")
    assert "no such location" in refused({"LMCACHE_STORE_LOCATION": "PDBackend"})


# ---- process ------------------------------------------------------------------------------------------------------------


def test_process() -> None:
    assert lmcache(enable_kv_events=True).kv_events
    assert not lmcache(py_enable_gc=False).python_gc
    assert lmcache({"LMCACHE_LMCACHE_INSTANCE_ID": "one"}).instance_id == "one"


def test_no_server_and_no_telemetry_is_needed() -> None:
    environ = {"LMCACHE_MP_HOST": "h", "LMCACHE_TRACK_USAGE": "false", "DO_NOT_TRACK": "1", "LMCACHE_MQ_TIMEOUT": "3"}
    extra: dict[str, Any] = {"mp_port": 6000, "lmcache.mp.autostart": True, "lmcache.mp.server_args": "--l1-size-gb 5"}
    assert lmcache(environ, **extra) == DEFAULT


def test_encoder_cache_settings_turn_nothing_on() -> None:
    assert lmcache({"LMCACHE_EC_LOCAL_DISK": "/ec", "LMCACHE_EC_CHUNK_SIZE": "16"}, ec_local_cpu=True, ec={"x": 1}) == DEFAULT


# ---- extra_config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ['{"use_odirect": true, "disk_io_threads": 8}', "{'use_odirect': True}", '{"save_only_first_rank": true, "x_y": null}']
)
def test_extra_config_as_text(text: str) -> None:
    assert lmcache({"LMCACHE_EXTRA_CONFIG": text}) == DEFAULT


@pytest.mark.parametrize("value", ["{", "[1]", "7", ["a"], 5])
def test_extra_config_must_be_a_mapping(value: object) -> None:
    assert "must be names and values" in wrong(extra_config=value)


def test_extra_config_refusals() -> None:
    message = refused(extra_config={"force_store_wait": True})
    assert message.startswith("extra_config.force_store_wait=True (kv_connector_extra_config): must be left out")
    assert "enable_nixl_storage" in refused(extra_config={"enable_nixl_storage": True, "nixl_pool_size": 3})
    assert "enable_cache_usage_details_in_response" in refused(extra_config={"enable_cache_usage_details_in_response": True})
    assert lmcache(extra_config={"force_store_wait": False, "nixl_pool_size": 3, "s3_region": "eu"}) == DEFAULT


def test_extra_config_of_a_later_source_replaces_the_earlier() -> None:
    lmcache({"LMCACHE_EXTRA_CONFIG": '{"force_store_wait": true}'}, extra_config={"use_odirect": True})


def test_unknown_sub_key() -> None:
    assert "'extra_config.use_odirekt' is not known; did you mean use_odirect?" in wrong(extra_config={"use_odirekt": True})
    assert lmcache({"LMCACHE_EXTRA_CONFIG": '{"use_odirekt": true}'}) == DEFAULT


# ---- the other connector ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_layerwise", True),
        ("save_decode_cache", True),
        ("save_unfull_chunk", True),
        ("min_retrieve_tokens", 5),
        ("priority_limit", 1),
        ("hit_miss_ratio", 0.5),
        ("retrieve_locations", ["LocalCPUBackend"]),
        ("force_skip_save", True),
        ("enable_kv_events", True),
        ("py_enable_gc", False),
    ],
)
def test_what_only_the_token_connector_honours(key: str, value: object) -> None:
    message = refused(profile=Profile.OFFLOADING, **{key: value})
    assert f"{key}={value!r}" in message
    assert "only LMCacheNativeConnector honours it" in message
    assert lmcache(**{key: value}) != DEFAULT


@pytest.mark.parametrize(("key", "value"), [("block_size", 64), ("blocks_per_chunk", 2), ("offload_prompt_only", False)])
def test_what_only_the_offloading_connector_honours(key: str, value: object) -> None:
    assert "only NativeOffloadingConnector honours it" in refused(**{key: value})
    offloading(**{key: value})


def test_vllms_spec_means_nothing_to_the_token_connector() -> None:
    assert lmcache(spec_name="NativeOffloadingSpec", offload_prompt_only=True, self_describing_kv_events=False) == DEFAULT


# ---- older names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "value"),
    [("enable_xpyd", True), ("plugin_locations", ["/p"]), ("external_backends", ["b"])],
)
def test_older_names_are_refused_under_the_name_given(old: str, value: object) -> None:
    assert refused(**{old: value}).startswith(f"{old}={value!r}")


def test_older_names_of_parts() -> None:
    parts: dict[str, Any] = {
        "nixl_role": "sender",
        "nixl_peer_host": "h",
        "nixl_peer_init_port": 1,
        "nixl_peer_alloc_port": 1,
        "nixl_proxy_host": "h",
        "nixl_proxy_port": 1,
        "controller_url": "u",
        "lmcache_worker_port": 1,
    }
    assert lmcache(**parts) == DEFAULT
    message = refused(enable_pd=True, **parts)
    assert "nixl_role" in message
    assert "controller_url" not in message


# ---- what is refused is explained -------------------------------------------------------------------------------------------


def anchors() -> set[str]:
    """Of FEATURES_PAGE's headings, as GitHub makes them."""
    text = (Path(__file__).parents[2] / FEATURES_PAGE).read_text(encoding="utf-8")
    headings = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    return {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def pointers(key: Key) -> set[str]:
    """A part of a feature is refused with it, by the feature's own message."""
    if not key.needs or key.see:
        return {key.see}
    masters = [TABLE.find(name, Place.ANYWHERE, Place.SUB) for name in key.needs]
    return {master.see for master in masters if master is not None}


@pytest.mark.parametrize("key", [key for key in TABLE if key.kind is Kind.UNSUPPORTED], ids=lambda key: key.name)
def test_every_refusal_points_to_a_heading_that_is_there(key: Key) -> None:
    assert pointers(key)
    assert pointers(key) <= anchors()


def test_no_heading_without_a_refusal() -> None:
    assert anchors() - {key.see for key in TABLE} == {"cachegen", "what-no-key-of-the-engine-turns-on"}


@pytest.mark.parametrize(
    "name", [name for name in LMCACHE_KEYS if (row := TABLE.find(name, Place.ANYWHERE)) and row.see and not row.needs]
)
def test_the_message_ends_with_the_pointer(name: str) -> None:
    row = TABLE.find(name, Place.ANYWHERE)
    assert row is not None
    first_line = refused(**{name: LMCACHE_KEYS[name][1]}).splitlines()[0]
    assert first_line.endswith(f"; see docs/lmcache-features.md#{row.see}")


def test_a_part_of_what_is_supported_points_too() -> None:
    message = refused(gds_path="/kv", gds_backend="hipfile", **DISK)
    assert message.splitlines()[0].endswith("; see docs/lmcache-features.md#gpudirect-storage")


# All keys of one LMCache release, reviewed; `make compat` compares them with the release itself.
REVIEWED = json.loads((Path(__file__).parents[1] / "data" / "lmcache_keys.json").read_text(encoding="utf-8"))


def test_the_reviewed_list_is_the_one_above() -> None:
    assert set(REVIEWED["config"]) == set(LMCACHE_KEYS)


@pytest.mark.parametrize("name", REVIEWED["extra_config"])
def test_sub_keys_are_known(name: str) -> None:
    assert TABLE.find(name, Place.SUB, Place.ANYWHERE) is not None


def test_sub_keys_of_a_remote_store_are_refused_with_it() -> None:
    message = refused(remote_url="valkey://h:1", extra_config={"valkey_mode": "cluster", "username": "u"})
    assert "(with it: extra_config.username, extra_config.valkey_mode)" in message
    assert lmcache(extra_config={"valkey_mode": "cluster", "username": "u"}) == DEFAULT
