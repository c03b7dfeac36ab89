"""The scripts of `make gpu-check` that judge: what they call met, missed, spilled and missing. The figures are made up."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


def script(path: str) -> ModuleType:
    name = "gpu_script_" + Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


report = script("benchmarks/gpu/report.py")
resources = script("tests/cuda/kernel_resources.py")

# ---- the report ---------------------------------------------------------------------------------------------------------

Line = dict[str, Any]


def copy(path: str, direction: str, run_bytes: int, gb_s: float, runs: int = 4096) -> Line:
    return {
        "kind": "copy", "path": path, "direction": direction, "run_bytes": run_bytes, "runs": runs, "gb_s": gb_s,
        "copier": f"cuda-{path}",
    }  # fmt: skip


def measured(auto_gb_s: float = 48.0, kernel_gb_s: float = 42.0) -> list[Line]:
    lines: list[Line] = [
        {"kind": "device", "name": "Some GPU", "capability": "9.0", "multiprocessors": 9, "cuda_runtime": 1, "cuda_driver": 1},
        {"kind": "ceiling", "name": "host to device", "bytes": 256 << 20, "gb_s": 50.0},
        {"kind": "ceiling", "name": "device to host", "bytes": 256 << 20, "gb_s": 50.0},
        {
            "kind": "kernel", "slot": "mapped host memory", "max_ctas": 12, "run_bytes": 4096, "runs": 4096, "direction": "scatter",
            "gb_s": kernel_gb_s,
        },
        {
            "kind": "kernel", "slot": "mapped host memory", "max_ctas": 64, "run_bytes": 4096, "runs": 4096, "direction": "scatter",
            "gb_s": 50.0,
        },
    ]  # fmt: skip
    for direction in ("gather", "scatter"):
        for run_bytes in (4096, 32768):
            lines += [copy("batch", direction, run_bytes, 48.0), copy("memcpy", direction, run_bytes, 9.0)]
            lines += [copy("plain cudaMemcpyAsync", direction, run_bytes, 90.0), copy("auto", direction, run_bytes, auto_gb_s)]
            lines.append(copy("auto", direction, run_bytes, 1.0, runs=16))  # few runs are not judged
    return [*lines, {"kind": "end"}]


def states(lines: list[Line], part: str) -> set[str]:
    return {verdict.state for verdict in report.judge(lines) if part in verdict.target}


def test_targets_met() -> None:
    assert {verdict.state for verdict in report.judge(measured())} == {"met"}


def test_a_slow_choice_misses_the_ceiling_and_the_best_path() -> None:
    lines = measured(auto_gb_s=44.9)  # 89.8 % of 50; 93.5 % of 48
    assert states(lines, "runs of 32 KiB: at least 90%") == {"missed"}
    assert states(lines, "calibrated choice") == {"missed"}
    assert states(measured(auto_gb_s=45.7), "runs of 32 KiB: at least 90%") == {"met"}  # 91.4 % of 50; 95.2 % of 48
    assert states(measured(auto_gb_s=45.7), "calibrated choice") == {"met"}


def test_only_few_thread_blocks_count() -> None:
    assert states(measured(kernel_gb_s=39.9), "12 CTAs") == {"missed"}  # the 50 GB/s of 64 CTAs do not help
    assert states(measured(kernel_gb_s=40.1), "12 CTAs") == {"met"}


@pytest.mark.parametrize("kind", ["ceiling", "kernel", "copy"])
def test_what_was_not_measured_is_not_met(kind: str) -> None:
    assert "not measured" in {v.state for v in report.judge([line for line in measured() if line["kind"] != kind])}


def run_report(tmp_path: Path, lines: list[Line], *more: str) -> int:
    bench = tmp_path / "bench.jsonl"
    bench.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return int(report.main(["--bench", str(bench), "--out", str(tmp_path / "out"), *more]))


def test_files_and_exit_codes(tmp_path: Path) -> None:
    assert run_report(tmp_path, measured(), "--name", "h.1") == 0
    text = (tmp_path / "out/gpu-h.1.md").read_text()
    assert "# GPU copies: Some GPU" in text
    assert "| 32 KiB | 4096 | 48.00 | 9.00 | 90.00 | 48.00 |" in text
    document = json.loads((tmp_path / "out/gpu-h.1.json").read_text())
    assert len(document["lines"]) == len(measured())
    assert run_report(tmp_path, measured(auto_gb_s=1.0)) == 1
    assert (tmp_path / "out/gpu-some-gpu.md").exists()
    assert run_report(tmp_path, measured()[:-1]) == 2  # gpu_bench ended early


def test_steps_count_too(tmp_path: Path) -> None:
    checks = tmp_path / "checks.tsv"
    checks.write_text("passed\tbuild\nNOT RUN\tcompute-sanitizer\n")
    assert run_report(tmp_path, measured(), "--checks", str(checks)) == 2
    checks.write_text("passed\tbuild\nFAILED\tcompute-sanitizer\n")
    assert run_report(tmp_path, measured(), "--checks", str(checks)) == 1


# ---- kernels' resources -------------------------------------------------------------------------------------------------


def said(name: str, arch: str, spill: int = 0) -> str:
    return (
        f"ptxas info    : Compiling entry function '{name}' for 'sm_{arch}'\n"
        f"ptxas info    : Function properties for {name}\n"
        f"    {8 if spill else 0} bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 8448 bytes smem, 376 bytes cmem[0]\n"
        "ptxas info    : Compile time = 9.194 ms\n"
    )


def test_kernels_as_ptxas_tells_them() -> None:
    text = "ptxas info    : 0 bytes gmem\n" + said("_Z4copyv", "80") + said("_Z4copyv", "90a") + said("_Z6verifyv", "80")
    kernels = resources.parse(text, "a.cu")
    assert [(k.name, k.arch, k.registers, k.shared_bytes) for k in kernels] == [
        ("_Z4copyv", 80, 40, 8448), ("_Z4copyv", 90, 40, 8448), ("_Z6verifyv", 80, 40, 8448),
    ]  # fmt: skip
    assert resources.problems(kernels) == ["_Z6verifyv is missing for sm_90"]
    assert resources.problems(resources.parse(said("_Z4copyv", "80", spill=12), "a.cu")) == ["_Z4copyv on sm_80 spills 24 bytes"]
    with pytest.raises(SystemExit, match="something else than expected"):
        resources.parse("Compiling entry function '_Z4copyv' for 'sm_80'\nnothing more", "a.cu")
