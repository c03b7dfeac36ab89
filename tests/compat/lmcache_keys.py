"""usage: lmcache_keys.py FOLDER    Compares the keys of an unpacked LMCache with those reviewed in this repository.

FOLDER holds `lmcache/` of the release that tests/data/lmcache_keys.json names; nothing of it is imported. Prints the differences;
exit code 1 when there are any. Keys of extra_config are those that the sources name in words, as in `extra_config.get("key")`.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

REVIEWED = Path(__file__).parents[1] / "data" / "lmcache_keys.json"
READERS = {"get", "pop", "setdefault", "get_extra_config_value"}
# Read from other mappings of a similar name: a request's extra_args, the extras of a trace event and of the coordinator.
NOT_KEYS = {"cb.sparse_l1_owners", "kv_transfer_params", "retrieve_start_time", "store_start_time"}


def config_keys(package: Path) -> set[str]:
    """Of v1/config.py's table of definitions."""
    tree = ast.parse((package / "v1" / "config.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Dict):
            names = {key.value for key in value.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
            if "max_local_cpu_size" in names and "chunk_size" in names:
                return names
    raise SystemExit(f"{package}: no table of configuration keys found")


def extra_keys(package: Path) -> set[str]:
    found: set[str] = set()
    for path in sorted(package.rglob("*.py")):
        if "cli" in path.relative_to(package).parts:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            target.id: node.value.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for key in _keys(tree):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                found.add(key.value)
            elif isinstance(key, ast.Name) and key.id in constants:
                found.add(constants[key.id])
    return {name for name in found - NOT_KEYS if not name.startswith("lmcache.")}  # those are of kv_connector_extra_config


def _keys(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            method = isinstance(node.func, ast.Attribute) and node.func.attr in READERS
            if "extra" in ast.unparse(node.func) and (method or isinstance(node.func, ast.Name)):
                yield node.args[0]
        elif isinstance(node, ast.Subscript) and _of_extra(node.value):
            yield node.slice
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn) and _of_extra(node.comparators[0]):
            yield node.left


def _of_extra(node: ast.expr) -> bool:
    return "extra_config" in ast.unparse(node)


def main() -> int:
    package = Path(sys.argv[1]) / "lmcache"
    reviewed = json.loads(REVIEWED.read_text(encoding="utf-8"))
    problems = 0
    for kind, found in (("config", config_keys(package)), ("extra_config", extra_keys(package))):
        known = set(reviewed[kind])
        for name in sorted(found ^ known):
            problems += 1
            print(f"{kind}: {name}: {'not reviewed' if name in found else 'reviewed, but not there'}")
        print(f"{kind}: {len(found)} keys of LMCache {reviewed['version']}")
    return int(problems > 0)


if __name__ == "__main__":
    raise SystemExit(main())
