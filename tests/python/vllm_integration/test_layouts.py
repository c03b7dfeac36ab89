"""Where the attention backends of vLLM put K and V, by their own classes: the writes are those of the real implementations, and the
CUDA kernels behind them are replaced by what their documentation says. Memory is planned and allocated by vLLM."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from kv_memory import BLOCKS, LAYERS, LatentLayer, Layer, Paged, engine_config, flash, full, round_trip
from vllm import _custom_ops
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.utils import get_kv_connector_cache_layout
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
from vllm.v1.attention.backends import flash_attn, flex_attention, triton_attn
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl
from vllm.v1.attention.backends.mla.triton_mla import TritonMLAImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.turboquant_attn import TurboQuantAttentionBackend
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
from vllm.v1.kv_cache_interface import KVCacheLayout, MLAAttentionSpec

from lmcache_native import PagedCopier, Store, make_namespace
from lmcache_native.errors import Unsupported
from lmcache_native.integration.vllm import compat, layout
from lmcache_native.integration.vllm.connector import NativeOffloadingConnector
from lmcache_native.integration.vllm.layout import Page, PagedMemory, block_outermost, check_devices
from lmcache_native.integration.vllm.token_connector import LMCacheNativeConnector

HEADS, DIM, ITEM = 2, 64, 2  # of full(): bfloat16
ALL_LAYOUTS = pytest.mark.parametrize("kv_layout", [*KVCacheLayout], ids=lambda kv_layout: kv_layout.name)


@pytest.fixture(scope="module", autouse=True)
def config(tiny: Path) -> Iterator[VllmConfig]:
    with engine_config(tiny) as found:
        yield found


# ---- K and V ------------------------------------------------------------------------------------------------------------


def reshape_and_cache_flash(
    key: Any, value: Any, key_cache: Any, value_cache: Any, slot_mapping: Any, kv_cache_dtype: str, k_scale: Any, v_scale: Any
) -> None:
    """Token i goes to [slot // block_size, slot % block_size] of caches [block, token, head, dim]."""
    assert kv_cache_dtype == "auto"
    tokens = key_cache.shape[1]
    for cache, new in ((key_cache, key), (value_cache, value)):
        cache[slot_mapping // tokens, slot_mapping % tokens] = new


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for a package that is not installed: vLLM's module of it can be imported then."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        mine = name.split(".")[0] == self._package
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if mine else None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: type(name, (), {}) if name[:1].isupper() else mock.MagicMock()  # type: ignore[method-assign]
        return module

    def exec_module(self, module: Any) -> None:
        """Nothing is in it."""


def flash_attention(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(flash_attn, "reshape_and_cache_flash", reshape_and_cache_flash, raising=False)
    return flash_attn.FlashAttentionImpl(HEADS, DIM, 1.0, HEADS, None, None, "auto")


def triton(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(triton_attn, "triton_reshape_and_cache_flash", reshape_and_cache_flash)
    return triton_attn.TritonAttentionImpl(HEADS, DIM, 1.0, HEADS, None, None, "auto")


def flashinfer(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "meta_path", [Absent("flashinfer"), *sys.meta_path])
    module = importlib.import_module("vllm.v1.attention.backends.flashinfer")
    monkeypatch.setattr(module, "can_use_trtllm_attention", lambda *args, **kwargs: False)
    ops = SimpleNamespace(_C_cache_ops=SimpleNamespace(reshape_and_cache_flash=reshape_and_cache_flash))
    monkeypatch.setattr(module, "torch", SimpleNamespace(ops=ops))
    return module.FlashInferImpl(HEADS, DIM, 1.0, HEADS, None, None, "auto")


Make = Callable[[pytest.MonkeyPatch], Any]


@pytest.mark.parametrize("block_tokens", [16, 64])
@ALL_LAYOUTS
@pytest.mark.parametrize("make", [flash_attention, flashinfer, triton], ids=lambda make: make.__name__)
def test_key_value_backends(monkeypatch: pytest.MonkeyPatch, make: Make, kv_layout: KVCacheLayout, block_tokens: int) -> None:
    round_trip(Paged(full(block_tokens, HEADS, DIM), kv_layout=kv_layout, layer=Layer(make(monkeypatch))))


@ALL_LAYOUTS
def test_strides_are_those_of_the_layouts_name(monkeypatch: pytest.MonkeyPatch, kv_layout: KVCacheLayout) -> None:
    """C holds K and then V of one head of one token; the other letters nest as they stand."""
    tokens = 16
    found = Paged(full(tokens, HEADS, DIM), kv_layout=kv_layout, layer=Layer(flash_attention(monkeypatch))).describe()
    counts = {"L": LAYERS, "B": BLOCKS, "H": HEADS, "N": tokens, "C": 2 * DIM * ITEM}
    steps, below = {}, 1
    for letter in reversed(kv_layout.name):
        steps[letter] = below
        below *= counts[letter]
    for planes in found.strides:
        key, value = planes
        assert key == (0, steps["B"], steps["N"], steps["H"], ITEM)
        assert value == (DIM * ITEM, *key[1:])
    bases = [int(tensor.data_ptr()) for tensor in found.tensors]
    assert [base - bases[0] for base in bases] == [number * steps["L"] for number in range(LAYERS)]


@pytest.mark.parametrize("kv_layout", [KVCacheLayout.LBNHC, KVCacheLayout.LBHNC], ids=lambda kv_layout: kv_layout.name)
def test_blocks_split_for_a_kernel(monkeypatch: pytest.MonkeyPatch, kv_layout: KVCacheLayout) -> None:
    layer = Layer(flashinfer(monkeypatch))
    round_trip(Paged(full(256, HEADS, DIM), kv_layout=kv_layout, kernel_block_tokens=64, layer=layer))


# ---- MLA ----------------------------------------------------------------------------------------------------------------

RANK, ROPE = 512, 64


def latents(block_tokens: int, dtype: Any = torch.bfloat16) -> MLAAttentionSpec:
    return MLAAttentionSpec(block_size=block_tokens, num_kv_heads=1, head_size=RANK + ROPE, dtype=dtype)


def concat_and_cache_mla(kv_c: Any, k_pe: Any, kv_cache: Any, slot_mapping: Any, kv_cache_dtype: str, scale: Any) -> None:
    """Token i goes to [slot // block_size, slot % block_size] of a cache [block, token, kv_lora_rank + rotary dims]."""
    assert kv_cache_dtype == "auto"
    tokens = kv_cache.shape[1]
    kv_cache[slot_mapping // tokens, slot_mapping % tokens] = torch.cat([kv_c, k_pe], dim=-1)


def of_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    return CPUMLAImpl.__new__(CPUMLAImpl)  # its write uses nothing of it


def of_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(_custom_ops, "concat_and_cache_mla", concat_and_cache_mla)
    return TritonMLAImpl.__new__(TritonMLAImpl)  # inherits the write of all CUDA backends


@pytest.mark.parametrize(
    ("make", "kv_layout"),
    [(of_cpu, KVCacheLayout.LBHNC), *((of_cuda, kv_layout) for kv_layout in KVCacheLayout)],
    ids=lambda value: getattr(value, "name", None) or value.__name__,
)
@pytest.mark.parametrize("block_tokens", [16, 64])
def test_mla_backends(monkeypatch: pytest.MonkeyPatch, make: Make, kv_layout: KVCacheLayout, block_tokens: int) -> None:
    paged = Paged(latents(block_tokens), kv_layout=kv_layout, layer=LatentLayer(make(monkeypatch), RANK))
    found = paged.describe()
    assert (found.opaque, found.reason, found.planes, found.heads, found.head_dim) == (False, "", 1, 1, RANK + ROPE)
    assert found.strides[0][0][2:] == ((RANK + ROPE) * ITEM, 0, ITEM)
    round_trip(paged)


# ---- blocks whole -------------------------------------------------------------------------------------------------------


def pages_of_vllm(paged: Paged, config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> PagedMemory:
    """As vLLM's OffloadingConnector cuts them."""
    given: list[Any] = []
    spec = mock.MagicMock()
    spec.get_worker.side_effect = given.append
    monkeypatch.setattr(paged.config, "kv_cache_layout", paged.kv_layout.name)
    monkeypatch.setattr(config.cache_config, "kv_cache_layout", paged.kv_layout.name)
    OffloadingConnectorWorker(spec, config, paged.config).register_kv_caches(paged.caches)
    (memory,) = PagedMemory.of_groups(given[0])
    return memory


@pytest.mark.parametrize("name", ["LBNHC", "LBHNC"])
def test_layers_apart_are_a_page_each(config: VllmConfig, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    paged = Paged(full(), kv_layout=KVCacheLayout[name])
    memory = pages_of_vllm(paged, config, monkeypatch)
    memory.check_holds(paged.caches)
    page = paged.spec.page_size_bytes
    assert memory.pages == tuple(Page(int(cache.data_ptr()), page, page) for cache in paged.caches.values())


@pytest.mark.parametrize("name", ["BLHNC", "BLNHC", "BHLNC"])
def test_block_outermost_is_one_page_of_all_layers(config: VllmConfig, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    paged = Paged(full(), kv_layout=KVCacheLayout[name])
    memory = pages_of_vllm(paged, config, monkeypatch)
    memory.check_holds(paged.caches)
    block_bytes = LAYERS * paged.spec.page_size_bytes
    assert memory == PagedMemory((Page(paged.raw.data_ptr(), block_bytes, block_bytes),), BLOCKS, "cpu", 0)

    slot = memory.slot_layout(2)
    wanted = [cache[[4, 1]].view(torch.int16).clone() for cache in paged.caches.values()]
    with Store(host_bytes=16 << 20, max_payload_bytes=slot.rank_bytes) as store:
        copier = PagedCopier.host(store, memory.paged_layout(), slot, owner=paged)
        lease = store.reserve_engine_keys(make_namespace("test=1\n"), [b"a"], slot.rank_bytes, for_worker=True)
        where = (lease.slot_offsets(), lease.generations(), [0], [2], [0])
        copier.submit(1, "store", *where, [4, 1])
        copier.wait([1])
        paged.raw.zero_()
        copier.submit(2, "load", *where, [0, 6])
        copier.wait([2])
        assert [done.message for done in copier.poll()] == ["", ""]
        for cache, want in zip(paged.caches.values(), wanted, strict=True):
            assert torch.equal(cache[[0, 6]].view(torch.int16), want)
        assert not any(bool(cache[[1, 2, 3, 4, 5]].any()) for cache in paged.caches.values())
        del copier
        lease.abort()


def test_heads_outermost_are_refused(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would give the connector one head's part of each block, and call it the block."""
    paged = Paged(full(), kv_layout=KVCacheLayout.LHBNC)
    memory = pages_of_vllm(paged, config, monkeypatch)
    with pytest.raises(Unsupported, match=r"KV cache of model.layers.0.attn: a block spans .* use VLLM_KV_CACHE_LAYOUT=LBHNC"):
        memory.check_holds(paged.caches)


def test_padded_pages_are_refused(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM takes any page with a gap behind it for one of all layers."""
    paged = Paged(full(block_stride_alignment=12 * 1024))
    assert paged.caches[paged.names[0]].stride(0) * ITEM > paged.spec.page_size_bytes
    memory = pages_of_vllm(paged, config, monkeypatch)
    with pytest.raises(Unsupported, match=r"KV cache of model.layers.1.attn: .*which is not within"):
        memory.check_holds(paged.caches)


# ---- what the connectors ask for ----------------------------------------------------------------------------------------


def resolved(config: VllmConfig, monkeypatch: pytest.MonkeyPatch, connector: Any, *backends: Any) -> KVCacheLayout:
    """vLLM's choice when its workers' backends are these."""
    monkeypatch.setattr(config.cache_config, "kv_cache_layout", None)
    monkeypatch.setattr(config, "kv_transfer_config", SimpleNamespace())
    factory = "vllm.distributed.kv_transfer.kv_connector.utils.KVConnectorFactory.get_connector_class"
    with mock.patch(factory, return_value=connector):
        names = [kind.name for kind in get_supported_kv_cache_layouts(backends)]
        return resolve_kv_cache_layout(config, [names], [full()])


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "current_platform", SimpleNamespace(is_cuda=lambda: True), raising=False)


@pytest.mark.usefixtures("on_cuda")
def test_offloading_asks_for_whole_blocks_on_cuda(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for backend in (flash_attn.FlashAttentionBackend, triton_attn.TritonAttentionBackend):
        assert resolved(config, monkeypatch, NativeOffloadingConnector, backend) is KVCacheLayout.BLHNC
    assert "does not satisfy" not in caplog.text


@pytest.mark.usefixtures("on_cuda")
def test_beside_another_connector_offloading_answers_what_vllms_does(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"kv_connector": "NativeOffloadingConnector", "kv_connector_module_path": "lmcache_native.integration.vllm"}
    both = [{**ours, "kv_role": "kv_both"}, {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}]

    def asked(*children: dict[str, str]) -> str | None:
        top = KVTransferConfig(
            kv_connector="MultiConnector", kv_role="kv_both", kv_connector_extra_config={"connectors": list(children)}
        )
        monkeypatch.setattr(config, "kv_transfer_config", top)
        return get_kv_connector_cache_layout(config)

    assert asked(*both) == asked(*reversed(both)) == asked(both[0]) == "LBHNC"
    monkeypatch.setattr(config, "kv_transfer_config", KVTransferConfig(**both[0]))
    assert get_kv_connector_cache_layout(config) == "BLHNC"


@pytest.mark.usefixtures("on_cuda")
def test_tokens_take_what_the_backend_likes_best(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LMCacheNativeConnector.get_required_kvcache_layout(config) is None
    assert resolved(config, monkeypatch, LMCacheNativeConnector, flash_attn.FlashAttentionBackend) is KVCacheLayout.LBNHC


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("cache_config", {"user_specified_block_size": True, "block_size": 128}),
        ("cache_config", {"kv_cache_dtype_skip_layers": ["0"]}),
        ("attention_config", {"backend": AttentionBackendEnum.FLEX_ATTENTION}),
        ("attention_config", {"backend_per_kind": {"full": AttentionBackendEnum.TURBOQUANT}}),
    ],
)
def test_offloading_asks_for_pages_apart_where_whole_blocks_may_fail(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch, part: str, changes: dict[str, Any]
) -> None:
    for name, value in changes.items():
        monkeypatch.setattr(getattr(config, part), name, value)
    assert block_outermost(config) is None
    assert NativeOffloadingConnector.get_required_kvcache_layout(config) == "LBHNC"


@pytest.mark.usefixtures("on_cuda")
def test_a_named_backend_and_block_size_that_take_whole_blocks(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config.attention_config, "backend", AttentionBackendEnum.FLASH_ATTN)
    monkeypatch.setattr(config.cache_config, "user_specified_block_size", True)
    for block_tokens in (16, 32, 64):
        monkeypatch.setattr(config.cache_config, "block_size", block_tokens)
        assert block_outermost(config) == "BLHNC"


def test_on_the_cpu_vllms_own_answer_stays(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert block_outermost(config) is None
    assert NativeOffloadingConnector.get_required_kvcache_layout(config) == "LBHNC"


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("backend", [flex_attention.FlexAttentionBackend, TurboQuantAttentionBackend])
def test_vllm_drops_what_a_backend_does_not_take(config: VllmConfig, monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    assert NativeOffloadingConnector.get_required_kvcache_layout(config) == "BLHNC"
    assert resolved(config, monkeypatch, NativeOffloadingConnector, backend) is KVCacheLayout.LBNHC


def test_one_group_has_no_partial_hits(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM refuses hits within a block then; test_kv_specs.py says what they would do, and has several groups."""
    paged = Paged(full())
    monkeypatch.setattr(config.cache_config, "prefix_match_unit", 8)
    with pytest.raises(ValueError, match="prefix_match_unit"):
        resolve_kv_cache_block_sizes(paged.config, config)
    assert not paged.config.needs_kv_cache_zeroing


# ---- devices ------------------------------------------------------------------------------------------------------------


def on(*names: str) -> dict[str, Any]:
    return {f"layers.{number}": SimpleNamespace(device=torch.device(name)) for number, name in enumerate(names)}


@pytest.fixture(autouse=True)
def _cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices, the second of which runs the model."""
    monkeypatch.setattr(layout, "cuda_status", lambda: {"built": True, "devices": 2, "error": 0, "message": ""})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


def test_devices() -> None:
    check_devices(on("cpu", "cpu"))
    check_devices(on("cuda:1", "cuda:1"))


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (("cuda:1", "cuda:0"), "layers.1 is on cuda:0, that of layers.0 on cuda:1: a worker copies to and from one device"),
        (("cuda:1", "cpu"), "layers.1 is on cpu, that of layers.0 on cuda:1"),
        (("cuda:0", "cuda:0"), "layers.0 is on cuda:0, but this worker runs the model on cuda:1: must be on that device"),
        (("meta",), r"layers.0 is on meta \(meta\): not yet supported, must be on a CUDA device or on the CPU"),
    ],
)
def test_wrong_devices_are_named(devices: tuple[str, ...], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        check_devices(on(*devices))


def test_rocm_is_not_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(Unsupported, match=r"cuda:0 \(ROCm\): not yet supported"):
        check_devices(on("cuda:0"))


@pytest.mark.parametrize(("built", "devices"), [(False, 0), (True, 0)])
def test_a_build_that_does_not_reach_the_device_says_so(monkeypatch: pytest.MonkeyPatch, built: bool, devices: int) -> None:
    monkeypatch.setattr(layout, "cuda_status", lambda: {"built": built, "devices": devices, "error": 35, "message": "no driver"})
    with pytest.raises(Unsupported, match=r"layers.0 is on cuda:1, which this lmcache-native cannot copy from: no driver"):
        check_devices(on("cuda:1"))


def test_a_layer_elsewhere_stops_the_registration() -> None:
    paged = Paged(full(), write=flash)
    paged.caches[paged.names[1]] = paged.caches[paged.names[1]].to("meta")
    with pytest.raises(Unsupported, match=r"KV cache of model.layers.1.attn is on meta, that of model.layers.0.attn on cpu"):
        paged.describe()
