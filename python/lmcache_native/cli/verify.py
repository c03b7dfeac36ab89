"""`lmcache-native verify`: reads a whole store and checks it."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from lmcache_native import _native
from lmcache_native.cli.stores import (
    EXIT_CODES,
    add_path,
    count_of,
    over_stores,
    print_json,
    report_error,
    say,
    size,
)
from lmcache_native.errors import LmcacheNativeError

_DESCRIPTION = f"""\
Reads every chunk of a store that nobody has open, whole, and checks what a load checks: the header, its key, region
and record sequences, length and all checksums of the payload. Writes nothing and uses at most 256 MiB, or the memory
of one chunk. A chunk that does not hold is a miss for an engine, never wrong data; this tells you about the device.
Ctrl-C ends it at once.
{EXIT_CODES}; 130 after Ctrl-C
"""

_PROGRESS_COLUMNS = 30


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="read a whole store on NVMe and check it",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_path(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    def work(path: str) -> tuple[dict[str, Any], bool]:
        show = _Progress(path)
        try:
            report = {"path": path, **_native.verify_store(path, show)}
        finally:
            show.end()
        if not arguments.json:
            say("\n".join(_as_text(report)) + "\n")
        return report, bool(report["bad"] or report["notes"])

    try:
        reports, code = over_stores(arguments, work)
    except KeyboardInterrupt:
        sys.stderr.write("lmcache-native: interrupted; nothing was changed\n")
        return 130
    except LmcacheNativeError as error:
        return report_error(error, arguments.json)
    if arguments.json:
        print_json({"stores": reports, "bad": sum(len(report.get("bad", [])) for report in reports)})
    return code


def _as_text(report: dict[str, Any]) -> list[str]:
    total, verified = report["total"], report["verified"]
    lines = [
        f"{report['path']}: {verified['records']:,} of {count_of(total['records'], 'chunk')} hold ({size(verified['bytes'])} read)"
    ]
    lines += [f"  note: {note}" for note in report["notes"]]
    lines += [
        f"  BAD {one['key']}  region {one['region']}, page {one['page']} ({count_of(one['pages'], 'page')}), "
        f"{one['check']}: {one['detail']}"
        for one in report["bad"]
    ]
    if report["bad"]:
        lines.append(
            "  Each is a miss when it is asked for. Look at the device (smartctl, the kernel's log); "
            "`lmcache-native clear` makes the store new."
        )
    return lines


class _Progress:
    """On stderr: a bar that moves on a terminal, a line per 10 % elsewhere."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._terminal = sys.stderr.isatty()
        self._tenths = 0
        self._drawn = False

    def __call__(self, records: int, of_records: int, done: int, of_bytes: int) -> None:
        share = done / of_bytes if of_bytes else 1.0
        if self._terminal:
            filled = round(share * _PROGRESS_COLUMNS)
            sys.stderr.write(
                f"\r{self._path}  [{'#' * filled:<{_PROGRESS_COLUMNS}}] {share:4.0%}  {size(done)} of {size(of_bytes)} "
            )
            sys.stderr.flush()
            self._drawn = True
        elif int(share * 10) > self._tenths:
            self._tenths = int(share * 10)
            sys.stderr.write(f"{self._path}: {self._tenths * 10} %, {records:,} of {count_of(of_records, 'chunk')}\n")

    def end(self) -> None:
        if self._drawn:
            sys.stderr.write("\n")
