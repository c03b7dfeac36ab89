"""Several ranks and several engines, as vLLM's own ParallelConfig says them: what is served, what is refused by the name of its
flag, and that engines of data parallelism share nothing."""

from __future__ import annotations

import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import ParallelConfig

from lmcache_native.config import GIB, NativeConfig
from lmcache_native.errors import Unsupported
from lmcache_native.integration.vllm import support
from lmcache_native.integration.vllm.opening import StoreOpening


def parallel(backend: str | None = None, **fields: Any) -> ParallelConfig:
    """`backend`: one whose package need not be installed."""
    found = ParallelConfig(**fields)
    if backend is not None:
        found.distributed_executor_backend = backend
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 64},
        {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
        {"data_parallel_size": 2, "data_parallel_rank": 1, "tensor_parallel_size": 2},
    ],
    ids=str,
)
def test_served(fields: dict[str, Any]) -> None:
    support.check_parallelism(parallel(**fields))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2"),
        ({"pipeline_parallel_size": 2, "tensor_parallel_size": 2}, "--pipeline-parallel-size 2"),
        ({"tensor_parallel_size": 2, "decode_context_parallel_size": 2}, "--decode-context-parallel-size 2"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size 2"),
        ({"tensor_parallel_size": 2, "nnodes": 2}, "--nnodes 2"),
        ({"tensor_parallel_size": 4, "nnodes": 2, "distributed_executor_backend": "mp"}, "--nnodes 2"),
        ({"tensor_parallel_size": 2, "backend": "ray"}, "--distributed-executor-backend ray"),
        ({"distributed_executor_backend": "external_launcher"}, "--distributed-executor-backend external_launcher"),
        ({"tensor_parallel_size": 65}, "65 ranks: at most 64"),
    ],
    ids=str,
)
def test_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(Unsupported, match=named):
        support.check_parallelism(parallel(**fields))


RANK_BYTES = 1 << 20


@pytest.mark.parametrize("replicated", [False, True])
def test_engines_of_data_parallelism_share_nothing(tmp_path: Path, replicated: bool) -> None:
    config = NativeConfig(host_bytes=GIB // 32, directories=(tmp_path,), nvme_bytes=GIB // 4, data_parallel_engines=2)
    stores = []
    for index in range(2):
        engine = SimpleNamespace(
            parallel_config=parallel(data_parallel_size=2, data_parallel_rank=index, tensor_parallel_size=2),
            kv_transfer_config=SimpleNamespace(engine_id=f"{uuid.uuid4()}_dp{index}"),
            device_config=SimpleNamespace(device_type="cpu"),
        )
        stores.append(StoreOpening(engine, config).open(RANK_BYTES, replicated=replicated))
    first, second = stores
    assert (first.rank_count, first.part_count) == (2, 1 if replicated else 2)
    assert first.put(b"a", bytes(2 * RANK_BYTES // (2 if replicated else 1)))
    assert second.get(b"a", timeout_s=0.0) is None
    first.flush(20.0)
    assert first.stats()["nvme_limit_bytes"] == second.stats()["nvme_limit_bytes"] == GIB // 8
    for store in stores:
        assert store.nvme_ready
        store.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vllm-dp0", "vllm-dp1"]
