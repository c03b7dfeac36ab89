"""Which connector names lead to us: the table in plugin.py, with real vLLM configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import EngineArgs

from lmcache_native.config import GIB, Profile, resolve
from lmcache_native.errors import InvalidArgument, Unsupported
from lmcache_native.integration.vllm import plugin
from lmcache_native.integration.vllm.connector import NativeOffloadingConnector
from lmcache_native.integration.vllm.token_connector import LMCacheNativeConnector, configuration, loads_that_are_safe

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


VLLMS = None  # served by vLLM or LMCache


@pytest.mark.parametrize(
    ("value", "lmcache", "lmcaches_names", "offloading"),
    [
        (None, False, LMCacheNativeConnector, VLLMS),
        ("", False, LMCacheNativeConnector, VLLMS),
        (None, True, VLLMS, VLLMS),
        ("1", False, LMCacheNativeConnector, NativeOffloadingConnector),
        ("yes", True, LMCacheNativeConnector, NativeOffloadingConnector),
        ("0", False, VLLMS, VLLMS),
        ("off", True, VLLMS, VLLMS),
    ],
)
def test_the_table(
    with_plugin: Callable[[str | None], None],
    request: pytest.FixtureRequest,
    value: str | None,
    lmcache: bool,
    lmcaches_names: Any,
    offloading: Any,
) -> None:
    if lmcache:
        request.getfixturevalue("lmcache_installed")
    before = dict(KVConnectorFactory._registry)
    with_plugin(value)
    ours = (LMCacheNativeConnector, NativeOffloadingConnector)
    found = {name: served(name) for name in (*plugin.LMCACHE, plugin.OFFLOADING)}
    for name in plugin.LMCACHE:
        assert found[name] is lmcaches_names or (lmcaches_names is VLLMS and found[name] not in ours)
    assert found[plugin.OFFLOADING] is offloading or (offloading is VLLMS and found[plugin.OFFLOADING] not in ours)
    for name, loads in before.items():  # what vLLM had is where it was, or under its name with the suffix
        now = KVConnectorFactory._registry
        assert loads in (now[name], now.get(name + plugin.ORIGINAL_SUFFIX))
    by_its_own_name = served(plugin.NATIVE) if plugin.NATIVE in KVConnectorFactory._registry else None
    assert by_its_own_name is (VLLMS if value in ("0", "off") else LMCacheNativeConnector)


@pytest.mark.parametrize("value", ["2", "maybe", " "])
def test_what_is_neither_is_refused(with_plugin: Callable[[str | None], None], value: str) -> None:
    before = dict(KVConnectorFactory._registry)
    with pytest.raises(InvalidArgument, match=f"LMCACHE_NATIVE='{value}' .* must be one of 1, true"):
        with_plugin(value)
    assert KVConnectorFactory._registry == before


def test_registering_again_changes_nothing(with_plugin: Callable[[str | None], None]) -> None:
    with_plugin(None)
    registry, hook = dict(KVConnectorFactory._registry), VllmConfig._post_init_kv_transfer_config
    with_plugin(None)
    assert KVConnectorFactory._registry == registry
    assert VllmConfig._post_init_kv_transfer_config is hook


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


def test_size_wins_over_lmcaches_own(
    with_plugin: Callable[[str | None], None], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_plugin(None)
    monkeypatch.setenv("LMCACHE_MAX_LOCAL_CPU_SIZE", "0.5")
    assert configuration(engine_config(tiny, kv_transfer_config=V1)).host_bytes == GIB // 2
    assert configuration(engine_config(tiny, kv_offloading_backend="lmcache", kv_offloading_size=0.25)).host_bytes == GIB // 4


def test_quickstart_has_lmcaches_defaults(with_plugin: Callable[[str | None], None], tiny: Path) -> None:
    with_plugin(None)
    found = configuration(engine_config(tiny, kv_transfer_config=V1))
    assert (found.host_bytes, found.chunk_tokens, found.async_loading) == (5 * GIB, 256, True)


@pytest.mark.parametrize(("key", "value"), [("enable_async_loading", False), ("use_layerwise", True)])
def test_synchronous_loads_only_without_asynchronous_scheduling(key: str, value: bool) -> None:
    config = resolve({key: value}, {}, profile=Profile.LMCACHE)
    assert not config.async_loading

    def under(asynchronous: bool) -> tuple[bool, bool]:
        engine = SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=asynchronous))
        found = loads_that_are_safe(config, engine, warn=False)
        return found.async_loading, found.layerwise

    assert under(True) == (True, False)
    assert under(False) == (False, key == "use_layerwise")


@pytest.mark.parametrize("module", [None, "lmcache_native.integration.vllm"])
def test_wrong_values_fail_in_the_front_end(
    with_plugin: Callable[[str | None], None], tiny: Path, monkeypatch: pytest.MonkeyPatch, module: str | None
) -> None:
    with_plugin(None)
    monkeypatch.setenv("LMCACHE_CHUNK_SIZE", "many")
    transfer = V1 if module is None else {**V1, "kv_connector": plugin.NATIVE, "kv_connector_module_path": module}
    with pytest.raises(ValueError, match="LMCACHE_CHUNK_SIZE='many'"):
        engine_config(tiny, kv_transfer_config=transfer)


@pytest.mark.parametrize(
    ("size", "environ", "message"),
    [
        (1e6, {}, "this machine may use"),
        (0.25, {"LMCACHE_LOCAL_DISK": "/proc/kv", "LMCACHE_MAX_LOCAL_DISK_SIZE": "0.01"}, "/proc"),
        (0.25, {"LMCACHE_SAVE_DECODE_CACHE": "perhaps"}, "LMCACHE_SAVE_DECODE_CACHE='perhaps'"),
    ],
)
def test_wrong_values_with_the_lmcache_backend_fail_in_the_front_end(
    with_plugin: Callable[[str | None], None],
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: float,
    environ: dict[str, str],
    message: str,
) -> None:
    with_plugin(None)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        engine_config(tiny, kv_offloading_backend="lmcache", kv_offloading_size=size)


def test_keys_that_nobody_knows_fail_in_the_front_end(with_plugin: Callable[[str | None], None], tiny: Path) -> None:
    with_plugin(None)
    with pytest.raises(ValueError, match="chunk_sise"):
        engine_config(tiny, kv_transfer_config={**V1, "kv_connector_extra_config": {"chunk_sise": 16}})


REFUSED = {  # of LMCache's features, each as its users write it
    "enable_blending": "blending",
    "enable_pd": "disaggregated-prefill",
    "enable_p2p": "p2p-sharing",
    "enable_controller": "controller",
}


@pytest.mark.parametrize("module", [None, "lmcache_native.integration.vllm"])
@pytest.mark.parametrize("key", list(REFUSED))
def test_features_of_lmcache_are_refused_in_the_front_end(
    with_plugin: Callable[[str | None], None], tiny: Path, module: str | None, key: str
) -> None:
    with_plugin(None)
    transfer = V1 if module is None else {**V1, "kv_connector": plugin.NATIVE, "kv_connector_module_path": module}
    with pytest.raises(Unsupported) as caught:
        engine_config(tiny, kv_transfer_config={**transfer, "kv_connector_extra_config": {f"lmcache.{key}": True}})
    first_line = str(caught.value).splitlines()[0]
    assert first_line.startswith(f"lmcache.{key}=True (kv_connector_extra_config): must be left out")
    assert first_line.endswith(f"docs/lmcache-features.md#{REFUSED[key]}")


def test_features_of_lmcache_in_a_file_are_refused_in_the_front_end(
    with_plugin: Callable[[str | None], None], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_plugin(None)
    file = tmp_path / "lmcache.yaml"
    file.write_text("chunk_size: 256\nenable_blending: true\nremote_url: redis://host:6379\nremote_serde: cachegen\n")
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(file))
    for changes in ({"kv_transfer_config": V1}, {"kv_offloading_backend": "lmcache", "kv_offloading_size": 0.25}):
        with pytest.raises(Unsupported) as caught:
            engine_config(tiny, **changes)
        message = str(caught.value)
        assert message.startswith("2 problems in the configuration:")
        assert f"enable_blending=True ({file})" in message
        assert "(with it: remote_serde); see docs/lmcache-features.md#remote-stores" in message
    monkeypatch.setenv("LMCACHE_NATIVE_IGNORE_UNSUPPORTED", "1")
    engine_config(tiny, kv_transfer_config=V1)


@pytest.mark.parametrize("error", [RuntimeError("another vLLM"), AttributeError("no such thing")])
def test_a_vllm_that_nobody_foresaw_starts_unless_we_are_asked_for(
    with_plugin: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    lines: list[str] = []

    def check() -> None:
        raise error

    monkeypatch.setattr(plugin.logger, "warning", lambda text, *args: lines.append(text % args))
    monkeypatch.setattr("lmcache_native.integration.vllm.compat.check_registries", check)
    registry = dict(KVConnectorFactory._registry)
    with_plugin(None)
    assert lines == [f"connector names left as they are: {type(error).__name__}: {error}"]
    with pytest.raises(type(error)):
        with_plugin("1")
    assert KVConnectorFactory._registry == registry


def test_number_of_engines_is_passed_on_unless_given(with_plugin: Callable[[str | None], None], tiny: Path) -> None:
    with_plugin(None)

    def engines(extra: dict[str, Any]) -> int | None:
        config = engine_config(tiny, kv_transfer_config={**V1, "kv_connector_extra_config": extra})
        return configuration(config).data_parallel_engines

    assert engines({}) == 1
    assert engines({"data_parallel_engines": 4}) == 4


@pytest.mark.usefixtures("lmcache_installed")
def test_lmcaches_own_configurations_are_for_lmcache_to_check(
    with_plugin: Callable[[str | None], None], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_plugin(None)
    monkeypatch.setenv("LMCACHE_CHUNK_SIZE", "many")
    with pytest.raises(RuntimeError, match="it must not be imported"):  # by vLLM, as LMCache's connector needs it
        engine_config(tiny, kv_transfer_config={**V1, "kv_connector": "LMCacheMPConnector"})


def test_others_configurations_are_not_looked_at(
    with_plugin: Callable[[str | None], None], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_plugin(None)
    monkeypatch.setenv("LMCACHE_CHUNK_SIZE", "many")
    engine_config(tiny, kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both"})
    engine_config(tiny, kv_offloading_size=0.25)


@pytest.mark.parametrize("missing", ["registry", "hook"])
def test_a_vllm_without_our_ways_in_is_left_alone_unless_asked(
    with_plugin: Callable[[str | None], None], tiny: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(plugin.logger, "debug", lambda text, *args: lines.append(text % args))
    with monkeypatch.context() as patch:
        if missing == "registry":
            patch.setattr(KVConnectorFactory, "_registry", None)
        else:
            patch.delattr(VllmConfig, "_post_init_kv_transfer_config")
        with_plugin(None)
        assert len(lines) == 1
        assert "connector names left as they are" in lines[0]
    names = dict(KVConnectorFactory._registry)
    engine_config(tiny)
    with monkeypatch.context() as patch:
        if missing == "registry":
            patch.setattr(KVConnectorFactory, "_registry", None)
        else:
            patch.delattr(VllmConfig, "_post_init_kv_transfer_config")
        with pytest.raises(Unsupported, match=missing if missing == "registry" else "_post_init_kv_transfer_config"):
            with_plugin("1")
    assert missing == "hook" or names == KVConnectorFactory._registry
