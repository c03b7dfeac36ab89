"""What the commands that look at store directories share: finding the stores, exit codes, sizes, ages, bars."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lmcache_native.errors import FormatVersion, InvalidArgument, LmcacheNativeError, Locked, NotFound

OK, PROBLEMS, CANNOT = 0, 1, 2

EXIT_CODES = "exit codes: 0 done and well, 1 problems found, 2 wrong usage or a store that cannot be read or is in use"

BAR_COLUMNS = 40

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_MARKS = ("superblock", "data.000")
_MOST_SECONDS = 2**63 - 1


def add_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a store's directory, or a folder of several (vllm-dp0, vllm-dp1, ...)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def find_stores(path: str) -> list[str]:
    """The store at `path`, or those directly in it, by name. InvalidArgument or NotFound say why there is none."""
    if not path:
        raise InvalidArgument("PATH is empty: name a store's directory, or the folder that holds several")
    named = path.rstrip("/") or "/"
    if os.path.islink(named):
        raise InvalidArgument(f"{path} is a symbolic link; name the directory itself")
    if not os.path.exists(named):
        raise NotFound(f"{path}: no such directory")
    if not os.path.isdir(named):
        raise InvalidArgument(f"{path} is not a directory; name a store's directory, or the folder that holds several")
    if _is_store(Path(named)):
        return [named]
    try:
        below = sorted(entry for entry in Path(named).iterdir() if _is_store(entry))
    except OSError as error:
        raise InvalidArgument(f"{path}: {error.strerror}; run this as the user that owns it") from error
    if not below:
        raise NotFound(f"{path} holds no store: there is no superblock in it or in a directory directly in it")
    links = [str(entry) for entry in below if entry.is_symlink()]
    if links:
        raise InvalidArgument(f"{links[0]} is a symbolic link; name the directory itself")
    return [str(entry) for entry in below]


def over_stores(
    arguments: argparse.Namespace, work: Callable[[str], tuple[dict[str, Any], bool]]
) -> tuple[list[dict[str, Any]], int]:
    """`work` on each store at arguments.path: its report, and whether there are problems. Returns the reports and the exit code. Of
    several stores, one that cannot be had has {"path", "error"} for a report; the error of the only one is raised."""
    reports: list[dict[str, Any]] = []
    code = OK
    paths = find_stores(arguments.path)
    for path in paths:
        try:
            report, problems = work(path)
        except LmcacheNativeError as error:
            if len(paths) == 1:
                raise
            if not arguments.json:
                report_error(error, False)
            report, problems = {"path": path, "error": {"code": error.code, "message": str(error)}}, False
            code = CANNOT
        reports.append(report)
        if problems and code == OK:
            code = PROBLEMS
    return reports, code


def _is_store(path: Path) -> bool:
    if not os.path.isdir(path):
        return False
    for mark in _MARKS:
        try:
            os.stat(path / mark)
        except PermissionError:
            return True  # it may be one: opening it says whose it is
        except OSError:
            continue
        return True
    return False


def report_error(error: LmcacheNativeError, as_json: bool) -> int:
    """Prints the error, with what to do where the message does not say it."""
    hint = ""
    if isinstance(error, Locked):
        hint = "\nIt is read and changed only while nobody has it open; what a running engine holds is in its metrics."
    elif isinstance(error, FormatVersion):
        hint = "\nUse the lmcache-native that wrote it."
    if as_json:
        print_json({"error": {"code": error.code, "message": str(error)}})
    else:
        sys.stderr.write(f"lmcache-native: {error}{hint}\n")
    return CANNOT


def say(text: str) -> None:
    """To stdout, at once. A reader that has seen enough (`| head`) changes neither what is done nor the exit code."""
    if sys.stdout is None:  # as below, or started without one
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = None  # Python must not try again at exit


def print_json(content: object) -> None:
    say(json.dumps(content, indent=2) + "\n")


def parse_age(text: str) -> int:
    """Seconds of "90s", "15m", "12h", "7d", "2w"; for argparse."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no age: write a number and s, m, h, d or w, for example 36h or 7d")
    seconds = float(match[1]) * _UNITS_S[match[2]]
    if seconds > _MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is longer than {_MOST_SECONDS} s, the longest age")
    return int(seconds)


def parse_namespace(text: str) -> bytes:
    """32 bytes of 64 hexadecimal digits; for argparse."""
    if re.fullmatch(r"[0-9a-fA-F]{64}", text) is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no namespace: write all 64 hexadecimal digits, as `inspect --namespaces` prints"
        )
    return bytes.fromhex(text)


def size(count: float) -> str:
    """ "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def age(seconds: int) -> str:
    """ "3 d", the largest unit that gives at least 2, rounded down."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def count_of(number: int, what: str) -> str:
    """ "1 record", "2 records"."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def bars(rows: Sequence[tuple[str, int, str]]) -> list[str]:
    """A line per (label, value, note), with a bar as long as its share of the largest value; nothing but zeros gives no line."""
    largest = max((value for _, value, _ in rows), default=0)
    if largest == 0:
        return []
    width = max(len(label) for label, _, _ in rows)
    lines = []
    for label, value, note in rows:
        length = max(1, round(BAR_COLUMNS * value / largest)) if value else 0
        lines.append(f"  {label:>{width}}  {'#' * length:<{BAR_COLUMNS}}  {note}".rstrip())
    return lines


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns aligned to the right, but for the first."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = []
    for row in [heads, *rows]:
        cells = [
            f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines
