"""One KV cache group's memory as vLLM lays it out, full of random bits, and the writes of its attention layers, without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, _get_attn_isa
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheLayout,
)
from vllm.v1.worker.utils import allocate_kv_cache

from lmcache_native import KeyDeriver, PagedCopier, Store, make_namespace
from lmcache_native.integration.vllm.pages import TokenPages, describe

BLOCKS = 7
LAYERS = 3

Write = Callable[[Any, Any, Any, Any, Any], None]  # (layer, key, value, cache, slot_mapping), as an AttentionImpl's


class Layer(AttentionLayerBase):
    _k_scale_float = _v_scale_float = 1.0
    _k_scale = _v_scale = torch.ones(1)

    def __init__(self, impl: Any, isa: str | None = None) -> None:
        self.impl, self.isa = impl, isa

    def get_attn_backend(self) -> Any:
        return CPUAttentionBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        raise NotImplementedError


class LatentLayer(Layer):
    """MLAAttention, to whom its cache is written."""

    kv_cache_dtype = "auto"

    def __init__(self, impl: Any, kv_lora_rank: int) -> None:
        super().__init__(impl)
        self.kv_lora_rank = kv_lora_rank


class Paged:
    """One group's caches, laid out by vLLM, full of random bits, and its layers. `write`: in place of the CPU kernel. `layer`: in
    place of layers with one of these."""

    def __init__(
        self,
        spec: Any,
        *,
        layers: int = LAYERS,
        kv_layout: KVCacheLayout = KVCacheLayout.LBHNC,
        kernel_block_tokens: int | None = None,
        write: Write | None = None,
        layer: Layer | None = None,
        kv_cache_dtype: str = "auto",
        model_dtype: Any = None,
    ) -> None:
        self.spec, self.kv_layout = spec, kv_layout
        self.names = [f"model.layers.{index}.attn" for index in range(layers)]
        self.group = KVCacheGroupSpec(self.names, spec)
        cache_config = SimpleNamespace(num_gpu_blocks_override=BLOCKS, prefix_cache_retention_interval=None)
        cache_config.get_resolved_kv_cache_layout = lambda: kv_layout
        planner = SimpleNamespace(cache_config=cache_config, attention_config=SimpleNamespace(hisparse_config=None))
        self.config = get_kv_cache_config_from_groups(planner, [self.group], 1 << 40)
        sizes = None if kernel_block_tokens is None else [kernel_block_tokens]
        self.caches = allocate_kv_cache(self.config, torch.device("cpu"), kv_layout, sizes)
        storage = self.caches[self.names[0]].untyped_storage()
        self.raw = torch.tensor([], dtype=torch.int8).set_(storage)
        self.raw.copy_(torch.randint(-128, 128, self.raw.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(7)))
        self.layers = {name: layer or self._layer(write, kv_cache_dtype) for name in self.names}
        self.vllm_config = SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context=self.layers),
            model_config=SimpleNamespace(dtype=model_dtype or spec.dtype),
        )

    def _layer(self, write: Write | None, kv_cache_dtype: str) -> Layer:
        spec = self.spec
        isa = _get_attn_isa(spec.dtype, spec.block_size, spec.head_size, kv_cache_dtype)
        if write is not None:
            return Layer(SimpleNamespace(do_kv_cache_update=write), isa)
        heads, dim = spec.num_kv_heads, spec.head_size
        return Layer(CPUAttentionBackendImpl(heads, dim, 1.0, heads, None, None, kv_cache_dtype), isa)

    def describe(self) -> TokenPages:
        """The caches must stay as they are, bit by bit."""
        before = self.raw.clone()
        found = describe(self.vllm_config, self.config, self.caches)
        assert torch.equal(self.raw, before)
        return found

    def write(self, number: int, blocks: list[int], first: int, *planes: Any) -> None:
        """Through the layer's own write: K and V, or latents [token, 1, dim], of tokens from number `first` of a sequence whose
        engine blocks are `blocks`."""
        name, tokens = self.names[number], self.spec.block_size
        layer, cache = self.layers[name], self.caches[name]
        where = torch.arange(first, first + len(planes[0]))
        slots = torch.tensor(blocks)[where // tokens] * tokens + where % tokens
        if isinstance(layer, LatentLayer):
            kv_c, k_pe = planes[0].split([layer.kv_lora_rank, self.spec.head_size - layer.kv_lora_rank], dim=-1)
            layer.impl.do_kv_cache_update(kv_c.squeeze(1), k_pe, cache.squeeze(1), slots, "auto", layer._k_scale)
        else:
            layer.impl.do_kv_cache_update(layer, *planes, cache, slots)


def full(block_tokens: int = 32, heads: int = 2, head_dim: int = 64, dtype: Any = torch.bfloat16, **more: Any) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=block_tokens, num_kv_heads=heads, head_size=head_dim, dtype=dtype, **more)


def flash(_layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    """As the GPU backends write: [block, head, token, K and V], whatever the order in memory."""
    tokens = cache.shape[2]
    planes = cache.transpose(1, 2).split(key.shape[-1], dim=-1)
    for plane, new in zip(planes, (key, value), strict=True):
        plane[slots // tokens, slots % tokens] = new


def bits(tensor: Any) -> np.ndarray:
    return tensor.contiguous().view(torch.int8).numpy()


@contextmanager
def engine_config(model: Path) -> Iterator[VllmConfig]:
    """vLLM's attention asks for the configuration of the engine it is in."""
    config: VllmConfig = EngineArgs(model=str(model), enforce_eager=True, max_model_len=512).create_engine_config()
    with set_current_vllm_config(config):
        yield config


def round_trip(paged: Paged) -> None:
    """Tokens from inside a block, over two block borders, to a slot and back to another place of other blocks."""
    found = paged.describe()
    assert not found.opaque, found.reason
    spec, block_tokens = paged.spec, paged.spec.block_size
    count = 2 * block_tokens - 3
    source, target = [4, 1, 6], [0, 5, 2]
    generator = torch.Generator().manual_seed(1)
    shape = (len(paged.names), found.planes, 3 * block_tokens, spec.num_kv_heads, spec.head_size)
    kv = torch.randn(shape, generator=generator).to(spec.dtype)
    for layer in range(len(paged.names)):
        paged.write(layer, source, 0, *kv[layer])

    slot = found.slot_layout(count)
    with Store(host_bytes=32 << 20, max_payload_bytes=slot.rank_bytes) as store:
        copier = PagedCopier.host(store, found.paged_layout(), slot, owner=found)
        namespace = make_namespace("test=1\n")
        lease = store.reserve_engine_keys(namespace, [b"a"], slot.rank_bytes, for_worker=True)
        where = (lease.slot_offsets(), lease.generations(), [0], [count], [0])
        copier.submit(1, "store", *where, found.block_ids(source), [5])
        copier.wait([1])
        assert [done.message for done in copier.poll()] == [""]
        assert lease.commit() == 1
        with store.acquire(namespace, KeyDeriver(namespace).derive_all([b"a"])) as read:
            payload = np.frombuffer(read.payload(0), np.int8)
            for layer, begin in enumerate(slot.layer_offset):
                wanted = kv[layer, :, 5 : 5 + count]
                assert np.array_equal(payload[begin : begin + found.planes * slot.plane_bytes], bits(wanted).reshape(-1))
            # What the engine's own write makes of the same tokens in the same place is what the scatter must make.
            before = paged.raw.clone()
            for layer in range(len(paged.names)):
                paged.write(layer, target, 11, *kv[layer, :, 5 : 5 + count])
            wanted = paged.raw.clone()
            assert not torch.equal(wanted, before)
            paged.raw.copy_(before)
            copier.submit(2, "load", *where, found.block_ids(target), [11])
            copier.wait([2])
            assert [done.message for done in copier.poll()] == [""]
            assert torch.equal(paged.raw, wanted)
        del copier
