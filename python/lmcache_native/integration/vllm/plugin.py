"""vLLM's general plugin: serves the connector names of LMCache, and with LMCACHE_NATIVE=1 plain `--kv-offloading-size`.

| LMCACHE_NATIVE | LMCacheConnectorV1, LMCacheMPConnector | OffloadingConnector (`--kv-offloading-size N`) |
|---|---|---|
| not set | ours, unless LMCache itself is installed | vLLM's |
| true | ours | ours |
| false | LMCache's | vLLM's |

vLLM calls register() in the front end, in the engine core and in every worker.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any

from lmcache_native.config import Profile, check_machine, parse_flag, resolve
from lmcache_native.errors import InvalidArgument, Unsupported
from lmcache_native.logging import get_logger

logger = get_logger(__name__)

OFFLOADING = "OffloadingConnector"
LMCACHE = ("LMCacheConnectorV1", "LMCacheMPConnector")  # the second is what vLLM makes of --kv-offloading-backend lmcache
NATIVE = "LMCacheNativeConnector"
ORIGINAL_SUFFIX = ".vllm"  # vLLM's own stays reachable under its name with this
PACKAGE = "lmcache_native.integration.vllm"

_served: set[str] = set()  # names that lead to a connector of ours


def register() -> None:
    """Idempotent. Raises only when LMCACHE_NATIVE asks for something that cannot be had: vLLM calls this in every process, also
    for users who merely have the package installed."""
    value = os.environ.get("LMCACHE_NATIVE", "")
    wanted = None if value == "" else parse_flag(value)
    if value != "" and wanted is None:
        raise InvalidArgument(f"LMCACHE_NATIVE={value!r} (environment): must be one of 1, true, yes, on, 0, false, no, off")
    if wanted is False:
        return
    try:
        _replace(offloading=wanted is True, lmcache=wanted is True or not _lmcache_installed())
    except Unsupported as error:
        if wanted:
            raise
        logger.debug("connector names left as they are: %s", error)
    except Exception as error:
        if wanted:
            raise
        # A vLLM that nobody foresaw starts as if this package were not there.
        logger.warning("connector names left as they are: %s: %s", type(error).__name__, error)


def _replace(*, offloading: bool, lmcache: bool) -> None:
    from lmcache_native.integration.vllm import compat

    compat.check_registries()
    wanted = {name: _in_place_of(name) for name in LMCACHE} if lmcache else {}
    if offloading:
        wanted[OFFLOADING] = _offloading
    new = compat.add_connector(NATIVE, _native)
    for name, load in wanted.items():
        new |= compat.replace_connector(name, name + ORIGINAL_SUFFIX, load)
    _served.update(wanted, [NATIVE])
    if new:
        compat.after_transfer_config(_early)
        try:
            compat.before_requests(_check_request)
        except Unsupported as error:
            logger.debug("requests are checked in the engine only: %s", error)


def _lmcache_installed() -> bool:
    return importlib.util.find_spec("lmcache") is not None


def _native() -> Any:
    return importlib.import_module(PACKAGE).LMCacheNativeConnector


def _offloading() -> Any:
    return importlib.import_module(PACKAGE).NativeOffloadingConnector


def _in_place_of(name: str) -> Callable[[], Any]:
    told = False

    def load() -> Any:
        nonlocal told
        if not told and _lmcache_installed():
            told = True
            logger.warning(
                "%s is served by lmcache_native because LMCACHE_NATIVE is set, although LMCache %s is installed", name, _version()
            )
        return _native()

    return load


def _version() -> str:
    try:
        return importlib.metadata.version("lmcache")
    except importlib.metadata.PackageNotFoundError:
        return "(unknown version)"


def _ours(transfer: Any) -> bool:
    if transfer is None:
        return False
    module = transfer.kv_connector_module_path
    return module == PACKAGE or (module is None and transfer.kv_connector in _served)


def _check_request(vllm_config: Any, parameters: Any) -> None:
    """In the front end: a wrong value is the client's error, not a request that is served without the cache."""
    if _ours(vllm_config.kv_transfer_config) and isinstance(parameters, Mapping):
        from lmcache_native.integration.vllm.token_keys import request_settings

        request_settings(parameters)


def _early(vllm_config: Any) -> None:
    """Where the configuration is first whole, in the front end: wrong values fail here, before anything is started."""
    transfer = vllm_config.kv_transfer_config
    if not _ours(transfer):
        return
    from lmcache_native.integration.vllm import compat

    kind = compat.connector_class(transfer)
    extra = transfer.kv_connector_extra_config
    if kind is _native():
        from lmcache_native.integration.vllm.token_connector import configuration

        config = configuration(vllm_config)
    elif kind is _offloading():
        config = resolve(extra, os.environ, profile=Profile.OFFLOADING)
    else:
        return
    # An engine core of a dense model no longer knows how many its siblings are.
    if config.data_parallel_engines is None:
        extra["data_parallel_engines"] = vllm_config.parallel_config.data_parallel_size
    check_machine(config, max(1, vllm_config.parallel_config.data_parallel_size_local))
