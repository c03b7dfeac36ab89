"""use_gds, gds_path and gds_buffer_size: what cannot be is refused by name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from lmcache_native.config import GIB, NativeConfig, Profile, explain, resolve
from lmcache_native.errors import InvalidArgument, Unsupported

pytestmark = pytest.mark.unit

STORE = {"cpu_bytes_to_use": GIB, "local_disk": "/kv", "max_local_disk_size": 10}


@pytest.fixture
def lines() -> Iterator[list[str]]:
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    root = logging.getLogger("lmcache_native")
    root.addHandler(handler)
    yield found
    root.removeHandler(handler)


def config(extra: dict[str, Any], environ: dict[str, str] | None = None) -> NativeConfig:
    return resolve(STORE | extra, environ or {}, profile=Profile.LMCACHE, warn=True)


@pytest.mark.parametrize("value", [False, "off", "OFF", "false", "0", "no"])
def test_off(value: object, lines: list[str]) -> None:
    assert config({"use_gds": value, "gds_path": "/kv", "gds_buffer_size": 64}).use_gds == "off"
    assert lines == []


@pytest.mark.parametrize("value", [True, "true", "1", None])
def test_lmcaches_default_says_nothing(value: object, lines: list[str]) -> None:
    assert config({"use_gds": value}).use_gds == "auto"
    assert lines == []


def test_auto_and_on(lines: list[str]) -> None:
    found = config({"use_gds": "auto"})
    assert (found.use_gds, found.gds_buffer_bytes) == ("auto", 256 << 20)
    assert config({"use_gds": "on"}).use_gds == "on"
    assert config({}, {"LMCACHE_USE_GDS": "On"}).use_gds == "on"
    assert lines == []


def test_on_where_it_cannot_be() -> None:
    with pytest.raises(Unsupported, match=r"^use_gds='on' \(kv_connector_extra_config\): must be auto or off: only LMCacheNativeC"):
        resolve(STORE | {"use_gds": "on"}, {}, profile=Profile.OFFLOADING)
    with pytest.raises(Unsupported, match="must be auto or off with use_layerwise"):
        config({"use_gds": "on", "use_layerwise": True})
    with pytest.raises(InvalidArgument, match="must be auto or off without local_disk"):
        resolve({"cpu_bytes_to_use": GIB, "use_gds": "on"}, {}, profile=Profile.LMCACHE)


def test_on_can_be_ignored(lines: list[str]) -> None:
    ignoring = {"LMCACHE_NATIVE_IGNORE_UNSUPPORTED": "1"}
    given = STORE | {"use_gds": "on", "gds_buffer_size": 64}
    found = resolve(given, ignoring, profile=Profile.OFFLOADING, warn=True)
    assert found == resolve(STORE, {}, profile=Profile.OFFLOADING)
    assert len(lines) == 1
    assert "unsupported and ignored: use_gds='on'" in lines[0]


@pytest.mark.parametrize("value", ["maybe", 2, ["on"]])
def test_what_is_no_word_of_use_gds(value: object) -> None:
    with pytest.raises(InvalidArgument, match="must be one of auto, on, off"):
        config({"use_gds": value})


def test_gds_path_is_the_store_or_refused(lines: list[str]) -> None:
    assert config({"gds_path": "file:///kv"}) == config({})
    assert lines == []
    with pytest.raises(Unsupported, match=r"gds_path='/other' .* must be what local_disk is, or left out") as caught:
        config({"gds_path": "/other", "gds_path_sharding": "other", "gds_backend": "hipfile"})
    assert "(with it: gds_backend, gds_path_sharding)" in str(caught.value)


def test_parts_of_gds_path_are_not_ignored_in_silence() -> None:
    for part in ({"gds_path_sharding": "other"}, {"gds_backend": "hipfile"}):
        with pytest.raises(Unsupported, match=next(iter(part))):
            config({"gds_path": "/kv"} | part)


def test_gds_buffer_size_is_mebibytes() -> None:
    assert config({"gds_buffer_size": "4096"}).gds_buffer_bytes == 4 * GIB
    for wrong in (0, -1, 1.5, "x", 1 << 30):
        with pytest.raises(InvalidArgument, match="gds_buffer_size"):
            config({"gds_buffer_size": wrong})


def test_explain_shows_them() -> None:
    lines = explain(STORE | {"gds_buffer_size": 64, "use_gds": "auto"}, {}, Profile.LMCACHE)
    shown = {line.key: line for line in lines}
    assert shown["use_gds"][1:] == ("auto", "kv_connector_extra_config", "done")
    assert shown["gds_buffer_size"][1:] == ("64", "kv_connector_extra_config", "done")
    lines = explain(STORE | {"use_gds": "on"}, {"LMCACHE_NATIVE_IGNORE_UNSUPPORTED": "1"}, Profile.OFFLOADING)
    assert {line.key: line for line in lines}["use_gds"][1:] == ("on", "kv_connector_extra_config", "unsupported")
