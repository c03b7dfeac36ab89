"""Tokens and engine block hashes to chunk keys."""

from __future__ import annotations

from collections.abc import Mapping

from lmcache_native._native import ChunkHasher, ChunkKeys, KeyDeriver, make_namespace
from lmcache_native.errors import InvalidArgument

__all__ = ["ChunkHasher", "ChunkKeys", "KeyDeriver", "describe_namespace", "make_namespace"]


def describe_namespace(fields: Mapping[str, str | int | bool]) -> str:
    """The canonical text of a namespace: one "name=value" line per field, sorted by name.

    Everything that must match before bytes may be shared belongs into `fields`. Two mappings give the same text only if they
    are equal: names must not hold '=' or line breaks, values no line breaks.
    """
    lines = []
    for name in sorted(fields):
        value = str(fields[name])
        if not name or "=" in name or "\n" in name:
            raise InvalidArgument(f"namespace field {name!r}: a name without '=' and line breaks expected")
        if "\n" in value:
            raise InvalidArgument(f"namespace field {name!r}: a value without line breaks expected, got {value!r}")
        lines.append(f"{name}={value}\n")
    return "".join(lines)
