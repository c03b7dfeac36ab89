"""vLLM: `--kv-transfer-config` finds NativeOffloadingConnector here; `plugin.register` serves plain `--kv-offloading-size`.

Importing this package imports no part of vLLM.
"""

from __future__ import annotations

from typing import Any

__all__ = ["NativeOffloadingConnector", "NativeOffloadingSpec"]


def __getattr__(name: str) -> Any:
    if name == "NativeOffloadingConnector":
        from lmcache_native.integration.vllm.connector import NativeOffloadingConnector

        return NativeOffloadingConnector
    if name == "NativeOffloadingSpec":
        from lmcache_native.integration.vllm.spec import NativeOffloadingSpec

        return NativeOffloadingSpec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
