"""A PagedCopier for each KV cache group, all on one arena. To its owner they are one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lmcache_native import CopyDirection, PagedCopier
from lmcache_native.errors import LmcacheNativeError
from lmcache_native.integration.vllm.slots import SlotLoadStoreSpec


@dataclass(frozen=True, slots=True)
class GroupPart:
    """What a job copies in one group: as PagedCopier.submit()."""

    group: int
    slots: SlotLoadStoreSpec
    first: Any  # per chunk: first block within the chunk
    counts: Any  # number of blocks
    begin: Any  # index into `blocks` of the first
    blocks: Any  # the engine's block numbers


@dataclass(frozen=True, slots=True)
class Refused:
    """A part that could not be started while others of its job were."""

    part: GroupPart
    error: LmcacheNativeError


@dataclass(slots=True)
class _Job:
    items: dict[int, range]  # by group: the numbers of its chunks within the job
    left: int
    ok: bool = True
    bytes: int = 0
    seconds: float = 0.0
    failed_items: list[int] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class GroupDone:
    """As CopyDone. Items are the job's chunks, numbered through its parts."""

    id: int
    ok: bool
    bytes: int
    seconds: float
    failed_items: list[int]
    message: str


class GroupCopier:
    """One thread calls everything. `copiers`: by group."""

    def __init__(self, copiers: Sequence[PagedCopier]) -> None:
        self._copiers = list(copiers)
        self._jobs: dict[int, _Job] = {}

    @property
    def name(self) -> str:
        return self._copiers[0].name

    @property
    def details(self) -> str:
        return "; ".join(dict.fromkeys(details for copier in self._copiers if (details := copier.details)))

    def submit(self, job_id: int, direction: CopyDirection, parts: Sequence[GroupPart], *, stream: int) -> list[Refused]:
        """REQUIRES: at least one part, one per group. When none can be started, raises why, and there is no job. The job ends with
        the parts that were started; those that were not are returned."""
        refused, started = [], 0
        items, count = {}, 0
        for part in parts:
            items[part.group] = range(count, count + len(part.slots))
            count += len(part.slots)
        for part in parts:
            slots = part.slots
            try:
                self._copiers[part.group].submit(
                    job_id,
                    direction,
                    slots.offsets,
                    slots.generations,
                    part.first,
                    part.counts,
                    part.begin,
                    part.blocks,
                    stream=stream,
                )
                started += 1
            except LmcacheNativeError as error:
                refused.append(Refused(part, error))
        if not started:
            raise refused[0].error
        self._jobs[job_id] = _Job(items, started)
        return refused

    def poll(self) -> list[GroupDone]:
        ended = []
        for group, copier in enumerate(self._copiers):
            for done in copier.poll():
                job = self._jobs[done.id]
                job.left -= 1
                job.bytes += done.bytes
                job.seconds = max(job.seconds, done.seconds)
                if not done.ok:
                    job.ok = False
                    job.messages.append(done.message)
                    numbers = job.items[group]
                    job.failed_items += [numbers[item] for item in done.failed_items or range(len(numbers))]
                if job.left == 0:
                    del self._jobs[done.id]
                    message = "; ".join(dict.fromkeys(job.messages))
                    ended.append(GroupDone(done.id, job.ok, job.bytes, job.seconds, job.failed_items, message))
        return ended

    def wait(self, ids: Sequence[int], timeout_s: float) -> None:
        """For each group's part of the jobs in turn."""
        for copier in self._copiers:
            copier.wait(ids, timeout_s)
