"""docs/configuration.md, made from the table."""

from __future__ import annotations

from collections.abc import Iterable

from lmcache_native.config.sources import TABLE
from lmcache_native.config.table import ALIASES, Key, Kind, Place, Theme
from lmcache_native.config.values import Profile

_INTRODUCTION = """\
<!-- Written by `lmcache-native config --reference`; a test holds this file to it. -->
# Configuration

LMCache's names, files and variables are accepted as they are. A key is given, the later winning over the earlier,

1. in the file that `LMCACHE_CONFIG_FILE` names, as YAML or JSON: `max_local_cpu_size: 20`
2. in the environment, in capitals and with a prefix: `LMCACHE_MAX_LOCAL_CPU_SIZE=20`
3. in vLLM's `kv_connector_extra_config`, with or without a prefix: `{"lmcache.max_local_cpu_size": 20}`
4. `--kv-offloading-size GIB` is above them all for the size of host memory.

Sizes are GiB (2^30 bytes) and totals of one engine with all its tensor-parallel ranks. LMCache counts per rank: with
`--tensor-parallel-size 8`, its 5 is our 40. NVMe's limit is the total of all engines of a node.

A wrong value stops the start with a message that names the key, the value, its source and what would be right; all problems are
told at once. A key that nobody knows is an error in the file and in `kv_connector_extra_config`, and a warning in the environment.
`lmcache-native config` prints what is in force here and now, and where each value comes from.

What the tables say:

- *done*: has the effect described. Where a connector is named, only that one honours the key, and the other refuses it: *lmcache*
  is LMCacheNativeConnector, which works on tokens and is reached as LMCacheConnectorV1; *offloading* is NativeOffloadingConnector.
- *accepted*: may be given, means nothing here, and need not: the text says why.
- *unsupported*: known and not done yet. An error when it asks for something, that is, when it is neither LMCache's default nor
  empty, zero or false. `LMCACHE_NATIVE_IGNORE_UNSUPPORTED=1` makes one warning of all such errors.
- *part of*: a setting of an unsupported key: unsupported with it, without effect alone.
"""

_WHERE = {
    Place.EXTRA: " (`kv_connector_extra_config` only)",
    Place.ENVIRONMENT: " (environment only)",
    Place.SUB: " (in `extra_config`)",
}


def reference() -> str:
    parts = [_INTRODUCTION]
    for theme in Theme:
        rows = [key for key in TABLE if key.theme is theme]
        parts.append(f"## {theme.value}\n\n{_note(theme)}{_table(rows)}")
    parts.append(_aliases())
    return "\n".join(parts)


def _note(theme: Theme) -> str:
    if theme is Theme.REQUEST:
        return 'In a request\'s `kv_transfer_params`, for example `{"kv_transfer_params": {"lmcache.skip_save": true}}`.\n\n'
    return ""


def _table(rows: Iterable[Key]) -> str:
    lines = ["| key | takes | default | | meaning |", "|---|---|---|---|---|"]
    for key in rows:
        name = f"LMCACHE_{key.name.upper()}" if key.place is Place.ENVIRONMENT else key.name
        name = {"LMCACHE_DO_NOT_TRACK": "DO_NOT_TRACK"}.get(name, name)
        where = "" if key.theme is Theme.REQUEST else _WHERE.get(key.place, "")
        lines.append(f"| `{name}`{where} | {key.takes} | {_default(key)} | {_state(key)} | {_meaning(key)} |")
    return "\n".join(lines) + "\n"


def _default(key: Key) -> str:
    if not isinstance(key.shown_default, str):
        return "; ".join(f"{text} ({profile.value})" for profile, text in key.shown_default.items())
    if key.kind is Kind.DONE and (key.secondary or key.shown_default):
        return key.shown_default
    if key.default is None:
        return ""
    if isinstance(key.default, bool):
        return "true" if key.default else "false"
    if isinstance(key.default, float):
        return f"{key.default:g}"
    return f"`{key.default}`" if key.default == " # # " else str(key.default)


def _state(key: Key) -> str:
    if key.kind is Kind.UNSUPPORTED and key.needs:
        return "part of"
    if key.kind is Kind.DONE and len(key.connectors) == 1:
        (only,) = key.connectors
        return f"done, {only.value}"
    return key.kind.value


def _meaning(key: Key) -> str:
    if key.kind is Kind.UNSUPPORTED and key.needs:
        return " or ".join(f"`{name}`" for name in key.needs)
    text = key.meaning
    if key.kind is Kind.UNSUPPORTED:
        text += f" {key.instead[0].upper()}{key.instead[1:]}."
    if key.kind is Kind.DONE and key.elsewhere:
        other = "NativeOffloadingConnector" if key.connectors == {Profile.LMCACHE} else "LMCacheNativeConnector"
        text += f" Accepted without effect by {other}: {key.elsewhere}."
    return text


def _aliases() -> str:
    lines = ["## Older names\n", "| LMCache's older name | the same as |", "|---|---|"]
    lines += [f"| `{old}` | `{new}` |" for old, new in ALIASES.items()]
    return "\n".join(lines) + "\n"
