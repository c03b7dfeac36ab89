"""Configuration: defaults < LMCACHE_CONFIG_FILE < LMCACHE_* environment < kv_connector_extra_config < --kv-offloading-size.

LMCache's names are used where they mean the same, and its files and variables are accepted as they are. Sizes are numbers of
GiB, times are seconds. One difference: sizes here are totals of one engine (all its tensor-parallel ranks), where LMCache counts
per rank. docs/configuration.md lists every key; `lmcache-native config` prints what is in force.

A wrong value is an error, and so is a key that asks for what is not done yet; all of one configuration are told at once. A name
nobody knows is an error in the file and in kv_connector_extra_config (they were written for this engine) and a warning in the
environment (which other programs share).
"""

from __future__ import annotations

from lmcache_native.config.machine import (
    available_memory_bytes,
    check_machine,
    engine_daily_bytes,
    engine_directories,
    engine_directory_bytes,
    engine_nvme_bytes,
    memory_limit_bytes,
)
from lmcache_native.config.merge import Explained, explain, resolve
from lmcache_native.config.unowned import describe as describe_unowned
from lmcache_native.config.unowned import unowned_stores
from lmcache_native.config.unowned import without as without_unowned
from lmcache_native.config.values import (
    ENV_PREFIX,
    EXTRA_PREFIX,
    GIB,
    IO_ENGINES,
    LOAD_FAILURE_POLICIES,
    UNLIMITED,
    NativeConfig,
    Profile,
    parse_flag,
)

__all__ = [
    "ENV_PREFIX",
    "EXTRA_PREFIX",
    "GIB",
    "IO_ENGINES",
    "LOAD_FAILURE_POLICIES",
    "UNLIMITED",
    "Explained",
    "NativeConfig",
    "Profile",
    "available_memory_bytes",
    "check_machine",
    "describe_unowned",
    "engine_daily_bytes",
    "engine_directories",
    "engine_directory_bytes",
    "engine_nvme_bytes",
    "explain",
    "memory_limit_bytes",
    "parse_flag",
    "resolve",
    "unowned_stores",
    "without_unowned",
]
