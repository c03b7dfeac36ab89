"""`lmcache-native config`: what is in force here and now, and where it comes from; or the reference of all keys."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Mapping
from typing import Any

from lmcache_native.config import GIB, Explained, Profile
from lmcache_native.config.merge import CONNECTORS, Evaluation, evaluate
from lmcache_native.config.reference import reference
from lmcache_native.config.table import Kind
from lmcache_native.errors import InvalidArgument, LmcacheNativeError

COLUMNS = 100

_MARKS = {
    Kind.DONE.value: "",
    Kind.ACCEPTED.value: "  [no effect here]",
    Kind.UNSUPPORTED.value: "  [unsupported, ignored]",
}
# vLLM's names of connectors that each of ours stands in for.
_OF_CONNECTOR = {
    "LMCacheNativeConnector": Profile.LMCACHE,
    "LMCacheConnectorV1": Profile.LMCACHE,
    "LMCacheConnectorV1Dynamic": Profile.LMCACHE,
    "LMCacheMPConnector": Profile.LMCACHE,
    "NativeOffloadingConnector": Profile.OFFLOADING,
    "OffloadingConnector": Profile.OFFLOADING,
}

_DESCRIPTION = """\
Prints the configuration that an engine started here would have: each key, its value, and whether that is a default or comes from
LMCACHE_CONFIG_FILE, the environment or vLLM's options. Give vLLM's options as you give them to `vllm serve`. Changes nothing;
exit code 2 and the error when something is wrong.
"""


def add_to(commands: Any) -> None:
    parser = commands.add_parser("config", help="print the configuration in force, or the reference", description=_DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--connector",
        choices=[profile.value for profile in Profile],
        help="whose configuration (default: the kv_connector in --kv-transfer-config, or offloading with --kv-offloading-size, "
        "else lmcache)",
    )
    parser.add_argument("--kv-transfer-config", metavar="JSON", help="as for `vllm serve`")
    parser.add_argument("--kv-offloading-size", metavar="GIB", help="as for `vllm serve`")
    parser.add_argument("--reference", action="store_true", help="print the reference of all keys, as Markdown")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.reference:
        sys.stdout.write(reference())
        return 0
    try:
        transfer = _transfer_config(arguments.kv_transfer_config)
        profile = _profile(arguments, transfer)
        found = evaluate(_extra_config(transfer, arguments.kv_offloading_size), os.environ, profile)
    except LmcacheNativeError as error:
        if arguments.json:
            _print_json({"error": str(error)})
        else:
            sys.stderr.write(f"lmcache-native: {error}\n")
        return 2
    if arguments.json:
        _print_json(_as_json(found, profile))
    else:
        sys.stdout.write(_as_text(found, profile))
        for warning in found.warnings:
            sys.stderr.write(f"warning: {warning}\n")
    return 0


def _transfer_config(text: str | None) -> Mapping[str, Any]:
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InvalidArgument(f"--kv-transfer-config: must be JSON: {error}") from error
    extra = content.get("kv_connector_extra_config", {}) if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(extra, dict):
        raise InvalidArgument(
            f"--kv-transfer-config={text!r}: must be a JSON object, for example "
            '{"kv_connector": "LMCacheConnectorV1", "kv_connector_extra_config": {}}'
        )
    return content


def _profile(arguments: argparse.Namespace, transfer: Mapping[str, Any]) -> Profile:
    if arguments.connector is not None:
        return Profile(arguments.connector)
    named = transfer.get("kv_connector")
    if named is not None:
        known = _OF_CONNECTOR.get(str(named))
        if known is None:
            raise InvalidArgument(
                f"kv_connector={named!r} (--kv-transfer-config): must be one of {', '.join(_OF_CONNECTOR)}, "
                "or name the configuration with --connector"
            )
        return known
    return Profile.LMCACHE if arguments.kv_offloading_size is None else Profile.OFFLOADING


def _extra_config(transfer: Mapping[str, Any], size_gib: str | None) -> dict[str, Any]:
    extra = dict(transfer.get("kv_connector_extra_config", {}))
    if size_gib is not None:
        try:
            extra["cpu_bytes_to_use"] = float(size_gib) * GIB
        except ValueError:
            raise InvalidArgument(f"--kv-offloading-size={size_gib!r}: must be a number of GiB greater than 0") from None
    return extra


# ---- output -------------------------------------------------------------------------------------------------------------


def _as_json(found: Evaluation, profile: Profile) -> dict[str, Any]:
    return {
        "connector": profile.value,
        "keys": [line._asdict() for line in found.explained],
        "warnings": found.warnings,
    }


def _print_json(content: object) -> None:
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def _as_text(found: Evaluation, profile: Profile) -> str:
    key_width = max(len(line.key) for line in found.explained)
    value_width = min(24, max(len(line.value) for line in found.explained))
    lines = [f"{CONNECTORS[profile]}; sizes in GiB are totals of one engine"]
    for line in found.explained:
        lines += _line(line, key_width, value_width)
    return "\n".join(lines) + "\n"


def _line(line: Explained, key_width: int, value_width: int) -> list[str]:
    note = line.source + _MARKS[line.kind]
    plain = f"{line.key:<{key_width}}  {line.value:<{value_width}}  {note}"
    if len(plain) <= COLUMNS:
        return [plain]
    indent = " " * (key_width + 2)
    rest = textwrap.wrap(line.value, COLUMNS - len(indent)) + textwrap.wrap(note, COLUMNS - len(indent))
    return [f"{line.key:<{key_width}}  {rest[0]}"] + [indent + text for text in rest[1:]]
