"""What torch itself does: index_select into a buffer on the device and one copy to pinned memory, and back; as JSON lines.

    torch_baseline.py --out FILE [--small]      77: no GPU here, or no torch. --small: on the CPU, to show that it runs.

The same pages as gpu_bench's, in torch's indexing; seconds by events around all that is enqueued, medians of 7.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import torch
except ImportError:
    sys.stdout.write("torch_baseline: no torch in this Python: NOTHING MEASURED\n")
    raise SystemExit(77) from None

RUN_BYTES = (4 << 10, 16 << 10, 32 << 10, 64 << 10, 2 << 20)
RUNS = (16, 256, 1024, 4096, 16384)
MOST_BYTES = 1 << 30
ROUNDS = 7


def seconds_of(work: Callable[[], None], on_gpu: bool) -> float:
    work()
    measured = []
    for _ in range(ROUNDS):
        if on_gpu:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            end.synchronize()
            measured.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            work()
            measured.append(time.perf_counter() - start)
    return statistics.median(measured)


def measure(run_bytes: int, runs: int, device: str) -> list[dict[str, Any]]:
    on_gpu = device != "cpu"
    pages = torch.randint(0, 256, (2 * runs, run_bytes), dtype=torch.uint8, device=device)
    index = 2 * ((torch.arange(runs) * 7919) % runs).to(device)
    staging = torch.empty((runs, run_bytes), dtype=torch.uint8, device=device)
    host = torch.zeros((runs, run_bytes), dtype=torch.uint8, pin_memory=on_gpu)

    def gather() -> None:
        torch.index_select(pages, 0, index, out=staging)
        host.copy_(staging, non_blocking=True)

    def scatter() -> None:
        staging.copy_(host, non_blocking=True)
        pages.index_copy_(0, index, staging)

    lines = []
    for direction, work in (("gather", gather), ("scatter", scatter)):
        seconds = seconds_of(work, on_gpu)
        gb_s = run_bytes * runs / seconds / 1e9
        lines.append(
            {
                "kind": "copy",
                "path": "torch index + copy",
                "run_bytes": run_bytes,
                "runs": runs,
                "direction": direction,
                "gb_s": gb_s,
            }
        )
    if not torch.equal(host, pages[index].cpu()):
        raise SystemExit("torch_baseline: FAILED: a round trip changed bytes")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    if not arguments.small and not torch.cuda.is_available():
        sys.stdout.write("torch_baseline: NO GPU HERE, NOTHING MEASURED\n")
        return 77
    shapes = [(4096, 16)] if arguments.small else [(b, r) for b in RUN_BYTES for r in RUNS if b * r <= MOST_BYTES]
    with arguments.out.open("w", encoding="utf-8") as out:
        out.write(json.dumps({"kind": "torch", "version": torch.__version__}) + "\n")
        for run_bytes, runs in shapes:
            for line in measure(run_bytes, runs, "cpu" if arguments.small else "cuda:0"):
                out.write(json.dumps(line) + "\n")
                sys.stdout.write(f"torch    {line['direction']:<7} {run_bytes:7} B x {runs:5}  {line['gb_s']:8.2f} GB/s\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
