"""`lmcache-native vllm-check`: whether the installed vLLM has what the connectors need."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import textwrap
from collections import Counter
from dataclasses import asdict
from typing import Any

from lmcache_native import __version__
from lmcache_native.cli.stores import OK, PROBLEMS, print_json, say

COLUMNS = 132

_DESCRIPTION = """\
Imports the installed vLLM and compares each of its interfaces that a connector uses with what that connector needs. Starts no
engine and changes nothing. A release that was not tested may still behave differently: docs/compatibility.md lists what was run.
"""


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "vllm-check",
        help="whether the installed vLLM has the interfaces that the connectors need",
        description=_DESCRIPTION,
        epilog="exit codes: 0 both connectors can be used, 1 one of them cannot, or there is no vLLM, 2 wrong usage",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with contextlib.redirect_stdout(sys.stderr):  # where vLLM's log goes
        found = report()
    if arguments.json:
        print_json(found)
    else:
        say("\n".join(as_text(found)) + "\n")
    return OK if all(connector["usable"] for connector in found["connectors"].values()) else PROBLEMS


def report() -> dict[str, Any]:
    """What --json prints. `vllm`: the version, or null."""
    from lmcache_native.integration.vllm import compat, interface_check, shapes

    version = compat.installed_version()
    findings = interface_check.check() if version else []
    return {
        "version": __version__,
        "vllm": version,
        "tested": version is not None and compat.is_tested(version),
        "tested_versions": list(compat.TESTED_VERSIONS),
        "connectors": {
            name: {
                "usable": version is not None and not any(f.bad for f in findings if name in f.users),
                "missing": [str(f) for f in findings if f.bad and name in f.users],
            }
            for name in shapes.CONNECTORS
        },
        "interfaces": [asdict(finding) for finding in findings],
    }


def as_text(found: dict[str, Any]) -> list[str]:
    head = f"lmcache-native {found['version']}, tested with vLLM {', '.join(found['tested_versions'])}"
    if found["vllm"] is None:
        return [head, "vLLM: not installed"]
    lines = [head, f"vLLM {found['vllm']}: {'tested' if found['tested'] else 'not tested'}", ""]
    for finding in found["interfaces"]:
        lines += _wrapped(f"{finding['state']:<11} ", f"{finding['path']} {'; '.join(finding['differences'])}".rstrip())
    counts = Counter(finding["state"] for finding in found["interfaces"])
    lines += ["", ", ".join(f"{count} {state}" for state, count in sorted(counts.items())), ""]
    for name, connector in found["connectors"].items():
        lines += _wrapped(f"{name:<26}", "can be used" if connector["usable"] else "cannot be used:")
        for missing in connector["missing"]:
            lines += _wrapped("    ", missing)
    return lines


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(text, COLUMNS, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)
