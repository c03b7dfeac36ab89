"""compat.py alone knows where vLLM keeps things: no other module imports vLLM, or reaches for what is private to it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "python" / "lmcache_native"
# May import vLLM and use its private names; names it in data.
COMPAT = {"compat.py", "shapes.py", "interface_check.py"}

# Underscore names that no class of ours defines, and why they may be used all the same.
ALLOWED = {
    "_asdict": "collections.namedtuple",
    "_collector_to_names": "prometheus_client's registry, which lists its collectors nowhere else",
    "_get_connector_metadata": "KVConnectorBase_V1's, made for subclasses; shapes.py checks it",
    "_kv_cache_config": "KVConnectorBase_V1's, made for subclasses; shapes.py checks it",
    "_name": "prometheus_client's, of a collector: its class has no public one",
    "_vllm_config": "KVConnectorBase_V1's, made for subclasses; shapes.py checks it",
}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules that are imported by a statement, or by a call that is given the name as text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "find_spec"):
                yield from (part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str))


def defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def reached(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Attributes with an underscore, by dot or by a name given as text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            yield from ((node.lineno, str(name.value)) for name in node.args[1:2] if isinstance(name, ast.Constant))


def is_vllm(module: str) -> bool:
    return module == "vllm" or module.startswith("vllm.")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in modules()}


def test_no_module_but_compat_imports_vllm() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}: {module}"
        for path, tree in trees().items()
        if path.name not in COMPAT
        for module in imports(tree)
        if is_vllm(module)
    }
    assert not found


def test_no_module_but_compat_reaches_for_what_is_private_to_vllm() -> None:
    found = trees()
    ours = {name for tree in found.values() for name in defined(tree)}
    strangers = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path, tree in found.items()
        if path.name not in COMPAT
        for line, name in reached(tree)
        if is_private(name) and name not in ours and name not in ALLOWED
    ]
    assert not strangers


def test_what_is_allowed_is_used() -> None:
    used = {name for path, tree in trees().items() if path.name not in COMPAT for _, name in reached(tree)}
    assert used >= set(ALLOWED)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import vllm.config", True),
        ("from vllm.v1 import request", True),
        ("def f():\n    import vllm", True),
        ("importlib.import_module('vllm.platforms')", True),
        ("importlib.import_module(f'vllm.{name}')", True),
        ("from lmcache_native.integration.vllm import compat", False),
        ("import vllmx", False),
    ],
)
def test_finds_imports(text: str, expected: bool) -> None:
    assert any(map(is_vllm, imports(ast.parse(text)))) is expected


@pytest.mark.parametrize(
    "text", ["request._blocks", "compat.Scheduler._free", "getattr(layer, '_k_scale', None)", "self._pool.x()"]
)
def test_finds_private_names(text: str) -> None:
    tree = ast.parse(text)
    assert [name for _, name in reached(tree) if is_private(name)]
    assert not set(defined(tree)) & {name for _, name in reached(tree)}
