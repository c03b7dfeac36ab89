"""Records read from NVMe by the worker itself, under vLLM. Without a GPU they are read by O_DIRECT into staging memory, verified
there and copied to the pages: all of GPUDirect Storage's path but the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from same_answer import check_cold, check_own_hit
from test_token_modes import HIT_TOKENS, LENGTH, engine

from lmcache_native import DeviceLoader, PagedKvLayout, SlotLayout
from lmcache_native.config import engine_directories
from lmcache_native.integration.vllm import gds
from lmcache_native.integration.vllm.record_loader import RecordLoader


def through_host_memory(
    config: Any,
    vllm_config: Any,
    paged: PagedKvLayout,
    slot: SlotLayout,
    *,
    device_type: str,
    device: int,
    owner: object,
    replicated: bool = False,
) -> RecordLoader:
    assert (device_type, replicated) == ("cpu", False)
    loader = DeviceLoader.host(paged, slot, buffer_bytes=32 << 20, owner=owner)
    return RecordLoader(loader, engine_directories(config, 0))


@pytest.mark.parametrize(
    "extra", [{}, {"enable_async_loading": False, "async_scheduling": False}], ids=["asynchronous", "synchronous"]
)
def test_same_answer(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, extra: dict[str, Any]
) -> None:
    monkeypatch.setattr(gds, "record_loader", through_host_memory)
    with engine(smollm2, tmp_path / "kv", **extra) as running:
        prompt = running.prompt(41, LENGTH)
        with running.watch_stores() as stored:
            cold = running.answer(prompt)
            own = running.answer(prompt)
        running.evict_to_nvme()
        promoted = running.stats()["promoted_chunks"]
        with running.watch_loads() as kv:
            loaded = running.answer(prompt)
        assert running.stats()["promoted_chunks"] == promoted
        assert kv[0].shape[2] == HIT_TOKENS
        assert (kv[0] == stored[0][:, :, :HIT_TOKENS]).all()
        check_own_hit(own, loaded)
        print(check_cold(cold, loaded))

        wrong = kv[0].copy()
        wrong[:, :, 100:140] ^= 0x0080
        running.forget_gpu()
        with running.wrong_kv(wrong), pytest.raises(AssertionError):
            check_own_hit(own, running.answer(prompt))
        running.forget_gpu()

        # Records that go bad are computed, whatever was expected of them.
        with (tmp_path / "kv" / "vllm-dp0" / "data.000").open("r+b") as data:
            whole = data.read()
            for at in range(0, len(whole), 4096):
                if whole[at : at + 8] == b"MCNSLOT1":
                    data.seek(at + 4096 + 1000)
                    data.write(bytes([whole[at + 4096 + 1000] ^ 1]))
        again = running.answer(prompt)
        assert again.token_ids == own.token_ids
        assert "failed to load 880 tokens" in caplog.text
