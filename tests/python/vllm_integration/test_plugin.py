"""Which connector names lead to us: the table in plugin.py, with real vLLM configurations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import EngineArgs

from lmcache_native.config import GIB
from lmcache_native.errors import Unsupported
from lmcache_native.integration.vllm import compat, plugin
from lmcache_native.integration.vllm.connector import NativeOffloadingConnector
from lmcache_native.integration.vllm.token_connector import LMCacheNativeConnector, configuration

V1 = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}


@pytest.fixture
def with_plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | None], None]]:
    """Registers with LMCACHE_NATIVE=value; everything is as before afterwards."""
    registry = dict(KVConnectorFactory._registry)
    method = VllmConfig._post_init_kv_transfer_config
    served = set(plugin._served)
    for name in (plugin.NATIVE, plugin.OFFLOADING, *plugin.LMCACHE):  # what vLLM's own plugin loading may have done before
        original = KVConnectorFactory._registry.pop(name + plugin.ORIGINAL_SUFFIX, None)
        if original is not None:
            KVConnectorFactory._registry[name] = original
    KVConnectorFactory._registry.pop(plugin.NATIVE, None)
    plugin._served.clear()

    def register(value: str | None) -> None:
        if value is None:
            monkeypatch.delenv("LMCACHE_NATIVE", raising=False)
        else:
            monkeypatch.setenv("LMCACHE_NATIVE", value)
        plugin.register()

    yield register
    KVConnectorFactory._registry.clear()
    KVConnectorFactory._registry.update(registry)
    VllmConfig._post_init_kv_transfer_config = method
    plugin._served.clear()
    plugin._served.update(served)


@pytest.fixture
def lmcache_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "lmcache"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('it must not be imported')\n")
    monkeypatch.syspath_prepend(tmp_path / "site")


def engine_config(model: Path, **changes: Any) -> VllmConfig:
    return EngineArgs(model=str(model), enforce_eager=True, max_model_len=512, **changes).create_engine_config()


def served(name: str) -> Any:
    try:
        return KVConnectorFactory.get_connector_class_by_name(name)
    except (ImportError, RuntimeError):  # LMCache's own, which is not there
        return None


@pytest.mark.parametrize("value", [None, ""])
def test_lmcaches_names_are_ours_without_lmcache(with_plugin: Callable[[str | None], None], value: str | None) -> None:
    with_plugin(value)
    assert [served(name) for name in plugin.LMCACHE] == [LMCacheNativeConnector] * 2
    assert served(plugin.NATIVE) is LMCacheNativeConnector
    assert served(plugin.OFFLOADING) is not NativeOffloadingConnector


def test_off_leaves_everything(with_plugin: Callable[[str | None], None]) -> None:
    before = dict(KVConnectorFactory._registry)
    with_plugin("0")
    assert KVConnectorFactory._registry == before


@pytest.mark.usefixtures("lmcache_installed")
def test_lmcache_keeps_its_names_where_it_is_installed(with_plugin: Callable[[str | None], None]) -> None:
    with_plugin(None)
    assert all(served(name) is not LMCacheNativeConnector for name in plugin.LMCACHE)
    assert served(plugin.NATIVE) is LMCacheNativeConnector


@pytest.mark.usefixtures("lmcache_installed")
def test_taking_over_says_so_once(with_plugin: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(plugin.logger, "warning", lambda text, *args: lines.append(text % args))
    with_plugin("1")
    assert served("LMCacheConnectorV1") is LMCacheNativeConnector
    assert served("LMCacheConnectorV1") is LMCacheNativeConnector
    assert len(lines) == 1
    assert "LMCacheConnectorV1 is served by lmcache_native" in lines[0]
    assert served(plugin.OFFLOADING) is NativeOffloadingConnector


def test_size_with_the_lmcache_backend_is_honoured(with_plugin: Callable[[str | None], None], tiny: Path) -> None:
    with_plugin(None)
    config = engine_config(tiny, kv_offloading_backend="lmcache", kv_offloading_size=0.25)
    assert config.kv_transfer_config.kv_connector == "LMCacheMPConnector"
    assert KVConnectorFactory.get_connector_class(config.kv_transfer_config) is LMCacheNativeConnector
    assert configuration(config).host_bytes == GIB // 4
    assert KVConnectorFactory.supports_hma_config(config.kv_transfer_config)


def test_quickstart_has_lmcaches_defaults(with_plugin: Callable[[str | None], None], tiny: Path) -> None:
    with_plugin(None)
    found = configuration(engine_config(tiny, kv_transfer_config=V1))
    assert (found.host_bytes, found.chunk_tokens, found.async_loading) == (5 * GIB, 256, True)


@pytest.mark.parametrize("module", [None, "lmcache_native.integration.vllm"])
def test_wrong_values_fail_in_the_front_end(
    with_plugin: Callable[[str | None], None], tiny: Path, monkeypatch: pytest.MonkeyPatch, module: str | None
) -> None:
    with_plugin(None)
    monkeypatch.setenv("LMCACHE_CHUNK_SIZE", "many")
    transfer = V1 if module is None else {**V1, "kv_connector": plugin.NATIVE, "kv_connector_module_path": module}
    with pytest.raises(ValueError, match="LMCACHE_CHUNK_SIZE='many'"):
        engine_config(tiny, kv_transfer_config=transfer)


def test_others_configurations_are_not_looked_at(
    with_plugin: Callable[[str | None], None], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_plugin(None)
    monkeypatch.setenv("LMCACHE_CHUNK_SIZE", "many")
    engine_config(tiny, kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both"})
    engine_config(tiny, kv_offloading_size=0.25)


def test_a_vllm_without_our_ways_in_is_left_alone_unless_asked(
    with_plugin: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_registry(factory: Any, name: str) -> Any:
        raise Unsupported("no registry")

    monkeypatch.setattr(compat, "_registry", no_registry)
    monkeypatch.setattr(logging, "raiseExceptions", True)
    with_plugin(None)
    with pytest.raises(Unsupported, match="no registry"):
        with_plugin("1")
