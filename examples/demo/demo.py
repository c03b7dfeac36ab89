"""What a hit in each tier is worth, measured on a real vLLM server with a real model.

A long document with a question is sent once cold, then again while the engine still has it, after the engine forgot it
(from host memory), after an ordinary restart and after `kill -9` (from NVMe). For each: time to first token, how many
prompt tokens came from a cache by vLLM's own account, and whether the answer is the same as the cold one.

`make demo` prepares what this needs and runs it. Exit status: 0 when every tier gave hits and every answer was the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FrameType

from vllm_server import Completion, ServerError, VllmServer

REPO = Path(__file__).resolve().parents[2]
DOCUMENT = REPO / "LICENSE"
ANSWER_TOKENS = 16
# Prefill of another shape rounds differently in bfloat16. Where an answer leaves the cold one, the cold run must have
# been this undecided between its two best tokens; a wrong KV cache is off by whole units.
UNDECIDED_LOGPROB_GAP = 0.25
DURABLE_TIMEOUT_S = 30.0
DIRTY = "lmcache_native_nvme_dirty_bytes"
WRITTEN = "lmcache_native_nvme_written_bytes_total"

COLD, ENGINE, HOST, TAIL, RESTART, KILLED = "cold", "engine_hit", "host_hit", "other_question", "nvme_hit", "nvme_hit_after_kill"
TITLES = {
    COLD: "cold",
    ENGINE: "hit in the engine's own cache",
    HOST: "hit in host memory",
    TAIL: "the same with another question",
    RESTART: "hit on NVMe, after a restart",
    KILLED: "hit on NVMe, after kill -9",
}
# How vLLM's account must name the source of a hit; anything else is a different experiment.
SOURCES = {ENGINE: "device", HOST: "host", TAIL: "host", RESTART: "disk", KILLED: "disk"}


@dataclass(frozen=True, slots=True)
class Sample:
    ttft_ms: float
    prompt_tokens: int
    hit_tokens: int
    sources: dict[str, int]
    answer: Completion


@dataclass(slots=True)
class Comparison:
    """How the answers of one phase relate to the cold ones."""

    same_tokens: bool = True
    explained: bool = True  # where tokens differ, the cold run was undecided there
    largest_logprob_difference: float = 0.0  # over the tokens both chose
    same_as_engine_hit: bool | None = None  # tokens and logprobs, bit for bit; None: no engine hit of the same length
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Phase:
    samples: list[Sample] = field(default_factory=list)
    comparison: Comparison | None = None

    def median_ms(self) -> float:
        return statistics.median(sample.ttft_ms for sample in self.samples)

    def min_ms(self) -> float:
        return min(sample.ttft_ms for sample in self.samples)

    def hit_tokens(self) -> int:
        return min(sample.hit_tokens for sample in self.samples)


def say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def prompt(number: int, question: str = "What does this document allow?") -> str:
    """Prompt `number`: differs from the others in its first tokens, so none shares a prefix with another."""
    return f"{number}. Read this document, then answer.\n\n{DOCUMENT.read_text()}\n\nQuestion: {question}\nAnswer:"


def measure(server: VllmServer, text: str) -> Sample:
    before = server.cached_tokens_by_source()
    answer = server.completions(text, max_tokens=ANSWER_TOKENS, logprobs=2, extra={"ignore_eos": True})
    after = server.cached_tokens_by_source()
    sources = {name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)}
    return Sample(answer.ttft_s * 1e3, answer.prompt_tokens, answer.cached_tokens, sources, answer)


def compare(number: int, cold: Completion, hit: Completion, into: Comparison) -> None:
    for position, (expected, found) in enumerate(zip(cold.token_ids, hit.token_ids, strict=True)):
        if expected != found:
            into.same_tokens = False
            best = sorted(cold.top_logprobs[position].values(), reverse=True)
            gap = best[0] - best[1]
            into.explained = into.explained and gap < UNDECIDED_LOGPROB_GAP and found in cold.top_logprobs[position]
            into.notes.append(f"token {position} of prompt {number}, gap {gap:.3f}")
            return  # what follows has another context
        difference = abs(cold.logprobs[position] - hit.logprobs[position])
        into.largest_logprob_difference = max(into.largest_logprob_difference, difference)


def warm_up(server: VllmServer, number: int) -> None:
    """The first requests of a process are slow for reasons of its own; these share no prefix with those measured."""
    text = prompt(-number)
    for _ in range(2):
        server.completions(text, max_tokens=ANSWER_TOKENS, logprobs=2)


def wait_until_durable(server: VllmServer) -> float:
    """Until the store says that a crash now would lose nothing; seconds. Its word reaches vLLM's metrics with an engine step."""
    begin = time.monotonic()
    while True:
        server.completions("Hello", max_tokens=1)
        metrics = server.metrics()
        if DIRTY not in metrics:
            raise ServerError(f"the server has no metric {DIRTY}: is lmcache-native in use?\n{server.log_tail()}")
        if metrics[DIRTY] == 0 and metrics.get(WRITTEN, 0) > 0:
            return time.monotonic() - begin
        if time.monotonic() - begin > DURABLE_TIMEOUT_S:
            raise ServerError(f"{metrics[DIRTY]:.0f} bytes still not on NVMe after {DURABLE_TIMEOUT_S:.0f} s")
        time.sleep(0.1)


class Demo:
    def __init__(self, options: argparse.Namespace) -> None:
        self.repeats: int = options.repeats
        self.work: Path = options.work
        self.store = self.work / "store"
        env = {
            "LMCACHE_NATIVE": "1",
            "LMCACHE_LOCAL_DISK": str(self.store),
            "LMCACHE_MAX_LOCAL_DISK_SIZE": "4",
        }
        self.server = VllmServer(options.model, env=env, args=["--kv-offloading-size", "1"], log_path=self.work / "server.log")
        self.phases = {name: Phase() for name in TITLES}
        self.machine = machine()  # fails here, before anything is started, where lmcache_native is not installed
        self.starts = 0
        self.other: dict[str, float] = {}

    def run(self) -> None:
        numbers = range(1, self.repeats + 1)
        survivors = range(101, 101 + self.repeats)  # stored by the server that is killed

        self.start()
        for number in numbers:
            self.sample(COLD, number)
            self.sample(ENGINE, number)
            self.server.reset_prefix_cache()
            self.sample(HOST, number)
            self.server.reset_prefix_cache()
            self.sample(TAIL, number, "Who may change it?")
            self.server.reset_prefix_cache()
        self.durable("stop")
        say(f"stopping the server (SIGTERM): gone after {self.server.stop():.1f} s")

        self.start()
        for number in numbers:
            self.sample(RESTART, number)
        for number in survivors:
            self.sample(COLD, number)
            self.sample(ENGINE, number)
        self.durable("kill")
        self.server.kill9()
        say("server killed (SIGKILL to all its processes)")

        self.start()
        for number in (*numbers, *survivors):
            self.sample(KILLED, number)
        say(f"stopping the server (SIGTERM): gone after {self.server.stop():.1f} s")
        self.compare_answers()

    def start(self) -> None:
        self.starts += 1
        say(f"starting vLLM, start {self.starts} of 3 (about half a minute)")
        seconds = self.server.start()
        self.other[f"start_{self.starts}_s"] = round(seconds, 1)
        say(f"healthy after {seconds:.1f} s; warming up with a prompt of its own")
        warm_up(self.server, self.starts)

    def sample(self, phase: str, number: int, question: str | None = None) -> None:
        text = prompt(number) if question is None else prompt(number, question)
        sample = measure(self.server, text)
        self.phases[phase].samples.append(sample)
        say(
            f"{TITLES[phase]}: first token after {sample.ttft_ms:.0f} ms, "
            f"{sample.hit_tokens} of {sample.prompt_tokens} prompt tokens from {sample.sources or 'no cache'}"
        )

    def durable(self, before: str) -> None:
        seconds = wait_until_durable(self.server)
        self.other[f"write_behind_lag_before_{before}_s"] = round(seconds, 2)
        say(f"all stored chunks are on NVMe (waited {seconds:.1f} s)")

    def compare_answers(self) -> None:
        """Cold samples are in the order of the prompts; each other phase has a leading part of them."""
        cold = self.phases[COLD].samples
        engine_hits = self.phases[ENGINE].samples
        for name, phase in self.phases.items():
            if name in (COLD, TAIL):  # the other question has no cold answer
                continue
            phase.comparison = Comparison()
            for number, (expected, sample) in enumerate(zip(cold, phase.samples, strict=False), start=1):
                compare(number, expected.answer, sample.answer, phase.comparison)
            if name != ENGINE:
                same = [
                    (a.answer.token_ids, a.answer.logprobs) == (b.answer.token_ids, b.answer.logprobs)
                    for a, b in zip(engine_hits, phase.samples, strict=False)
                    if a.hit_tokens == b.hit_tokens
                ]
                phase.comparison.same_as_engine_hit = all(same) if same else None

    # -- results ----------------------------------------------------------------------------------------------------

    def failures(self) -> list[str]:
        found = []
        for name, phase in self.phases.items():
            if name == COLD:
                if any(sample.hit_tokens for sample in phase.samples):
                    found.append("a cold run had cache hits")
                continue
            for sample in phase.samples:
                if sample.hit_tokens == 0:
                    found.append(f"{TITLES[name]}: no hit")
                elif sample.sources.get(SOURCES[name], 0) != sample.hit_tokens:
                    found.append(f"{TITLES[name]}: hits came from {sample.sources}, expected {SOURCES[name]}")
            if phase.comparison is not None and not phase.comparison.explained:
                found.append(f"{TITLES[name]}: another answer than the cold run at {'; '.join(phase.comparison.notes)}")
            if phase.comparison is not None and phase.comparison.same_as_engine_hit is False:
                found.append(f"{TITLES[name]}: not the logprobs of the engine's own hit of the same length")
        return found

    def result(self) -> dict[str, object]:
        compared = [phase.comparison for phase in self.phases.values() if phase.comparison is not None]
        return {
            **{f"{name}_ms": round(phase.median_ms(), 1) for name, phase in self.phases.items()},
            "prompt_tokens": self.phases[COLD].samples[0].prompt_tokens,
            "hit_tokens": self.phases[RESTART].hit_tokens(),
            "same_tokens": all(comparison.explained and comparison.same_as_engine_hit is not False for comparison in compared),
            "same_tokens_as_cold": all(comparison.same_tokens for comparison in compared),
            "phases": {
                name: {
                    "title": TITLES[name],
                    "ttft_ms": [round(sample.ttft_ms, 1) for sample in phase.samples],
                    "hit_tokens": [sample.hit_tokens for sample in phase.samples],
                    "sources": [sample.sources for sample in phase.samples],
                    "comparison": asdict(phase.comparison) if phase.comparison is not None else None,
                }
                for name, phase in self.phases.items()
            },
            "failures": self.failures(),
            "command": self.server.command(),
            "machine": self.machine,
            **self.other,
        }

    def table(self) -> str:
        lines = [
            "| | TTFT, median (min) ms | tokens from the cache | logprobs of the engine's own hit | tokens of the cold run |",
            "|---|---:|---:|---|---|",
        ]
        tokens = self.phases[COLD].samples[0].prompt_tokens
        for name, phase in self.phases.items():
            as_engine, as_cold = "", ""
            if phase.comparison is not None:
                as_engine = {None: "", True: "same", False: "OTHER"}[phase.comparison.same_as_engine_hit]
                notes = "; ".join(phase.comparison.notes)
                as_cold = "OTHER" if not phase.comparison.explained else f"same, but undecided at {notes}" if notes else "same"
            lines.append(
                f"| {TITLES[name]} | {phase.median_ms():.0f} ({phase.min_ms():.0f}) "
                f"| {phase.hit_tokens()} of {tokens} | {as_engine} | {as_cold} |"
            )
        return "\n".join(lines)


def machine() -> Mapping[str, object]:
    return {
        "cpus": os.cpu_count(),
        "processor": next(
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            platform.processor(),
        ),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "vllm": version("vllm"),
        "lmcache_native": version("lmcache_native"),
    }


def interrupt(signal_number: int, _frame: FrameType | None) -> None:
    """SIGTERM ends the demo as Ctrl-C does, so that the server goes too."""
    raise KeyboardInterrupt(f"signal {signal_number}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder; make demo passes SmolLM2-135M-Instruct")
    parser.add_argument("--repeats", type=int, default=3, help="prompts of each kind (default 3)")
    parser.add_argument("--work", type=Path, default=REPO / ".demo", help="folder for the store, log and result (.demo)")
    parser.add_argument("--json", action="store_true", help="print result.json on stdout in place of the table")
    parser.add_argument("--keep", action="store_true", help="leave the store behind")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    if not (options.model / "config.json").is_file():
        parser.error(f"--model {options.model}: no config.json there")
    return options


def main() -> int:
    options = parse()
    signal.signal(signal.SIGTERM, interrupt)
    options.work.mkdir(parents=True, exist_ok=True)
    demo = Demo(options)
    shutil.rmtree(demo.store, ignore_errors=True)  # a cold run must find nothing
    result_path: Path = options.work / "result.json"
    for old in (demo.server.log_path, result_path):
        old.unlink(missing_ok=True)
    begin = time.monotonic()
    try:
        demo.run()
    except ServerError as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("interrupted; ending the server")
        return 130
    finally:
        demo.server.kill9()
        if not options.keep:
            shutil.rmtree(demo.store, ignore_errors=True)
    demo.other["demo_s"] = round(time.monotonic() - begin, 1)

    result = json.dumps(demo.result(), indent=1)
    result_path.write_text(result + "\n")
    print(result if options.json else demo.table())
    say(f"written to {result_path}")
    for failure in demo.failures():
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if demo.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
