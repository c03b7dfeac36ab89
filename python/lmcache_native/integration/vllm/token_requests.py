"""What the scheduler's side of LMCacheNativeConnector knows of one request and of one job."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from lmcache_native import ReadLease, Request, WriteLease
from lmcache_native.integration.vllm.namespace import RequestNamespace
from lmcache_native.integration.vllm.stats import Admission
from lmcache_native.integration.vllm.token_keys import RequestSettings, TokenKeys
from lmcache_native.integration.vllm.transfer import JobReport, TransferJob


@dataclass(slots=True)
class Match:
    """Tokens [begin, end) that can be loaded: begin is what the engine has, chunk `first_chunk` holds it."""

    begin: int
    end: int
    first_chunk: int


class RequestState:
    """Lives from vLLM's on_new_request until the request has finished and its last job has ended."""

    __slots__ = (
        "admission",
        "all_saved",
        "asked_since_s",
        "computed_tokens",
        "finished",
        "jobs",
        "keys",
        "loading",
        "lookup",
        "match",
        "may_load",
        "may_save",
        "namespace",
        "prefetched_bytes",
        "reported",
        "request",
        "saved_tokens",
        "settings",
        "wait_until_s",
    )

    def __init__(
        self,
        request: Any,
        namespace: RequestNamespace | None,
        keys: TokenKeys | None,
        *,
        may_load: bool,
        may_save: bool,
        settings: RequestSettings = RequestSettings(),  # noqa: B008 (immutable)
    ) -> None:
        self.request = request
        self.settings = settings
        self.namespace = namespace
        self.keys = keys  # None: this request is not cached at all
        self.may_load = may_load and keys is not None
        self.may_save = may_save and keys is not None
        self.lookup: Request | None = None  # pins what was found, until it was loaded
        self.match: Match | None = None
        self.prefetched_bytes = 0
        self.wait_until_s: float | None = None  # time.monotonic(): what is still being promoted then is a miss
        self.asked_since_s: float | None = None  # time.monotonic(): it was told to ask again
        self.computed_tokens = 0  # that the engine had itself, when it asked last
        self.admission: Admission | None = None  # when it was first scheduled
        self.reported: tuple[int, int] | None = None  # (hit, load) tokens of the last log line
        self.saved_tokens = 0  # leading ones that were stored, or found stored
        self.all_saved = False  # nothing is left to store, whatever is generated
        self.loading: list[bytes] = []  # its keys in TokenScheduler._loading
        self.jobs: dict[int, Job] = {}
        self.finished = False

    def usable(self) -> bool:
        """Whether the KV of its namespace and the KV that it computes are of the same weights. If not, it loads and stores nothing
        from now on."""
        if self.namespace is None or not self.namespace.holds():
            self.may_load = self.may_save = False
            return False
        return True

    @property
    def request_id(self) -> str:
        return str(self.request.request_id)

    def end_lookup(self) -> None:
        if self.lookup is not None:
            self.lookup.end()
            self.lookup = None
        self.match = None
        self.prefetched_bytes = 0

    def forget(self) -> None:
        """Of before a reset: loads and stores nothing any more."""
        self.end_lookup()
        self.may_load = self.may_save = False
        for job in self.jobs.values():
            job.drop()


class Job:
    """A transfer under way. Ends when every rank reported it; its lease may be dropped before."""

    __slots__ = ("begun_s", "keys", "lease", "left", "report", "state", "transfer")

    def __init__(
        self, state: RequestState, transfer: TransferJob, lease: ReadLease | WriteLease | None, keys: list[bytes], ranks: int
    ) -> None:
        self.state = state
        self.transfer = transfer
        self.lease = lease
        self.keys = keys  # one per slot
        self.left = ranks
        self.begun_s = time.monotonic()
        self.report: JobReport | None = None

    @property
    def is_load(self) -> bool:
        return not isinstance(self.lease, WriteLease)

    def add(self, report: JobReport) -> bool:
        """True: all ranks have reported."""
        self.report = report if self.report is None else self.report.merged(report)
        self.left -= report.ranks
        return self.left <= 0

    def drop(self) -> None:
        """Nothing of it will be visible. The store keeps the slots from reuse until the ranks' words say that the copies ended."""
        if isinstance(self.lease, WriteLease):
            self.lease.abort()
        elif self.lease is not None:
            self.lease.release()
