"""The integration against vLLM's own classes, without a model. Runs under the engine environment's Python, skipped elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm.version", reason="needs vLLM: run it with the engine environment's Python")

sys.path.insert(0, str(Path(__file__).parent))
os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "default")  # vLLM's imports warn


@pytest.fixture(scope="session")
def tiny() -> Path:
    path = os.environ.get("LMCN_MODEL_TINY_QWEN3", "")
    if not path:
        pytest.fail("LMCN_MODEL_TINY_QWEN3 is not set (tests/env/model.sh makes the model)")
    return Path(path)
