"""Configuration: defaults < LMCACHE_CONFIG_FILE < LMCACHE_* environment < kv_connector_extra_config.

LMCache's names are used where they mean the same. Sizes are numbers of GiB, times are seconds. One difference: sizes here are
totals of one engine (all its tensor-parallel ranks), where LMCache counts per rank.

A name of ours with a wrong value is an error. A name nobody knows is an error in kv_connector_extra_config (it was written for
this engine) and a warning in the environment (which other programs share). LMCache's names that have no meaning here are
ignored, with one warning that lists them.
"""

from __future__ import annotations

import difflib
import importlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcache_native.errors import InvalidArgument
from lmcache_native.logging import get_logger

logger = get_logger(__name__)

GIB = 1 << 30
ENV_PREFIX = "LMCACHE_"
EXTRA_PREFIX = "lmcache."

IO_ENGINES = ("auto", "io_uring", "threads")
LOAD_FAILURE_POLICIES = ("recompute", "fail")

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True, slots=True)
class NativeConfig:
    """Checked values, in base units. `directory` is the user's path; each engine uses a directory of its own below it."""

    host_bytes: int
    directory: Path | None = None
    nvme_bytes: int = 0  # of all engines below `directory` together
    chunk_tokens: int | None = None  # None: the engine's block
    cache_policy: str = "LRU"
    io_engine: str = "auto"
    region_bytes: int = 0  # 0: the store chooses
    promotion_deadline_s: float = 10.0
    promotion_budget_bytes: int = 0  # per request; 0: half of host_bytes
    request_ttl_s: float = 30.0
    fail_when_locked: bool = False
    lock_wait_s: float = 10.0
    copy_threads: int = 1
    model_fingerprint: str | None = None
    load_failure_policy: str = "recompute"
    data_parallel_engines: int | None = None  # engines that share `directory` on this node; None: not said


# ---- values -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Given:
    """A value and where it came from, for messages."""

    name: str
    value: object
    source: str

    def wrong(self, right: str) -> InvalidArgument:
        return InvalidArgument(f"{self.name}={self.value!r} ({self.source}): must be {right}")


def _number(given: _Given, right: str) -> float:
    value = given.value
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise given.wrong(right)
    try:
        number = float(value)
    except ValueError:
        raise given.wrong(right) from None
    if not math.isfinite(number):
        raise given.wrong(right)
    return number


def _size(given: _Given) -> int:
    right = "a number of GiB greater than 0, for example 100"
    number = _number(given, right)
    if number <= 0:
        raise given.wrong(right)
    return int(number * GIB)


def _bytes(given: _Given) -> int:
    right = "a number of bytes greater than 0 (--kv-offloading-size takes GiB and fills it in)"
    number = _number(given, right)
    if number < 1:
        raise given.wrong(right)
    return int(number)


def _seconds(given: _Given) -> float:
    right = "a number of seconds greater than 0"
    number = _number(given, right)
    if number <= 0:
        raise given.wrong(right)
    return number


def _seconds_or_zero(given: _Given) -> float:
    right = "a number of seconds, 0 or more"
    number = _number(given, right)
    if number < 0:
        raise given.wrong(right)
    return number


def _count(limit: int) -> Callable[[_Given], int]:
    def parse(given: _Given) -> int:
        right = f"a whole number from 1 to {limit}"
        number = _number(given, right)
        if number != int(number) or not 1 <= number <= limit:
            raise given.wrong(right)
        return int(number)

    return parse


def _flag(given: _Given) -> bool:
    flag = parse_flag(given.value)
    if flag is None:
        raise given.wrong("one of 1, true, yes, on, 0, false, no, off")
    return flag


def parse_flag(value: object) -> bool | None:
    """True or False for the usual spellings, None for anything else."""
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in _TRUE:
        return True
    return False if text in _FALSE else None


def _text(given: _Given) -> str:
    if not isinstance(given.value, str) or not given.value.strip():
        raise given.wrong("a non-empty text")
    return given.value.strip()


def _one_of(choices: tuple[str, ...]) -> Callable[[_Given], str]:
    def parse(given: _Given) -> str:
        if given.value not in choices:
            raise given.wrong("one of " + ", ".join(choices))
        return str(given.value)

    return parse


def _path(given: _Given) -> Path:
    text = _text(given)
    text = text.removeprefix("file://")
    if "," in text:
        raise given.wrong("one directory (several paths are not supported yet)")
    if "://" in text or not text:
        raise given.wrong("a directory, for example /mnt/nvme/kv or file:///mnt/nvme/kv")
    return Path(os.path.abspath(os.path.expanduser(text)))


# key -> (field of NativeConfig, parser)
_KEYS: dict[str, tuple[str, Callable[[_Given], Any]]] = {
    "local_disk": ("directory", _path),
    "max_local_disk_size": ("nvme_bytes", _size),
    "max_local_cpu_size": ("host_bytes", _size),
    "chunk_size": ("chunk_tokens", _count(1 << 20)),
    "cache_policy": ("cache_policy", _text),
    "io_engine": ("io_engine", _one_of(IO_ENGINES)),
    "region_size": ("region_bytes", _size),
    "promotion_deadline": ("promotion_deadline_s", _seconds),
    "promotion_budget": ("promotion_budget_bytes", _size),
    "request_ttl": ("request_ttl_s", _seconds),
    "fail_when_locked": ("fail_when_locked", _flag),
    "lock_wait": ("lock_wait_s", _seconds_or_zero),
    "copy_threads": ("copy_threads", _count(64)),
    "model_fingerprint": ("model_fingerprint", _text),
    "load_failure_policy": ("load_failure_policy", _one_of(LOAD_FAILURE_POLICIES)),
    "data_parallel_engines": ("data_parallel_engines", _count(4096)),
}

# Read elsewhere, or switches of the program itself.
_NOT_CONFIGURATION = frozenset({"native", "config_file", "log_level"})

# What vLLM 0.32 itself reads from kv_connector_extra_config for any offloading spec.
_VLLM_KEYS = frozenset(
    {
        "cpu_bytes_to_use",
        "block_size",
        "blocks_per_chunk",
        "spec_name",
        "spec_module_path",
        "offload_prompt_only",
        "self_describing_kv_events",
    }
)
# Read by vLLM's own specs only; they change nothing here.
_VLLM_KEYS_OF_OTHER_SPECS = frozenset(
    {
        "backpressure",
        "cache_policy_module_path",
        "canonical_layout",
        "enable_telemetry",
        "eviction_policy",
        "max_tracker_size",
        "secondary_tiers",
        "store_threshold",
    }
)

# Keys of LMCache 0.5.6 (and LMCACHE_<KEY> variables) that we know of and do not use.
_LMCACHE_KEY_TEXT = """
app_id audit_actual_remote_url blend_check_layers blend_min_tokens blend_recompute_ratios blend_special_str
blend_thresholds blocking_timeout_secs chunk_statistics_auto_exit_target_unique_chunks
chunk_statistics_auto_exit_timeout_hours chunk_statistics_auto_start_statistics chunk_statistics_strategy controller_pull_url
controller_reply_url controller_url discard_partial_chunks do_not_track enable_async_loading enable_blending
enable_chunk_statistics enable_controller enable_hidden_state_cache enable_kv_events enable_lazy_memory_allocator enable_p2p
enable_pd enable_scheduler_bypass_lookup enable_xpyd external_backends external_lookup_client extra_config force_skip_save
gds_backend gds_buffer_size gds_path gds_path_sharding gpu_staging_buffer_bytes hidden_state_layers
hidden_states_retrieve_mode hit_miss_ratio internal_api_server_enabled internal_api_server_host
internal_api_server_include_index_list internal_api_server_port_start internal_api_server_socket_path_prefix
lazy_memory_expand_trigger_ratio lazy_memory_initial_ratio lazy_memory_safe_size lazy_memory_step_ratio lmcache_instance_id
lmcache_worker_heartbeat_delay_time lmcache_worker_heartbeat_time lmcache_worker_ids lmcache_worker_port
lmcache_worker_ports local_cpu local_cpu_use_hugepages local_disk_path_sharding lookup_server_worker_ids lookup_timeout_ms
maru_path maru_pool_size max_hidden_state_cpu_size max_tokens_per_load min_retrieve_tokens mp_host mp_port mq_timeout
nixl_backends nixl_buffer_device nixl_buffer_size numa_mode p2p_host p2p_init_ports p2p_lookup_ports
pd_allocation_timeout_sec pd_backend_mode pd_bidirectional pd_buffer_device pd_buffer_size pd_condition_poll_interval_sec
pd_max_prefill_len pd_peer_alloc_port pd_peer_host pd_peer_init_port pd_peer_query_port pd_proxy_host pd_proxy_port pd_role
pd_shutdown_timeout_sec pd_skip_proxy_notification pin_check_interval_sec pin_timeout_sec plugin_locations
pre_caching_hash_algorithm priority_limit py_enable_gc remote_config_url remote_serde remote_storage_plugins remote_url
reserve_local_cpu_size retrieve_locations run_script_api_enabled runtime_plugin_locations save_decode_cache
save_unfull_chunk script_allowed_imports skip_last_n_tokens storage_plugins store_location track_usage transfer_channel
use_experimental use_gds use_gpu_connector_v3 use_layerwise use_native use_upstream_mp
"""
_LMCACHE_KEYS = frozenset(_LMCACHE_KEY_TEXT.split())


# ---- sources ------------------------------------------------------------------------------------------------------------


def resolve(extra_config: Mapping[str, Any], environ: Mapping[str, str], *, warn: bool = False) -> NativeConfig:
    """The configuration, checked without touching the machine. InvalidArgument names the field, the value and what is right.

    `warn`: log what is ignored or unknown. Every process of an engine resolves; one of them warns.
    """
    values: dict[str, Any] = {}
    ignored: list[str] = []
    unknown: list[str] = []
    given = [
        *_from_file(environ, ignored),
        *_from_environment(environ, ignored, unknown),
        *_from_extra_config(extra_config, ignored),
    ]
    for item in given:
        key = item.name.removeprefix(ENV_PREFIX).lower() if item.name.startswith(ENV_PREFIX) else item.name
        if key == "cpu_bytes_to_use":
            values["host_bytes"] = _bytes(item)
        else:
            field, parse = _KEYS[key.removeprefix(EXTRA_PREFIX)]
            values[field] = parse(item)
    if warn and ignored:
        logger.warning("ignored, no meaning here: %s", ", ".join(sorted(ignored)))
    for message in unknown if warn else ():
        logger.warning("%s", message)
    if "host_bytes" not in values:
        raise InvalidArgument(
            "host memory size missing: give --kv-offloading-size GIB (or max_local_cpu_size in kv_connector_extra_config, "
            "or LMCACHE_MAX_LOCAL_CPU_SIZE)"
        )
    if "directory" in values and "nvme_bytes" not in values:
        raise InvalidArgument(
            f"local_disk={str(values['directory'])!r} without max_local_disk_size: "
            "give its limit in GiB, for example LMCACHE_MAX_LOCAL_DISK_SIZE=100"
        )
    if "nvme_bytes" in values and "directory" not in values:
        raise InvalidArgument(
            f"max_local_disk_size={values['nvme_bytes'] / GIB:g} without local_disk: "
            "give the directory, for example LMCACHE_LOCAL_DISK=/mnt/nvme/kv"
        )
    return NativeConfig(**values)


def _from_environment(environ: Mapping[str, str], ignored: list[str], unknown: list[str]) -> list[_Given]:
    given = []
    for name, value in sorted(environ.items()):
        if not name.startswith(ENV_PREFIX) or value == "":
            continue
        key = name.removeprefix(ENV_PREFIX).lower()
        if key in _KEYS:
            given.append(_Given(name, value, "environment"))
        elif key in _NOT_CONFIGURATION:
            continue
        elif key in _LMCACHE_KEYS or key.startswith("ec_"):
            ignored.append(name)
        else:
            unknown.append(f"environment variable {name} is not known{_nearest(key, lambda k: ENV_PREFIX + k.upper())}")
    return given


def _from_extra_config(extra_config: Mapping[str, Any], ignored: list[str]) -> list[_Given]:
    # --kv-offloading-size wins over max_local_cpu_size, whichever comes first in the text.
    given = []
    last = []
    for name, value in extra_config.items():
        key = name.removeprefix(EXTRA_PREFIX)
        source = "kv_connector_extra_config"
        if name == "cpu_bytes_to_use":
            last.append(_Given(name, value, "--kv-offloading-size, as bytes"))
        elif name in _VLLM_KEYS:
            continue
        elif key in _KEYS:
            if value is not None:
                given.append(_Given(name, value, source))
        elif key in _LMCACHE_KEYS or name in _VLLM_KEYS_OF_OTHER_SPECS or name.startswith(EXTRA_PREFIX + "mp."):
            ignored.append(name)
        else:
            raise InvalidArgument(f"kv_connector_extra_config key {name!r} is not known{_nearest(key, str)}")
    return given + last


def _from_file(environ: Mapping[str, str], ignored: list[str]) -> list[_Given]:
    path = environ.get("LMCACHE_CONFIG_FILE", "")
    if not path:
        return []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidArgument(f"LMCACHE_CONFIG_FILE={path!r}: {error.strerror}") from error
    content = _parse_file(path, text)
    if content is None:
        return []
    if not isinstance(content, dict):
        raise InvalidArgument(f"LMCACHE_CONFIG_FILE={path!r}: must hold names and values, found {type(content).__name__}")
    given = []
    for name, value in content.items():
        if name in _KEYS:
            if value is not None:
                given.append(_Given(str(name), value, path))
        elif name in _LMCACHE_KEYS:
            ignored.append(str(name))
        else:
            raise InvalidArgument(f"{path}: key {name!r} is not known{_nearest(str(name), str)}")
    return given


def _parse_file(path: str, text: str) -> object:
    if path.endswith(".json"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise InvalidArgument(f"LMCACHE_CONFIG_FILE={path!r}: not JSON: {error}") from error
    try:
        yaml: Any = importlib.import_module("yaml")
    except ImportError as error:
        raise InvalidArgument(f"LMCACHE_CONFIG_FILE={path!r}: needs PyYAML, or a file named *.json") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidArgument(f"LMCACHE_CONFIG_FILE={path!r}: not YAML: {error}") from error


def _nearest(key: str, spell: Callable[[str], str]) -> str:
    near = difflib.get_close_matches(key, sorted(_KEYS | dict.fromkeys(_VLLM_KEYS)), n=1, cutoff=0.6)
    return f"; did you mean {spell(near[0])}?" if near else ""


# ---- the machine --------------------------------------------------------------------------------------------------------


def check_machine(config: NativeConfig) -> None:
    """Host size against memory, path and limit against the file system. Creates and changes nothing."""
    memory = memory_limit_bytes()
    if config.host_bytes > memory:
        raise InvalidArgument(
            f"host size {config.host_bytes / GIB:.2f} GiB (--kv-offloading-size): "
            f"this machine may use {memory / GIB:.2f} GiB of memory"
        )
    if config.directory is not None:
        _check_directory(config.directory, config.nvme_bytes)


def _check_directory(directory: Path, limit_bytes: int) -> None:
    existing = directory
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise InvalidArgument(f"local_disk={str(directory)!r}: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InvalidArgument(f"local_disk={str(directory)!r}: no permission to write in {existing}")
    usage = shutil.disk_usage(existing)
    if limit_bytes > usage.total:
        raise InvalidArgument(
            f"max_local_disk_size={limit_bytes / GIB:g}: the file system of {existing} has {usage.total / GIB:.1f} GiB in all"
        )


def memory_limit_bytes() -> int:
    """Physical memory, or the control group's limit when that is smaller."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(file).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            limit = min(limit, int(text))
    return limit


def engine_directory(config: NativeConfig, engine_index: int) -> Path | None:
    """The directory of one vLLM engine: it has one owner."""
    return None if config.directory is None else config.directory / f"vllm-dp{engine_index}"


def engine_nvme_bytes(config: NativeConfig, engines: int) -> int:
    """One engine's share of the limit of all."""
    return config.nvme_bytes // engines
