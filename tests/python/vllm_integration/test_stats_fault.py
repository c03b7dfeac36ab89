"""A tier that goes out of use while the engine runs is said in the log, once."""

from __future__ import annotations

from pathlib import Path

import pytest

import lmcache_native as native
from lmcache_native.integration.vllm import stats


def test_a_quarantine_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = native.Store(host_bytes=16 << 20, directory=tmp_path / "kv", nvme_bytes=96 << 20, max_payload_bytes=1 << 20)
    namespace = native.make_namespace("a=1\n")
    keys = [native.KeyDeriver(namespace).derive(bytes([i])) for i in range(9)]
    for i in range(9):
        store.put(bytes([i]), b"v" * 100, namespace=namespace)
    store.flush(20)
    store.close()
    store = native.Store(host_bytes=16 << 20, directory=tmp_path / "kv", nvme_bytes=96 << 20, max_payload_bytes=1 << 20)
    reporter = stats.StatsReporter()
    lines: list[str] = []
    monkeypatch.setattr(stats.logger, "warning", lambda text, *values: lines.append(text % values))
    reporter.report(store)
    assert lines == []
    (tmp_path / "kv" / "data.000").write_bytes(b"")  # every read ends short: eight in a row are a device that is gone
    for key in keys:
        with pytest.raises(native.NotFound):
            store.acquire(namespace, [key], timeout_s=10)
    assert not store.nvme_ready
    reporter.report(store)
    reporter.report(store)
    assert len(lines) == 1
    assert "NVMe quarantined" in lines[0]
    assert "data.000" in lines[0]
    with pytest.raises(native.Unavailable, match="quarantined"):
        store.close()
