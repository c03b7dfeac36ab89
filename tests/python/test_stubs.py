"""_native.pyi is what nanobind.stubgen writes for the extension. To renew it: python tests/python/test_stubs.py"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit


def generated() -> str:
    stubgen = pytest.importorskip("nanobind.stubgen")
    module = importlib.import_module("lmcache_native._native")
    generator = stubgen.StubGen(module)
    generator.put(module)
    return str(generator.get())


def committed() -> Path:
    package = importlib.import_module("lmcache_native")
    assert package.__file__ is not None
    return Path(package.__file__).resolve().with_name("_native.pyi")


def test_stub_is_current() -> None:
    assert committed().read_text() == generated()


if __name__ == "__main__":
    committed().write_text(generated())
    sys.stdout.write(f"{committed()}\n")
