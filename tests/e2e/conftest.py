"""Runs under the engine environment's Python: real vLLM on the CPU, real models. See the Makefile's `test_e2e` stage.

One engine lives in the test process (`engine`); servers are real `vllm serve` processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent.parent / "examples" / "demo"))

# Before vLLM is imported. One compute thread: torch's own threads stall on barriers on a small busy machine.
os.environ.update(
    DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "default")  # vLLM's imports warn


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.e2e)


def _model(variable: str) -> Path:
    path = os.environ.get(variable, "")
    if not path:
        pytest.fail(f"{variable} is not set (tests/env/model.sh makes the model)")
    return Path(path)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return _model("LMCN_MODEL_SMOLLM2")


@pytest.fixture(scope="session")
def tiny() -> Path:
    return _model("LMCN_MODEL_TINY_QWEN3")


@pytest.fixture(scope="module")
def engine(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    from engine import InProcessEngine

    running = InProcessEngine(smollm2, tmp_path_factory.mktemp("engine") / "kv")
    yield running
    running.close()


@pytest.fixture(scope="module")
def token_engine(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """As `engine`, with LMCacheNativeConnector. A process holds one engine with a connector at a time: hence the scope."""
    from token_engine import TokenEngine

    running = TokenEngine(smollm2, tmp_path_factory.mktemp("token_engine") / "kv")
    yield running
    running.close()
