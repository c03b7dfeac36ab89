"""`lmcache-native clear`: takes chunks out of a store for good."""

from __future__ import annotations

import argparse
from typing import Any

from lmcache_native import _native
from lmcache_native.cli.stores import (
    EXIT_CODES,
    add_path,
    count_of,
    over_stores,
    parse_age,
    parse_namespace,
    print_json,
    report_error,
    say,
    size,
)
from lmcache_native.errors import LmcacheNativeError

_DESCRIPTION = f"""\
Takes chunks out of a store that nobody has open, so that no later open finds them: all, or those that have become
old, or those of one namespace (a model with all that decides its KV; `inspect --namespaces` lists them). Space of
regions that become empty goes back to the file system; what else was cleared is overwritten when its region is used
again, so its payload may stay on the device until then. Asks nothing. Ended half-way it has cleared more or less,
never made a chunk wrong: run it again.
{EXIT_CODES}
"""


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "clear",
        help="take chunks out of a store on NVMe",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_path(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--older-than",
        metavar="AGE",
        type=parse_age,
        help="only regions opened at least this long ago, whole: 90s, 15m, 12h, 7d, 2w. Their newest chunks may be younger",
    )
    which.add_argument(
        "--namespace", metavar="NS", type=parse_namespace, help="only chunks of this namespace, 64 hexadecimal digits"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    def work(path: str) -> tuple[dict[str, Any], bool]:
        cleared = _native.clear_store(path, older_than_s=arguments.older_than, namespace=arguments.namespace)
        report = {"path": path, **cleared}
        if not arguments.json:
            say("\n".join(_as_text(report)) + "\n")
        return report, bool(report["unreadable_regions"] or report["read_errors"])

    try:
        reports, code = over_stores(arguments, work)
    except LmcacheNativeError as error:
        return report_error(error, arguments.json)
    if arguments.json:
        print_json({"stores": reports, "records": sum(report.get("records", 0) for report in reports)})
    return code


def _as_text(report: dict[str, Any]) -> list[str]:
    lines = [
        f"{report['path']}: {count_of(report['records'], 'chunk')} ({size(report['bytes'])}) cleared, "
        f"{size(report['freed_bytes'])} given back to the file system"
    ]
    if report["regions_of_unknown_age"]:
        lines.append(
            f"  {count_of(report['regions_of_unknown_age'], 'region')} of unknown age kept: written by a version that noted none. "
            "`clear` without --older-than takes them too"
        )
    if report["unreadable_headers"]:
        lines.append(
            f"  {count_of(report['unreadable_headers'], 'chunk')} kept whose header does not hold; they are misses in any case"
        )
    if report["unreadable_regions"] or report["read_errors"]:
        lines.append(
            f"  PROBLEM {count_of(report['unreadable_regions'], 'region')} cannot be read, "
            f"{count_of(report['read_errors'], 'read')} failed: some of what was to go may have stayed. Run it again, or clear all"
        )
    return lines
