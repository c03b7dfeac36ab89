"""Time to first token of a long prompt through real vLLM servers: our two connectors, and vLLM's own tiered offloading as a peer.

For each way in: cold, with a hit in the engine's own cache, in host memory (the engine forgot it), and on NVMe (after a restart).
The order of the ways rotates from round to round, and each starts from an empty store. `make bench-ttft` prepares what this needs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO / "examples" / "demo"), str(REPO / "tests" / "e2e")]
import prompts  # noqa: E402
from demo import machine  # noqa: E402
from vllm_server import VllmServer  # noqa: E402

ANSWER_TOKENS = 8
SETTLE_TIMEOUT_S = 60.0
COLD, ENGINE, HOST, NVME = "cold", "engine hit", "host hit", "NVMe hit"
PHASES = (COLD, ENGINE, HOST, NVME)


@dataclass(frozen=True, slots=True)
class Way:
    title: str
    environment: dict[str, str]
    arguments: list[str]


@dataclass(slots=True)
class Samples:
    ttft_ms: list[float] = field(default_factory=list)
    hit_tokens: list[int] = field(default_factory=list)
    sources: dict[str, int] = field(default_factory=dict)


def ways(store: Path) -> dict[str, Way]:
    def lmcache(chunk_tokens: int) -> Way:
        return Way(
            f"LMCacheConnectorV1 by lmcache-native, chunk {chunk_tokens}",
            {
                "LMCACHE_CHUNK_SIZE": str(chunk_tokens),
                "LMCACHE_MAX_LOCAL_CPU_SIZE": "1",
                "LMCACHE_LOCAL_DISK": str(store),
                "LMCACHE_MAX_LOCAL_DISK_SIZE": "4",
                "LMCACHE_LOG_LEVEL": "WARNING",
            },
            ["--kv-transfer-config", '{"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}'],
        )

    tiering = {
        "spec_name": "CpuTieringSpec",
        "spec_module_path": "cpu_tiering_spec",
        "secondary_tiers": [{"type": "fs", "root_dir": str(store)}],
    }
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(Path(__file__).parent)])
    return {
        "offloading": Way(
            "NativeOffloadingConnector, chunk 128",
            {"LMCACHE_NATIVE": "1", "LMCACHE_LOCAL_DISK": str(store), "LMCACHE_MAX_LOCAL_DISK_SIZE": "4"},
            ["--kv-offloading-size", "1"],
        ),
        "lmcache256": lmcache(256),
        "lmcache32": lmcache(32),
        "tiering": Way(
            "vLLM's tiering (host and fs), chunk 128",
            {"PYTHONPATH": path},
            ["--kv-offloading-size", "1", "--kv-transfer-config", json.dumps({"kv_connector_extra_config": tiering})],
        ),
    }


def say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


class Benchmark:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.store: Path = options.work / "store"
        known = ways(self.store)
        self.ways = {name: known[name] for name in options.ways}
        self.samples = {name: {phase: Samples() for phase in PHASES} for name in self.ways}
        self.prompts = [prompts.tokens(options.model, 1000 + index, options.tokens) for index in range(options.prompts)]
        self.warm_up = prompts.tokens(options.model, 999, options.tokens)
        self.answers: dict[tuple[str, int], list[int]] = {}  # of the cold runs
        self.other_tokens: dict[str, int] = dict.fromkeys(self.ways, 0)

    def run(self) -> None:
        names = list(self.ways)
        for turn in range(self.options.rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                say(f"round {turn + 1} of {self.options.rounds}: {self.ways[name].title}")
                self.round(name)

    def round(self, name: str) -> None:
        shutil.rmtree(self.store, ignore_errors=True)
        with self.server(name) as server:
            self.ask_all(server, name, COLD)
            self.ask_all(server, name, ENGINE)
            self.reset(server)
            self.ask_all(server, name, HOST)
            self.settle()
        self.drop_page_cache()
        with self.server(name) as server:
            self.ask_all(server, name, NVME)

    @contextlib.contextmanager
    def server(self, name: str) -> Iterator[VllmServer]:
        way = self.ways[name]
        log = self.options.work / f"{name}.log"
        server = VllmServer(self.options.model, env={"OMP_NUM_THREADS": "1", **way.environment}, args=way.arguments, log_path=log)
        server.start()
        try:
            for _ in range(2):  # the first requests of a process are slow for reasons of its own
                server.completions(self.warm_up, max_tokens=ANSWER_TOKENS)
            yield server
            server.stop()
        finally:
            server.kill9()

    def ask_all(self, server: VllmServer, name: str, phase: str) -> None:
        found = self.samples[name][phase]
        before = server.cached_tokens_by_source()
        for index, prompt in enumerate(self.prompts):
            answer = server.completions(prompt, max_tokens=ANSWER_TOKENS, extra={"ignore_eos": True})
            found.ttft_ms.append(answer.ttft_s * 1e3)
            found.hit_tokens.append(answer.cached_tokens)
            if phase == COLD:
                self.answers[name, index] = answer.token_ids
            else:
                self.other_tokens[name] += answer.token_ids != self.answers[name, index]
        for source, tokens in server.cached_tokens_by_source().items():
            if tokens > before.get(source, 0):
                found.sources[source] = found.sources.get(source, 0) + tokens - before.get(source, 0)
        median_ms, source = statistics.median(found.ttft_ms), found.sources or "no cache"
        say(f"  {phase}: {median_ms:.0f} ms, {min(found.hit_tokens)} tokens from {source}")

    def reset(self, server: VllmServer) -> None:
        server.reset_prefix_cache(timeout=30.0)

    def settle(self) -> None:
        """Until the store's folder has not changed for a second: written behind, whoever writes it."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        before: list[tuple[str, int, int]] = []
        while time.monotonic() < deadline:
            now = sorted(
                (str(path), path.stat().st_mtime_ns, path.stat().st_blocks) for path in self.store.rglob("*") if path.is_file()
            )
            if now == before:
                return
            before = now
            time.sleep(1.0)
        say(f"  the store still changes after {SETTLE_TIMEOUT_S:.0f} s")

    def drop_page_cache(self) -> None:
        for path in self.store.rglob("*"):
            if path.is_file():
                file = os.open(path, os.O_RDONLY)
                os.fsync(file)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(file)

    # ---- results ------------------------------------------------------------------------------------------------------

    def table(self) -> str:
        lines = ["| TTFT, median (min) ms; tokens from a cache | " + " | ".join(PHASES) + " |", "|---|" + "---:|" * len(PHASES)]
        for name, phases in self.samples.items():
            cells = [
                f"{statistics.median(found.ttft_ms):.0f} ({min(found.ttft_ms):.0f}); {min(found.hit_tokens)}"
                for found in phases.values()
            ]
            lines.append(f"| {self.ways[name].title} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def result(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.options.tokens,
            "ways": {
                name: {
                    "title": way.title,
                    "answers_other_than_cold": self.other_tokens[name],
                    "phases": {
                        phase: {
                            "ttft_ms": [round(value, 1) for value in found.ttft_ms],
                            "hit_tokens": found.hit_tokens,
                            "sources": found.sources,
                        }
                        for phase, found in self.samples[name].items()
                    },
                }
                for name, way in self.ways.items()
            },
            "machine": machine(),
        }

    def failures(self) -> list[str]:
        found = []
        for name, phases in self.samples.items():
            title = self.ways[name].title
            if any(phases[COLD].hit_tokens):
                found.append(f"{title}: a cold run had cache hits")
            found += [f"{title}: no {phase}" for phase in (ENGINE, HOST, NVME) if not all(phases[phase].hit_tokens)]
            found += [
                f"{title}: no {phase} by vLLM's account"
                for phase, source in ((HOST, "host"), (NVME, "disk"))
                if not phases[phase].sources.get(source)
            ]
        return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(ways(Path()))
    parser.add_argument("--model", type=Path, required=True, help="model folder; make bench-ttft passes SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=2, help="default 2")
    parser.add_argument("--prompts", type=int, default=5, help="prompts of each phase and round (default 5)")
    parser.add_argument("--tokens", type=int, default=2000, help="length of each prompt (default 2000)")
    parser.add_argument("--ways", nargs="+", choices=known, default=known, help="default: all")
    parser.add_argument("--work", type=Path, default=REPO / ".bench" / "ttft", help="folder for store, logs and result")
    parser.add_argument("--json", action="store_true", help="print result.json on stdout in place of the table")
    options = parser.parse_args()
    if options.rounds < 1 or options.prompts < 1:
        parser.error("--rounds and --prompts must be at least 1")
    return options


def interrupt(signal_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(f"signal {signal_number}")


def main() -> int:
    options = parse()
    signal.signal(signal.SIGTERM, interrupt)
    options.work.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(options)
    try:
        benchmark.run()
    finally:
        shutil.rmtree(benchmark.store, ignore_errors=True)
    result = json.dumps(benchmark.result(), indent=1)
    (options.work / "result.json").write_text(result + "\n")
    print(result if options.json else benchmark.table())
    say(f"written to {options.work / 'result.json'}")
    for failure in benchmark.failures():
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if benchmark.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
