"""Runs under the engine environment's Python with one release of vLLM in front of its own: see run.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

# Before vLLM is imported.
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


@pytest.fixture(scope="session")
def tiny() -> Path:
    return Path(os.environ["LMCN_MODEL_TINY_QWEN3"])


@pytest.fixture(scope="session")
def release() -> str:
    return os.environ["LMCN_RELEASE"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test marked for one outcome is not of the other's releases at all."""
    expected = os.environ["LMCN_EXPECTED"]
    other = {"usable": "test_refused", "refused": "test_usable"}[expected]
    config.hook.pytest_deselected(items=[item for item in items if item.name.startswith(other)])
    items[:] = [item for item in items if not item.name.startswith(other)]
