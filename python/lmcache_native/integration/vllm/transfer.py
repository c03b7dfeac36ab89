"""What crosses the border between the scheduler's process and the workers, for LMCacheNativeConnector. All of it pickles."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmcache_native.integration.vllm import compat
from lmcache_native.integration.vllm.pages import TokenPages


@dataclass(frozen=True, slots=True)
class Records:
    """Chunks of a load that the workers read from NVMe themselves. Nothing holds them where they are: each worker checks key,
    namespace, sequence and bytes, and what does not hold is a failed load."""

    chunks: array[int]  # "I": as TransferJob.chunks; arrays of one length
    paths: array[int]  # "I": index of the engine's directory
    offsets: array[int]  # "Q": bytes into its data file
    image_bytes: array[int]  # "Q"
    sequences: array[int]  # "Q": of the regions
    keys: list[bytes]
    namespace: bytes


@dataclass(frozen=True, slots=True)
class TransferJob:
    """Tokens [begin, end) of one request, between its blocks and slots. Without slots: the chunks could not be leased."""

    id: int
    request_id: str
    begin: int
    end: int
    chunks: array[int]  # "I": number of each slot's chunk in the request, ascending
    offsets: array[int]  # "Q": of the slots
    generations: array[int]  # "I"
    first_block: int  # number in the request of block_ids[0]
    block_ids: array[int]  # "q": the engine's, of all blocks that hold [begin, end)
    synchronous: bool = False  # a load that this step's forward pass needs
    records: Records | None = None  # chunks of a load without slots

    @property
    def items(self) -> list[int]:
        """Numbers of all its chunks: those with slots, then records'."""
        return [*self.chunks, *(self.records.chunks if self.records is not None else ())]


@dataclass
class TokenConnectorMetadata(compat.KVConnectorMetadata):  # type: ignore[misc]
    """Scheduler -> workers, each step. `flush`: jobs of earlier steps that must have ended before this step writes any block."""

    loads: list[TransferJob] = field(default_factory=list)
    stores: list[TransferJob] = field(default_factory=list)
    flush: set[int] = field(default_factory=set)


@dataclass(slots=True)
class JobReport:
    """How a job ended in some ranks."""

    ranks: int
    bytes: int
    seconds: float  # of the slowest rank
    failed: bool
    bad_records: tuple[int, ...] = ()  # indexes into TransferJob.records: they do not hold
    no_more_records: bool = False  # a read failed for another reason, or went another way than was chosen: not worth it any more

    def merged(self, other: JobReport) -> JobReport:
        return JobReport(
            self.ranks + other.ranks,
            self.bytes + other.bytes,
            max(self.seconds, other.seconds),
            self.failed or other.failed,
            tuple(sorted({*self.bad_records, *other.bad_records})),
            self.no_more_records or other.no_more_records,
        )


@dataclass(frozen=True, slots=True)
class NotStarted:
    """Slots that wait for a word of a rank that never started the job."""

    rank: int
    load: bool
    offsets: array[int]
    generations: array[int]


@dataclass
class TokenWorkerMetadata(compat.KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Workers -> scheduler, each step with ended jobs."""

    ended: dict[int, JobReport] = field(default_factory=dict)
    not_started: list[NotStarted] = field(default_factory=list)

    def aggregate(self, other: Any) -> TokenWorkerMetadata:
        ended = dict(self.ended)
        for job_id, report in other.ended.items():
            ended[job_id] = ended[job_id].merged(report) if job_id in ended else report
        return TokenWorkerMetadata(ended, self.not_started + other.not_started)


@dataclass(frozen=True, slots=True)
class CopyItems:
    """The arguments of PagedCopier.submit and DeviceLoader.submit: one row per chunk."""

    first_tokens: Any  # within the chunk
    tokens: Any
    block_begin: Any  # index into block_ids of the block of the first token
    token_in_block: Any


def copy_items(job: TransferJob, pages: TokenPages, chunk_tokens: int, job_chunks: array[int] | None = None) -> CopyItems:
    """Cuts [begin, end) at chunk borders; `job_chunks`: by default those with slots. Opaque pages: the copier's unit is a block, so
    that begin and chunks must be at borders of blocks, and the block that holds the end is copied whole (it is the request's own,
    and what follows is computed)."""
    unit_tokens = pages.block_tokens if pages.opaque else 1
    block_tokens = pages.block_tokens if pages.opaque else pages.kernel_block_tokens
    chunks = np.asarray(job.chunks if job_chunks is None else job_chunks, dtype=np.int64)
    first = np.maximum(chunks * chunk_tokens, job.begin)
    last = np.minimum((chunks + 1) * chunk_tokens, job.end)
    origin = job.first_block * pages.block_tokens // block_tokens
    return CopyItems(
        first_tokens=((first - chunks * chunk_tokens) // unit_tokens).astype(np.uint32),
        tokens=(-(-(last - first) // unit_tokens)).astype(np.uint32),
        block_begin=(first // block_tokens - origin).astype(np.uint32),
        token_in_block=(first % block_tokens // unit_tokens).astype(np.uint32),
    )


def blocks_of_item(job: TransferJob, item: int, chunk_tokens: int, block_tokens: int) -> set[int]:
    """The engine's blocks (of block_tokens tokens) that job.items[item] covers, in part or whole."""
    chunk = job.items[item]
    begin = max(chunk * chunk_tokens, job.begin)
    end = min((chunk + 1) * chunk_tokens, job.end)
    return set(job.block_ids[begin // block_tokens - job.first_block : -(-end // block_tokens) - job.first_block])
