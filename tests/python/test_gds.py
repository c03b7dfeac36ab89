"""The probe of GPUDirect Storage, and what is missing here. The plugin itself is tested in tests/gds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lmcache_native import gds
from lmcache_native.errors import LmcacheNativeError, Unavailable

pytestmark = pytest.mark.unit

SMALL = 4 << 20


def test_without_a_plugin_the_host_path_is_measured(tmp_path: Path) -> None:
    found = gds.probe(str(tmp_path), plugin="/nowhere/liblmcn_gds.so", file_bytes=SMALL, in_flight=2)
    assert found.mode == "none"
    assert "/nowhere/liblmcn_gds.so is not there" in found.reason
    assert found.host_read > 0
    assert found.host_write > 0
    assert (found.gds_read, found.gds_write, found.use_gds) == (0, 0, False)
    assert list(tmp_path.iterdir()) == []


def test_without_kvikio_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libkvikio", None)
    plugin = tmp_path / gds.PLUGIN
    plugin.touch()
    with pytest.raises(Unavailable, match=r"pip install 'libkvikio-cu13==26\.10\.\*'"):
        gds.load_plugin(str(plugin))


def test_a_file_that_is_no_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Kvikio:
        @staticmethod
        def load_library() -> None: ...

    monkeypatch.setitem(sys.modules, "libkvikio", Kvikio)
    plugin = tmp_path / gds.PLUGIN
    plugin.write_bytes(b"not a library")
    with pytest.raises(Unavailable, match=str(plugin)):
        gds.load_plugin(str(plugin))


def test_off_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("off loaded the plugin")

    monkeypatch.setattr(gds, "load_plugin", fail)
    assert gds.choose("off", "/nowhere", device=0) == gds.GdsChoice(False, "use_gds=off")


def test_on_without_gds_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"use_gds=on: there is no GPUDirect Storage in .*is not there"):
        gds.choose("on", str(tmp_path), device=-1, plugin="/nowhere/x.so", file_bytes=SMALL)
    choice = gds.choose("auto", str(tmp_path), device=-1, plugin="/nowhere/x.so", file_bytes=SMALL)
    assert not choice.use
    assert "is not there" in choice.why


@pytest.mark.parametrize(("faster", "auto"), [(True, True), (False, False)])
def test_real_gds_is_taken_where_it_is_faster(monkeypatch: pytest.MonkeyPatch, faster: bool, auto: bool) -> None:
    found = gds.GdsProbe("gds", "nvidia-fs 2.28", 6.0 if faster else 2.0, 1.0, 4.0, 1.0, faster)
    monkeypatch.setattr(gds, "probe", lambda *_, **__: found)
    assert gds.choose("auto", "/kv", device=0).use is auto
    assert gds.choose("on", "/kv", device=0).use
    assert "host memory 4.00 GB/s" in gds.choose("auto", "/kv", device=0).why


def test_a_directory_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LmcacheNativeError, match=str(tmp_path / "none")):
        gds.probe(str(tmp_path / "none"), plugin="/nowhere/x.so", file_bytes=SMALL)
    assert gds.main([str(tmp_path / "none"), "--mib", "4"]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_the_command_prints_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gds.main([str(tmp_path), "--mib", "4", "--plugin", "/nowhere/x.so"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("mode        none: ")
    assert "GDS read    not measured" in out
    assert "use_gds=auto would take host memory" in out
