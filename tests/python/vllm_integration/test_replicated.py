"""KV that all ranks hold alike is stored once: when that is so, which rank copies, what publishes, and every byte of it."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kv_memory import Paged
from test_direct_loads import on_nvme
from test_token_scheduler import random_day
from token_parts import prompt
from token_world import Engine, engines, in_store
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.kv_cache_utils import kv_cache_groups_tp_replicas
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MLAAttentionSpec
from vllm.v1.kv_offload.base import GPULoadStoreSpec
from world import HIT, MISS, World, keys

from lmcache_native import ArenaAttachment
from lmcache_native.config import GIB, NativeConfig
from lmcache_native.errors import InvalidArgument
from lmcache_native.integration.vllm import namespace
from lmcache_native.integration.vllm.layout import WorkerLayout, agreed_layout, machine_id
from lmcache_native.integration.vllm.replicated import is_replicated
from lmcache_native.integration.vllm.transfer import TokenConnectorMetadata

LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32, "q_lora_rank": None}
Make = Callable[..., Engine]


# ---- when it is so ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a DeepSeek-V2, without weights."""
    folder = tmp_path_factory.mktemp("latent")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 1024, "torch_dtype": "bfloat16"}
    experts = {"first_k_dense_replace": 2, "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 8192}
    names = {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"}
    (folder / "config.json").write_text(json.dumps(names | sizes | experts | heads | LATENT))
    return folder


def configured(model: Path, **changes: Any) -> VllmConfig:
    transfer = {
        "kv_connector": "NativeOffloadingConnector",
        "kv_connector_module_path": "lmcache_native.integration.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": GIB},
    }
    return EngineArgs(
        model=str(model), enforce_eager=True, max_model_len=512, skip_tokenizer_init=True, kv_transfer_config=transfer, **changes
    ).create_engine_config()


def memory(config: VllmConfig, spec_class: Any = MLAAttentionSpec) -> KVCacheConfig:
    """As vLLM plans it for MLA, or for two heads, one on each of two ranks."""
    shards = 1 if spec_class is MLAAttentionSpec else 2
    spec = spec_class(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.bfloat16, max_tp_shards=shards)
    found: KVCacheConfig = Paged(spec, write=lambda *_: None).config
    parallel = config.parallel_config
    found.kv_tp_replicas = kv_cache_groups_tp_replicas(
        found.kv_cache_groups, parallel.tensor_parallel_size, parallel.decode_context_parallel_size
    )
    return found


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"tensor_parallel_size": 2}, True),
        ({"tensor_parallel_size": 4}, True),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, False),
        ({"tensor_parallel_size": 2, "decode_context_parallel_size": 2}, False),
    ],
    ids=str,
)
def test_it_is_what_vllm_says(latent_model: Path, changes: dict[str, Any], expected: bool) -> None:
    config = configured(latent_model, **changes)
    planned = memory(config)
    assert build_offloading_config(config, planned).replicated_layout is expected
    assert is_replicated(config, planned) is expected


def test_other_executors_and_nodes_are_not(latent_model: Path) -> None:
    config = configured(latent_model, tensor_parallel_size=2)
    planned = memory(config)
    for name, value in (("distributed_executor_backend", "ray"), ("nnodes_within_dp", 2)):
        parallel = SimpleNamespace(
            **{field: getattr(config.parallel_config, field) for field in _PARALLEL} | {name: value},
        )
        changed = SimpleNamespace(parallel_config=parallel, model_config=config.model_config)
        assert not is_replicated(changed, planned), name


_PARALLEL = (
    "tensor_parallel_size",
    "world_size",
    "pipeline_parallel_size",
    "prefill_context_parallel_size",
    "decode_context_parallel_size",
    "distributed_executor_backend",
    "nnodes_within_dp",
)


def test_heads_of_their_own_are_not(tiny: Path, latent_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grouped = configured(tiny, tensor_parallel_size=2)
    assert not is_replicated(grouped, memory(grouped, FullAttentionSpec))
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")  # full heads again
    unrolled = configured(latent_model, tensor_parallel_size=2)
    assert not is_replicated(unrolled, memory(unrolled, FullAttentionSpec))


def test_a_layer_of_another_kind_beside_them_is_not(latent_model: Path) -> None:
    config = configured(latent_model, tensor_parallel_size=2)
    planned = memory(config)
    other = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
    planned.kv_cache_groups = [*planned.kv_cache_groups, KVCacheGroupSpec(["c"], other)]
    assert not is_replicated(config, planned)


def test_a_vllm_that_does_not_count_replicas_is_not(latent_model: Path) -> None:
    config = configured(latent_model, tensor_parallel_size=2)
    assert not is_replicated(config, SimpleNamespace(kv_cache_groups=memory(config).kv_cache_groups))


# ---- agreement and namespace --------------------------------------------------------------------------------------------

LAYOUT = WorkerLayout(0, layers=2, page_bytes=4096, rank_bytes=8192, layout_id="opaque:test", machine=machine_id(), replicated=True)


def test_all_agree_or_the_engine_does_not_start() -> None:
    second = dataclasses.replace(LAYOUT, rank=1)
    assert agreed_layout({0: LAYOUT, 1: second}, 2, replicated=True).parts(2) == 1
    assert dataclasses.replace(LAYOUT, replicated=False).parts(2) == 2
    with pytest.raises(InvalidArgument, match="disagree on replicated: rank 0 has True, rank 1 has False"):
        agreed_layout({0: LAYOUT, 1: dataclasses.replace(second, replicated=False)}, 2, replicated=True)
    with pytest.raises(InvalidArgument, match="disagree on rank_bytes"):
        agreed_layout({0: LAYOUT, 1: dataclasses.replace(second, rank_bytes=4096)}, 2, replicated=True)
    with pytest.raises(InvalidArgument, match="the workers have True, the scheduler has False"):
        agreed_layout({0: LAYOUT, 1: second}, 2)


def test_nothing_is_shared_with_another_number_of_ranks_or_with_copies_of_each(latent_model: Path) -> None:
    native = NativeConfig(host_bytes=GIB)
    group = memory(configured(latent_model)).kv_cache_groups[0]
    scheme = namespace.token_scheme(256, None)

    def described(ranks: int, replicated: bool) -> str:
        layout = dataclasses.replace(LAYOUT, replicated=replicated)
        config = configured(latent_model, tensor_parallel_size=ranks, load_format="dummy")
        return namespace.canonical_text(namespace.describe(config, native, layout, [group], scheme))

    assert 'kv="replicated"' in described(2, True)
    assert len({described(1, False), described(2, False), described(2, True), described(4, True)}) == 4


# ---- vLLM's connector: whole blocks -------------------------------------------------------------------------------------


@pytest.fixture
def world() -> Iterator[World]:
    found = World(ranks=2, per_chunk=2, replicated=True)
    yield found
    found.close()


def test_one_copy_goes_to_both_ranks(world: World) -> None:
    stored = [world.pages(rank, [3, 9]) for rank in range(2)]
    assert stored[0] != stored[1]  # so that it shows whose they are
    world.stored(world.request(), [1], [3, 9])
    reader = world.request()
    assert world.look(reader, 1) == [HIT]
    world.load(reader, [1], [20, 7])
    assert [world.pages(rank, [20, 7]) for rank in range(2)] == [stored[0], stored[0]]
    assert world.store.part_count == 1
    assert [group.payload_bytes for group in world.manager._groups] == [world.workers[0].slot_layout.rank_bytes]


def test_rank_zeros_copy_alone_decides(world: World) -> None:
    writer = world.request()
    first, second = world.prepare_store(writer, [1]), world.prepare_store(writer, [2])
    world.copy_stores(first.store_spec, [3, 9], ranks=[0])
    world.copy_stores(second.store_spec, [4, 5], ranks=[1])
    for output in (first, second):
        world.manager.complete_store(set(output.keys_to_store), writer)
    assert world.look(writer, 1, 2) == [HIT, MISS]


def test_another_rank_copies_nothing_and_says_so(world: World) -> None:
    output = world.prepare_store(world.request(), [1])
    worker = world.workers[1]
    assert worker.submit_store(5, GPULoadStoreSpec([3, 9], (2,), (0,)), output.store_spec)
    (result,) = worker.get_finished()
    assert (result.job_id, result.success, result.transfer_size, result.transfer_time) == (5, True, None, None)
    assert worker._copier is None  # it has not even looked for the arena
    assert worker.take_not_started() == []


def test_a_rank_that_cannot_load_gives_the_slot_back(world: World) -> None:
    world.stored(world.request(), [1], [3, 9])
    reader = world.request()
    assert world.look(reader, 1) == [HIT]
    spec = world.manager.prepare_load(keys(1), reader)
    slots = GPULoadStoreSpec([20, 7], (2,), (0,))
    assert world.workers[0].submit_load(1, spec, slots)
    World.ended(world.workers[0], 1)
    assert world.workers[1].submit_load(2, spec, GPULoadStoreSpec([20, 99], (2,), (0,)))  # there is no block 99
    world.manager.complete_load(set(keys(1)), reader)
    world.manager.on_request_finished(reader)
    world.store.clear()
    assert world.store.stats()["host_quarantined_slots"] == 1
    world.manager.not_started(pickle.loads(pickle.dumps(world.workers[1].take_not_started())))
    assert world.store.stats()["host_quarantined_slots"] == 0


def test_a_rank_that_disconnects_reads_no_more(world: World) -> None:
    world.stored(world.request(), [1], [3, 9])
    for worker in world.workers:
        worker.attached()
    reader = world.request()
    assert world.look(reader, 1) == [HIT]
    spec = world.manager.prepare_load(keys(1), reader)
    assert world.workers[0].submit_load(1, spec, GPULoadStoreSpec([20, 7], (2,), (0,)))
    World.ended(world.workers[0], 1)
    world.manager.complete_load(set(keys(1)), reader)
    world.manager.on_request_finished(reader)
    world.store.clear()
    assert world.store.stats()["host_quarantined_slots"] == 1
    world.workers[1].shutdown()
    wait_until(lambda: world.store.stats()["host_quarantined_slots"] == 0)


def test_a_worker_with_a_part_of_its_own_is_refused(world: World) -> None:
    worker = world.workers[1]
    with pytest.raises(InvalidArgument, match="replicated is 0, the owner expects 1"):
        ArenaAttachment.attach(worker._engine_id, 1, worker.slot_layout.rank_bytes, 10.0)


def test_one_copy_on_nvme(tmp_path: Path) -> None:
    """A chunk of each rank's own takes twice that."""
    written = {}
    for replicated in (True, False):
        world = World(ranks=2, replicated=replicated, directory=tmp_path / f"kv-{replicated}")
        world.stored(world.request(), [1, 2, 3], [3, 9, 4])
        world.store.flush(10.0)
        written[replicated] = world.store.stats()["demoted_bytes"]
        world.close()
    header = 4096
    assert written[False] - 3 * header == 2 * (written[True] - 3 * header) > 0


def wait_until(condition: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.001)


# ---- our connector: tokens ----------------------------------------------------------------------------------------------


@pytest.fixture
def make() -> Iterator[Make]:
    with engines() as found:
        yield found


@pytest.mark.parametrize("config", [{}, {"async_loading": False}, {"async_loading": False, "layerwise": True}])
@pytest.mark.parametrize("ahead", [False, True])
def test_tokens_of_rank_zero_reach_every_rank(make: Make, ahead: bool, config: dict[str, Any]) -> None:
    engine = make(chunk=24, ranks=3, replicated=True, ahead=ahead and not config, **config)
    tokens = prompt(41, 125)
    assert engine.answered(tokens) == 0
    stored = engine.stats["host_used_bytes"]
    assert engine.answered(tokens) == 120
    assert stored < make(chunk=24, ranks=3).scheduler._chunk_bytes * 5


def test_token_worker_of_another_rank_ends_a_store_at_once(make: Make) -> None:
    engine = make(chunk=24, ranks=2, replicated=True)
    engine.ask(prompt(42, 125))
    (job,) = engine.step().meta.stores
    worker = engine.workers[1]
    worker.end_step(TokenConnectorMetadata(stores=[dataclasses.replace(job, id=77)]))
    report = worker.take_report()
    assert report is not None
    assert (report.ended[77].ranks, report.ended[77].bytes, report.ended[77].failed) == (1, 0, False)
    assert worker._deferred == []
    assert worker._copier is None


def test_a_slow_rank_keeps_what_it_reads(make: Make) -> None:
    """The scheduler forgets the load; the slots stay until the last rank has read them."""
    engine = make(chunk=24, ranks=2, replicated=True)
    tokens = prompt(43, 125)
    engine.answered(tokens)
    held = engine.hold("load", rank=1)
    engine.forget_blocks()
    name = engine.ask(tokens)
    while not held.held:
        engine.step()
    engine.abort(name)
    engine.scheduler.reset()
    assert engine.stats["host_quarantined_slots"] == 5
    held.end()
    engine.drain()
    assert in_store(engine, tokens) == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_failed_load_of_one_rank_is_recomputed_by_all(make: Make, ranks: int) -> None:
    engine = make(chunk=24, ranks=2, replicated=True, blocks=60)
    tokens = prompt(44, 125)
    engine.answered(tokens)
    engine.fail_loads(random.Random(1), 1.0, ranks=[ranks - 1])
    engine.answered(tokens)  # which checks what every rank has
    engine.heal_loads()
    assert engine.answered(tokens) == 120


def test_records_are_read_by_every_rank(make: Make, tmp_path: Path) -> None:
    engine = make(chunk=24, ranks=2, replicated=True, directory=tmp_path / "kv", direct=True, step_tokens=200)
    tokens = on_nvme(engine, 45)
    promoted = engine.stats["promoted_chunks"]
    assert engine.answered(tokens) == 120
    assert engine.stats["promoted_chunks"] == promoted


@pytest.mark.parametrize("seed", range(6))
def test_random_days_of_one_copy(make: Make, seed: int, tmp_path: Path) -> None:
    directory = tmp_path / "kv" if seed % 2 else None
    random_day(make, seed, 2 + seed % 2, directory, replicated=True, direct=seed == 5 and directory is not None)
