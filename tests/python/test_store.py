"""Store: put and get, the NVMe tier, reopening, requests, errors."""

from __future__ import annotations

import array
import math
import select
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lmcache_native as native
from conftest import MIB, StoreMaker
from lmcache_native import Presence, Tier

pytestmark = pytest.mark.unit

np = pytest.importorskip("numpy")


def noise(nbytes: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def engine_key(number: int) -> bytes:
    return number.to_bytes(36, "big")


def publish(store: native.Store, namespace: bytes, keys: list[bytes], payload: bytes) -> None:
    with store.reserve_engine_keys(namespace, keys, len(payload)) as lease:
        for i in range(len(lease)):
            lease.fill(i, payload)
            lease.mark_filled(i)
        assert lease.commit() == len(keys)


# ---- put and get --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [1, 31, 4095, 4096, 4097, 65537, MIB + 3])
def test_put_then_get_gives_the_exact_bytes(store: native.Store, nbytes: int) -> None:
    data = noise(nbytes)
    assert store.get(b"k") is None
    assert store.put(b"k", data) is True
    assert store.get(b"k") == data.tobytes()
    out = np.zeros(nbytes, np.uint8)
    assert store.get(b"k", out) is out
    assert np.array_equal(out, data)


BUFFERS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: b"some bytes",
    "bytearray": lambda: bytearray(b"some bytes"),
    "memoryview": lambda: memoryview(b"xsome bytesx")[1:-1],
    "array": lambda: array.array("d", [1.5, 2.5]),
    "float16 matrix": lambda: noise(64).view(np.float16).reshape(4, 8),
    "Fortran vector": lambda: np.asfortranarray(np.arange(5)),
}


@pytest.mark.parametrize("kind", BUFFERS)
def test_any_contiguous_buffer(store: native.Store, kind: str) -> None:
    data = BUFFERS[kind]()
    assert store.put(b"k", data)
    assert store.get(b"k") == memoryview(data).tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_torch_tensors(store: native.Store, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    data = torch.arange(24).reshape(2, 12).to(getattr(torch, dtype))
    assert store.put(b"k", data)
    out = torch.zeros_like(data)
    assert store.get(b"k", out) is out
    assert torch.equal(out, data)
    with pytest.raises(native.InvalidArgument, match="C-contiguous"):
        store.put(b"other", data.t())


def test_a_stored_chunk_never_changes(store: native.Store) -> None:
    assert store.put(b"k", b"first") is True
    assert store.put(b"k", b"other") is False
    assert store.get(b"k") == b"first"


def test_namespaces_do_not_share(store: native.Store, namespace: bytes) -> None:
    store.put(b"k", b"default")
    assert store.get(b"k", namespace=namespace) is None
    store.put(b"k", b"mine", namespace=namespace)
    assert (store.get(b"k"), store.get(b"k", namespace=namespace)) == (b"default", b"mine")


def test_get_into_a_wrong_buffer(store: native.Store) -> None:
    store.put(b"k", bytes(16))
    with pytest.raises(native.InvalidArgument, match="out: 16 bytes expected, got 15"):
        store.get(b"k", bytearray(15))
    with pytest.raises(native.InvalidArgument, match="out: a writable contiguous CPU buffer"):
        store.get(b"k", bytes(16))
    with pytest.raises(native.InvalidArgument, match="out: C-contiguous"):
        store.get(b"k", np.zeros(32, np.uint8)[::2])
    assert store.stats()["host_pinned_slots"] == 0


def test_put_of_something_else(store: native.Store) -> None:
    for value in ("text", 5, None, [1, 2]):
        with pytest.raises(native.InvalidArgument, match="data: a contiguous CPU buffer"):
            store.put(b"k", value)  # type: ignore[arg-type]
    with pytest.raises(native.InvalidArgument):
        store.put(b"k", b"")
    assert store.get(b"k") is None


def test_put_fills_every_rank(make_store: StoreMaker) -> None:
    store = make_store(rank_count=3)
    assert store.put(b"k", bytes(range(9)))
    assert store.get(b"k") == bytes(range(9))
    with pytest.raises(native.InvalidArgument):
        store.put(b"other", bytes(10))


def test_a_full_store_evicts_the_oldest(store: native.Store) -> None:
    data = noise(MIB)
    for i in range(40):
        assert store.put(engine_key(i), data)
    assert store.get(engine_key(0)) is None
    assert store.get(engine_key(39)) == data.tobytes()
    stats = store.stats()
    assert stats["host_used_bytes"] <= stats["host_limit_bytes"] <= 16 * MIB
    assert stats["evicted_chunks"] > 0


@pytest.mark.parametrize(
    ("policy", "kept"), [("LRU", "hit"), ("s3fifo", "hit"), ("lfu", "hit"), ("FIFO", "last"), ("MRU", "first")]
)
def test_what_a_full_store_keeps(make_store: StoreMaker, policy: str, kept: str) -> None:
    store = make_store(cache_policy=policy)
    data = bytes(MIB - 8192)
    store.put(b"hit", data)
    store.put(b"first", data)
    for i in range(40):
        if policy != "MRU":
            assert store.get(b"hit") is not None or policy == "FIFO"
        assert store.put(b"%d" % i, data)
    store.put(b"last", data)
    present = {name for name in ("hit", "first", "last") if store.get(name.encode()) is not None}
    assert kept in present
    assert "first" not in present or policy == "MRU"
    assert "hit" not in present or policy != "FIFO"


def test_put_is_refused_while_everything_is_pinned(store: native.Store) -> None:
    data = noise(MIB)
    pins = []
    deriver = native.KeyDeriver(native.store.DEFAULT_NAMESPACE)
    number = 0
    while store.put(engine_key(number), data):
        pins.append(store.acquire(native.store.DEFAULT_NAMESPACE, [deriver.derive(engine_key(number))]))
        number += 1
        assert number <= 16
    assert store.get(engine_key(number)) is None
    with pytest.raises(native.ResourceExhausted):
        store.reserve_engine_keys(native.store.DEFAULT_NAMESPACE, [engine_key(number)], MIB)
    pins.pop().release()
    assert store.put(engine_key(number), data)


# ---- NVMe ---------------------------------------------------------------------------------------------------------------


def test_what_was_put_is_there_after_reopening(make_store: StoreMaker, nvme_options: dict[str, Any], namespace: bytes) -> None:
    sizes = [1, 4096, 70_001, MIB]
    with make_store(**nvme_options) as first:
        assert first.nvme_ready
        assert first.nvme_warning == ""
        for i, nbytes in enumerate(sizes):
            assert first.put(engine_key(i), noise(nbytes, seed=i), namespace=namespace)
        first.flush(30.0)
        assert first.stats()["nvme_dirty_bytes"] == 0
    second = make_store(**nvme_options)
    keys = native.KeyDeriver(namespace).derive_all([engine_key(i) for i in range(len(sizes))])
    assert second.lookup(keys) == (len(sizes), 0, len(sizes))
    for i, nbytes in enumerate(sizes):
        assert second.get(engine_key(i), namespace=namespace, timeout_s=30.0) == noise(nbytes, seed=i).tobytes()
    hit = second.lookup(keys)
    assert (hit.hit, hit.host, hit.nvme) == (len(sizes), len(sizes), 0)
    assert second.stats()["promoted_chunks"] == len(sizes)


def test_a_damaged_record_is_a_miss(make_store: StoreMaker, nvme_options: dict[str, Any]) -> None:
    payload = noise(64 * 1024).tobytes()
    with make_store(**nvme_options) as first:
        assert first.put(b"k", payload)
        first.flush(30.0)
    damaged = 0
    for path in Path(nvme_options["directory"]).iterdir():
        content = bytearray(path.read_bytes())
        at = content.find(payload[:64])
        if at >= 0:
            content[at + 5000] ^= 1
            path.write_bytes(content)
            damaged += 1
    assert damaged == 1
    second = make_store(**nvme_options)
    assert second.get(b"k", timeout_s=30.0) is None
    assert second.stats()["corrupt_records"] == 1


def test_a_locked_directory(make_store: StoreMaker, nvme_options: dict[str, Any]) -> None:
    make_store(**nvme_options)
    with pytest.raises(native.Locked) as raised:
        make_store(**nvme_options, lock_wait_s=0.0, fail_when_locked=True)
    assert raised.value.code == "locked"
    without = make_store(**nvme_options, lock_wait_s=0.0)
    assert not without.nvme_ready
    assert without.nvme_warning
    assert without.put(b"k", b"v")
    assert without.get(b"k") == b"v"


def test_a_directory_given_as_text_or_path(make_store: StoreMaker, tmp_path: Path) -> None:
    for directory in (tmp_path / "a", str(tmp_path / "b")):
        assert make_store(directory=directory, nvme_bytes=96 * MIB, max_payload_bytes=MIB).nvme_ready
        assert Path(directory).is_dir()


# ---- requests -----------------------------------------------------------------------------------------------------------


def test_a_request_sees_a_chunk_appear(store: native.Store, namespace: bytes) -> None:
    key = engine_key(1)
    request = store.begin_request(namespace)
    assert request.lookup(key) == Presence.MISS
    with store.reserve_engine_keys(namespace, [key], 100) as lease:
        assert request.lookup(key) == Presence.PENDING
        lease.fill(0, bytes(100))
        lease.mark_filled(0)
        assert lease.commit() == 1
    assert request.lookup(key) == Presence.HIT
    assert request.lookup_key(native.KeyDeriver(namespace).derive(key)) == Presence.HIT
    assert request.source(key) == Tier.HOST
    assert isinstance(request.lookup(key), int)


def test_a_request_promotes_from_nvme(make_store: StoreMaker, nvme_options: dict[str, Any], namespace: bytes) -> None:
    keys = [engine_key(i) for i in range(4)]
    payload = noise(70_000).tobytes()
    with make_store(**nvme_options) as first:
        publish(first, namespace, keys, payload)
    store = make_store(**nvme_options)
    request = store.begin_request(namespace)
    assert request.prefetch(native.KeyDeriver(namespace).derive_all(keys)) == 4
    for key in keys:
        while (found := request.lookup(key)) == Presence.RETRY:
            readable, _, _ = select.select([store.event_fd], [], [], 30.0)
            assert readable, "no promotion ended in 30 s"
        assert found == Presence.HIT
        assert request.source(key) == Tier.NVME
    with request.acquire_engine_keys(keys) as lease:
        assert [lease.tobytes(i) for i in range(len(lease))] == [payload] * 4


def test_a_request_may_repeat_its_last_key(make_store: StoreMaker, nvme_options: dict[str, Any], namespace: bytes) -> None:
    keys = [engine_key(i) for i in range(3)]
    with make_store(**nvme_options) as first:
        publish(first, namespace, keys, noise(70_000).tobytes())
    store = make_store(**nvme_options)
    request = store.begin_request(namespace)
    assert all(request.lookup(key) != Presence.MISS for key in keys)
    while request.lookup(keys[-1]) == Presence.RETRY:
        readable, _, _ = select.select([store.event_fd], [], [], 30.0)
        assert readable, "no promotion ended in 30 s"
    assert request.lookup(keys[-1]) == Presence.HIT
    assert request.source(keys[-1]) == Tier.NVME


def test_request_acquire(store: native.Store, namespace: bytes) -> None:
    publish(store, namespace, [engine_key(0), engine_key(1)], b"payload")
    keys = native.KeyDeriver(namespace).derive_all([engine_key(0), engine_key(1), engine_key(2)])
    request = store.begin_request(namespace)
    for wanted in (keys[:2], list(keys)[:2], tuple(keys)[:2]):
        lease = request.acquire(wanted)
        assert len(lease) == 2
        lease.release()
        lease.release()
    with pytest.raises(native.NotFound) as raised:
        request.acquire(keys)
    assert isinstance(raised.value, KeyError)
    assert not str(raised.value).startswith(("'", '"'))
    assert store.stats()["host_pinned_slots"] <= 2
    request.end()
    assert store.stats()["host_pinned_slots"] == 0


def test_lookup_of_both_tiers(make_store: StoreMaker, nvme_options: dict[str, Any], namespace: bytes) -> None:
    engine_keys = [engine_key(i) for i in range(6)]
    store = make_store(**nvme_options)
    publish(store, namespace, engine_keys[:4], b"payload")
    store.close()
    store = make_store(**nvme_options)
    publish(store, namespace, engine_keys[4:5], b"payload")
    keys = native.KeyDeriver(namespace).derive_all(engine_keys)
    request = store.begin_request(namespace, promote=False)
    assert request.lookup_prefix(keys[:1]) == (0, Presence.MISS)
    assert request.lookup_tiers(keys[:5]) == (5, Presence.HIT)
    assert request.lookup_tiers(keys) == (5, Presence.MISS)
    assert store.stats()["host_pinned_slots"] == 1
    assert store.stats()["promoted_chunks"] == 0
    request.end()
    with pytest.raises(native.Aborted):
        request.lookup_tiers(keys)


def test_lookup_prefix_and_its_sources(make_store: StoreMaker, nvme_options: dict[str, Any], namespace: bytes) -> None:
    engine_keys = [engine_key(i) for i in range(6)]
    store = make_store(**nvme_options)
    publish(store, namespace, engine_keys[:4], b"payload")
    store.close()
    store = make_store(**nvme_options)
    publish(store, namespace, engine_keys[4:5], b"payload")
    keys = native.KeyDeriver(namespace).derive_all(engine_keys)
    order = [keys[i] for i in (4, 0, 1, 2, 3, 5)]
    request = store.begin_request(namespace)
    assert request.count_sources(keys) == (0, 0)
    assert request.lookup_prefix(keys[:0]) == (0, Presence.HIT)
    assert request.lookup_prefix(order) == (1, Presence.RETRY)
    assert request.prefetch(keys[:4]) == 4
    while request.lookup_prefix(order) != (5, Presence.MISS):
        readable, _, _ = select.select([store.event_fd], [], [], 30.0)
        assert readable, "no promotion ended in 30 s"
    assert store.stats()["host_pinned_slots"] == 5
    assert request.lookup_prefix(keys) == request.lookup_prefix(tuple(keys)) == (5, Presence.MISS)
    assert request.lookup_prefix(keys[1:5]) == (4, Presence.HIT)
    assert request.lookup_prefix(keys[5:]) == (0, Presence.MISS)
    assert request.count_sources(keys) == request.count_sources(order) == (1, 4)
    assert request.count_sources(keys[3:5]) == (1, 1)


def test_an_ended_request(store: native.Store, namespace: bytes) -> None:
    request = store.begin_request(namespace)
    assert store.stats()["requests"] == 1
    request.end()
    request.end()
    assert store.stats()["requests"] == 0
    calls: list[Callable[[], Any]] = [
        lambda: request.lookup(b"k"),
        lambda: request.lookup_key(bytes(32)),
        lambda: request.source(b"k"),
        lambda: request.source_key(bytes(32)),
        lambda: request.lookup_prefix([bytes(32)]),
        lambda: request.count_sources([bytes(32)]),
        lambda: request.prefetch([bytes(32)]),
        lambda: request.acquire([bytes(32)]),
        lambda: request.acquire_engine_keys([b"k"]),
    ]
    for call in calls:
        with pytest.raises(native.Aborted, match="the request has ended"):
            call()


def test_wrong_keys(store: native.Store, namespace: bytes) -> None:
    request = store.begin_request(namespace)
    for key in ("text", 5, None, bytearray(36)):
        with pytest.raises(TypeError):
            request.lookup(key)  # type: ignore[arg-type]
    wrong: list[tuple[Any, str]] = [
        (bytes(32), "keys: a sequence of bytes expected, got bytes"),
        ("text", "keys: a sequence of bytes expected, got str"),
        (5, "keys: a sequence of bytes expected, got int"),
        ([bytes(32), bytes(31)], r"keys\[1\]: 32 bytes expected, got 31"),
        ([bytearray(32)], r"keys\[0\]: bytes expected, got bytearray"),
    ]
    for keys, message in wrong:
        with pytest.raises(native.InvalidArgument, match=message):
            store.lookup(keys)
        with pytest.raises(native.InvalidArgument, match=message):
            request.prefetch(keys)


# ---- control ------------------------------------------------------------------------------------------------------------


def test_lookup_counts_the_leading_keys(store: native.Store, namespace: bytes) -> None:
    publish(store, namespace, [engine_key(0), engine_key(1), engine_key(3)], b"payload")
    keys = native.KeyDeriver(namespace).derive_all([engine_key(i) for i in range(4)])
    assert store.lookup(keys) == native.PrefixHit(hit=2, host=2, nvme=0)
    assert store.lookup(list(keys)) == (2, 2, 0)
    assert store.lookup([]) == (0, 0, 0)
    store.touch(keys)


def test_erase_and_clear(store: native.Store, namespace: bytes) -> None:
    publish(store, namespace, [engine_key(0), engine_key(1)], b"payload")
    keys = native.KeyDeriver(namespace).derive_all([engine_key(0), engine_key(1)])
    assert store.erase(keys[0]) is True
    assert store.erase(keys[0]) is False
    assert store.lookup(keys[1:]).hit == 1
    store.clear()
    assert store.lookup(keys[1:]).hit == 0


def test_locate_says_where_records_are(make_store: StoreMaker, nvme_options: dict[str, Any], namespace: bytes) -> None:
    store = make_store(**nvme_options)
    publish(store, namespace, [engine_key(0), engine_key(1)], b"payload")
    store.flush(30)
    keys = native.KeyDeriver(namespace).derive_all([engine_key(0), engine_key(7), engine_key(1)])
    places = store.locate(keys)
    assert [place[:2] for place in places] == [(0, 0), (2, 0)]
    with (Path(nvme_options["directory"]) / "data.000").open("rb") as file:
        for position, _path, offset, nbytes, sequence in places:
            file.seek(offset)
            image = file.read(nbytes)
            assert image[:8] == b"MCNSLOT1"
            assert image[16:48] == keys[position]
            assert int.from_bytes(image[104:112], "little") == sequence
            assert image[4096 : 4096 + 7] == b"payload"
    assert native.Store(host_bytes=16 << 20).locate(keys) == []


def test_acquire_waits_for_a_chunk_without_the_gil(store: native.Store, namespace: bytes) -> None:
    """Would hang until its deadline, and then miss, if the waiting thread kept the GIL."""
    key = native.KeyDeriver(namespace).derive(engine_key(0))
    lease = store.reserve(namespace, [key], 5)
    got: list[bytes] = []
    entered = threading.Event()

    def reader() -> None:
        entered.set()
        with store.acquire(namespace, [key], 60.0) as found:
            got.append(found.tobytes(0))

    thread = threading.Thread(target=reader)
    thread.start()
    entered.wait()
    lease.fill(0, b"value")
    lease.mark_filled(0)
    lease.commit()
    thread.join()
    assert got == [b"value"]


def test_acquire_of_an_absent_key_is_not_found(store: native.Store, namespace: bytes) -> None:
    with pytest.raises(native.NotFound):
        store.acquire(namespace, [bytes(32)], 0.01)


def test_stats_are_whole(store: native.Store) -> None:
    stats = store.stats()
    assert stats["host_limit_bytes"] == store.arena_bytes
    assert {"hits_host", "hits_nvme", "misses", "promoted_bytes", "cleared"} <= set(stats)
    assert all(isinstance(value, int) for value in stats.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host_bytes": 4096}, "host_bytes"),
        ({"rank_count": 0}, "rank_count"),
        ({"rank_count": 65}, "rank_count"),
        ({"io_engine": "windmill"}, "windmill"),
        ({"cache_policy": "FANCY"}, '"FANCY", which is not known; available: "LRU", "S3FIFO", "LFU", "FIFO", "MRU"'),
        ({"nvme_bytes": 0}, "nvme_bytes"),
        ({"nvme_bytes": MIB}, "too small"),
        ({"lock_wait_s": -1.0}, "lock_wait_s: seconds >= 0 expected, got -1"),
        ({"request_ttl_s": math.nan}, "request_ttl_s: seconds >= 0 expected, got nan"),
        ({"numa_nodes": 0}, "numa_nodes: .* got int"),
        ({"numa_nodes": None}, "numa_nodes: .* got NoneType"),
        ({"numa_nodes": [2**31]}, r"numa_nodes\[0\]: -2147483648\.\.2147483647 expected, got 2147483648"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, nvme_options: dict[str, Any]) -> None:
    with pytest.raises(native.InvalidArgument, match=message):
        native.Store(**{"host_bytes": 16 * MIB, **nvme_options, **options})


def test_numa_nodes_and_hugetlb(make_store: StoreMaker) -> None:
    try:
        store = make_store(numa_nodes=[0])
    except native.Unavailable as error:
        pytest.skip(str(error))
    assert store.put(b"k", b"payload")
    with pytest.raises(native.InvalidArgument, match=r"numa_nodes\[1\] is 1023, must be a node .*: 0"):
        make_store(numa_nodes=(0, 1023))
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
    free = int((pool / "free_hugepages").read_text()) - int((pool / "resv_hugepages").read_text())
    if free >= 8:
        assert make_store(hugetlb=True).put(b"k", b"payload")
    else:
        with pytest.raises(native.ResourceExhausted, match=r"needs 8 huge pages of 2 MiB, .*vm\.nr_hugepages="):
            make_store(hugetlb=True)


def test_unknown_options_are_a_type_error() -> None:
    with pytest.raises(TypeError):
        native.Store(host_bytes=16 * MIB, hots_bytes=1)  # type: ignore[call-arg]


def test_a_closed_store(make_store: StoreMaker, namespace: bytes) -> None:
    store = make_store()
    with store as entered:
        assert entered is store
        assert not store.closed
    assert store.closed
    store.close()
    calls: list[Callable[[], Any]] = [
        lambda: store.lookup([bytes(32)]),
        lambda: store.reserve(namespace, [bytes(32)], 1),
        lambda: store.reserve_engine_keys(namespace, [b"k"], 1),
        lambda: store.begin_request(namespace),
        lambda: store.acquire(namespace, [bytes(32)]),
        lambda: store.touch([bytes(32)]),
        lambda: store.erase(bytes(32)),
        lambda: store.clear(),
        lambda: store.flush(),
        lambda: store.serve("id", 4096),
        lambda: store.stats(),
        lambda: store.event_fd,
        lambda: store.nvme_ready,
        lambda: store.nvme_warning,
        lambda: store.io_engine_note,
        lambda: store.arena_bytes,
        lambda: store.put(b"k", b"v"),
        lambda: store.get(b"k"),
    ]
    for call in calls:
        with pytest.raises(native.Unavailable, match="the store is closed"):
            call()


def test_with_closes_on_an_exception(make_store: StoreMaker) -> None:
    store = make_store()
    with pytest.raises(ZeroDivisionError), store:
        raise ZeroDivisionError
    assert store.closed


def test_a_process_may_exit_with_everything_open(tmp_path: Path) -> None:
    script = (
        "import lmcache_native as n\n"
        f"store = n.Store(host_bytes=16 << 20, directory={str(tmp_path / 'd')!r}, nvme_bytes=96 << 20, max_payload_bytes=1 << 20)\n"
        "ns = n.make_namespace('a=1\\n')\n"
        "store.put(b'k', b'v', namespace=ns)\n"
        "read = store.acquire(ns, [n.KeyDeriver(ns).derive(b'k')]); view = read.payload(0)\n"
        "write = store.reserve_engine_keys(ns, [b'other'], 100)\n"
        "request = store.begin_request(ns); request.lookup(b'k')\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_several_directories(tmp_path: Path) -> None:
    for directory in ([tmp_path / "a", str(tmp_path / "b")], (tmp_path / "a", tmp_path / "b")):
        with native.Store(host_bytes=8 << 20, max_payload_bytes=1 << 20, directory=directory, nvme_bytes=256 << 20) as store:
            assert store.stats()["nvme_paths"] == 2
            store.put(b"key", b"x" * 4096)
            store.flush(30.0)
    for wrong in (7, [7], object()):
        with pytest.raises(native.InvalidArgument, match="directory"):
            native.Store(host_bytes=8 << 20, directory=wrong, nvme_bytes=256 << 20)  # type: ignore[arg-type]
