"""`lmcache-native inspect`: what a store on NVMe holds."""

from __future__ import annotations

import argparse
from typing import Any

from lmcache_native import _native
from lmcache_native.cli.stores import (
    EXIT_CODES,
    add_path,
    age,
    bars,
    count_of,
    over_stores,
    print_json,
    report_error,
    say,
    size,
    table,
)
from lmcache_native.errors import LmcacheNativeError

_DESCRIPTION = f"""\
Shows what a store holds that nobody has open: its identity, space, regions, ages and hits of its chunks, and how
much was written for what was stored. Reads headers and lists only, no payload, and writes nothing. A chunk's age is
that of the region it lies in, so it is at most that old; hits count since the chunk was written.
{EXIT_CODES}
"""

_SUMS = ("allocated_bytes", "limit_bytes", "records", "live_bytes", "dead_bytes")


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="show what a store on NVMe holds",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_path(parser)
    parser.add_argument("--namespaces", action="store_true", help="also the bytes of each namespace: reads one page per chunk")
    parser.add_argument("--regions", action="store_true", help="also a line for each region")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    def work(path: str) -> tuple[dict[str, Any], bool]:
        found = _native.inspect_store(path, arguments.namespaces)
        found["write_amplification"] = write_amplification(found["totals"])
        found["problems"] = problems_of(found)
        return found, bool(found["problems"])

    try:
        stores, code = over_stores(arguments, work)
    except LmcacheNativeError as error:
        return report_error(error, arguments.json)
    readable = [store for store in stores if "error" not in store]
    total = {name: sum(store[name] for store in readable) for name in _SUMS}
    if arguments.json:
        print_json({"stores": stores, "total": total})
        return code
    for store in readable:
        say("\n".join(_as_text(store, arguments.namespaces, arguments.regions)) + "\n\n")
    if len(stores) > 1:
        say("\n".join(_total_text(readable, total)) + "\n")
    return code


def write_amplification(totals: dict[str, int]) -> float | None:
    """Bytes of records written for each byte that was new; None when nothing is known."""
    first = totals["first_bytes"]
    return round((first + totals["reappended_bytes"]) / first, 4) if first else None


def problems_of(found: dict[str, Any]) -> list[str]:
    """What is not as it should be; each costs hits, none gives wrong data."""
    out = []
    if found["checkpoint_note"]:
        out.append(f"index.ckpt is not used: {found['checkpoint_note']}; the next open reads footers instead")
    unreadable = [region["region"] for region in found["regions"] if region["state"] == "unreadable"]
    if unreadable:
        out.append(f"{count_of(len(unreadable), 'region')} cannot be read: {', '.join(map(str, unreadable[:10]))}")
    if found["unreadable_headers"]:
        out.append(f"{count_of(found['unreadable_headers'], 'chunk')} with a header that does not hold: `verify` names them")
    if found["read_errors"] and not unreadable:
        out.append(f"{count_of(found['read_errors'], 'read')} failed; look at the kernel's log for the device")
    return out


def _as_text(found: dict[str, Any], namespaces: bool, regions: bool) -> list[str]:
    now = found["now_unix_s"]

    def ago(unix_s: int) -> str:
        return "unknown" if unix_s == 0 else f"{age(max(0, now - unix_s))} ago"

    states: dict[str, int] = {}
    for region in found["regions"]:
        states[region["state"]] = states.get(region["state"], 0) + 1
    totals = found["totals"]
    limit = size(found["limit_bytes"]) if found["limit_bytes"] else "unknown"
    lines = [
        found["path"],
        f"  store        {found['uuid']}, format version {found['format_version']}, made {ago(found['created_unix_s'])}",
        f"  space        {size(found['allocated_bytes'])} taken, limit {limit}",
        f"  chunks       {found['records']:,} in {size(found['live_bytes'])}; {size(found['dead_bytes'])} of dead ones",
        f"  regions      {len(found['regions'])} of {size(found['region_bytes'])}: "
        + (", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none"),
    ]
    if totals["since_unix_s"]:
        amplification = write_amplification(totals)
        lines.append(
            f"  written      {size(totals['first_bytes'])} new, {size(totals['reappended_bytes'])} again at reclaim, "
            f"over {age(max(0, now - totals['since_unix_s']))}"
            + (f"; write amplification {amplification:.2f}" if amplification is not None else "")
        )
    lines += [f"  PROBLEM      {text}" for text in found["problems"]]
    last = max((i for i, one in enumerate(found["ages"]) if one["records"]), default=0)
    rows = [(_age_label(one), one["bytes"], _tally(one)) for one in found["ages"][: last + 1]]
    lines += _chart("age of chunks, by bytes", rows)
    used = max((i for i, one in enumerate(found["hits"]) if one["records"]), default=0)
    rows = [(_hits_label(one["from"]), one["records"], _tally(one)) for one in found["hits"][: used + 1]]
    lines += _chart("hits since written, by chunks", rows)
    if namespaces:
        rows = [(one["namespace"], one["bytes"], _tally(one)) for one in found["namespaces"]]
        lines += _chart("namespaces, by bytes", rows)
    if regions:
        lines += ["", *_region_table(found["regions"], ago)]
    return lines


def _chart(title: str, rows: list[tuple[str, int, str]]) -> list[str]:
    drawn = bars(rows)
    return ["", f"  {title}", *drawn] if drawn else []


def _tally(one: dict[str, int]) -> str:
    return f"{one['records']:,}, {size(one['bytes'])}" if one["records"] else "-"


def _age_label(one: dict[str, Any]) -> str:
    if one["class"] == "below":
        return f"below {age(one['below_s'])}"
    return "older" if one["class"] == "older" else "unknown"


def _hits_label(begin: int) -> str:
    if begin < 2:
        return str(begin)
    return "32768 and more" if begin == 32768 else f"{begin}-{2 * begin - 1}"


def _region_table(regions: list[dict[str, Any]], ago: Any) -> list[str]:
    rows = [
        [
            str(one["region"]),
            one["state"],
            str(one["sequence"]),
            str(one["epoch"]),
            ago(one["opened_unix_s"]),
            f"{one['records']:,}",
            size(one["live_bytes"]),
            size(one["dead_bytes"]),
        ]
        for one in regions
    ]
    return table(["region", "state", "sequence", "epoch", "opened", "chunks", "live", "dead"], rows)


def _total_text(stores: list[dict[str, Any]], total: dict[str, int]) -> list[str]:
    rows = [
        [name, f"{one['records']:,}", size(one["live_bytes"]), size(one["allocated_bytes"]), size(one["limit_bytes"])]
        for name, one in [*((store["path"], store) for store in stores), ("sum", total)]
    ]
    return table(["store", "chunks", "live", "taken", "limit"], rows)
