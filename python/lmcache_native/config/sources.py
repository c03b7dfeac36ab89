"""Where values come from: the file, the environment, kv_connector_extra_config. Finds each name's row; judges no value."""

from __future__ import annotations

import ast
import difflib
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmcache_native.config.rows_done import ROWS as ROWS_DONE
from lmcache_native.config.rows_other import ROWS as ROWS_OTHER
from lmcache_native.config.table import Key, Place, Table
from lmcache_native.config.values import ENV_PREFIX, EXTRA_PREFIX, Given
from lmcache_native.errors import InvalidArgument

TABLE = Table(ROWS_DONE + ROWS_OTHER)

EXTRA_CONFIG = "kv_connector_extra_config"

_HUGE = 10**1000

# Later sources win.
FILE, ENVIRONMENT, EXTRA, SIZE_FLAG = range(4)


@dataclass(frozen=True, slots=True)
class Item:
    """One value of one row."""

    key: Key
    given: Given
    rank: int

    @property
    def strength(self) -> tuple[int, bool]:
        """The larger one decides a field."""
        return self.rank, not self.key.secondary


@dataclass(slots=True)
class Collected:
    items: list[Item] = field(default_factory=list)
    nulls: set[str] = field(default_factory=set)  # rows that some source says null for
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, item: Item) -> None:
        if _holds_huge_integer(item.given.value, set()):
            self.errors.append(f"{item.given.name} ({item.given.source}): must not hold integers of more than 1000 digits")
        else:
            self.items.append(item)


def collect(extra_config: Mapping[str, Any], environ: Mapping[str, str]) -> Collected:
    """All values of all sources, weakest source first. An empty variable and a null count as absent."""
    found = Collected()
    _from_file(environ, found)
    _from_environment(environ, found)
    _from_extra_config(extra_config, found)
    return found


def _from_file(environ: Mapping[str, str], found: Collected) -> None:
    path = environ.get("LMCACHE_CONFIG_FILE", "")
    if not path:
        return
    try:
        content = _read_file(path)
    except InvalidArgument as error:
        found.errors.append(str(error))
        return
    for name, value in content.items():
        key = TABLE.find(str(name), Place.ANYWHERE)
        if key is None:
            found.errors.append(f"{path}: key {name!r} is not known{_nearest(str(name), str, Place.ANYWHERE)}")
        elif value is None:
            found.nulls.add(key.name)
        else:
            found.add(Item(key, Given(str(name), value, path), FILE))


def _from_environment(environ: Mapping[str, str], found: Collected) -> None:
    places = (Place.ANYWHERE, Place.ENVIRONMENT)
    for name, text in sorted(environ.items()):
        if not name.startswith(ENV_PREFIX) or text == "":
            continue
        word = name.removeprefix(ENV_PREFIX).lower()
        key = TABLE.find(word, *places)
        if key is None:
            near = _nearest(word, lambda k: ENV_PREFIX + k.upper(), *places)
            found.warnings.append(f"environment variable {name} is not known{near}")
        else:
            found.add(Item(key, Given(name, _unquoted(text), "environment"), ENVIRONMENT))


def _from_extra_config(extra_config: Mapping[str, Any], found: Collected) -> None:
    places = (Place.ANYWHERE, Place.EXTRA)
    for name, value in extra_config.items():
        key = TABLE.find(str(name).removeprefix(EXTRA_PREFIX), *places)
        if key is None:
            near = _nearest(str(name).removeprefix(EXTRA_PREFIX), str, *places)
            found.errors.append(f"{EXTRA_CONFIG} key {name!r} is not known{near}")
        elif key.name == "cpu_bytes_to_use":
            found.add(Item(key, Given(name, value, "--kv-offloading-size, as bytes"), SIZE_FLAG))
        elif value is None:
            found.nulls.add(key.name)
        else:
            found.add(Item(key, Given(name, value, EXTRA_CONFIG), EXTRA))


def expand(parent: Item, content: Mapping[str, Any], found: Collected) -> None:
    """Adds the sub-keys of one extra_config."""
    for name, value in content.items():
        key = TABLE.find(name, Place.SUB)
        label = f"{parent.given.name}.{name}"
        if key is not None:
            if value is not None:
                found.add(Item(key, Given(label, value, parent.given.source), parent.rank))
            continue
        message = f"{parent.given.source}: key {label!r} is not known{_nearest(name, str, Place.SUB)}"
        (found.warnings if parent.rank == ENVIRONMENT else found.errors).append(message)


def _holds_huge_integer(value: object, seen: set[int]) -> bool:
    """Integers that Python may refuse to write in decimal, for a message. YAML has them in hexadecimal."""
    if isinstance(value, int):
        return abs(value) >= _HUGE
    if not isinstance(value, (list, tuple, Mapping)) or id(value) in seen:
        return False
    seen.add(id(value))  # YAML's aliases make values that hold themselves
    parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
    return any(_holds_huge_integer(part, seen) for part in parts)


def _nearest(name: str, spell: Callable[[str], str], *places: Place) -> str:
    near = difflib.get_close_matches(name, TABLE.names(*places), n=1, cutoff=0.6)
    return f"; did you mean {spell(near[0])}?" if near else ""


def _unquoted(text: str) -> str:
    """As LMCache does: quotes that a shell or a YAML list of variables left around a value are not part of it."""
    text = text.strip()
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "\"'":
        return text
    try:
        inner = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text[1:-1]
    return inner if isinstance(inner, str) else text


# ---- the file -----------------------------------------------------------------------------------------------------------


def _read_file(path: str) -> Mapping[Any, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidArgument(f"LMCACHE_CONFIG_FILE={path!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"LMCACHE_CONFIG_FILE={path!r}: not UTF-8: {error}") from error
    except ValueError as error:
        raise InvalidArgument(f"LMCACHE_CONFIG_FILE={path!r}: not a path: {error}") from error
    content = _parse(path, text)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InvalidArgument(f"LMCACHE_CONFIG_FILE={path!r}: must hold names and values, found {type(content).__name__}")
    return content


def _parse(path: str, text: str) -> object:
    if path.endswith(".json"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidArgument(f"LMCACHE_CONFIG_FILE={path!r}: not JSON: {error}") from error
    try:
        yaml: Any = importlib.import_module("yaml")
    except ImportError as error:
        raise InvalidArgument(f"LMCACHE_CONFIG_FILE={path!r}: needs PyYAML, or a file named *.json") from error
    try:
        return yaml.safe_load(text)
    # Its constructors raise what Python's int() and date() do, and others: whatever it is, the text is at fault.
    except Exception as error:
        raise InvalidArgument(f"LMCACHE_CONFIG_FILE={path!r}: not YAML: {error}") from error
