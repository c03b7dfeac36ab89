"""The log lines of LMCache's quickstart, which people and scripts look for. The wording is LMCache's, the numbers are measured."""

from __future__ import annotations

import logging

from lmcache_native.config import GIB
from lmcache_native.logging import get_logger

logger = get_logger(__name__)


def matched(request_id: str, total_tokens: int, hit_tokens: int, load_tokens: int, min_retrieve_tokens: int) -> None:
    if 0 < load_tokens < min_retrieve_tokens:
        logger.info(
            "Reqid: %s, Total tokens %d, LMCache hit tokens: %d, but need to load: %d < min_retrieve %d, skip retrieve",
            request_id,
            total_tokens,
            hit_tokens,
            load_tokens,
            min_retrieve_tokens,
        )
    else:
        logger.info(
            "Reqid: %s, Total tokens %d, LMCache hit tokens: %d, need to load: %d",
            request_id,
            total_tokens,
            hit_tokens,
            load_tokens,
        )


def retrieved(request_id: str, tokens: int, required_tokens: int, total_tokens: int, size_bytes: int, copy_s: float) -> None:
    """copy_s: the slowest rank's copies."""
    logger.info(
        "[req_id=%s] Retrieved %d out of %d required tokens (from %d total tokens). "
        "size: %.4f gb, cost %.4f ms, throughput: %.4f GB/s;",
        request_id,
        tokens,
        required_tokens,
        total_tokens,
        size_bytes / GIB,
        copy_s * 1e3,
        _throughput(size_bytes, copy_s),
    )


def load_failed(request_id: str, tokens: int, blocks: int) -> None:
    logger.error("Request %s failed to load %d tokens across %d blocks", request_id, tokens, blocks)


def storing(request_id: str, begin: int, end: int, *, decoded: bool) -> None:
    logger.log(
        _store_level(decoded),
        "Storing KV cache for %d out of %d tokens (skip_leading_tokens=%d) for request %s",
        end - begin,
        end,
        begin,
        request_id,
    )


def stored(
    request_id: str, tokens: int, total_tokens: int, size_bytes: int, copy_s: float, publish_s: float, *, decoded: bool
) -> None:
    """copy_s: the slowest rank's copies; publish_s: until the chunks could be looked up."""
    cost_s = copy_s + publish_s
    logger.log(
        _store_level(decoded),
        "[req_id=%s] Stored %d out of total %d tokens. size: %.4f GB, cost %.4f ms, throughput: %.4f GB/s; "
        "offload_time: %.4f ms, put_time: %.4f ms",
        request_id,
        tokens,
        total_tokens,
        size_bytes / GIB,
        cost_s * 1e3,
        _throughput(size_bytes, cost_s),
        copy_s * 1e3,
        publish_s * 1e3,
    )


def _store_level(decoded: bool) -> int:
    """An answer's chunks would give a line every few steps."""
    return logging.DEBUG if decoded else logging.INFO


def _throughput(size_bytes: int, seconds: float) -> float:
    """In LMCache's GB, which are GiB."""
    return size_bytes / GIB / seconds if seconds > 0 else 0.0
