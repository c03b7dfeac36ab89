"""Compares the installed vLLM with what we rely on (shapes.py). Imports what vLLM's own processes import, and starts nothing.

Used when a connector is loaded (require), and by `lmcache-native vllm-check` (check).
"""

from __future__ import annotations

import dis
import functools
import importlib
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lmcache_native.errors import Unsupported
from lmcache_native.integration.vllm import compat, shapes

OK = "ok"
MISSING = "missing"
DIFFERS = "differs"
NOT_NEEDED = "not needed"  # of a later vLLM: this one never asks for it


@dataclass(frozen=True, slots=True)
class Finding:
    """One interface. `path`: module.attribute of vLLM. `users`: the connectors that need it. `differences`: in words."""

    name: str
    path: str
    users: tuple[str, ...]
    state: str
    differences: tuple[str, ...] = ()

    @property
    def bad(self) -> bool:
        return self.state in (MISSING, DIFFERS)

    def __str__(self) -> str:
        return f"{self.path}: {'; '.join(self.differences)}"


def check(connector: str | None = None) -> list[Finding]:
    """All interfaces, or those that one connector needs, by name."""
    names = sorted({*compat.INTERFACES, *shapes.SHAPES}, key=str.lower)
    return [_finding(name) for name in names if connector is None or connector in _shape(name).users]


def require(connector: str) -> None:
    """Unsupported, with all that is missing, when this vLLM cannot serve the connector. Looks once per process."""
    bad = _bad(connector)
    if bad:
        raise Unsupported(
            f"vLLM {compat.vllm_version()} cannot be used with {connector}: {' | '.join(map(str, bad))}. "
            f"lmcache-native was tested with vLLM {compat.tested_text()}; `lmcache-native vllm-check` says more"
        )


@functools.cache
def _bad(connector: str) -> tuple[Finding, ...]:
    return tuple(finding for finding in check(connector) if finding.bad)


def _shape(name: str) -> shapes.Shape:
    return shapes.SHAPES.get(name, shapes.Shape())


def _finding(name: str) -> Finding:
    module, attribute = compat.INTERFACES.get(name) or shapes.HANDED[name]
    shape = _shape(name)
    path = f"{module}.{attribute}"
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever one module of a strange vLLM raises, the others are looked at
        gone = isinstance(error, (ModuleNotFoundError, AttributeError))
        if gone and name in compat.SUBSTITUTES:
            return Finding(name, path, shape.users, NOT_NEEDED)
        why = "missing" if gone else f"{type(error).__name__}: {error}"
        return Finding(name, path, shape.users, MISSING, (why,))
    differences = tuple(_differences(found, shape))
    return Finding(name, path, shape.users, DIFFERS if differences else OK, differences)


def _differences(found: Any, shape: shapes.Shape) -> Iterator[str]:
    for text in shape.overrides:
        yield from _compare(found, text, _same_parameters)
    for text in shape.later:
        if hasattr(found, text.partition("(")[0]):
            yield from _compare(found, text, _same_parameters)
    for text in shape.calls:
        yield from _compare(found, text, _takes)
    for name in shape.members.split():
        if name not in getattr(found, "__members__", {}):
            yield f"no member {name}"
    for name in _absent(found, shape.fields.split()):
        yield f"no {name.replace('|', ' or ')}"


def _compare(found: Any, text: str, rule: Callable[[inspect.Signature, list[str]], bool]) -> Iterator[str]:
    name, _, rest = text.removesuffix(")").partition("(")
    expected = [part.strip() for part in rest.split(",") if part.strip()]
    target = getattr(found, name, None) if name else found
    if not callable(target):
        yield f"no {name}()"
        return
    signature = _signature(found, name, target)
    if not rule(signature, expected):
        yield f"{name}({', '.join(_names(signature))}) where ({', '.join(expected)}) was expected"


def _signature(found: Any, name: str, target: Any) -> inspect.Signature:
    """Without self and cls."""
    signature = inspect.signature(target)
    unbound = name and isinstance(inspect.getattr_static(found, name), types.FunctionType) and inspect.isclass(found)
    if unbound:
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])
    return signature


def _names(signature: inspect.Signature) -> list[str]:
    stars: dict[object, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [stars.get(parameter.kind, "") + parameter.name for parameter in signature.parameters.values()]


def _same_parameters(signature: inspect.Signature, expected: list[str]) -> bool:
    return _names(signature) == expected


def _takes(signature: inspect.Signature, given: list[str]) -> bool:
    by_name = [name for name in given if name != "_"]
    try:
        signature.bind(*[None] * (len(given) - len(by_name)), **dict.fromkeys(by_name))
    except TypeError:
        return False
    return True


def _absent(found: Any, fields: list[str]) -> list[str]:
    """Of `fields`, those that no instance has: not in the class, annotated, or assigned to self by one of its methods."""
    kinds = getattr(found, "__mro__", ())
    names = set(dir(found)).union(*(vars(kind).get("__annotations__", ()) for kind in kinds))
    absent = [field for field in fields if names.isdisjoint(field.split("|"))]
    if absent:
        names |= {name for kind in kinds for name in _assigned(kind)}
    return [field for field in absent if names.isdisjoint(field.split("|"))]


def _assigned(kind: type) -> Iterator[str]:
    for value in vars(kind).values():
        if isinstance(value, types.FunctionType):
            yield from (step.argval for step in dis.get_instructions(inspect.unwrap(value)) if step.opname == "STORE_ATTR")
