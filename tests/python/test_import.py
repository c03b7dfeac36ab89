"""What importing the package costs and says."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lmcache_native as native

pytestmark = pytest.mark.unit


def test_import_brings_no_heavy_package() -> None:
    script = (
        "import sys, lmcache_native\n"
        "print([m for m in ('numpy', 'torch', 'vllm', 'numba', 'llvmlite', 'sglang') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.strip() == "[]"


def test_build_info_and_cuda_status() -> None:
    info = native.build_info()
    assert info["version"] == native.__version__
    assert info["cuda_choice"] in ("AUTO", "ON", "OFF")
    assert isinstance(info["format_version"], int)
    status = native.cuda_status()
    assert status["built"] == info["cuda"]
    assert set(status) == {"built", "devices", "error", "message"}


def test_all_names_exist() -> None:
    assert [name for name in native.__all__ if not hasattr(native, name)] == []
