"""vLLM's general plugin: with LMCACHE_NATIVE=1, plain `vllm serve M --kv-offloading-size N` is served by lmcache-native.

vLLM calls register() in the front end, in the engine core and in every worker.
"""

from __future__ import annotations

import os
from typing import Any

from lmcache_native.config import check_machine, parse_flag, resolve
from lmcache_native.errors import InvalidArgument

REPLACED = "OffloadingConnector"
ORIGINAL = "OffloadingConnector.vllm"  # vLLM's own stays reachable under this name


def register() -> None:
    """Does nothing unless LMCACHE_NATIVE is true. Idempotent."""
    value = os.environ.get("LMCACHE_NATIVE", "")
    wanted = False if value == "" else parse_flag(value)
    if wanted is None:
        raise InvalidArgument(f"LMCACHE_NATIVE={value!r} (environment): must be one of 1, true, yes, on, 0, false, no, off")
    if not wanted:
        return
    from lmcache_native.integration.vllm import compat

    if compat.replace_connector(REPLACED, ORIGINAL, _load):
        compat.after_transfer_config(_early)


def _load() -> Any:
    from lmcache_native.integration.vllm.connector import NativeOffloadingConnector

    return NativeOffloadingConnector


def _early(vllm_config: Any) -> None:
    """Where the configuration is first whole, in the front end: wrong values fail here, before anything is started."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector != REPLACED or transfer.kv_connector_module_path:
        return
    extra = transfer.kv_connector_extra_config
    # An engine core of a dense model no longer knows how many its siblings are.
    extra.setdefault("data_parallel_engines", vllm_config.parallel_config.data_parallel_size)
    check_machine(resolve(extra, os.environ))
