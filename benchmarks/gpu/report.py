"""What gpu_bench and torch_baseline.py measured, as docs/benchmarks/gpu-NAME.md and .json, with the targets judged.

    report.py --bench FILE [--torch FILE] [--checks FILE] [--command TEXT] --out FOLDER [--name NAME] [--fake]

Exit code 0: every target met. 1: one missed. 2: a measurement is missing. A figure is never filled in: what was not measured
says so. --fake: of programs on the fake runtime; no target is judged then, and the exit code is 2.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# Targets. Ceilings are one cudaMemcpyAsync of 256 MiB between pinned and device memory.
LONG_RUN_BYTES, LONG_SHARE = 32 << 10, 0.90
SHORT_RUN_BYTES, SHORT_SHARE, MOST_CTAS = 4 << 10, 0.80, 12
CHOICE_SHARE = 0.95
NOT_MEASURED = "not measured"
NO_GPU = "NOT OF A GPU: programs on the fake runtime, on the CPU; none of these figures says anything about a device"
PLAIN = "plain cudaMemcpyAsync"
CEILING_OF = {"gather": "device to host", "scatter": "host to device"}

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Verdict:
    target: str
    state: str  # "met", "missed", "not measured"
    why: str


def lines_of(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def size(count: int) -> str:
    return f"{count >> 20} MiB" if count % (1 << 20) == 0 else f"{count >> 10} KiB"


# ---- targets ------------------------------------------------------------------------------------------------------------


def judge(lines: Sequence[Line]) -> list[Verdict]:
    ceilings = {line["name"]: float(line["gb_s"]) for line in lines if line["kind"] == "ceiling"}
    copies = [line for line in lines if line["kind"] == "copy"]
    forced = [line for line in copies if line["path"] not in (PLAIN, "auto")]
    verdicts = []
    for direction, ceiling_name in CEILING_OF.items():
        ceiling = ceilings.get(ceiling_name)
        sizes = sorted({line["run_bytes"] for line in copies if line["run_bytes"] >= LONG_RUN_BYTES})
        if not sizes:
            verdicts.append(Verdict(_long_target(direction, None), "not measured", "no copies of such runs"))
        for run_bytes in sizes:
            chosen = [c for c in copies if c["path"] == "auto" and c["direction"] == direction and c["run_bytes"] == run_bytes]
            verdicts.append(_share(_long_target(direction, run_bytes), _most_runs(chosen), ceiling, LONG_SHARE))
    kernels = [
        line
        for line in lines
        if line["kind"] == "kernel"
        and line["slot"] == "mapped host memory"
        and line["direction"] == "scatter"
        and line["run_bytes"] == SHORT_RUN_BYTES
        and line["max_ctas"] <= MOST_CTAS
    ]
    best = max(kernels, key=lambda line: float(line["gb_s"]), default=None)
    target = f"host to device, runs of {size(SHORT_RUN_BYTES)}, at most {MOST_CTAS} CTAs: at least {SHORT_SHARE:.0%} of the ceiling"
    verdicts.append(_share(target, best, ceilings.get("host to device"), SHORT_SHARE))
    verdicts += _choices(copies, forced)
    return verdicts


def _long_target(direction: str, run_bytes: int | None) -> str:
    runs = f"runs of {size(run_bytes)}" if run_bytes else f"runs of at least {size(LONG_RUN_BYTES)}"
    return f"{CEILING_OF[direction]}, {runs}: at least {LONG_SHARE:.0%} of the ceiling"


def _most_runs(lines: Iterable[Line]) -> Line | None:
    return max(lines, key=lambda line: int(line["runs"]), default=None)


def _share(target: str, line: Line | None, ceiling: float | None, least: float) -> Verdict:
    if line is None or not ceiling:
        return Verdict(target, "not measured", "no figure" if line is None else "no ceiling")
    share = float(line["gb_s"]) / ceiling
    what = line.get("copier") or f"{line['max_ctas']} CTAs"
    return Verdict(
        target,
        "met" if share >= least else "missed",
        f"{line['gb_s']:.2f} of {ceiling:.2f} GB/s = {share:.1%} ({what}, {line['runs']} runs)",
    )


def _choices(copies: Sequence[Line], forced: Sequence[Line]) -> list[Verdict]:
    """The calibrated choice beside the best forced path, for each size of runs at its largest number."""
    verdicts = []
    for direction in CEILING_OF:
        for run_bytes in sorted({line["run_bytes"] for line in copies}):
            target = (
                f"calibrated choice, {direction}, runs of {size(run_bytes)}: at least {CHOICE_SHARE:.0%} of the best forced path"
            )
            mine = [c for c in copies if c["path"] == "auto" and c["direction"] == direction and c["run_bytes"] == run_bytes]
            auto = _most_runs(mine)
            others = [c for c in forced if auto and all(c[k] == auto[k] for k in ("direction", "run_bytes", "runs"))]
            best = max(others, key=lambda line: float(line["gb_s"]), default=None)
            if auto is None or best is None:
                verdicts.append(Verdict(target, "not measured", "no figure"))
                continue
            share = float(auto["gb_s"]) / float(best["gb_s"])
            why = f"{auto['copier']} {auto['gb_s']:.2f}, best forced {best['path']} {best['gb_s']:.2f} GB/s = {share:.1%}"
            verdicts.append(Verdict(target, "met" if share >= CHOICE_SHARE else "missed", why))
    return verdicts


# ---- output -------------------------------------------------------------------------------------------------------------


def markdown(facts: dict[str, Any], lines: Sequence[Line], verdicts: Sequence[Verdict]) -> str:
    out = [f"# GPU copies: {facts['device']}", ""]
    out += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items() if name != "device"), ""]
    out += ["GB are 10^9 bytes, by device events around all that a job enqueues; medians of 7 rounds.", ""]
    out += ["## Targets", "", "| target | | |", "|---|---|---|"]
    out += [f"| {v.target} | {v.state} | {v.why} |" for v in verdicts]
    out += ["", "## Ceilings", "", "| copy | GB/s |", "|---|---:|"]
    out += [f"| {line['name']}, one of {size(line['bytes'])} | {line['gb_s']:.2f} |" for line in lines if line["kind"] == "ceiling"]
    copies = [line for line in lines if line["kind"] == "copy"]
    for direction in CEILING_OF:
        mine = [line for line in copies if line["direction"] == direction]
        paths = list(dict.fromkeys(line["path"] for line in mine))
        out += ["", f"## {direction.capitalize()}, GB/s", ""]
        out += [f"| run | runs | {' | '.join(paths)} |", f"|---:|---:|{'---:|' * len(paths)}"]
        for run_bytes, runs in dict.fromkeys((line["run_bytes"], line["runs"]) for line in mine):
            rates = {c["path"]: c["gb_s"] for c in mine if (c["run_bytes"], c["runs"]) == (run_bytes, runs)}
            cells = [f"{rates[path]:.2f}" if path in rates else "-" for path in paths]
            out.append(f"| {size(run_bytes)} | {runs} | {' | '.join(cells)} |")
    missing = {(line["path"], line["why"]) for line in lines if line["kind"] == "path missing"}
    if missing:
        out += ["", "Not to be had here: " + "; ".join(f"{path}: {why}" for path, why in sorted(missing)) + "."]
    kernels = [line for line in lines if line["kind"] == "kernel"]
    if kernels:
        out += [
            "",
            "## Kernels alone, GB/s",
            "",
            "| slot in | at most | run | runs | gather | scatter |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        keys = ("slot", "max_ctas", "run_bytes", "runs")
        for key in dict.fromkeys(tuple(line[k] for k in keys) for line in kernels):
            rates = {line["direction"]: line["gb_s"] for line in kernels if tuple(line[k] for k in keys) == key}
            slot, ctas, run_bytes, runs = key
            cells = " | ".join(f"{rates[d]:.2f}" if d in rates else "-" for d in CEILING_OF)
            out.append(f"| {slot} | {ctas} CTAs | {size(run_bytes)} | {runs} | {cells} |")
    storage = [line for line in lines if line["kind"] == "storage"]
    if storage:
        out += ["", "## NVMe to device, GB/s", "", "| way | read | |", "|---|---:|---|"]
        out += [f"| {line['way']} | {line['gb_s']:.2f} | {line['note']} |" for line in storage]
    return "\n".join(out) + "\n"


def output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def facts_of(lines: Sequence[Line], command: str) -> dict[str, Any]:
    device = next(line for line in lines if line["kind"] == "device")
    torch = next((line for line in lines if line["kind"] == "torch"), None)
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[:1]
    link = output_of("nvidia-smi", "--query-gpu=pcie.link.gen.max,pcie.link.width.max", "--format=csv,noheader").splitlines()[:1]
    return {
        "device": device["name"],
        "compute capability": device["capability"],
        "multiprocessors": device["multiprocessors"],
        "CUDA": f"runtime {device['cuda_runtime']}, driver {device['cuda_driver']}{f' ({driver[0]})' if driver else ''}",
        "PCIe (generation, width)": link[0] if link else "not known",
        "torch": torch["version"] if torch else "not measured",
        "commit": output_of("git", "rev-parse", "--short", "HEAD") or "not known",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": f"`{command}`",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, required=True)
    parser.add_argument("--torch", type=Path)
    parser.add_argument("--checks", type=Path, help="lines 'state<TAB>name' of the tests that ran before")
    parser.add_argument("--command", default="make gpu-check")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", help="default: the device's")
    parser.add_argument("--fake", action="store_true", help="the programs ran on the fake runtime, on the CPU")
    chosen = parser.parse_args(arguments)
    lines = lines_of(chosen.bench)
    if not any(line["kind"] == "end" for line in lines):
        sys.stderr.write(f"report: {chosen.bench} ends early: gpu_bench did not\n")
        return 2
    if chosen.torch:
        lines += lines_of(chosen.torch)
    facts = facts_of(lines, chosen.command)
    verdicts = judge(lines)
    if chosen.fake:
        verdicts = [Verdict(verdict.target, NOT_MEASURED, NO_GPU) for verdict in verdicts]
    if chosen.checks:
        for line in chosen.checks.read_text(encoding="utf-8").splitlines():
            state, _, name = line.partition("\t")
            verdicts.insert(0, Verdict(name, {"passed": "met", "FAILED": "missed"}.get(state, NOT_MEASURED), state))
    name = chosen.name or re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    chosen.out.mkdir(parents=True, exist_ok=True)
    target = chosen.out / f"gpu-{name}"
    warning = f"**{NO_GPU}**\n\n" if chosen.fake else ""
    Path(f"{target}.md").write_text(warning + markdown(facts, lines, verdicts), encoding="utf-8")
    document = {"fake": chosen.fake, "facts": facts, "verdicts": [asdict(v) for v in verdicts], "lines": lines}
    Path(f"{target}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if chosen.fake:
        sys.stdout.write(f"===== {NO_GPU}\n")
    for verdict in verdicts:
        sys.stdout.write(f"{verdict.state:<12}  {verdict.target}: {verdict.why}\n")
    sys.stdout.write(f"{target}.md, .json\n")
    states = {verdict.state for verdict in verdicts}
    return 1 if "missed" in states else 2 if "not measured" in states else 0


if __name__ == "__main__":
    raise SystemExit(main())
