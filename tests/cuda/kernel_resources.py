"""What ptxas said of each kernel: a table, and exit code 1 when one spills registers or is missing for an architecture.

kernel_resources.py BUILD [--json FILE]      BUILD: a build with LMCN_CUDA_RESOURCES=ON (preset gpu)
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

COMPILING = re.compile(r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)[a-z]*'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True, slots=True)
class Kernel:
    name: str  # demangled, without parameters
    source: str
    arch: int
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


def parse(text: str, source: str) -> list[Kernel]:
    """The kernels of one object, each architecture after the other."""
    kernels = []
    for part in re.split(r"(?=Compiling entry function)", text)[1:]:
        entry = COMPILING.match(part)
        spills, registers = SPILLS.search(part), REGISTERS.search(part)
        if entry is None or spills is None or registers is None:
            raise SystemExit(f"{source}: ptxas said something else than expected:\n{part}")
        shared = SHARED.search(part)
        stack, stores, loads = (int(n) for n in spills.groups())
        kernels.append(
            Kernel(
                name=entry["name"],
                source=source,
                arch=int(entry["arch"]),
                registers=int(registers[1]),
                stack_bytes=stack,
                spill_bytes=stores + loads,
                shared_bytes=int(shared[1]) if shared else 0,
            )
        )
    return kernels


def demangled(names: list[str]) -> dict[str, str]:
    """Mangled name -> `paged_copy<true>`."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    plain = {}
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        short = line.replace("(anonymous namespace)", "").replace("lmcn::", "").removeprefix("void ").lstrip(":")
        depth = 0
        for at, letter in enumerate(short):  # up to the parameters, past those of templates
            depth += (letter == "<") - (letter == ">")
            if letter == "(" and depth == 0:
                short = short[:at]
                break
        plain[name] = short
    return plain


def table(kernels: list[Kernel]) -> list[str]:
    """A line per kernel; its registers per architecture, the largest of the rest."""
    archs = sorted({k.arch for k in kernels})
    rows = [("kernel", *(f"sm_{arch}" for arch in archs), "stack B", "spill B", "shared B")]
    for name in dict.fromkeys(k.name for k in kernels):
        mine = [k for k in kernels if k.name == name]
        registers = {k.arch: k.registers for k in mine}
        worst = (max(k.stack_bytes for k in mine), max(k.spill_bytes for k in mine), max(k.shared_bytes for k in mine))
        rows.append((name, *(str(registers.get(arch, "-")) for arch in archs), *(str(n) for n in worst)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in rows
    ]


def problems(kernels: list[Kernel]) -> list[str]:
    found = [f"{k.name} on sm_{k.arch} spills {k.spill_bytes} bytes" for k in kernels if k.spill_bytes]
    archs = {k.arch for k in kernels}
    for name in dict.fromkeys(k.name for k in kernels):
        missing = archs - {k.arch for k in kernels if k.name == name}
        if missing:
            found.append(f"{name} is missing for {', '.join(f'sm_{arch}' for arch in sorted(missing))}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path, metavar="BUILD")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    kernels: list[Kernel] = []
    sources = sorted((ROOT / "cuda").glob("*.cu"))
    for source in sources:
        kept = sorted(arguments.build.rglob(f"{source.name}.o.ptxas"))
        if len(kept) != 1:
            raise SystemExit(f"expected one {source.name}.o.ptxas below {arguments.build}, found {len(kept)}: build it first")
        kernels += parse(kept[0].read_text(encoding="utf-8"), source.name)
    names = demangled([k.name for k in kernels])
    kernels = [Kernel(**{**asdict(k), "name": names[k.name]}) for k in kernels]
    if not sources:
        sys.stdout.write("no kernels: cuda/ has no .cu\n")
        return 0
    if not kernels:
        raise SystemExit(f"ptxas named no kernel of {', '.join(s.name for s in sources)}")
    sys.stdout.write(
        "registers a thread, and the largest of the other figures over the architectures\n" + "\n".join(table(kernels)) + "\n"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(k) for k in kernels], indent=1) + "\n", encoding="utf-8")
    wrong = problems(kernels)
    for line in wrong:
        sys.stderr.write(f"FAILED: {line}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
