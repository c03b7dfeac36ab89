"""Whether a worker reads NVMe itself: one probe for all workers, within bounds. Without a GPU the answer is no."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmcache_native import gds as probes
from lmcache_native.config import GIB, NativeConfig
from lmcache_native.errors import Unavailable
from lmcache_native.integration.vllm import gds

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gds, "PROBE_BYTES", 4 << 20)
    return tmp_path / "cache" / "lmcache-native" / "gds"


def config(tmp_path: Path, **more: Any) -> NativeConfig:
    return NativeConfig(host_bytes=GIB, directories=(tmp_path / "kv",), nvme_bytes=GIB, **more)


def test_one_probe_for_all_workers(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = gds.probe_once(tmp_path / "kv", -1, config(tmp_path))
    assert first.mode == "none"
    assert first.host_read > 0
    assert list((tmp_path / "kv").iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(probes, "probe", lambda *_, **__: pytest.fail("probed again"))
        assert gds.probe_once(tmp_path / "kv", -1, config(tmp_path)) == first
    (kept,) = cache.glob("*.json")
    kept.write_text("[]")
    again = gds.probe_once(tmp_path / "kv", -1, config(tmp_path))
    assert again.mode == "none"
    assert kept.read_text() != "[]"


def test_probe_of_a_drive_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()
    monkeypatch.setattr(gds, "PROBE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(probes, "probe", lambda *_, **__: answer.wait(60))
    with pytest.raises(Unavailable, match="no answer to a probe within"):
        gds.probe_once(tmp_path / "kv", -1, config(tmp_path))
    answer.set()


def test_no_probe_below_the_floor(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="MiB are free, too few for a probe above the floor"):
        gds.probe_once(tmp_path / "kv", -1, config(tmp_path, nvme_free_floor_bytes=1 << 60))


@pytest.mark.parametrize("use_gds", ["auto", "on"])
def test_on_the_cpu(tmp_path: Path, use_gds: str) -> None:
    def choose() -> object:
        vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(rank=0, world_size=1, data_parallel_index=0))
        found: Any = None
        return gds.record_loader(
            config(tmp_path, use_gds=use_gds), vllm_config, found, found, device_type="cpu", device=0, owner=None
        )

    if use_gds == "auto":
        assert choose() is None
    else:
        with pytest.raises(Unavailable, match="use_gds=on: the KV cache is on cpu"):
            choose()


def test_libraries_that_do_not_load_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Kvikio:
        @staticmethod
        def load_library() -> None:
            raise RuntimeError("Failed to dlopen libcufile.so.0")

    monkeypatch.setitem(__import__("sys").modules, "libkvikio", Kvikio)
    plugin = tmp_path / probes.PLUGIN
    plugin.touch()
    with pytest.raises(Unavailable, match="libkvikio does not load: Failed to dlopen"):
        probes.load_plugin(str(plugin))
