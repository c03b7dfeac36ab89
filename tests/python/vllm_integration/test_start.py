"""What is decided when an engine starts: support, versions, the plugin, the namespace, agreement of the ranks."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, KVCacheGroupSpec, SlidingWindowSpec

from lmcache_native.config import GIB, NativeConfig, resolve
from lmcache_native.errors import InvalidArgument, Unavailable, Unsupported
from lmcache_native.integration.vllm import compat, layout, namespace, plugin, support
from lmcache_native.integration.vllm.connector import NativeOffloadingConnector, NativeWorkerMetadata
from lmcache_native.integration.vllm.layout import GroupLayout, WorkerLayout, agreed_layout, machine_id
from lmcache_native.integration.vllm.opening import engines_sharing

HOST = NativeConfig(host_bytes=GIB)
NVME = NativeConfig(host_bytes=GIB, directories=(Path("/kv"),), nvme_bytes=GIB)
LAYOUT = WorkerLayout(
    rank=0,
    layers=3,
    page_bytes=65536,
    rank_bytes=3 * 65536,
    layout_id="opaque:test",
    machine=machine_id(),
    groups=(GroupLayout("3x65536", 3 * 65536),),
)


def engine_config(model: Path, **changes: Any) -> VllmConfig:
    return EngineArgs(model=str(model), enforce_eager=True, max_model_len=512, **changes).create_engine_config()


@pytest.fixture
def with_plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Registers with LMCACHE_NATIVE=value; everything is as before afterwards."""
    registry = dict(KVConnectorFactory._registry)
    method = VllmConfig._post_init_kv_transfer_config

    def register(value: str) -> None:
        monkeypatch.setenv("LMCACHE_NATIVE", value)
        plugin.register()

    yield register
    KVConnectorFactory._registry.clear()
    KVConnectorFactory._registry.update(registry)
    VllmConfig._post_init_kv_transfer_config = method


# ---- plugin -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["", "0", "no", "off", "False"])
def test_plugin_leaves_vllms_own_connector_unless_asked(with_plugin: Callable[[str], None], value: str) -> None:
    with_plugin(value)
    assert KVConnectorFactory.get_connector_class_by_name("OffloadingConnector") is OffloadingConnector


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_plugin_replaces_and_keeps_the_original(with_plugin: Callable[[str], None], value: str) -> None:
    with_plugin(value)
    hook = VllmConfig._post_init_kv_transfer_config
    with_plugin(value)
    assert VllmConfig._post_init_kv_transfer_config is hook
    assert KVConnectorFactory.get_connector_class_by_name("OffloadingConnector") is NativeOffloadingConnector
    assert KVConnectorFactory.get_connector_class_by_name(plugin.OFFLOADING + plugin.ORIGINAL_SUFFIX) is OffloadingConnector


def test_plugin_refuses_what_is_neither(with_plugin: Callable[[str], None]) -> None:
    with pytest.raises(InvalidArgument, match=r"LMCACHE_NATIVE='2' .* must be one of 1, true"):
        with_plugin("2")


def test_size_flag_reaches_us_with_the_number_of_engines(with_plugin: Callable[[str], None], tiny: Path) -> None:
    with_plugin("1")
    transfer = engine_config(tiny, kv_offloading_size=0.25).kv_transfer_config
    assert KVConnectorFactory.get_connector_class(transfer) is NativeOffloadingConnector
    assert transfer.kv_connector_extra_config == {"cpu_bytes_to_use": 0.25 * GIB, "data_parallel_engines": 1}


@pytest.mark.parametrize(
    ("environ", "size", "message"),
    [
        ({"LMCACHE_LOCAL_DISK": "/kv"}, 0.25, "without max_local_disk_size"),
        ({"LMCACHE_MAX_LOCAL_DISK_SIZE": "1"}, 0.25, "without local_disk"),
        ({"LMCACHE_LOCAL_DISK": "/proc/kv", "LMCACHE_MAX_LOCAL_DISK_SIZE": "0.01"}, 0.25, "/proc"),
        ({}, 1e6, "this machine may use"),
        ({"LMCACHE_CHUNK_SIZE": "none"}, 0.25, "LMCACHE_CHUNK_SIZE='none'"),
    ],
)
def test_wrong_values_fail_in_the_front_end(
    with_plugin: Callable[[str], None],
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    environ: dict[str, str],
    size: float,
    message: str,
) -> None:
    with_plugin("1")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):  # vLLM's pydantic wraps our InvalidArgument, a ValueError
        engine_config(tiny, kv_offloading_size=size)


# ---- support ------------------------------------------------------------------------------------------------------------


def test_the_users_number_of_engines_wins(with_plugin: Callable[[str], None], tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_plugin("1")
    monkeypatch.setenv("LMCACHE_DATA_PARALLEL_ENGINES", "8")
    transfer = engine_config(tiny, kv_offloading_size=0.25).kv_transfer_config
    assert resolve(transfer.kv_connector_extra_config, {"LMCACHE_DATA_PARALLEL_ENGINES": "8"}).data_parallel_engines == 8


def test_namespace_holds_what_the_server_tells_the_processor_and_not_who_loaded_the_model(plain: VllmConfig) -> None:
    assert "transformers_version" in plain.model_config.hf_config.to_json_string(use_diff=False)
    assert "transformers_version" not in namespace._config_text(plain.model_config)
    assert namespace._rope_depends_on_length(SimpleNamespace(rope_parameters={"full_attention": {"rope_type": "longrope"}}))
    assert not namespace._rope_depends_on_length(SimpleNamespace(rope_parameters={"full_attention": {"rope_type": "default"}}))


def test_chunk_size_in_blocks() -> None:
    assert support.blocks_per_chunk(None, [128], {"block_size": 256}) is None
    assert support.blocks_per_chunk(256, [128, 128], {}) == 2
    with pytest.raises(InvalidArgument, match=r"chunk_size=200: must be a multiple of .* 128 tokens, for example 128"):
        support.blocks_per_chunk(200, [128], {})
    assert support.blocks_per_chunk(256, [128, 128], {"blocks_per_chunk": 2}) == 2
    with pytest.raises(InvalidArgument, match=r"chunk_size=256 and blocks_per_chunk=4 contradict"):
        support.blocks_per_chunk(256, [128, 128], {"blocks_per_chunk": 4})
    with pytest.raises(InvalidArgument, match=r"chunk_size=256 and block_size=512 contradict"):
        support.blocks_per_chunk(256, [128, 128], {"block_size": 512})
    with pytest.raises(InvalidArgument, match=r"chunk_size=256: .* groups have blocks of 64, 128 tokens"):
        support.blocks_per_chunk(256, [128, 64, 128], {})


def test_role_and_spec() -> None:
    with pytest.raises(InvalidArgument, match="kv_both"):
        support.check_role("kv_producer")
    with pytest.raises(InvalidArgument, match="TieringOffloadingSpec"):
        support.check_spec_name({"spec_name": "TieringOffloadingSpec"}, "NativeOffloadingSpec")


def engine_of(size: int, index: int, engine_id: str) -> SimpleNamespace:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_size=size, data_parallel_index=index),
        kv_transfer_config=SimpleNamespace(engine_id=engine_id),
    )


def test_engines_that_share_the_limit() -> None:
    """vLLM resets the size to 1 in the engine cores of dense models, and only the id and the index tell of siblings."""
    assert engines_sharing(engine_of(1, 0, "id"), NVME) == 1
    assert engines_sharing(engine_of(4, 2, "id_dp2"), NVME) == 4
    assert engines_sharing(engine_of(1, 1, "id_dp1"), dataclasses.replace(NVME, data_parallel_engines=2)) == 2
    assert engines_sharing(engine_of(1, 1, "id_dp1"), HOST) == 1
    for index in (0, 1):
        with pytest.raises(InvalidArgument, match="data_parallel_engines missing"):
            engines_sharing(engine_of(1, index, f"id_dp{index}"), NVME)


# ---- versions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "warnings"), [("0.32.0", 0), ("0.32.5+cpu", 0), ("0.33.0", 1), ("0.320", 1)])
def test_another_version_is_one_warning(monkeypatch: pytest.MonkeyPatch, version: str, warnings: int) -> None:
    lines: list[str] = []
    log = logging.Logger("test")
    log.addHandler(type("Collect", (logging.Handler,), {"emit": lambda _, record: lines.append(record.getMessage())})())
    monkeypatch.setattr(compat, "vllm_version", lambda: version)
    compat.warn_if_untested(log)
    assert len(lines) == warnings
    assert all(version in line and "0.32" in line for line in lines)


def test_missing_interface_is_one_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compat.INTERFACES, "Gone", ("vllm.v1.kv_offload.base", "OffloadingGizmo"))
    with pytest.raises(Unsupported, match=r"has no vllm\.v1\.kv_offload\.base\.OffloadingGizmo"):
        compat.__getattr__("Gone")


def test_every_interface_we_name_is_there() -> None:
    for name in compat.INTERFACES:
        assert compat.__getattr__(name) is not None


# ---- agreement of the ranks ---------------------------------------------------------------------------------------------


def test_ranks_agree() -> None:
    assert agreed_layout({0: LAYOUT, 1: dataclasses.replace(LAYOUT, rank=1)}, 2) is LAYOUT


@pytest.mark.parametrize(
    ("layouts", "error", "message"),
    [
        ({0: LAYOUT}, Unavailable, r"rank\(s\) \[1\] of 2"),
        (
            {0: LAYOUT, 1: dataclasses.replace(LAYOUT, page_bytes=4096)},
            InvalidArgument,
            "page_bytes: rank 0 has 65536, rank 1 has 4096",
        ),
        ({0: LAYOUT, 1: dataclasses.replace(LAYOUT, layout_id="x")}, InvalidArgument, "layout_id"),
        ({0: LAYOUT, 1: dataclasses.replace(LAYOUT, groups=LAYOUT.groups * 2)}, InvalidArgument, "groups"),
        ({0: LAYOUT, 1: dataclasses.replace(LAYOUT, machine="elsewhere")}, Unsupported, "another machine"),
        ({0: LAYOUT, 1: object()}, InvalidArgument, "another KV connector"),
    ],
)
def test_ranks_that_do_not_agree(layouts: dict[int, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        agreed_layout(layouts, 2)


def test_worker_metadata_of_several_ranks_and_of_vllm() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata

    merged = NativeWorkerMetadata({1: 1}, failed_loads={5}).aggregate(NativeWorkerMetadata({1: 1, 2: 1}, failed_loads={6}))
    assert (merged.completed_jobs, merged.failed_loads) == ({1: 2, 2: 1}, {5, 6})
    assert merged.aggregate(OffloadingWorkerMetadata({2: 1})).failed_loads == {5, 6}


# ---- namespace ----------------------------------------------------------------------------------------------------------


def described(
    config: VllmConfig,
    native: NativeConfig = NVME,
    *,
    chunk_blocks: int = 1,
    worker: WorkerLayout = LAYOUT,
    groups: Sequence[KVCacheGroupSpec] | None = None,
) -> str:
    if groups is None:
        spec = FullAttentionSpec(block_size=config.cache_config.block_size, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
        groups = [KVCacheGroupSpec(["l0", "l1", "l2"], spec)]
    scheme = namespace.block_hash_scheme(config, native, groups, 128, chunk_blocks)
    return namespace.canonical_text(namespace.describe(config, native, worker, groups, scheme))


@pytest.fixture(scope="module")
def plain(tiny: Path) -> VllmConfig:
    return engine_config(tiny)


def test_namespace_is_the_same_for_the_same(plain: VllmConfig, tiny: Path) -> None:
    assert described(plain) == described(engine_config(tiny))


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float32"},
        {"block_size": 64},
        {"prefix_caching_hash_algo": "sha256_cbor"},
        {"hf_overrides": {"rope_theta": 12345.0}},
        {"tensor_parallel_size": 2},
        {"revision": "other"},
        {"load_format": "dummy"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_whatever_changes_the_bytes_changes_the_namespace(plain: VllmConfig, tiny: Path, changes: dict[str, Any]) -> None:
    assert described(engine_config(tiny, **changes)) != described(plain)


def test_layout_chunk_and_seed_change_the_namespace(plain: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    base = described(plain)
    assert described(plain, chunk_blocks=2) != base
    assert described(plain, worker=dataclasses.replace(LAYOUT, layout_id="opaque:other")) != base
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert described(plain) != base


def groups_of(
    config: VllmConfig, window: int = 128, split: int = 2, layers: str = "abcd", **changes: Any
) -> list[KVCacheGroupSpec]:
    """Full attention and sliding windows."""
    shape: dict[str, Any] = {"block_size": config.cache_config.block_size, "num_kv_heads": 2, "head_size": 64} | changes
    full = FullAttentionSpec(**shape, dtype=torch.bfloat16)
    windows = SlidingWindowSpec(**shape, dtype=torch.bfloat16, sliding_window=window)
    return [KVCacheGroupSpec(list(layers[:split]), full), KVCacheGroupSpec(list(layers[split:]), windows)]


def several(*pages: str) -> WorkerLayout:
    return dataclasses.replace(LAYOUT, groups=tuple(GroupLayout(text, 65536) for text in pages))


def test_every_group_is_in_the_namespace(plain: VllmConfig) -> None:
    """Each of these would have other bytes, or other layers' bytes, under the same keys."""
    two = several("3x65536", "2x65536")
    promoted = groups_of(plain)
    promoted[1].kv_cache_spec = promoted[0].kv_cache_spec
    chunked = groups_of(plain)
    chunked[1].kv_cache_spec = ChunkedLocalAttentionSpec(
        block_size=chunked[1].kv_cache_spec.block_size, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, attention_chunk_size=128
    )
    found = [
        described(plain),
        described(plain, worker=two, groups=groups_of(plain)),
        described(plain, worker=two, groups=groups_of(plain, window=256)),
        described(plain, worker=two, groups=groups_of(plain, split=3)),
        described(plain, worker=two, groups=groups_of(plain, layers="abdc")),
        described(plain, worker=two, groups=groups_of(plain, block_size=64)),
        described(plain, worker=two, groups=groups_of(plain)[::-1]),
        described(plain, worker=two, groups=promoted),
        described(plain, worker=two, groups=chunked),
        described(plain, worker=several("3x65536", "1x65536+1x32768"), groups=groups_of(plain)),
        described(plain, worker=several("1x65536"), groups=groups_of(plain)[1:]),
        described(plain, worker=several("1x65536"), groups=groups_of(plain)[:1]),
        described(plain, worker=several("1x65536+2x32768"), groups=groups_of(plain)[:1]),
        described(plain, worker=several("2x32768+1x65536"), groups=groups_of(plain)[:1]),
    ]
    assert len(set(found)) == len(found)
    assert described(plain, worker=two, groups=groups_of(plain)) == found[1]


def test_layers_that_are_not_quantised_change_the_namespace(tiny: Path) -> None:
    found = {
        described(engine_config(tiny, **changes))
        for changes in (
            {"kv_cache_dtype": "auto"},
            {"kv_cache_dtype": "fp8"},
            {"kv_cache_dtype": "fp8_e5m2"},
            {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]},
            {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["1"]},
            {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["sliding_window"]},
        )
    }
    assert len(found) == 6


def test_other_weights_change_the_namespace(plain: VllmConfig, tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / tiny.name
    copy.mkdir()
    for file in tiny.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    same = engine_config(copy)
    before = described(same)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert described(same) != before


@pytest.mark.parametrize("algorithm", ["xxhash", "xxhash_cbor"])
def test_hashes_that_do_not_last_are_refused_for_nvme_only(tiny: Path, algorithm: str) -> None:
    config = engine_config(tiny, prefix_caching_hash_algo=algorithm)
    with pytest.raises(InvalidArgument, match=f"--prefix-caching-hash-algo={algorithm}: .* use sha256 or sha256_cbor"):
        described(config)
    assert algorithm in described(config, HOST)


def test_weights_that_cannot_be_seen(plain: VllmConfig) -> None:
    hidden = SimpleNamespace(
        model="s3://bucket/model",
        model_weights="",
        revision=None,
        hf_config=plain.model_config.hf_config,
        hf_text_config=plain.model_config.hf_text_config,
        quantization=None,
        quantization_config=None,
        seed=0,
    )
    load = plain.load_config
    with pytest.raises(InvalidArgument, match="set model_fingerprint"):
        namespace._model_parts("model", hidden, load, NVME, lasting=True)
    assert namespace._model_parts("model", hidden, load, HOST, lasting=False)["model.weights"] == "unknown"
    named = dataclasses.replace(NVME, model_fingerprint="v7")
    assert namespace._model_parts("model", hidden, load, named, lasting=True)["model.weights"] == "given:v7"


def test_layout_id_names_engine_backend_and_dtypes(plain: VllmConfig) -> None:
    text = layout.layout_id(plain, "cpu", ["CPU_ATTN/vec"])
    assert f"vllm-{compat.vllm_version()}" in text
    for part in ("CPU_ATTN/vec", "runner=", "cache_dtype=", "model_dtype=", "device=cpu"):
        assert part in text


def test_extra_config_of_a_real_transfer_config_resolves(tiny: Path) -> None:
    config = engine_config(
        tiny,
        kv_transfer_config={
            "kv_connector": "NativeOffloadingConnector",
            "kv_connector_module_path": "lmcache_native.integration.vllm",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"max_local_cpu_size": 0.5, "lmcache.local_disk": "file:///kv", "max_local_disk_size": 1},
        },
    )
    found = resolve(config.kv_transfer_config.kv_connector_extra_config, {})
    assert (found.host_bytes, found.directory) == (GIB // 2, Path("/kv"))
