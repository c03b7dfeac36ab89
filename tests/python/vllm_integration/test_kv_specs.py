"""Every kind of KV cache that this vLLM knows is either offloaded or refused by its own name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1 import kv_cache_interface as kinds
from vllm.v1.core.kv_cache_utils import partial_hash_hits_enabled
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from lmcache_native.errors import Unsupported
from lmcache_native.integration.vllm import support

SHAPE: dict[str, Any] = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
PAGE: dict[str, Any] = {"block_size": 16, "page_size": 4096}
STATE: dict[str, Any] = {"block_size": 16, "shapes": ((4, 4),), "dtypes": (torch.bfloat16,)}

# Kind -> what else it takes to make one.
OFFLOADED: dict[str, dict[str, Any]] = {
    "FullAttentionSpec": SHAPE,
    "MLAAttentionSpec": SHAPE | {"num_kv_heads": 1},
    "SlidingWindowSpec": SHAPE | {"sliding_window": 128},
    "ChunkedLocalAttentionSpec": SHAPE | {"attention_chunk_size": 128},
}
REFUSED: dict[str, dict[str, Any]] = {
    "CircularBufferSpec": SHAPE,
    "CrossAttentionSpec": SHAPE,
    "EncoderOnlyAttentionSpec": SHAPE,
    "HiSparseHotSpec": PAGE | {"blocks_per_request": 1},
    "HiSparseResidentSpec": PAGE,
    "HiddenStateCacheSpec": SHAPE,
    "MambaSpec": STATE,
    "RSWASpec": SHAPE | {"rswa_window": 128},
    "SinkFullAttentionSpec": SHAPE | {"sink_len": 16},
    "SlidingWindowMLASpec": SHAPE | {"sliding_window": 128},
}
BASES = {"KVCacheSpec", "AttentionSpec", "UniformTypeKVCacheSpecs"}  # of which no layer is, or a group of others


def all_kinds(of: type = KVCacheSpec) -> Iterator[type]:
    yield of
    for kind in of.__subclasses__():
        yield from all_kinds(kind)


def made(kind: str, **changes: Any) -> Any:
    return getattr(kinds, kind)(**(OFFLOADED | REFUSED)[kind] | changes)


def group(spec: Any, **more: Any) -> KVCacheGroupSpec:
    return KVCacheGroupSpec(["a"], spec, **more)


def configured(*groups: KVCacheGroupSpec) -> SimpleNamespace:
    return SimpleNamespace(kv_cache_groups=list(groups))


FULL = FullAttentionSpec(**SHAPE)


def test_every_kind_is_decided() -> None:
    """A vLLM with another kind fails this until it is known whether its KV can be offloaded."""
    found = {kind.__name__ for kind in all_kinds() if kind.__module__.startswith("vllm.")}
    assert found == set(OFFLOADED) | set(REFUSED) | BASES


@pytest.mark.parametrize("kind", OFFLOADED)
def test_offloaded(kind: str) -> None:
    groups = (group(made(kind)), group(FULL))
    assert support.offloaded_groups(configured(*groups)) == groups


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name_alone_and_beside_others(kind: str) -> None:
    one = group(made(kind))
    for groups in ([one], [group(FULL), one]):
        for refuse in (support.offloaded_groups, support.offloaded_group):
            with pytest.raises(Unsupported, match=rf"^{kind} layers: not yet supported .*: \w"):
                refuse(configured(*groups))


@pytest.mark.parametrize("kind", [*OFFLOADED, "MambaSpec"])
def test_a_kind_of_somebody_elses_is_refused(kind: str) -> None:
    """A platform's or a plugin's: it may mean something else by its blocks."""
    theirs = dataclasses.make_dataclass("TheirSpec", [], bases=(getattr(kinds, kind),), frozen=True)
    with pytest.raises(Unsupported, match=r"^TheirSpec layers"):
        support.offloaded_groups(configured(group(theirs(**(OFFLOADED | REFUSED)[kind]))))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (FullAttentionSpec(**SHAPE, non_causal=True), "^non-causal attention"),
        (SlidingWindowSpec(**SHAPE, sliding_window=128, extra_retained_tokens=2), "retains 2 tokens below its window"),
    ],
)
def test_of_an_offloaded_kind_but_not_as_usual(spec: Any, message: str) -> None:
    for groups in ([group(spec)], [group(FULL), group(spec)]):
        with pytest.raises(Unsupported, match=message):
            support.offloaded_groups(configured(*groups))


@pytest.mark.parametrize("kind", ["RSWASpec", "MambaSpec"])
def test_layers_of_a_uniform_group_are_looked_at_one_by_one(kind: str) -> None:
    layers = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": FULL, "b": made(kind)})
    with pytest.raises(Unsupported, match=f"^{kind} layers"):
        support.offloaded_groups(configured(group(layers)))
    other = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": FULL, "b": made("FullAttentionSpec", head_size=128)})
    assert support.offloaded_groups(configured(group(other))) == (group(other),)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"is_eagle_group": True}, "KV cache group 1 holds the layers of an EAGLE or MTP draft model"),
        ({"host_resident": True}, r"KV cache group 1 \(default\) is not for connectors: HiSparse"),
        ({"enable_kv_transfer": False, "role": kinds.KVCacheGroupRole.HISPARSE_SOURCE}, r"group 1 \(hisparse_source\)"),
    ],
)
def test_groups_that_are_not_for_us(more: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        support.offloaded_groups(configured(group(FULL), group(made("SlidingWindowSpec"), **more)))


def test_no_groups() -> None:
    with pytest.raises(Unsupported, match="nothing to offload"):
        support.offloaded_groups(configured())


def test_chunks_of_tokens_take_one_group_of_full_attention() -> None:
    one = group(FULL)
    assert support.offloaded_group(configured(one)) is one
    window = group(made("SlidingWindowSpec"))
    several = r"2 KV cache groups \(FullAttentionSpec, SlidingWindowSpec\): .* use NativeOffloadingConnector"
    with pytest.raises(Unsupported, match=several):
        support.offloaded_group(configured(one, window))
    with pytest.raises(Unsupported, match=r"1 KV cache groups \(SlidingWindowSpec\): .*LMCACHE_NATIVE=1"):
        support.offloaded_group(configured(window))


def test_blocks_that_the_engine_zeroes() -> None:
    """The V2 runner zeroes a block that it hands out again before a store of its last content is submitted."""
    layers = {"a": FULL, "b": made("FullAttentionSpec", dtype=torch.uint8, kv_quant_mode=kinds.KVQuantMode.FP8_PER_TENSOR)}
    one = group(UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=layers))
    windows = group(made("SlidingWindowSpec", dtype=torch.uint8, kv_quant_mode=kinds.KVQuantMode.FP8_PER_TENSOR))
    for groups in ([one], [group(FULL), windows]):
        mixed = KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=groups)
        support.check_zeroing(mixed, SimpleNamespace(use_v2_model_runner=False))
        with pytest.raises(Unsupported, match=r"different precisions .* use VLLM_USE_V2_MODEL_RUNNER=0"):
            support.check_zeroing(mixed, SimpleNamespace(use_v2_model_runner=True))
    for kind in OFFLOADED:
        same = KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=[group(FULL), group(made(kind))])
        support.check_zeroing(same, SimpleNamespace(use_v2_model_runner=True))


@pytest.mark.parametrize("kind", OFFLOADED)
def test_no_offloaded_kind_has_hits_within_a_block(kind: str) -> None:
    """vLLM's V2 runner copies blocks (copy on write, of hits within a block) before it calls the connector, so that a store which
    is submitted then would read a copy's target. Only aligned Mamba states have such hits."""
    assert not partial_hash_hits_enabled([group(FULL), group(made(kind))], hash_block_size=8)
    assert partial_hash_hits_enabled([group(FULL), group(made("MambaSpec", mamba_cache_mode="align"))], hash_block_size=8)
