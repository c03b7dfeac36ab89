"""Pages described by a probe: vLLM's CPU kernels and cache views, without a model."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kv_memory import BLOCKS, LAYERS, Paged, Write, bits, engine_config, flash, full, round_trip
from vllm.v1.kv_cache_interface import (
    KVCacheLayout,
    KVQuantMode,
    MLAAttentionSpec,
    UniformTypeKVCacheSpecs,
)

from lmcache_native import PagedCopier, Store, make_namespace
from lmcache_native.errors import InvalidArgument, Unsupported
from lmcache_native.integration.vllm import layout, pages, probe
from lmcache_native.integration.vllm.pages import describe, layout_id


@pytest.fixture(scope="module", autouse=True)
def _vllm_config(tiny: Path) -> Iterator[None]:
    with engine_config(tiny):
        yield


# ---- strided ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 64), (1, 80), (3, 128)])
@pytest.mark.parametrize("block_tokens", [16, 32, 128])
def test_cpu_kernels(block_tokens: int, heads: int, head_dim: int, dtype: Any) -> None:
    round_trip(Paged(full(block_tokens, heads, head_dim, dtype)))


@pytest.mark.parametrize("kv_layout", [*KVCacheLayout], ids=lambda kv_layout: kv_layout.name)
def test_every_order_of_vllms_axes(kv_layout: KVCacheLayout) -> None:
    round_trip(Paged(full(), kv_layout=kv_layout, write=flash))


def test_kernel_blocks_smaller_than_the_engines() -> None:
    paged = Paged(full(block_tokens=64), kernel_block_tokens=16, write=flash)
    found = paged.describe()
    assert (found.block_tokens, found.num_blocks, found.kernel_block_tokens) == (64, BLOCKS, 16)
    assert found.paged_layout().num_blocks == 4 * BLOCKS
    assert found.block_ids([2, 0]).tolist() == [8, 9, 10, 11, 0, 1, 2, 3]
    assert found.block_ids([]).tolist() == []
    round_trip(paged)


def test_what_the_cpu_kernel_does() -> None:
    """Per head K as [dim][token], then V as [token][dim]."""
    found = Paged(full(block_tokens=32, heads=2, head_dim=64)).describe()
    head = 2 * 32 * 64 * 2
    assert found.strides == LAYERS * ((((0, 2 * head, 2, head, 64), (head // 2, 2 * head, 128, head, 2))),)
    assert found.reason == ""
    assert (found.layers, found.planes, found.token_bytes) == (LAYERS, 2, 2 * 64 * 2)
    assert (found.element, found.heads, found.head_dim) == ("bfloat16", 2, 64)
    assert (found.device_type, found.device_index) == ("cpu", 0)
    assert found.slot_layout(8).plane_bytes == 8 * found.token_bytes


def test_layers_in_the_groups_order_and_shared_caches_once() -> None:
    paged = Paged(full())
    order = [paged.names[2], paged.names[0], paged.names[1]]
    paged.group.layer_names = [*order, "model.layers.9.attn"]
    paged.caches["model.layers.9.attn"] = paged.caches[order[1]]
    found = paged.describe()
    assert [tensor.data_ptr() for tensor in found.tensors] == [paged.caches[name].data_ptr() for name in order]


def test_the_probed_blocks() -> None:
    assert [probe.probed_blocks(blocks) for blocks in (1, 2, 3, 100)] == [(0,), (0, 1), (0, 1, 2), (0, 1, 99)]


# ---- opaque -------------------------------------------------------------------------------------------------------------


def pairs(_layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    """K's dims in pairs, as tile instructions like them: [dim / 2][token][2]."""
    blocks, heads, tokens, both = cache.shape
    k = cache.view(blocks, heads, 2 * tokens, both // 2)[:, :, :tokens].reshape(blocks, heads, -1, tokens, 2)
    k[slots // tokens, :, :, slots % tokens] = key.reshape(len(slots), heads, -1, 2)
    halves = cache.view(blocks, heads, 2 * tokens, both // 2)
    halves[:, :, :tokens] = k.reshape(blocks, heads, tokens, -1)
    halves[:, :, tokens:][slots // tokens, :, slots % tokens] = value


def raises(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    flash(layer, key[:9], value[:9], cache, slots[:9])
    raise RuntimeError("no such kernel")


def doubles(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    flash(layer, key, 2 * value, cache, slots)


def shifts(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    flash(layer, key + 0.25, value, cache, slots)


def first_token_missing(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    flash(layer, key[1:], value[1:], cache, slots[1:])


def k_over_v(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    flash(layer, key, value, cache, slots)
    flash(layer, key, key, cache, slots)


def other_block(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    tokens = cache.shape[2]
    flash(layer, key, value, cache, torch.where(slots // tokens == 1, slots - tokens, slots))


def swapped_blocks(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    tokens = cache.shape[2]
    swap = torch.arange(cache.shape[0])
    swap[[1, -1]] = swap[[-1, 1]]
    flash(layer, key, value, cache, swap[slots // tokens] * tokens + slots % tokens)


def rolled_heads(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    """As right in the first block, but each block begins with another head."""
    turn = ((slots // cache.shape[2])[:, None] + torch.arange(key.shape[1])) % key.shape[1]
    index = turn[:, :, None].expand_as(key)
    flash(layer, key.gather(1, index), value.gather(1, index), cache, slots)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (pairs, r"attn: K is not strided: \d+ of \d+ elements lie elsewhere"),
        (raises, r"attn: the engine's cache write raised RuntimeError: no such kernel"),
        (doubles, r"attn: values change on their way into the cache"),
        (shifts, r"attn: values change on their way into the cache: \d+ of \d+"),
        (first_token_missing, r"attn: the engine's cache write changed \d+ places in the pages, not \d+"),
        (k_over_v, r"attn: \d+ of \d+ elements are not in the pages"),
        (other_block, r"attn: the engine's cache write changed \d+ places in the pages, not \d+"),
        (swapped_blocks, r"attn: K is not strided"),
        (rolled_heads, r"attn: K is not strided"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_writes_that_are_not_strides(write: Write, reason: str) -> None:
    found = Paged(full(), write=write).describe()
    assert found.opaque
    assert re.search(reason, found.reason), found.reason


def test_a_write_that_wanders() -> None:
    calls = iter(range(100))

    def wanders(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
        shift = next(calls) % 2 * 64
        flash(layer, key[..., :64], value[..., :64], cache[..., shift : shift + 128], slots)

    # The cache has room for twice the head.
    spec = full(head_dim=64, state_content_bytes=2 * 2 * 64 * 2)
    found = Paged(spec, write=wanders).describe()
    assert "chooses other places at each call" in found.reason


def test_fp8() -> None:
    spec = full(block_tokens=32, dtype=torch.uint8, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR)
    paged = Paged(spec, kv_cache_dtype="fp8", model_dtype=torch.bfloat16)
    paged.write(0, [1], 0, *torch.ones(2, 4, 2, 64, dtype=torch.bfloat16))  # the kernel itself works
    found = paged.describe()
    assert "quantized cache (FP8_PER_TENSOR)" in found.reason


def test_unknown_element_type_is_not_probed() -> None:
    found = Paged(full(dtype=torch.int8), write=flash, model_dtype=torch.bfloat16).describe()
    assert found.reason == "cache type int8: only bfloat16, float16, float32 can be probed"


def test_mla_of_another_write() -> None:
    spec = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    found = Paged(spec, write=flash).describe()
    assert "the engine's cache write raised" in found.reason
    assert found.token_bytes == 16 * 576 * 2


def test_mla_of_states_that_are_not_tokens() -> None:
    spec = MLAAttentionSpec(block_size=32, num_kv_heads=1, head_size=576, dtype=torch.bfloat16, tokens_per_state=4)
    assert Paged(spec, write=flash).describe().reason == "model.layers.0.attn: MLA states that are not one latent per token"


def test_no_write_to_call() -> None:
    paged = Paged(full())
    paged.layers[paged.names[1]].impl = SimpleNamespace()
    assert paged.describe().reason.startswith("model.layers.1.attn: the engine has no cache write")


def test_other_v_than_k() -> None:
    found = Paged(full(head_size_v=32), write=flash).describe()
    assert found.reason == "model.layers.0.attn: K has 64 elements per head, V has 32"


def test_layers_that_differ() -> None:
    paged = Paged(full(heads=2, head_dim=64), layers=2)
    other = Paged(full(heads=4, head_dim=32), layers=2)
    paged.caches[paged.names[1]] = other.caches[paged.names[1]]
    specs = dict(zip(paged.names, (paged.spec, other.spec), strict=True))
    paged.group.kv_cache_spec = UniformTypeKVCacheSpecs(block_size=32, kv_cache_specs=specs)
    found = paged.describe()
    assert found.opaque
    assert found.reason == "layers differ in (KV heads, head dim): (2, 64), (4, 32)"
    assert found.token_bytes == paged.spec.page_size_bytes

    larger = Paged(full(heads=8, head_dim=32), layers=2)
    paged.caches[paged.names[1]] = larger.caches[paged.names[1]]
    specs[paged.names[1]] = larger.spec
    with pytest.raises(Unsupported, match=r"\(16384, 16384\): model.layers.0.attn; \(32768, 32768\): model.layers.1.attn"):
        describe(paged.vllm_config, paged.config, paged.caches)


def test_scattered_opaque_pages_are_refused() -> None:
    paged = Paged(full(), kv_layout=KVCacheLayout.LHBNC, write=raises)
    with pytest.raises(Unsupported, match=r"model.layers.0.attn: a block's page lies scattered.*no such kernel"):
        describe(paged.vllm_config, paged.config, paged.caches)


@pytest.mark.parametrize(
    ("kv_layout", "kernel_block_tokens"), [(KVCacheLayout.LBHNC, None), (KVCacheLayout.BLHNC, None), (KVCacheLayout.LBHNC, 16)]
)
def test_opaque_pages_are_copied_whole(kv_layout: KVCacheLayout, kernel_block_tokens: int | None) -> None:
    paged = Paged(full(), kv_layout=kv_layout, kernel_block_tokens=kernel_block_tokens, write=raises)
    found = paged.describe()
    assert (found.opaque, found.planes, found.token_bytes) == (True, 1, paged.spec.page_size_bytes)
    assert (found.kernel_block_tokens, found.block_tokens, found.num_blocks) == (1, 32, BLOCKS)
    assert (found.element, found.heads, found.head_dim) == ("", 0, 0)
    assert found.block_ids([4, 1]).tolist() == [4, 1]
    slot = found.slot_layout(64)
    assert slot.plane_bytes == 2 * found.token_bytes
    with pytest.raises(
        InvalidArgument, match=r"chunk_tokens=40: .* 32 tokens, for example 32: KV pages are opaque .*no such kernel"
    ):
        found.slot_layout(40)

    page = found.token_bytes
    with Store(host_bytes=16 << 20, max_payload_bytes=slot.rank_bytes) as store:
        copier = PagedCopier.host(store, found.paged_layout(), slot, owner=found)
        lease = store.reserve_engine_keys(make_namespace("test=1\n"), [b"a"], slot.rank_bytes, for_worker=True)
        where = (lease.slot_offsets(), lease.generations(), [0], [2], [0])
        copier.submit(1, "store", *where, found.block_ids([4, 1]))
        copier.wait([1])
        wanted = {name: [cache.unflatten(0, (BLOCKS, -1))[b].clone() for b in (4, 1)] for name, cache in paged.caches.items()}
        paged.raw.zero_()
        copier.submit(2, "load", *where, found.block_ids([0, 6]))
        copier.wait([2])
        assert [done.message for done in copier.poll()] == ["", ""]
        for name, cache in paged.caches.items():
            got = cache.unflatten(0, (BLOCKS, -1))
            for block, want in zip((0, 6), wanted[name], strict=True):
                assert np.array_equal(bits(got[block]), bits(want))
        assert int((paged.raw != 0).sum()) <= 2 * LAYERS * page
        del copier
        lease.abort()


# ---- wrong strides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", probe.Strides._fields)
@pytest.mark.parametrize("plane", [0, 1])
def test_one_wrong_stride_is_noticed(monkeypatch: pytest.MonkeyPatch, axis: str, plane: int) -> None:
    fit, calls = probe.fit, iter(range(100))

    def wrong(places: Any, blocks: Any) -> probe.Strides:
        strides = fit(places, blocks)
        return strides._replace(**{axis: getattr(strides, axis) + 2}) if next(calls) == 2 + plane else strides

    monkeypatch.setattr(probe, "fit", wrong)
    found = Paged(full()).describe()
    assert found.reason.startswith(f"model.layers.1.attn: {'KV'[plane]} is not strided: ")


def test_every_element_is_checked() -> None:
    shape = (3, 4, 2, 5)
    places = torch.arange(math.prod(shape)).reshape(shape)
    strides = probe.fit(places, (0, 1, 2))
    assert strides == (0, 40, 10, 5, 1)
    probe.check("K", places, (0, 1, 2), strides)
    for element in range(places.numel()):
        moved = places.clone()
        moved.view(-1)[element] += 1
        with pytest.raises(probe.NotStrided, match="K is not strided: 1 of 120 "):
            probe.check("K", moved, (0, 1, 2), strides)


# ---- layout id ----------------------------------------------------------------------------------------------------------


def test_layout_id(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Paged(full(block_tokens=16)).describe()
    wanted = "kv:element=bfloat16;heads=2;head_dim=64;planes=2;layers=3"
    assert layout_id(None, found, ["CPU_ATTN/vec16"]) == wanted
    assert layout_id(None, Paged(full(block_tokens=128)).describe(), ["CPU_ATTN/vec"]) == wanted
    monkeypatch.setattr(layout, "layout_id", lambda config, device, backends: f"opaque:{config},{device},{backends}")
    opaque = dataclasses.replace(found, opaque=True)
    assert pages.layout_id("config", opaque, ["A"]) == "opaque:config,cpu,['A'];block_tokens=16"
