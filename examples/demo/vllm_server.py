"""Starts, drives and ends one real `vllm serve` process. Standard library only.

The demo and tests/e2e share this file: `sys.path.insert(0, ".../examples/demo"); from vllm_server import VllmServer`.

    with VllmServer(model, env={"LMCACHE_NATIVE": "1"}, args=["--kv-offloading-size", "1"], log_path=log) as server:
        answer = server.completions("Once upon a time", max_tokens=8)
        server.reset_prefix_cache()
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

DEFAULT_ENV = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
}
DEFAULT_ARGS = ("--enforce-eager", "--max-model-len", "4096", "--max-num-batched-tokens", "4096", "--dtype", "bfloat16")
# What a caller's shell may hold must not decide what a run measures.
INHERITED_PREFIXES_DROPPED = ("LMCACHE_", "LMCN_TEST_", "VLLM_")

_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(\{.*\})?\s+(\S+)$")


class ServerError(RuntimeError):
    """The server did not do what was asked in time; the message carries the end of its log."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer. Times are seconds from just before the request was sent."""

    text: str
    token_ids: list[int]
    logprobs: list[float]  # of the chosen tokens; empty unless asked for
    top_logprobs: list[dict[int, float]]  # token id -> logprob, one per generated token; empty unless asked for
    prompt_tokens: int
    cached_tokens: int  # prompt tokens that were not computed: engine prefix cache and connector together
    ttft_s: float
    total_s: float
    finish_reason: str | None


class VllmServer:
    """A `vllm serve` process group on a free loopback port.

    The process leads its own session, so `kill9` reaches the engine core and the workers too, and nothing else.
    `env` is laid over DEFAULT_ENV and over this process's environment less INHERITED_PREFIXES_DROPPED; a value of
    None removes the variable. `args` follow DEFAULT_ARGS, so the last one given wins. `completions` and `metrics` may
    be called from several threads; start, stop and kill9 from one. The log is appended to, so one path may
    serve several starts.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        env: Mapping[str, str | None] | None = None,
        args: Sequence[str] = (),
        log_path: str | Path,
        python: str | Path = sys.executable,
    ) -> None:
        self.model = str(model)
        self.log_path = Path(log_path)
        self.port = 0
        self._env = dict(env or {})
        self._args = list(args)
        # Not resolved: the venv's own bin/ is where `vllm` lies, its python is a link to elsewhere.
        self._vllm = Path(python).parent / "vllm"
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start_bytes = 0

    # -- life -------------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def command(self) -> list[str]:
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        return [
            str(self._vllm),
            "serve",
            self.model,
            *address,
            *DEFAULT_ARGS,
            "--enable-prompt-tokens-details",
            *self._args,
        ]

    def start(self, timeout: float = 300.0) -> float:
        """Starts the server and waits until /health answers; returns the seconds that took.

        Raises ServerError, with nothing left running, when it ends or is not healthy within `timeout` seconds.
        """
        if self._process is not None:
            raise ServerError("start() of a server that is already started")
        self.port = free_port()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(INHERITED_PREFIXES_DROPPED)}
        for name, value in (DEFAULT_ENV | self._env).items():
            if value is None:
                environment.pop(name, None)
            else:
                environment[name] = value
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        with open(self.log_path, "ab") as log:
            self._log_start_bytes = log.tell()
            self._process = subprocess.Popen(
                self.command(),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            while not self._healthy():
                if self._process.poll() is not None:
                    raise ServerError(f"vllm serve ended with {self._process.returncode} while starting\n{self.log_tail()}")
                if time.monotonic() - begin > timeout:
                    raise ServerError(f"vllm serve not healthy after {timeout:.0f} s\n{self.log_tail()}")
                time.sleep(0.1)
        except BaseException:
            self.kill9()
            raise
        return time.monotonic() - begin

    def stop(self, timeout: float = 60.0, signal_number: int = signal.SIGTERM) -> float:
        """Ends the server the ordinary way: one signal to the front process. Returns the seconds until the group was gone.

        Raises ServerError when a process of the group is still there after `timeout` seconds; the group is killed then.
        """
        process = self._running()
        segments = _shared_segments(_live_members(process.pid))
        begin = time.monotonic()
        process.send_signal(signal_number)
        try:
            self._wait_gone(process, begin + timeout, segments)
        except ServerError:
            self.kill9()
            raise
        return time.monotonic() - begin

    def kill9(self, timeout: float = 30.0) -> None:
        """SIGKILL to every process of the group, so nothing gets to tidy up; does nothing when none was started."""
        process = self._process
        if process is None:
            return
        members = _live_members(process.pid)
        segments = _shared_segments(members)
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._wait_gone(process, time.monotonic() + timeout, segments)

    def __enter__(self) -> VllmServer:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None or not self.running:
            self.kill9()
        else:
            self.stop()

    # -- what it said -----------------------------------------------------------------------------------------------

    def log(self) -> str:
        """The log of the present (or last) start."""
        with open(self.log_path, "rb") as file:
            file.seek(self._log_start_bytes)
            return file.read().decode(errors="replace")

    def log_tail(self, lines: int = 40) -> str:
        tail = "\n".join(self.log().splitlines()[-lines:])
        return f"--- last {lines} lines of {self.log_path}\n{tail}\n---"

    # -- requests ---------------------------------------------------------------------------------------------------

    def completions(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 16,
        logprobs: int | None = None,
        temperature: float = 0.0,
        timeout: float = 120.0,
        extra: Mapping[str, object] | None = None,
        engine: int | None = None,
    ) -> Completion:
        """One streamed /v1/completions request. `prompt` is text or token ids; `extra` is laid over the JSON body. `engine`: which
        of several (--data-parallel-size) answers; None: vLLM chooses.

        `ttft_s` ends at the first event that carries a token. Raises ServerError on an HTTP error, an error event or
        a stream that ends early.
        """
        body: dict[str, object] = {
            "model": self.model,
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        if logprobs is not None:
            body["logprobs"] = logprobs
        body.update(extra or {})

        text: list[str] = []
        token_ids: list[int] = []
        chosen: list[float] = []
        top: list[dict[int, float]] = []
        usage: dict[str, Any] | None = None
        finish_reason: str | None = None
        first_token: float | None = None
        begin = time.perf_counter()
        for event in self._events(body, timeout, {} if engine is None else {"X-data-parallel-rank": str(engine)}):
            usage = event.get("usage") or usage
            for choice in event.get("choices", []):
                if choice.get("token_ids"):
                    first_token = first_token or time.perf_counter()
                    token_ids += choice["token_ids"]
                text.append(choice.get("text") or "")
                finish_reason = choice.get("finish_reason") or finish_reason
                if choice.get("logprobs"):
                    chosen += choice["logprobs"]["token_logprobs"]
                    top += [_by_token_id(row) for row in choice["logprobs"]["top_logprobs"]]
        end = time.perf_counter()
        if first_token is None or usage is None:
            raise ServerError(f"completion without {'a token' if first_token is None else 'usage'}\n{self.log_tail()}")
        details = usage.get("prompt_tokens_details") or {}
        return Completion(
            text="".join(text),
            token_ids=token_ids,
            logprobs=chosen,
            top_logprobs=top,
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=details.get("cached_tokens") or 0,
            ttft_s=first_token - begin,
            total_s=end - begin,
            finish_reason=finish_reason,
        )

    def tokenize(self, prompt: str) -> list[int]:
        answer = self._json("POST", "/tokenize", {"model": self.model, "prompt": prompt})
        return [int(token) for token in answer["tokens"]]

    def reset_prefix_cache(self, external: bool = False, timeout: float = 10.0) -> None:
        """Empties the engine's own prefix cache; with `external`, the connector's too.

        The engine refuses while blocks are held (a copy may still run), so this asks again until `timeout` seconds have passed.
        """
        path = "/reset_prefix_cache" + ("?reset_external=true" if external else "")
        deadline = time.monotonic() + timeout
        while not self._json("POST", path).get("success"):
            if time.monotonic() > deadline:
                raise ServerError(f"{path} still refused after {timeout:.0f} s\n{self.log_tail()}")
            time.sleep(0.05)

    def metrics(self) -> dict[str, float]:
        """Prometheus samples: `name{labels}` -> value, and `name` -> the sum over all its label sets."""
        samples: dict[str, float] = {}
        for line in self._request("GET", "/metrics").decode().splitlines():
            match = _SAMPLE.match(line)
            if match is None:
                continue
            name, labels, value = match.group(1), match.group(2), float(match.group(3))
            samples[name] = samples.get(name, 0.0) + value
            if labels:
                samples[name + labels] = value
        return samples

    def cached_tokens_by_source(self) -> dict[str, int]:
        """Prompt tokens served from a cache since the start, by vLLM's own account: device, host, disk, ..."""
        found: dict[str, int] = {}
        for name, value in self.metrics().items():
            if name.startswith("vllm:prompt_tokens_cached_by_source_total{"):
                match = re.search(r'source="([^"]*)"', name)
                if match is not None:
                    found[match.group(1)] = found.get(match.group(1), 0) + int(value)
        return found

    # -- inside -----------------------------------------------------------------------------------------------------

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServerError("the server is not running")
        return self._process

    def _wait_gone(self, process: subprocess.Popen[bytes], deadline: float, segments: set[Path]) -> None:
        """Until no process of the group is left. Its leader is our child and must be reaped; the others are not.

        Then removes `segments`: vLLM kills its own processes at exit, which leaves up to 200 MB of /dev/shm behind each time.
        """
        while True:
            process.poll()
            left = _live_members(process.pid)
            if process.returncode is not None and not left:
                break
            if time.monotonic() > deadline:
                raise ServerError(f"processes {left or [process.pid]} of the server outlived its end\n{self.log_tail()}")
            time.sleep(0.02)
        for segment in segments:
            segment.unlink(missing_ok=True)
        self._process = None

    def _healthy(self) -> bool:
        try:
            self._request("GET", "/health", timeout=2.0)
        except ServerError:
            return False
        return True

    @contextlib.contextmanager
    def _response(
        self, method: str, path: str, body: object, timeout: float, extra_headers: Mapping[str, str] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """The response to one request, on a connection of its own. Whatever goes wrong becomes a ServerError."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        headers = {"Content-Type": "application/json"} if body is not None else {}
        headers.update(extra_headers or {})
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                content = response.read().decode(errors="replace")
                raise ServerError(f"{method} {path}: HTTP {response.status}: {content[:2000]}")
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{method} {path}: {error!r}") from error
        finally:
            connection.close()

    def _request(self, method: str, path: str, body: object = None, *, timeout: float = 30.0) -> bytes:
        with self._response(method, path, body, timeout) as response:
            return response.read()

    def _json(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        answer = json.loads(self._request(method, path, body))
        if not isinstance(answer, dict):
            raise ServerError(f"{method} {path}: expected a JSON object, got {answer!r}")
        return answer

    def _events(self, body: Mapping[str, object], timeout: float, headers: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        with self._response("POST", "/v1/completions", body, timeout, headers) as response:
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                data = line[len(b"data:") :].strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise ServerError(f"POST /v1/completions: {event['error']}\n{self.log_tail()}")
                yield event
        raise ServerError(f"the stream of /v1/completions ended before [DONE]\n{self.log_tail()}")


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return int(port)


def _by_token_id(row: Mapping[str, float] | None) -> dict[int, float]:
    return {int(name.removeprefix("token_id:")): value for name, value in (row or {}).items()}


def _live_members(group: int) -> list[int]:
    """Process ids of the session that `group` leads, zombies left out (an orphan's are init's to reap)."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:
            continue
        # The command in parentheses may hold anything; fields count from after it: state ppid pgrp session.
        state, _parent, _group, session = stat.rpartition(")")[2].split()[:4]
        if int(session) == group and state not in "ZX":
            members.append(int(entry.name))
    return members


def _shared_segments(members: Sequence[int]) -> set[Path]:
    """vLLM's files in /dev/shm that these processes have mapped: of its message queues and its CPU collectives."""
    found = set()
    for pid in members:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                path = Path(line.split(maxsplit=5)[-1])
                if path.parent == Path("/dev/shm") and path.name.startswith(("psm_", "vllm_")):
                    found.add(path)
    return found
