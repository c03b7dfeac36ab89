"""WriteLease and ReadLease: what they show, how long it lives, what ends them."""

from __future__ import annotations

import gc
import pickle
from typing import Any

import pytest

import lmcache_native as native
from conftest import MIB, StoreMaker

pytestmark = pytest.mark.unit

np = pytest.importorskip("numpy")

PAYLOAD = 5000


def keys_of(count: int) -> native.ChunkKeys:
    return native.ChunkKeys.from_bytes(b"".join(i.to_bytes(32, "big") for i in range(1, count + 1)))


def publish(store: native.Store, namespace: bytes, keys: native.ChunkKeys) -> None:
    with store.reserve(namespace, keys, PAYLOAD) as lease:
        for i in range(len(lease)):
            lease.payload(i)[:] = bytes([i + 1]) * PAYLOAD
            lease.mark_filled(i)
        assert lease.commit() == len(keys)


def test_reserve_gives_slots_for_what_is_absent(store: native.Store, namespace: bytes) -> None:
    keys = keys_of(5)
    publish(store, namespace, keys[1:3])
    lease = store.reserve(namespace, keys, PAYLOAD)
    assert len(lease) == 3
    assert list(lease.positions) == [0, 3, 4]
    assert lease.payload_bytes == PAYLOAD
    offsets, generations = lease.slot_offsets(), lease.generations()
    assert (offsets.typecode, offsets.itemsize, generations.typecode, generations.itemsize) == ("Q", 8, "I", 4)
    assert len(set(offsets)) == len(offsets) == len(generations) == 3
    assert all(offset % 4096 == 0 and offset < store.arena_bytes for offset in offsets)
    assert all(generations)
    assert pickle.loads(pickle.dumps((offsets, generations))) == (offsets, generations)


def test_commit_publishes_only_what_was_filled(store: native.Store, namespace: bytes) -> None:
    keys = keys_of(3)
    lease = store.reserve(namespace, keys, PAYLOAD)
    lease.mark_filled(0)
    lease.mark_filled(1)
    assert store.lookup(keys).hit == 0
    assert lease.commit() == 2
    assert len(lease) == 0
    assert lease.commit() == 0
    assert store.lookup(keys).hit == 2


def test_every_rank_must_say_so(make_store: StoreMaker, namespace: bytes) -> None:
    store = make_store(rank_count=2)
    keys = keys_of(2)
    lease = store.reserve(namespace, keys, 2 * 4096)
    lease.mark_filled(0, 0)
    lease.mark_filled(0, rank=1)
    lease.mark_filled(1, rank=1)
    with pytest.raises(native.InvalidArgument, match="rank: less than 2 expected, got 2"):
        lease.mark_filled(0, 2)
    assert lease.commit() == 1
    assert store.lookup(keys).hit == 1


@pytest.mark.parametrize("how", ["abort", "exit", "exception", "drop"])
def test_a_lease_that_is_not_committed_leaves_nothing(store: native.Store, namespace: bytes, how: str) -> None:
    keys = keys_of(2)
    lease = store.reserve(namespace, keys, PAYLOAD)
    lease.mark_filled(0)
    if how == "abort":
        lease.abort()
        lease.abort()
    elif how == "exit":
        with lease:
            pass
    elif how == "exception":
        with pytest.raises(ZeroDivisionError), lease:
            raise ZeroDivisionError
    else:
        del lease
        gc.collect()
    assert store.lookup(keys).hit == 0
    assert store.stats()["host_used_bytes"] == 0
    publish(store, namespace, keys)


def test_with_keeps_what_was_committed(store: native.Store, namespace: bytes) -> None:
    keys = keys_of(1)
    with store.reserve(namespace, keys, PAYLOAD) as lease:
        lease.mark_filled(0)
        lease.commit()
    assert store.lookup(keys).hit == 1


def test_payload_is_the_arena_itself(store: native.Store, namespace: bytes) -> None:
    keys = keys_of(2)
    with store.reserve(namespace, keys, PAYLOAD) as lease:
        view = lease.payload(0)
        assert (view.nbytes, view.format, view.readonly, view.ndim) == (PAYLOAD, "B", False, 1)
        np.frombuffer(view, np.uint8)[:] = 7
        lease.fill(1, np.full(PAYLOAD, 9, np.uint8))
        lease.mark_filled(0)
        lease.mark_filled(1)
        lease.commit()
    with store.acquire(namespace, keys) as read:
        assert len(read) == 2
        seen = read.payload(0)
        assert seen.readonly
        assert bytes(seen) == read.tobytes(0) == bytes([7]) * PAYLOAD
        out = np.zeros(PAYLOAD, np.uint8)
        read.copy_to(1, out)
        assert (out == 9).all()
        with pytest.raises(TypeError, match="read-only"):
            seen[0] = 1


@pytest.mark.parametrize("index", [2, 2**40])
def test_an_index_out_of_range(store: native.Store, namespace: bytes, index: int) -> None:
    lease = store.reserve(namespace, keys_of(2), PAYLOAD)
    for call in (lease.payload, lease.mark_filled, lambda i: lease.fill(i, bytes(PAYLOAD))):
        with pytest.raises(native.InvalidArgument, match=f"index: less than 2 expected, got {index}"):
            call(index)
    with pytest.raises(TypeError):
        lease.payload(-1)


def test_fill_wants_the_exact_length(store: native.Store, namespace: bytes) -> None:
    lease = store.reserve(namespace, keys_of(1), PAYLOAD)
    for nbytes in (0, PAYLOAD - 1, PAYLOAD + 1):
        with pytest.raises(native.InvalidArgument, match=f"data: {PAYLOAD} bytes expected, got {nbytes}"):
            lease.fill(0, bytes(nbytes))


def test_ended_leases_show_nothing(store: native.Store, namespace: bytes) -> None:
    keys = keys_of(1)
    write = store.reserve(namespace, keys, PAYLOAD)
    write.abort()
    for call in (write.payload, write.mark_filled):
        with pytest.raises(native.InvalidArgument, match="the lease has ended"):
            call(0)
    publish(store, namespace, keys)
    read = store.acquire(namespace, keys)
    read.release()
    read.release()
    for get in (read.payload, read.tobytes):
        with pytest.raises(native.InvalidArgument, match="the lease has ended"):
            get(0)
    assert (list(read.slot_offsets()), list(read.generations()), len(read)) == ([], [], 0)


def test_a_read_lease_pins(store: native.Store, namespace: bytes) -> None:
    keys = keys_of(1)
    publish(store, namespace, keys)
    with store.acquire(namespace, keys) as lease:
        for i in range(40):
            store.put(i.to_bytes(8, "big"), bytes(MIB))
        assert bytes(lease.payload(0)) == bytes([1]) * PAYLOAD
        assert store.lookup(keys).hit == 1
        assert store.stats()["host_pinned_slots"] == 1
    assert store.stats()["host_pinned_slots"] == 0


def view_without_owners(make_store: StoreMaker, namespace: bytes, kind: str) -> Any:
    """Of a payload whose lease and store nobody refers to any more; the store is closed."""
    store = make_store()
    keys = keys_of(1)
    if kind == "write":
        lease: Any = store.reserve(namespace, keys, PAYLOAD)
        lease.fill(0, bytes([1]) * PAYLOAD)
    else:
        publish(store, namespace, keys)
        lease = store.acquire(namespace, keys)
    store.close()
    return np.frombuffer(lease.payload(0), np.uint8) if kind == "numpy" else lease.payload(0)


@pytest.mark.parametrize("kind", ["read", "write", "numpy"])
def test_a_view_keeps_the_arena_mapped(make_store: StoreMaker, namespace: bytes, kind: str) -> None:
    view = view_without_owners(make_store, namespace, kind)
    gc.collect()
    assert bytes(view) == bytes([1]) * PAYLOAD
    if kind == "write":
        view[:] = bytes(PAYLOAD)


def test_leases_outlive_a_closed_store(make_store: StoreMaker, namespace: bytes) -> None:
    store = make_store()
    keys = keys_of(1)
    publish(store, namespace, keys)
    read = store.acquire(namespace, keys)
    request = store.begin_request(namespace)
    write = store.reserve(namespace, keys_of(2)[1:], PAYLOAD)
    store.close()
    assert read.tobytes(0) == bytes([1]) * PAYLOAD
    write.abort()
    request.end()
    read.release()


def test_slots_of_a_job_that_never_starts_come_back(store: native.Store, namespace: bytes) -> None:
    lease = store.reserve(namespace, keys_of(2), PAYLOAD, for_worker=True)
    offsets, generations = lease.slot_offsets(), lease.generations()
    lease.abort()
    assert store.stats()["host_quarantined_slots"] == 2
    store.job_not_started(0, offsets, [g + 1 for g in generations], load=False)
    store.job_not_started(0, [store.arena_bytes, 1], [1, 1], load=False)
    with pytest.raises(native.InvalidArgument, match=r"generations: as many as slot_offsets \(2\) expected, got 0"):
        store.job_not_started(0, offsets, [], load=False)
    assert store.stats()["host_quarantined_slots"] == 2
    store.job_not_started(0, offsets, generations, load=False)
    publish(store, namespace, keys_of(2))
    assert store.stats()["host_quarantined_slots"] == 0
