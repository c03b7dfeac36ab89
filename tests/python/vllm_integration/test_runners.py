"""LMCacheNativeConnector's worker under what calls it: the connector classes of vLLM's V1 and V2 model runners, as they are. The V2
runner itself needs Triton and a GPU; what it does around its connector class (model_runner.py, execute_model) is played here."""

from __future__ import annotations

import uuid
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kv_memory import Paged, engine_config, full
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.platforms import current_platform
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector, get_kv_connector
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from lmcache_native import KeyDeriver, PagedCopier, Store, make_namespace
from lmcache_native.integration.vllm import copier_client
from lmcache_native.integration.vllm.token_connector import LMCacheNativeConnector
from lmcache_native.integration.vllm.transfer import TokenConnectorMetadata, TransferJob

BLOCK = 32
CHUNK = 40  # not whole blocks
NAMESPACE = make_namespace("test=1\n")
NOTHING = TokenConnectorMetadata()
Forward = Callable[[], None]


class V1:
    """gpu_model_runner.py: the connector hears of the step before anything else, then the forward pass runs inside the mixin's
    context. The CPU's runner is this one too."""

    def __init__(self, config: VllmConfig, connector: Any, caches: dict[str, Any]) -> None:
        self._config, self._connector = config, connector
        connector.register_kv_caches(caches)

    def step(self, plan: Any, forward: Forward | None) -> Any:
        self._connector.handle_preemptions(plan.kv_connector_metadata)
        if forward is None:
            return KVConnectorModelRunnerMixin.kv_connector_no_forward(plan, self._config).kv_connector_output
        with (
            set_forward_context(None, self._config),
            KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(plan) as output,
        ):
            forward()
        return output


class V1Speculating(V1):
    """The step's end, wait_for_save, comes after the drafts: later than the question what has been received."""

    def step(self, plan: Any, forward: Forward | None) -> Any:
        if forward is None:
            return super().step(plan, forward)
        self._connector.handle_preemptions(plan.kv_connector_metadata)
        with (
            set_forward_context(None, self._config),
            KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(plan, defer_finalize=True) as output,
        ):
            forward()
        KVConnectorModelRunnerMixin.finalize_kv_connector()
        return output


class V2:
    """gpu/model_runner.py with a piecewise graph or none: inside the forward context."""

    def __init__(self, config: VllmConfig, connector: Any, caches: dict[str, Any]) -> None:
        self._config = config
        self.connector = get_kv_connector(config, caches)
        assert isinstance(self.connector, ActiveKVConnector)

    def step(self, plan: Any, forward: Forward | None) -> Any:
        if forward is None:
            return self.connector.no_forward(plan).kv_connector_output
        with set_forward_context(None, self._config):
            self._forward(plan, forward)
        return self.connector.post_forward(plan.finished_req_ids)

    def _forward(self, plan: Any, forward: Forward) -> None:
        batch = SimpleNamespace(idx_mapping=torch.zeros(1), req_ids=["r"], num_tokens=1)
        self.connector.pre_forward(plan, batch, attn_metadata={})
        forward()
        self.connector.finish_forward()


class V2FullGraph(V2):
    """Without a forward context; nothing of Python runs inside the replayed graph."""

    def step(self, plan: Any, forward: Forward | None) -> Any:
        if forward is None:
            return super().step(plan, forward)
        self._forward(plan, forward)
        return self.connector.post_forward(plan.finished_req_ids)


RUNNERS = pytest.mark.parametrize("runner_class", [V1, V1Speculating, V2, V2FullGraph])


def planned(meta: TokenConnectorMetadata) -> SimpleNamespace:
    """A SchedulerOutput, as far as it is of interest here."""
    synchronous = any(job.synchronous for job in meta.loads)
    return SimpleNamespace(kv_connector_metadata=meta, has_sync_kv_loads=synchronous, finished_req_ids=set())


class Worker:
    """A worker's connector and runner, and in place of the scheduler a store and plans made by hand."""

    def __init__(self, config: VllmConfig, runner_class: Any, monkeypatch: pytest.MonkeyPatch, **extra: Any) -> None:
        self.paged = Paged(full(BLOCK))
        transfer = KVTransferConfig(
            kv_connector="LMCacheNativeConnector",
            kv_role="kv_both",
            engine_id=f"test-{uuid.uuid4()}",
            kv_connector_extra_config={"chunk_size": CHUNK, "max_local_cpu_size": 0.03125, **extra},
        )
        monkeypatch.setattr(config, "kv_transfer_config", transfer)
        monkeypatch.setattr(config.compilation_config, "static_forward_context", self.paged.layers)
        monkeypatch.setattr(config.scheduler_config, "async_scheduling", False)
        self.connector = LMCacheNativeConnector(config, KVConnectorRole.WORKER, self.paged.config)
        monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", self.connector)
        self.runner = runner_class(config, self.connector, self.paged.caches)
        self.slot = self.connector.worker.slot_layout
        self.store = Store(host_bytes=32 << 20, max_payload_bytes=self.slot.rank_bytes)
        self.store.serve(str(transfer.engine_id), self.slot.rank_bytes)
        self._jobs = 0

    def close(self) -> None:
        self.connector.shutdown()
        self.store.close(10)

    def step(self, meta: TokenConnectorMetadata, forward: Forward | None = lambda: None) -> Any:
        output = self.runner.step(planned(meta), forward)
        return KVConnectorOutput() if output is None else output  # None: nothing to tell, and no forward pass

    def job(self, lease: Any, blocks: list[int], *, synchronous: bool = False, slots: int = 1) -> TransferJob:
        """One chunk, the first tokens of a request whose blocks are these."""
        self._jobs += 1
        offsets, generations = lease.slot_offsets()[:slots], lease.generations()[:slots]
        name, needed = f"r{self._jobs}", -(-CHUNK // BLOCK)
        return TransferJob(
            self._jobs, name, 0, CHUNK, array("I", [0]), offsets, generations, 0, array("q", blocks[:needed]), synchronous
        )

    def reserve(self, key: bytes) -> Any:
        return self.store.reserve_engine_keys(NAMESPACE, [key], self.slot.rank_bytes, for_worker=True)

    def acquire(self, key: bytes) -> Any:
        return self.store.acquire(NAMESPACE, KeyDeriver(NAMESPACE).derive_all([key]))

    def write(self, blocks: list[int], seed: int) -> None:
        """The engine's own write of CHUNK tokens into all layers."""
        generator = torch.Generator().manual_seed(seed)
        for layer in range(len(self.paged.names)):
            kv = torch.randn(2, CHUNK, 2, 64, generator=generator).to(torch.bfloat16)
            self.paged.write(layer, blocks, 0, *kv)

    def blocks(self, blocks: list[int]) -> list[Any]:
        return [cache[blocks].view(torch.int16).clone() for cache in self.paged.caches.values()]

    def stored(self, key: bytes, blocks: list[int], seed: int) -> None:
        """A whole store, by the runner's own steps."""
        lease = self.reserve(key)
        job = self.job(lease, blocks)
        self.step(TokenConnectorMetadata(stores=[job]), lambda: self.write(blocks, seed))
        self.step(NOTHING)
        self.step(TokenConnectorMetadata(flush={job.id}))
        assert lease.commit() == 1


@pytest.fixture(scope="module")
def config(tiny: Path) -> Iterator[VllmConfig]:
    with engine_config(tiny) as found:
        yield found


@pytest.fixture
def make(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make_one(runner_class: Any, **extra: Any) -> Worker:
        made.append(Worker(config, runner_class, monkeypatch, **extra))
        return made[-1]

    yield make_one
    for worker in made:
        worker.close()


Make = Callable[..., Worker]


@RUNNERS
def test_a_store_is_what_its_step_left(make: Make, runner_class: Any) -> None:
    """Submitted before the next step writes anything, and waited for when that step hands its blocks out again."""
    worker = make(runner_class)
    lease = worker.reserve(b"a")
    job = worker.job(lease, [3, 5])
    worker.step(TokenConnectorMetadata(stores=[job]), lambda: worker.write([3, 5], seed=1))
    wanted = worker.blocks([3, 5])
    output = worker.step(TokenConnectorMetadata(flush={job.id}), lambda: worker.write([3, 5], seed=2))
    assert output.kv_connector_worker_meta.ended[job.id].failed is False
    assert lease.commit() == 1
    load = worker.job(worker.acquire(b"a"), [3, 5])
    worker.step(TokenConnectorMetadata(loads=[load]))
    worker.connector.worker.wait_ended([load.id])
    for have, want in zip(worker.blocks([3, 5]), wanted, strict=True):
        assert torch.equal(have, want)


@RUNNERS
@pytest.mark.parametrize("layerwise", [False, True])
def test_a_synchronous_load_is_there_when_its_layer_is_read(make: Make, runner_class: Any, layerwise: bool) -> None:
    worker = make(runner_class, enable_async_loading=False, use_layerwise=layerwise)
    worker.stored(b"a", [3, 5], seed=1)
    wanted = worker.blocks([3, 5])
    seen: list[bool] = []

    def forward() -> None:
        for name, want in zip(worker.paged.names, wanted, strict=True):
            if layerwise:  # never with a full graph, see below
                worker.connector.wait_for_layer_load(name)
            seen.append(torch.equal(worker.paged.caches[name][[2, 4]].view(torch.int16)[0], want[0]))

    output = worker.step(TokenConnectorMetadata(loads=[worker.job(worker.acquire(b"a"), [2, 4], synchronous=True)]), forward)
    assert seen == [True] * len(worker.paged.names)
    assert not output.invalid_block_ids
    assert not output.finished_recving
    assert [report.failed for report in output.kv_connector_worker_meta.ended.values()] == [False]


@RUNNERS
@pytest.mark.parametrize("with_forward", [False, True])
def test_an_asynchronous_load_starts_after_the_forward_pass_was_launched(make: Make, runner_class: Any, with_forward: bool) -> None:
    worker = make(runner_class)
    worker.stored(b"a", [3, 5], seed=1)
    job = worker.job(worker.acquire(b"a"), [2, 4])
    open_at_forward: list[set[int]] = []

    def forward() -> None:
        open_at_forward.append(set(worker.connector.worker._loads))

    outputs = [worker.step(TokenConnectorMetadata(loads=[job]), forward if with_forward else None)]
    worker.connector.worker.wait_ended([job.id])
    outputs.append(worker.step(NOTHING, None))
    assert open_at_forward == ([set()] if with_forward else [])
    assert [name for output in outputs for name in output.finished_recving or ()] == [job.request_id]
    assert not any(output.invalid_block_ids for output in outputs)
    assert torch.equal(worker.blocks([2])[0], worker.blocks([3])[0])


@RUNNERS
@pytest.mark.parametrize("synchronous", [False, True])
def test_a_load_that_failed_is_told_in_the_step_that_reports_it(make: Make, runner_class: Any, synchronous: bool) -> None:
    worker = make(runner_class)
    worker.stored(b"a", [3, 5], seed=1)
    output = worker.step(TokenConnectorMetadata(loads=[worker.job(worker.acquire(b"a"), [2, 4], synchronous=synchronous, slots=0)]))
    assert output.invalid_block_ids == {2, 4}
    assert set(output.finished_recving or ()) == (set() if synchronous else {"r2"})


def test_v2_calls_nothing_while_it_captures_graphs(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up and capture run with the connector disabled; vLLM's attention then finds none."""
    worker = make(V2)
    monkeypatch.setattr(worker.connector, "_worker", None)  # any use of it would raise
    worker.runner.connector.set_disabled(True)
    assert not kv_transfer_state.has_kv_transfer_group()
    assert worker.runner.step(planned(NOTHING), lambda: None) is None
    worker.runner.connector.set_disabled(False)
    worker.runner.connector.reset_capture_state()
    assert kv_transfer_state.get_kv_transfer_group() is worker.connector


@pytest.mark.parametrize("layerwise", [False, True])
def test_graphs_are_whole_unless_layers_are_waited_for(tiny: Path, monkeypatch: pytest.MonkeyPatch, layerwise: bool) -> None:
    """vLLM's own rule, asked in the front end: a hook inside a graph would run at its capture only."""
    monkeypatch.setattr(type(current_platform), "support_static_graph_mode", classmethod(lambda cls: True))
    extra = {"use_layerwise": layerwise, "enable_async_loading": False, "max_local_cpu_size": 0.03125}
    transfer = KVTransferConfig(kv_connector="LMCacheNativeConnector", kv_role="kv_both", kv_connector_extra_config=extra)
    found = EngineArgs(
        model=str(tiny),
        max_model_len=512,
        kv_transfer_config=transfer,
        compilation_config={"mode": 3, "cudagraph_mode": "FULL_AND_PIECEWISE"},
    ).create_engine_config()
    assert found.compilation_config.cudagraph_mode.has_full_cudagraphs() is not layerwise


# ---- CUDA ---------------------------------------------------------------------------------------------------------------


class Recording:
    """A host copier that notes what a CUDA copier would be told."""

    def __init__(self, copier: Any) -> None:
        self._copier = copier
        self.calls: list[tuple[Any, ...]] = []

    def submit(self, job_id: int, direction: str, *args: Any, stream: int, layer_by_layer: bool) -> None:
        self.calls.append(("submit", direction, stream, layer_by_layer))
        self._copier.submit(job_id, direction, *args, layer_by_layer=layer_by_layer)

    def wait_layers(self, job_id: int, layers: int, *, timeout_s: float, stream: int) -> None:
        self.calls.append(("wait_layers", layers, stream))
        self._copier.wait_layers(job_id, layers, timeout_s=timeout_s)

    def wait(self, ids: Any, timeout_s: float) -> None:
        self.calls.append(("wait", len(list(ids))))
        self._copier.wait(ids, timeout_s)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._copier, name)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The current stream of cuda:1; everything that would wait for a device raises."""
    current = [0x70]

    def current_stream(device: Any) -> Any:
        assert device == 1
        return SimpleNamespace(cuda_stream=current[0])

    def synchronize(*args: Any) -> None:
        raise AssertionError("a hook waits for the device")

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
        monkeypatch.setattr(owner, "synchronize", synchronize, raising=False)  # an engine of this process has put others there
    return current


@RUNNERS
def test_jobs_follow_the_stream_that_is_current_when_they_are_submitted(
    make: Make, monkeypatch: pytest.MonkeyPatch, runner_class: Any, streams: list[int]
) -> None:
    worker = make(runner_class, enable_async_loading=False, use_layerwise=True)
    client, devices, copiers = worker.connector.worker, [], []

    class Copiers:
        @staticmethod
        def cuda(
            arena: Any, paged: Any, slot: Any, *, rank: int, device: int, slot_bytes: int, replicated: bool, owner: Any
        ) -> Any:
            devices.append(device)
            assert not replicated
            assert slot_bytes == 4096 + slot.rank_bytes
            copiers.append(Recording(PagedCopier.host(arena, paged, slot, rank=rank, owner=owner)))
            return copiers[-1]

    monkeypatch.setattr(copier_client, "PagedCopier", Copiers)
    monkeypatch.setattr(client, "_device_type", "cuda")
    monkeypatch.setattr(client, "_device_index", 1)

    lease = worker.reserve(b"a")
    store = worker.job(lease, [3, 5])
    worker.step(TokenConnectorMetadata(stores=[store]), lambda: worker.write([3, 5], seed=1))
    streams[0] = 0x71
    worker.step(NOTHING)
    assert devices == [1]
    assert copiers[0].calls == [("submit", "store", 0x71, False)]
    worker.step(TokenConnectorMetadata(flush={store.id}))
    assert lease.commit() == 1

    copiers[0].calls.clear()
    streams[0] = 0x72

    def forward() -> None:
        for name in worker.paged.names:
            worker.connector.wait_for_layer_load(name)
        assert ("wait", 1) not in copiers[0].calls

    worker.step(TokenConnectorMetadata(loads=[worker.job(worker.acquire(b"a"), [2, 4], synchronous=True)]), forward)
    assert copiers[0].calls[:4] == [
        ("submit", "load", 0x72, True),
        ("wait_layers", 1, 0x72),
        ("wait_layers", 2, 0x72),
        ("wait_layers", 3, 0x72),
    ]
