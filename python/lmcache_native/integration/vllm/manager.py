"""NativeOffloadingManager: the scheduler's side. Owns the Store, and the leases of jobs under way.

Nothing here waits: lookups, leases and commits touch memory only. Every lease ends in complete_load/complete_store, or in
reset_cache, after which the scheduler has forgotten the job; the store then keeps the slots from reuse until the workers' words
say that their copies have ended.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lmcache_native import ReadLease, Request, Store, WriteLease
from lmcache_native.errors import LmcacheNativeError, NotFound, ResourceExhausted, Unavailable
from lmcache_native.integration.vllm import compat
from lmcache_native.integration.vllm.namespace import Namespaces, RequestNamespace
from lmcache_native.integration.vllm.slots import SlotLoadStoreSpec
from lmcache_native.integration.vllm.stats import StatsReporter
from lmcache_native.integration.vllm.worker import NotStarted
from lmcache_native.logging import get_logger

logger = get_logger(__name__)

CLOSE_TIMEOUT_S = 2.0
_MISS = 0
_GROUP_BYTES = 4  # of an engine key's end: the index of its KV cache group


def _always_miss(_key: bytes) -> int:
    return _MISS


@dataclass(frozen=True, slots=True)
class ChunkGroup:
    """One KV cache group, to the manager."""

    payload_bytes: int  # one chunk, all parts
    windowed: bool  # the engine looks from the end for a window's chunks, instead of from the start for all


class _RequestState:
    """What the manager knows of one request; lives in vLLM's ReqContext."""

    __slots__ = ("budget_bytes", "finished", "load", "lookup", "namespace", "request", "stores")

    def __init__(self, namespace: RequestNamespace | None, budget_bytes: int) -> None:
        self.namespace = namespace  # None: served without the cache
        self.budget_bytes = budget_bytes
        self.request: Request | None = None
        self.lookup: Callable[[bytes], int] = _always_miss
        self.load: tuple[int, ReadLease] | None = None  # vLLM has at most one load of a request under way
        self.stores: dict[bytes, WriteLease] = {}
        self.finished = False

    def usable_namespace(self) -> bytes | None:
        """None: nothing may be loaded or published."""
        if self.namespace is not None and not self.namespace.holds():
            self.namespace = None
        return None if self.namespace is None else self.namespace.id

    def end_request(self) -> None:
        if self.request is not None:
            self.request.end()
            self.request = None
        self.lookup = _always_miss

    def drop(self) -> None:
        """Lets go of everything, without waiting for jobs under way."""
        self.end_request()
        if self.load is not None:
            self.load[1].release()
            self.load = None
        for lease in set(self.stores.values()):
            lease.abort()
        self.stores.clear()

    @property
    def idle(self) -> bool:
        return self.finished and self.load is None and not self.stores


class NativeOffloadingManager(compat.OffloadingManager):  # type: ignore[misc]
    """One thread, vLLM's scheduler, calls everything."""

    def __init__(self) -> None:
        self._store: Store | None = None
        self._namespaces = Namespaces({})
        self._groups: tuple[ChunkGroup, ...] = ()
        self._numbers: dict[bytes, int] = {}  # an engine key's end -> index of the group
        self._results: dict[bytes, tuple[Any, ...]] = {}  # an engine key's end -> by the int that Request.lookup returns
        self._announced: Any = None
        self._states: set[_RequestState] = set()
        self._loads: dict[int, _RequestState] = {}
        self._serial = 0
        self._stats = StatsReporter()
        self._closed = False
        # By the int that Request.source returns.
        sources = compat.CacheHitSource
        self._sources = (sources.EXTERNAL_UNSPECIFIED, sources.HOST, sources.DISK)

    def open(self, store: Store, description: dict[str, str], groups: Sequence[ChunkGroup]) -> None:
        """The handshake told what the store needs. `description`: the namespace. `groups`: in vLLM's order."""
        self._store = store
        self._namespaces = Namespaces(description)
        self._groups = tuple(groups)
        results = compat.LookupResult
        for number, group in enumerate(groups):
            suffix = number.to_bytes(_GROUP_BYTES, "big")
            self._numbers[suffix] = number
            # A search for a window goes on, towards the start, after a RETRY: it would promote all that a group has on NVMe. What
            # is being promoted counts as found, so that it ends with the window; vLLM asks again, and goes on should it fail.
            again = results.HIT_PENDING if group.windowed else results.RETRY
            self._results[suffix] = (results.MISS, results.HIT, results.HIT_PENDING, again)

    @property
    def namespace_hex(self) -> str:
        return self._namespaces.plain().hex()

    @property
    def store(self) -> Store:
        if self._store is None:
            why = "is shut down" if self._closed else "has no store: it works under NativeOffloadingConnector only"
            raise Unavailable(f"NativeOffloadingManager {why}")
        return self._store

    # ---- requests -----------------------------------------------------------------------------------------------------

    def announce_adapter(self, lora_request: Any) -> None:
        """The next on_new_request is for a request with this LoRA adapter (None: without)."""
        self._announced = lora_request

    def on_new_request(self, req_context: Any) -> Any:
        lora, self._announced = self._announced, None
        nvme = req_context.load_tier_filter.allows(compat.Medium.STORAGE, compat.Locality.LOCAL)
        state = _RequestState(self._namespaces.of(lora), 0 if nvme else 1)  # no chunk fits in a budget of one byte
        state.lookup = self._first_lookup(state)
        req_context.set_state(state)
        self._states.add(state)
        return compat.RequestOffloadingContext()

    def on_request_finished(self, req_context: Any) -> None:
        state: _RequestState = req_context.get_state(_RequestState)
        state.end_request()
        state.finished = True
        self._forget_if_idle(state)

    def _forget_if_idle(self, state: _RequestState) -> None:
        if state.idle:
            self._states.discard(state)

    def _first_lookup(self, state: _RequestState) -> Callable[[bytes], int]:
        def lookup(key: bytes) -> int:
            namespace = state.usable_namespace()
            if namespace is None:
                state.lookup = _always_miss
                return _MISS
            state.request = self.store.begin_request(namespace, promotion_budget_bytes=state.budget_bytes)
            state.lookup = state.request.lookup
            return state.lookup(key)

        return lookup

    # ---- loads --------------------------------------------------------------------------------------------------------

    def lookup(self, key: bytes, req_context: Any) -> Any:
        found = req_context.get_state(_RequestState).lookup(key)
        return self._results[key[-_GROUP_BYTES:]][found]

    def get_load_source(self, key: bytes, req_context: Any) -> Any:
        state: _RequestState = req_context.get_state(_RequestState)
        return self._sources[0 if state.request is None else state.request.source(key)]

    def prepare_load(self, keys: Collection[bytes], req_context: Any) -> SlotLoadStoreSpec:
        """Cannot refuse: vLLM has counted on the hit. What cannot be leased any more becomes a load that fails."""
        state: _RequestState = req_context.get_state(_RequestState)
        self._serial += 1
        self._loads[self._serial] = state
        try:
            if state.request is None:
                raise NotFound(f"request {req_context.req_id} looked nothing up")
            if state.usable_namespace() is None:
                raise NotFound("the adapter's files changed since the request arrived")
            lease = state.request.acquire_engine_keys(list(keys), for_worker=True)
        except LmcacheNativeError as error:
            logger.warning("request %s: a hit could not be leased, it will be recomputed: %s", req_context.req_id, error)
            return SlotLoadStoreSpec.unleased(self._serial)
        state.load = (self._serial, lease)
        chunks = [0] * len(self._groups)
        for key in keys:
            chunks[self._numbers[key[-_GROUP_BYTES:]]] += 1
        return SlotLoadStoreSpec(self._serial, lease.slot_offsets(), lease.generations(), tuple(chunks))

    def complete_load(self, keys: Collection[bytes], req_context: Any) -> None:
        state: _RequestState = req_context.get_state(_RequestState)
        if state.load is not None:
            serial, lease = state.load
            lease.release()
            state.load = None
            self._loads.pop(serial, None)
        self._forget_if_idle(state)

    def loads_failed(self, serials: Iterable[int]) -> None:
        """A worker could not copy (all of) these loads. vLLM recomputes; the request looks nothing up again, or it might fail for
        ever."""
        for serial in serials:
            state = self._loads.pop(serial, None)
            if state is not None:
                state.end_request()

    def not_started(self, jobs: Iterable[NotStarted]) -> None:
        """Their ranks will write no words: without this the slots would wait for them for ever."""
        for job in jobs:
            self.store.job_not_started(job.rank, job.slots.offsets, job.slots.generations, load=job.load)

    # ---- stores -------------------------------------------------------------------------------------------------------

    def prepare_store(self, keys: Collection[bytes], req_context: Any) -> Any:
        state: _RequestState = req_context.get_state(_RequestState)
        namespace = state.usable_namespace()
        if namespace is None:
            return compat.PrepareStoreOutput(keys_to_store=[], store_spec=SlotLoadStoreSpec.unleased(0), evicted_keys=[])
        offered: list[list[bytes]] = [[] for _ in self._groups]
        for key in keys:
            offered[self._numbers[key[-_GROUP_BYTES:]]].append(key)
        to_store: list[bytes] = []
        offsets, generations, chunks = array("Q"), array("I"), [0] * len(self._groups)
        for number, (group, of_group) in enumerate(zip(self._groups, offered, strict=True)):
            if not of_group:
                continue
            try:
                lease = self.store.reserve_engine_keys(namespace, of_group, group.payload_bytes, for_worker=True)
            except ResourceExhausted:
                if not to_store:
                    return None  # vLLM offers the chunks again in its next step
                break  # the leading ones, as within a group
            reserved = [of_group[position] for position in lease.positions]
            state.stores.update(dict.fromkeys(reserved, lease))
            to_store += reserved
            offsets += lease.slot_offsets()
            generations += lease.generations()
            chunks[number] = len(reserved)
        self._serial += 1
        spec = SlotLoadStoreSpec(self._serial, offsets, generations, tuple(chunks))
        return compat.PrepareStoreOutput(keys_to_store=to_store, store_spec=spec, evicted_keys=[])

    def complete_store(self, keys: Collection[bytes], req_context: Any, success: bool = True) -> None:
        """The ranks' words in the slots decide what is published, not `success` alone."""
        state: _RequestState = req_context.get_state(_RequestState)
        leases = {lease for key in keys if (lease := state.stores.pop(key, None)) is not None}
        for lease in leases:
            if success and state.usable_namespace() is not None:
                lease.commit()
            else:
                lease.abort()
        self._forget_if_idle(state)

    # ---- the rest -----------------------------------------------------------------------------------------------------

    def reset_cache(self) -> None:
        """Requests of before the reset may hold KV of the old weights: they load and store nothing any more."""
        self._namespaces.raise_epoch()
        for state in self._states:
            state.drop()
            state.namespace = None
        self._states = {state for state in self._states if not state.finished}
        self._loads.clear()
        if self._store is not None:
            self._store.clear()

    def get_stats(self) -> Any:
        if self._store is None or not self._stats.due():
            return None
        return self._stats.report(self._store)

    def shutdown(self) -> None:
        for state in self._states:
            state.drop()
        self._states.clear()
        self._closed = True
        if self._store is None:
            return
        store, self._store = self._store, None
        try:
            store.close(CLOSE_TIMEOUT_S)
        except LmcacheNativeError as error:
            logger.warning("closing the store: %s", error)
