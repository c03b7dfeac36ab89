"""Whether a worker reads NVMe itself: one probe for all workers, within bounds. Without a GPU the answer is no."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmcache_native import Store
from lmcache_native import gds as probes
from lmcache_native.config import GIB, NativeConfig
from lmcache_native.errors import ResourceExhausted, Unavailable
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
    assert (first.host_read, first.host_write) == (0, 0), "without GDS nothing is written"
    assert list((tmp_path / "kv").iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(probes, "probe", lambda *_, **__: pytest.fail("probed again"))
        assert gds.probe_once(tmp_path / "kv", -1, config(tmp_path)) == first
    (kept,) = cache.glob("*.json")
    kept.write_text("[]")
    again = gds.probe_once(tmp_path / "kv", -1, config(tmp_path))
    assert again.mode == "none"
    assert kept.read_text() != "[]"


def test_a_verdict_that_cost_writes_outlives_a_restart_until_its_grounds_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed: list[str] = []
    found = probes.GdsProbe("gds", "PCI P2PDMA", 10.0, 5.0, 8.0, 5.0, use_gds=True)

    def probe(directory: str, **_: Any) -> probes.GdsProbe:
        probed.append(directory)
        return found

    def ask() -> int:
        assert gds.probe_once(tmp_path / "kv", -1, config(tmp_path)) == found
        return len(probed)

    monkeypatch.setattr(probes, "probe", probe)
    assert (ask(), ask()) == (1, 1)
    monkeypatch.setattr(gds, "machine_id", lambda: "another boot")
    assert ask() == 1
    monkeypatch.setenv("CUFILE_ALLOW_COMPAT_MODE", "true")
    assert (ask(), ask()) == (2, 2)
    driver = tmp_path / "cufile.json"
    driver.write_text("{}")
    monkeypatch.setenv("CUFILE_ENV_PATH_JSON", str(driver))
    assert (ask(), ask()) == (3, 3)
    driver.write_text('{"properties": {"use_pci_p2pdma": true}}')
    assert (ask(), ask()) == (4, 4)
    found = probes.GdsProbe("none", "no nvidia-fs", 0, 0, 0, 0, use_gds=False)
    driver.write_text("{ }")
    assert (ask(), ask()) == (5, 5)
    monkeypatch.setattr(gds, "machine_id", lambda: "a third boot")
    assert (ask(), ask()) == (6, 6), "cheap to find out: asked anew after each boot"


@pytest.mark.parametrize(
    ("free", "utilization", "fixed", "words"),
    [
        (8 << 30, 0.9, None, ""),
        (8 << 30, 0.998, None, "gpu_memory_utilization=0.998 leaves room for 163 MiB"),
        (100 << 20, 0.9, None, "gpu_memory_utilization=0.9 leaves room for 100 MiB"),
        (8 << 30, 1.0, 70 << 30, ""),
        (100 << 20, 0.5, 70 << 30, "kv_cache_memory_bytes leaves room for 100 MiB"),
    ],
)
def test_staging_comes_from_what_vllm_leaves(free: int, utilization: float, fixed: int | None, words: str) -> None:
    cache = SimpleNamespace(gpu_memory_utilization=utilization, kv_cache_memory_bytes=fixed)
    if not words:
        gds.check_room(256 << 20, cache, free, 80 << 30)
        return
    with pytest.raises(ResourceExhausted, match=f"gds_buffer_size is 256 MiB, {words} of device memory"):
        gds.check_room(256 << 20, cache, free, 80 << 30)


@pytest.mark.parametrize("use_gds", ["auto", "on"])
def test_without_room_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_gds: str) -> None:
    monkeypatch.setattr(probes, "load_plugin", lambda: "plugin")
    monkeypatch.setattr(gds, "memory_of", lambda device: (100 << 20, 80 << 30))
    vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(rank=0, world_size=1, data_parallel_index=0),
        cache_config=SimpleNamespace(gpu_memory_utilization=0.9, kv_cache_memory_bytes=None),
    )
    found: Any = None

    def choose() -> object:
        return gds.record_loader(
            config(tmp_path, use_gds=use_gds), vllm_config, found, found, device_type="cuda", device=0, owner=None
        )

    if use_gds == "auto":
        assert choose() is None
    else:
        with pytest.raises(Unavailable, match=r"use_gds=on: .*100 MiB.*lower gds_buffer_size or vLLM's gpu_memory_utilization"):
            choose()


def test_probe_of_a_drive_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()
    monkeypatch.setattr(gds, "PROBE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(probes, "probe", lambda *_, **__: answer.wait(60))
    with pytest.raises(Unavailable, match="no answer to a probe within"):
        gds.probe_once(tmp_path / "kv", -1, config(tmp_path))
    answer.set()


def test_what_a_probe_writes_is_in_the_days_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gds = probes.GdsProbe("gds", "as told", 2.0, 2.0, 1.0, 1.0, True)
    monkeypatch.setattr(probes, "probe", lambda *_, **__: with_gds)
    gds.probe_once(tmp_path / "kv", -1, config(tmp_path))
    gds.probe_once(tmp_path / "kv", -1, config(tmp_path))
    written = gds.take_written_bytes(tmp_path / "kv")
    assert written == 2 * gds.PROBE_BYTES
    assert gds.take_written_bytes(tmp_path / "kv") == 0
    store = Store(host_bytes=16 << 20, directory=tmp_path / "kv" / "vllm-dp0", nvme_bytes=1 << 30)
    before = store.stats()["nvme_day_bytes"]
    store.count_writes(0, written)
    assert store.stats()["nvme_day_bytes"] == before + written
    store.close()
    again = Store(host_bytes=16 << 20, directory=tmp_path / "kv" / "vllm-dp0", nvme_bytes=1 << 30)
    assert written <= again.stats()["nvme_day_bytes"] < before + 2 * written
    again.close()


def test_a_probe_that_is_killed_is_counted_and_one_that_writes_nothing_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> Any:
        raise Killed

    monkeypatch.setattr(gds, "_probe", killed)
    with pytest.raises(Killed):
        gds.probe_once(tmp_path / "kv", -1, config(tmp_path))
    assert gds.take_written_bytes(tmp_path / "kv") == 2 * gds.PROBE_BYTES
    monkeypatch.setattr(gds, "_probe", lambda *_: probes.GdsProbe("none", "no plugin", 0, 0, 0, 0, False))
    gds.probe_once(tmp_path / "kv", -1, config(tmp_path))
    assert gds.take_written_bytes(tmp_path / "kv") == 0


def test_no_probe_below_the_floor(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="MiB are free, too few for a probe above the floor"):
        gds.probe_once(tmp_path / "kv", -1, config(tmp_path, nvme_free_floor_bytes=1 << 60))
    assert gds.take_written_bytes(tmp_path / "kv") == 0


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
