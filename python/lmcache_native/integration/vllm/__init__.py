"""vLLM: `--kv-transfer-config` finds the connectors here; `plugin.register` serves vLLM's and LMCache's own names.

Importing this package imports no part of vLLM. Naming a connector raises Unsupported where vLLM's interfaces are not as needed.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "LMCacheNativeConnector": "token_connector",
    "NativeOffloadingConnector": "connector",
    "NativeOffloadingSpec": "spec",
}
# Whose needs a vLLM must meet.
_NEEDS = {name: name for name in _MODULES} | {"NativeOffloadingSpec": "NativeOffloadingConnector"}

__all__ = ["LMCacheNativeConnector", "NativeOffloadingConnector", "NativeOffloadingSpec"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmcache_native.integration.vllm import interface_check

    interface_check.require(_NEEDS[name])
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
