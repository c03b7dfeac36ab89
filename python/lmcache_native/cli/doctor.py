"""`lmcache-native doctor`: what this machine has, what of it is used, and what to change."""

from __future__ import annotations

import argparse
import os
import queue
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lmcache_native import __version__
from lmcache_native.cli import machine_facts
from lmcache_native.cli.machine_facts import Fact, Roots
from lmcache_native.cli.stores import OK, PROBLEMS, print_json, say
from lmcache_native.config import Profile
from lmcache_native.config.merge import Evaluation

# A question that is not answered by then (a dead network file system, a driver that hangs) is told as such.
TIMEOUT_S = 20.0
COLUMNS = 132

Probe = tuple[str, str, Callable[[], list[Fact]]]  # area, what is asked, how

_DESCRIPTION = """\
Looks at this machine: driver and devices, GPUDirect Storage, the file systems of the store's paths, io_uring, memory, engines,
and the configuration that an engine started here would have. Writes one page to a file in each path, which it removes; changes
nothing else.
"""


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what this machine has, what is used, what to change",
        description=_DESCRIPTION,
        epilog="exit codes: 0 all is well, 1 something to change, 2 wrong usage",
    )
    parser.add_argument(
        "--path", metavar="DIR", action="append", default=[], help="where a store would be; more than once (default: local_disk)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--connector",
        choices=[profile.value for profile in Profile],
        default=Profile.LMCACHE.value,
        help="whose configuration (default: lmcache)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    roots = Roots()
    configuration, found = ask_configuration(Profile(arguments.connector), TIMEOUT_S)
    facts = ask(probes(roots, arguments.path, found, Profile(arguments.connector)), TIMEOUT_S) + configuration
    changes = [fact for fact in facts if fact.change]
    if arguments.json:
        print_json(
            {"version": __version__, "facts": [asdict(fact) for fact in facts], "changes": [asdict(fact) for fact in changes]}
        )
    else:
        say("\n".join(as_text(facts)) + "\n")
    return PROBLEMS if changes else OK


def ask_configuration(profile: Profile, timeout_s: float) -> tuple[list[Fact], Evaluation | None]:
    """A question like the others, which must know the answer: its file and the paths it names may be on a dead file system."""
    evaluated: list[Evaluation | None] = []

    def answer() -> list[Fact]:
        facts, found = machine_facts.configuration(os.environ, profile)
        evaluated.append(found)
        return facts

    facts = ask([("configuration", "all", answer)], timeout_s)
    return facts, evaluated[0] if evaluated else None


def probes(roots: Roots, paths: Sequence[str], found: Evaluation | None, profile: Profile = Profile.LMCACHE) -> list[Probe]:
    """All questions, in the order of the table."""
    config = found.config if found else None
    places = [Path(path) for path in paths] or list(config.directories if config else ()) or [machine_facts.temporary_path()]
    allow_network = config is not None and config.allow_network_file_system
    asked: list[Probe] = [
        ("gpu", "driver", lambda: machine_facts.gpu_driver(roots)),
        ("gpu", "devices", lambda: machine_facts.gpu_devices(roots)),
        ("gpu", "CUDA of the build", machine_facts.cuda_build),
        ("gpu", "storage to GPU", lambda: machine_facts.gpu_direct_storage(roots, os.environ)),
        ("gpu", "direct loads", lambda: machine_facts.direct_loads(config, profile)),
    ]
    for place in places:
        asked.append((f"path {place}", "file system", lambda p=place: machine_facts.store_path(p, roots, allow_network)))  # type: ignore[misc]
    asked += [
        ("io", "io_uring", lambda: machine_facts.io_uring(roots)),
        ("memory", "huge pages", lambda: machine_facts.huge_pages(roots)),
        ("memory", "locked memory limit", machine_facts.memlock),
        ("memory", "NUMA nodes", lambda: machine_facts.numa_nodes(roots)),
        ("memory", "/dev/shm", lambda: machine_facts.shared_memory(roots)),
        ("memory", "cgroup limit", lambda: machine_facts.cgroup_limit(roots)),
        ("engines", "engines", machine_facts.engines),
    ]
    return asked


def ask(asked: Sequence[Probe], timeout_s: float) -> list[Fact]:
    """The answers in order. One that raises or does not come in time is a fact that says so; the others are not touched by it.

    All are asked at once, each in a daemon thread: one that hangs in the kernel must not keep the command from ending.
    """
    answers: list[queue.SimpleQueue[list[Fact] | Exception]] = [queue.SimpleQueue() for _ in asked]

    def answer(probe: Callable[[], list[Fact]], into: queue.SimpleQueue[list[Fact] | Exception]) -> None:
        try:
            into.put(probe())
        except Exception as error:  # whatever one question meets, the others are answered
            into.put(error)

    for (_, _, probe), into in zip(asked, answers, strict=True):
        threading.Thread(target=answer, args=(probe, into), daemon=True).start()
    deadline = time.monotonic() + timeout_s
    facts: list[Fact] = []
    for (area, name, _), coming in zip(asked, answers, strict=True):
        try:
            got = coming.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            facts.append(Fact(area, name, "no answer", "", f"the machine did not answer within {timeout_s:g} s"))
            continue
        if isinstance(got, Exception):
            facts.append(Fact(area, name, "failed", "", f"{type(got).__name__}: {got}"))
        else:
            facts += got
    return facts


def as_text(facts: Sequence[Fact]) -> list[str]:
    name_width = max(len(fact.name) for fact in facts)
    lines = [f"lmcache-native {__version__}, Python {sys.version.split()[0]}"]
    area = ""
    for fact in facts:
        if fact.area != area:
            area = fact.area
            lines += ["", area]
        text = f"{fact.found}; {fact.used}" if fact.used else fact.found
        head = f"{'!' if fact.change else ' '} {fact.name:<{name_width}}  "
        lines += textwrap.wrap(text, COLUMNS, initial_indent=head, subsequent_indent=" " * len(head))
    changes = [fact for fact in facts if fact.change]
    lines += ["", "to change" if changes else "nothing to change"]
    for fact in changes:
        head = f"! {fact.name}: "
        lines += textwrap.wrap(fact.change, COLUMNS, initial_indent=head, subsequent_indent="    ")
    return lines
