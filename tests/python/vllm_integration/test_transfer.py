"""How a transfer is cut into the copier's items."""

from __future__ import annotations

import pickle
from array import array
from types import SimpleNamespace
from typing import Any

import pytest

from lmcache_native.integration.vllm.transfer import (
    JobReport,
    NotStarted,
    TokenWorkerMetadata,
    TransferJob,
    blocks_of_item,
    copy_items,
)


def job(begin: int, end: int, chunks: list[int], block_tokens: int) -> TransferJob:
    first = begin // block_tokens
    blocks = array("q", (100 + block for block in range(first, -(-end // block_tokens))))
    return TransferJob(1, "r", begin, end, array("I", chunks), array("Q", chunks), array("I", chunks), first, blocks)


def pages(block_tokens: int, kernel_block_tokens: int | None = None, *, opaque: bool = False) -> Any:
    kernel = 1 if opaque else kernel_block_tokens or block_tokens
    return SimpleNamespace(block_tokens=block_tokens, kernel_block_tokens=kernel, opaque=opaque)


@pytest.mark.parametrize("chunk_tokens", [1, 8, 16, 24, 40, 64])
@pytest.mark.parametrize(("block_tokens", "kernel"), [(16, 16), (32, 16), (48, 16)])
@pytest.mark.parametrize(("begin", "end"), [(0, 120), (48, 120), (48, 49), (96, 111)])
def test_each_token_is_copied_once_to_its_place(chunk_tokens: int, block_tokens: int, kernel: int, begin: int, end: int) -> None:
    begin = begin // block_tokens * block_tokens
    first, last = begin // chunk_tokens, -(-end // chunk_tokens)
    transfer = job(begin, end, list(range(first, last)), block_tokens)
    items = copy_items(transfer, pages(block_tokens, kernel), chunk_tokens)
    found = {}
    for slot, chunk in enumerate(transfer.chunks):
        for step in range(int(items.tokens[slot])):
            token = chunk * chunk_tokens + int(items.first_tokens[slot]) + step
            place = int(items.token_in_block[slot]) + step
            kernel_block = int(items.block_begin[slot]) + place // kernel
            found[token] = (kernel_block, place % kernel)
    origin = transfer.first_block * block_tokens
    assert found == {token: ((token - origin) // kernel, token % kernel) for token in range(begin, end)}


def test_chunks_that_are_left_out() -> None:
    """A store of those chunks only that were absent."""
    items = copy_items(job(0, 120, [1, 3], 16), pages(16), 24)
    assert items.first_tokens.tolist() == [0, 0]
    assert items.tokens.tolist() == [24, 24]
    assert items.block_begin.tolist() == [1, 4]
    assert items.token_in_block.tolist() == [8, 8]


def test_opaque_pages_count_in_blocks() -> None:
    items = copy_items(job(32, 128, [0, 1], 16), pages(16, opaque=True), 64)
    assert items.first_tokens.tolist() == [2, 0]
    assert items.tokens.tolist() == [2, 4]
    assert items.block_begin.tolist() == [0, 2]
    assert items.token_in_block.tolist() == [0, 0]


def test_opaque_block_that_holds_the_end_is_copied_whole() -> None:
    """All but the last token of a prompt that is stored to its end."""
    items = copy_items(job(0, 127, [0, 1], 16), pages(16, opaque=True), 64)
    assert items.tokens.tolist() == [4, 4]


def test_blocks_of_a_failed_item() -> None:
    transfer = job(16, 120, [0, 1, 2, 3, 4], 16)
    assert [blocks_of_item(transfer, item, 24, 16) for item in range(5)] == [
        {101},
        {101, 102},
        {103, 104},
        {104, 105},
        {106, 107},
    ]


def test_reports_of_several_ranks() -> None:
    left = TokenWorkerMetadata({1: JobReport(1, 10, 0.5, failed=False), 2: JobReport(1, 5, 0.1, failed=False)})
    right = TokenWorkerMetadata({1: JobReport(1, 10, 0.2, failed=True)}, [NotStarted(1, True, array("Q", [4]), array("I", [2]))])
    merged = pickle.loads(pickle.dumps(left)).aggregate(pickle.loads(pickle.dumps(right)))
    assert merged.ended == {1: JobReport(2, 20, 0.5, failed=True), 2: JobReport(1, 5, 0.1, failed=False)}
    assert merged.not_started == right.not_started
