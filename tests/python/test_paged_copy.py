"""PagedCopier on the CPU: pages to slots and back, through a store of the same process and of another."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lmcache_native as native
from conftest import MIB, StoreMaker

pytestmark = pytest.mark.unit

np = pytest.importorskip("numpy")

LAYERS, BLOCKS, BLOCK_TOKENS, HEADS, HEAD_DIM = 3, 12, 16, 2, 8
CHUNK_TOKENS = 2 * BLOCK_TOKENS


def opaque_pages(page_bytes: int = 4096) -> tuple[list[Any], native.PagedKvLayout]:
    pages = [np.random.default_rng(layer).integers(0, 256, (BLOCKS, page_bytes), np.uint8) for layer in range(LAYERS)]
    return pages, native.PagedKvLayout.opaque([p.ctypes.data for p in pages], BLOCKS, page_bytes, page_bytes)


def strided_pages() -> tuple[list[Any], native.PagedKvLayout]:
    """[2][block][token][head][dim] of int16: a K plane and a V plane per layer."""
    pages = [
        np.random.default_rng(layer).integers(0, 2**15, (2, BLOCKS, BLOCK_TOKENS, HEADS, HEAD_DIM), np.int16)
        for layer in range(LAYERS)
    ]
    plane, block, token, head, dim = pages[0].strides
    planes = [native.PlaneStrides(offset=i * plane, block=block, token=token, head=head, dim=dim) for i in range(2)]
    layout = native.PagedKvLayout.strided(
        layers=[(p.ctypes.data, planes) for p in pages],
        num_blocks=BLOCKS,
        block_tokens=BLOCK_TOKENS,
        heads=HEADS,
        head_dim=HEAD_DIM,
        element_bytes=2,
    )
    return pages, layout


def finish(copier: native.PagedCopier, job: int) -> native.CopyDone:
    copier.wait([job], 60.0)
    (done,) = copier.poll()
    assert done.id == job
    assert copier.poll() == []
    return done


def test_layouts_describe_themselves() -> None:
    _, opaque = opaque_pages()
    assert (opaque.layers, opaque.num_blocks, opaque.block_tokens, opaque.token_bytes) == (LAYERS, BLOCKS, 1, 4096)
    _, strided = strided_pages()
    assert (strided.block_tokens, strided.heads, strided.head_dim, strided.element_bytes) == (BLOCK_TOKENS, HEADS, HEAD_DIM, 2)
    slot = native.SlotLayout.make(strided, CHUNK_TOKENS)
    assert slot.chunk_tokens == CHUNK_TOKENS
    assert slot.plane_bytes == CHUNK_TOKENS * strided.token_bytes
    assert slot.rank_bytes % 4096 == 0
    sizes = native.SlotLayout.from_sizes(layers=LAYERS, planes=2, token_bytes=strided.token_bytes, chunk_tokens=CHUNK_TOKENS)
    assert (sizes.layer_offset, sizes.rank_bytes) == (slot.layer_offset, slot.rank_bytes)


def test_opaque_pages_round_trip(store: native.Store, namespace: bytes) -> None:
    pages, paged = opaque_pages()
    slot = native.SlotLayout.make(paged, 2)
    copier = native.PagedCopier.host(store, paged, slot, owner=pages)
    assert copier.name == "host"
    before = [p.copy() for p in pages]
    keys = [b"a", b"b", b"c"]

    lease = store.reserve_engine_keys(namespace, keys, slot.rank_bytes, for_worker=True)
    offsets, generations = lease.slot_offsets(), lease.generations()
    copier.submit(1, "store", offsets, generations, None, [2, 2, 2], [0, 2, 4], [5, 0, 7, 2, 11, 3])
    done = finish(copier, 1)
    assert done.ok, done
    assert done.bytes == LAYERS * 6 * 4096
    assert lease.commit() == 3

    for p in pages:
        p[:] = 0
    with store.acquire(namespace, native.KeyDeriver(namespace).derive_all(keys)) as read:
        # The last chunk's first block is not wanted.
        copier.submit(
            2,
            native.CopyDirection.SCATTER,
            np.array(read.slot_offsets(), np.uint64),
            np.array(read.generations(), np.uint32),
            first_tokens=np.array([0, 0, 1]),
            tokens=np.array([2, 2, 1]),
            block_begin=np.array([0, 2, 4], np.int32),
            block_ids=np.array([1, 2, 3, 4, 6], np.int32),
        )
        assert finish(copier, 2).ok
    for old, new in zip(before, pages, strict=True):
        assert (new[[1, 2, 3, 4, 6]] == old[[5, 0, 7, 2, 3]]).all()
        assert not new[[0, 5, 7, 8, 9, 10, 11]].any()


def test_cancelled_jobs_end_once_and_leave_no_quarantine(store: native.Store, namespace: bytes) -> None:
    pages, paged = opaque_pages(1 << 18)
    slot = native.SlotLayout.make(paged, 1)
    copier = native.PagedCopier.host(store, paged, slot, owner=pages)
    keys = [b"a", b"b", b"c", b"d"]
    lease = store.reserve_engine_keys(namespace, keys, slot.rank_bytes, for_worker=True)
    offsets, generations = lease.slot_offsets(), lease.generations()
    for job in range(4):
        copier.submit(job, "store", offsets[job : job + 1], generations[job : job + 1], None, [1], [0], [job])
    assert copier.cancel([0, 1, 2, 3, 99]) is None
    copier.cancel(np.array([3], np.uint64))
    copier.wait([0, 1, 2, 3], 60.0)
    done = {d.id: d for d in copier.poll()}
    assert sorted(done) == [0, 1, 2, 3]
    for d in done.values():  # those that were being copied ended well
        assert d.ok or (d.message == "item 0: cancelled" and d.bytes == 0 and d.failed_items == [0])
    assert lease.commit() == sum(d.ok for d in done.values())
    assert store.stats()["host_quarantined_slots"] == 0
    with pytest.raises(native.InvalidArgument, match=r"ids: .* got int"):
        copier.cancel(1)  # type: ignore[arg-type]


def test_layer_by_layer(store: native.Store, namespace: bytes) -> None:
    pages, paged = opaque_pages()
    slot = native.SlotLayout.make(paged, 2)
    copier = native.PagedCopier.host(store, paged, slot, owner=pages)
    keys = [b"a", b"b"]
    lease = store.reserve_engine_keys(namespace, keys, slot.rank_bytes, for_worker=True)
    at = (lease.slot_offsets(), lease.generations(), None, [2, 2], [0, 2])
    with pytest.raises(native.InvalidArgument, match="job 1: layer_by_layer is for loads"):
        copier.submit(1, "store", *at, [5, 0, 7, 2], layer_by_layer=True)
    copier.submit(1, "store", *at, [5, 0, 7, 2])
    assert finish(copier, 1).ok
    assert lease.commit() == 2
    with store.acquire(namespace, native.KeyDeriver(namespace).derive_all(keys)):
        copier.submit(2, "load", *at, [1, 3, 4, 6], layer_by_layer=True)
        for layers in range(LAYERS + 1):
            copier.wait_layers(2, layers)
            for page in pages[:layers]:
                assert (page[[1, 3, 4, 6]] == page[[5, 0, 7, 2]]).all()
        assert finish(copier, 2).ok
        copier.wait_layers(2, LAYERS, timeout_s=0.0, stream=0)
        with pytest.raises(native.InvalidArgument, match="layers is 4, must be at most 3"):
            copier.wait_layers(2, LAYERS + 1)
        with pytest.raises(native.NotFound, match="job 3"):
            copier.wait_layers(3, 1)
        wrong = [generation + 1 for generation in at[1]]
        copier.submit(4, "load", at[0], wrong, None, [2, 2], [0, 2], [1, 3, 4, 6], layer_by_layer=True)
        with pytest.raises(native.Aborted, match=r"job 4 failed: .*the slot was handed out anew"):
            copier.wait_layers(4, 1)
        assert not finish(copier, 4).ok


def test_strided_tokens_round_trip(store: native.Store, namespace: bytes) -> None:
    pages, paged = strided_pages()
    slot = native.SlotLayout.make(paged, CHUNK_TOKENS)
    copier = native.PagedCopier.host(store, paged, slot, owner=pages, threads=2)
    lease = store.reserve_engine_keys(namespace, [b"a"], slot.rank_bytes, for_worker=True)
    offsets, generations = list(lease.slot_offsets()), list(lease.generations())
    copier.submit(7, "store", offsets, generations, [0], [CHUNK_TOKENS], [0], [3, 9])
    assert finish(copier, 7).ok
    assert lease.commit() == 1

    with store.acquire(namespace, native.KeyDeriver(namespace).derive_all([b"a"])) as read:
        payload = np.frombuffer(read.payload(0), np.uint8)
        for layer, page in enumerate(pages):
            begin = slot.layer_offset[layer]
            part = payload[begin : begin + 2 * slot.plane_bytes].view(np.int16).reshape(2, CHUNK_TOKENS, HEADS, HEAD_DIM)
            assert (part == page[:, [3, 9]].reshape(part.shape)).all()

        want = [p[:, [3, 9]].reshape(2, CHUNK_TOKENS, HEADS, HEAD_DIM)[:, 5:25].copy() for p in pages]
        for page in pages:
            page[:] = 0
        # Tokens 5..24 of the chunk to the same places of blocks 1 and 2.
        copier.submit(8, "load", offsets, generations, [5], [20], [0], [1, 2], [5])
        assert finish(copier, 8).ok
    for page, tokens in zip(pages, want, strict=True):
        got = page[:, [1, 2]].reshape(2, CHUNK_TOKENS, HEADS, HEAD_DIM)
        assert (got[:, 5:25] == tokens).all()
        assert not got[:, :5].any()
        assert not got[:, 25:].any()


def test_a_stale_generation_fails_the_item(store: native.Store, namespace: bytes) -> None:
    pages, paged = opaque_pages()
    slot = native.SlotLayout.make(paged, 1)
    copier = native.PagedCopier.host(store, paged, slot, owner=pages)
    lease = store.reserve_engine_keys(namespace, [b"a", b"b"], slot.rank_bytes)
    generations = [lease.generations()[0], lease.generations()[1] + 1]
    copier.submit(1, "store", lease.slot_offsets(), generations, None, [1, 1], [0, 1], [0, 1])
    done = finish(copier, 1)
    assert not done.ok
    assert done.failed_items == [1]
    assert done.message
    assert lease.commit() == 1


def test_wrong_jobs_copy_nothing(store: native.Store, namespace: bytes) -> None:
    pages, paged = opaque_pages()
    slot = native.SlotLayout.make(paged, 1)
    copier = native.PagedCopier.host(store, paged, slot, owner=pages)
    lease = store.reserve_engine_keys(namespace, [b"a"], slot.rank_bytes)
    good: dict[str, Any] = {
        "id": 1,
        "direction": "store",
        "slot_offsets": lease.slot_offsets(),
        "generations": lease.generations(),
        "first_tokens": None,
        "tokens": [1],
        "block_begin": [0],
        "block_ids": [0],
    }
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"block_ids": [BLOCKS]}, rf"block_ids\[0\] is {BLOCKS}, must be in 0\.\.{BLOCKS - 1}"),
        ({"block_ids": [-1]}, r"block_ids\[0\] is -1"),
        ({"block_begin": [1]}, r"item 0: .*block_ids\[1\]"),
        ({"tokens": [2]}, r"item 0: first_token \+ tokens is 2"),
        ({"slot_offsets": [store.arena_bytes]}, r"item 0: slot_offset is"),
        ({"slot_offsets": [4097]}, r"item 0: slot_offset is 4097"),
        ({"direction": "sideways"}, "direction: 'store', 'load' or a CopyDirection expected, got 'sideways'"),
        ({"direction": 0}, "direction: .* got 0"),
        ({"tokens": [1, 1]}, r"tokens: as many as slot_offsets \(1\) expected, got 2"),
        ({"generations": []}, r"generations: as many as slot_offsets \(1\) expected, got 0"),
        ({"tokens": [-1]}, r"tokens\[0\]: 0\.\.4294967295 expected, got -1"),
        ({"tokens": [2**32]}, r"tokens\[0\]: 0\.\.4294967295 expected, got 4294967296"),
        ({"tokens": np.array([2**40])}, r"tokens\[0\]: 0\.\.4294967295 expected"),
        ({"slot_offsets": [-1]}, r"slot_offsets\[0\]"),
        ({"slot_offsets": [2**64]}, r"slot_offsets\[0\]: less than 2\*\*64 expected"),
        ({"tokens": [1.0]}, r"tokens\[0\]: an int expected, got 1\.0"),
        ({"tokens": [True]}, r"tokens\[0\]: an int expected, got True"),
        ({"tokens": np.ones(1)}, r"tokens: .* got numpy\.ndarray of float64"),
        ({"tokens": np.ones((1, 1), np.int32)}, "2 dimensions"),
        ({"block_ids": None}, "block_ids: .* got NoneType"),
        ({"tokens": None}, "tokens: .* got NoneType"),
    ]
    for change, message in wrong:
        with pytest.raises(native.InvalidArgument, match=message):
            copier.submit(**{**good, **change})
    assert copier.poll() == []
    copier.submit(**good)
    assert finish(copier, 1).ok


@pytest.mark.parametrize(
    "change", [{"bases": []}, {"bases": [0]}, {"num_blocks": 0}, {"page_bytes": 0}, {"block_stride": 100}], ids=str
)
def test_wrong_layouts(change: dict[str, Any]) -> None:
    good: dict[str, Any] = {"bases": [4096], "num_blocks": 2, "page_bytes": 4096, "block_stride": 4096}
    with pytest.raises(native.InvalidArgument):
        native.PagedKvLayout.opaque(**{**good, **change})


def test_a_copier_needs_an_arena() -> None:
    pages, paged = opaque_pages()
    with pytest.raises(native.InvalidArgument, match=r"arena: a Store or an ArenaAttachment expected, got list"):
        native.PagedCopier.host([], paged, native.SlotLayout.make(paged, 1), owner=pages)  # type: ignore[arg-type]


def test_cuda_says_why_it_is_unavailable(store: native.Store) -> None:
    if native.cuda_status()["devices"]:
        pytest.skip("a CUDA device is here")
    pages, paged = opaque_pages()
    with pytest.raises(native.CudaUnavailable) as raised:
        native.PagedCopier.cuda(store, paged, native.SlotLayout.make(paged, 1), owner=pages)
    with pytest.raises(native.CudaUnavailable):
        native.PagedCopier.prepare_cuda(paged, native.SlotLayout.make(paged, 1))
    assert isinstance(raised.value, native.Unavailable)
    assert raised.value.code == "unavailable"
    assert "CUDA" in str(raised.value) or "cuda" in str(raised.value)


def test_a_copier_keeps_its_owner_and_the_arena_alive(make_store: StoreMaker) -> None:
    class Owner:
        pass

    pages, paged = opaque_pages()
    owner = Owner()
    references = sys.getrefcount(owner)
    store = make_store()
    copier = native.PagedCopier.host(store, paged, native.SlotLayout.make(paged, 1), owner=owner)
    assert sys.getrefcount(owner) == references + 1
    store.close()
    del store
    assert copier.poll() == []
    del copier
    assert sys.getrefcount(owner) == references
    del pages


# ---- another process ----------------------------------------------------------------------------------------------------

WORKER = """
import pickle, sys
import numpy as np
import lmcache_native as native

engine_id, rank, rank_bytes, job = pickle.load(sys.stdin.buffer)
arena = native.ArenaAttachment.attach(engine_id, rank, rank_bytes, 60.0)
pages = np.full((4, 4096), rank + 1, np.uint8)
paged = native.PagedKvLayout.opaque([pages.ctypes.data], 4, 4096, 4096)
copier = native.PagedCopier.host(arena, paged, native.SlotLayout.make(paged, 1), rank=rank, owner=pages)
size = arena.bytes
arena.close()
offsets, generations = job
copier.submit(1, "store", offsets, generations, None, [1, 1], [0, 1], [3, 2])
copier.wait([1], 60.0)
(done,) = copier.poll()
pickle.dump((done.ok, done.message, size), sys.stdout.buffer)
"""


@pytest.fixture
def runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("LMCN_RUNTIME_DIR", str(path))
    return path


def test_two_worker_processes_fill_one_slot(make_store: StoreMaker, namespace: bytes, runtime_directory: Path) -> None:
    store = make_store(rank_count=2)
    store.serve("test-engine", 4096)
    lease = store.reserve_engine_keys(namespace, [b"a", b"b"], 2 * 4096, for_worker=True)
    job = (lease.slot_offsets(), lease.generations())
    for rank in (0, 1):
        ran = subprocess.run(
            [sys.executable, "-c", WORKER],
            input=pickle.dumps(("test-engine", rank, 4096, job)),
            capture_output=True,
            timeout=120,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr.decode()
        assert pickle.loads(ran.stdout) == (True, "", store.arena_bytes)
        if rank == 0:
            assert store.lookup(native.KeyDeriver(namespace).derive_all([b"a"])).hit == 0
    assert lease.commit() == 2
    with store.acquire(namespace, native.KeyDeriver(namespace).derive_all([b"a", b"b"])) as read:
        assert read.tobytes(0) == read.tobytes(1) == b"\x01" * 4096 + b"\x02" * 4096


def test_attach_errors(make_store: StoreMaker, runtime_directory: Path) -> None:
    with pytest.raises(native.DeadlineExceeded, match=str(runtime_directory)):
        native.ArenaAttachment.attach("nobody", 0, 4096, 0.05)
    store = make_store()
    store.serve("somebody", 4096)
    with pytest.raises(native.InvalidArgument, match="8192"):
        native.ArenaAttachment.attach("somebody", 0, 8192, 5.0)
    with pytest.raises(native.InvalidArgument):
        native.ArenaAttachment.attach("somebody", 1, 4096, 5.0)
    arena = native.ArenaAttachment.attach("somebody", 0, 4096, 5.0)
    assert (arena.bytes, arena.owner_pid) == (store.arena_bytes, os.getpid())
    arena.close()
    arena.close()
    with pytest.raises(native.Unavailable, match="the arena attachment is closed"):
        _ = arena.bytes
    assert store.arena_bytes <= 16 * MIB
