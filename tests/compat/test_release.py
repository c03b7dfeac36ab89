"""One release of vLLM with this package installed: what can be used works, what cannot is refused with one error, and who asks for
nothing of ours gets vLLM as it is."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import prompts
import pytest
from engine import Engine, InProcessEngine
from token_engine import TokenEngine

from lmcache_native.errors import Unsupported
from lmcache_native.integration.vllm import compat, interface_check, shapes

PACKAGE = "lmcache_native.integration.vllm"
BY_NAME = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
BY_MODULE = {name: {"kv_connector": name, "kv_connector_module_path": PACKAGE, "kv_role": "kv_both"} for name in shapes.CONNECTORS}


class PlainEngine(Engine):
    """vLLM without a connector."""

    def __init__(self, model: Path) -> None:
        from vllm import LLM

        self.model = model
        self.llm = LLM(model=str(model), enforce_eager=True, max_model_len=512, max_num_batched_tokens=512, dtype="bfloat16")


def config(model: Path, transfer: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(model), enforce_eager=True, max_model_len=512, kv_transfer_config=transfer).create_engine_config()


def test_it_is_this_release(release: str) -> None:
    import vllm

    assert compat.vllm_version() == release
    assert vllm.__version__ == release
    assert compat.is_tested(release) == (os.environ["LMCN_EXPECTED"] == "usable")


def test_the_command_says_what_can_be_used(release: str) -> None:
    command = [sys.executable, "-m", "lmcache_native.cli", "vllm-check", "--json"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False)
    if keep := os.environ.get("LMCN_CHECK"):
        Path(keep).write_text(done.stdout, encoding="utf-8")
    found = json.loads(done.stdout)
    assert found["vllm"] == release
    usable = os.environ["LMCN_EXPECTED"] == "usable"
    assert {name: connector["usable"] for name, connector in found["connectors"].items()} == dict.fromkeys(
        shapes.CONNECTORS, usable
    )
    assert done.returncode == (0 if usable else 1)


def test_who_asks_for_nothing_gets_vllm_as_it_is(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    """vLLM calls our plugin, which says nothing, and generates."""
    from vllm.plugins import load_general_plugins

    ours = logging.getLogger("lmcache_native")  # does not propagate
    ours.addHandler(caplog.handler)
    try:
        load_general_plugins()
        engine = PlainEngine(tiny)
        answer = engine.answer(prompts.tokens(tiny, 1, 100), max_tokens=4)
        assert engine.connector is None
        engine.close()
    finally:
        ours.removeHandler(caplog.handler)
    assert len(answer.token_ids) == 4
    assert [record for record in caplog.records if record.name.startswith("lmcache_native")] == []


@pytest.mark.parametrize("transfer", [BY_NAME, *BY_MODULE.values()], ids=["LMCacheConnectorV1", *BY_MODULE])
def test_refused_with_one_error(tiny: Path, release: str, transfer: dict[str, Any]) -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    with pytest.raises(Unsupported) as caught:
        config(tiny, transfer)
    message = str(caught.value)
    connector = transfer["kv_connector"] if transfer["kv_connector"] in shapes.CONNECTORS else shapes.TOKENS
    assert message.startswith(f"vLLM {release} cannot be used with {connector}: ")
    for finding in interface_check.check(connector):
        assert (str(finding) in message) == finding.bad
    assert f"tested with vLLM {compat.tested_text()}" in message


@pytest.mark.parametrize("kind", [TokenEngine, InProcessEngine], ids=["LMCacheNativeConnector", "NativeOffloadingConnector"])
def test_usable_from_host_memory_and_from_nvme_after_a_restart(tiny: Path, tmp_path: Path, kind: type[Any]) -> None:
    prompt = prompts.tokens(tiny, 1, 900)
    engine = kind(tiny, tmp_path / "kv")
    cold = engine.answer(prompt)
    engine.forget_gpu()
    warm = engine.answer(prompt)
    assert (cold.cached_tokens, warm.token_ids) == (0, cold.token_ids)
    assert warm.cached_tokens >= 768
    assert engine.stats()["hits_host"] > 0
    engine.drain()
    engine.store.flush(30.0)
    engine.close()

    engine = kind(tiny, tmp_path / "kv")
    restarted = engine.answer(prompt)
    assert (restarted.cached_tokens, restarted.token_ids) == (warm.cached_tokens, cold.token_ids)
    assert engine.stats()["hits_nvme"] > 0
    engine.close()
