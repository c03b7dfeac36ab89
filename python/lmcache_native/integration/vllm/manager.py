"""NativeOffloadingManager: the scheduler's side. Owns the Store, and the leases of jobs under way.

Nothing here waits: lookups, leases and commits touch memory only. Every lease ends in complete_load/complete_store, or in
reset_cache, after which the scheduler has forgotten the job; the store then keeps the slots from reuse until the workers' words
say that their copies have ended.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lmcache_native import ReadLease, Request, Store, WriteLease
from lmcache_native.errors import InvalidArgument, LmcacheNativeError, NotFound, ResourceExhausted, Unavailable
from lmcache_native.integration.vllm import compat
from lmcache_native.integration.vllm.engine_key_events import EngineKeyEvents
from lmcache_native.integration.vllm.namespace import Namespaces, RequestNamespace
from lmcache_native.integration.vllm.slots import SlotLoadStoreSpec
from lmcache_native.integration.vllm.stats import Admission, StatsReporter, log_admission
from lmcache_native.integration.vllm.token_keys import RequestSettings, request_settings, tagged
from lmcache_native.integration.vllm.worker import NotStarted
from lmcache_native.logging import get_logger

logger = get_logger(__name__)

CLOSE_TIMEOUT_S = 2.0
_MISS = 0
_RETRY = 3
_GROUP_BYTES = 4  # of an engine key's end: the index of its KV cache group


def _always_miss(_key: bytes) -> int:
    return _MISS


@dataclass(frozen=True, slots=True)
class ChunkGroup:
    """One KV cache group, to the manager."""

    payload_bytes: int  # one chunk, all parts
    windowed: bool  # the engine looks from the end for a window's chunks, instead of from the start for all
    chunk_tokens: int = 0


class _RequestState:
    """What the manager knows of one request; lives in vLLM's ReqContext."""

    __slots__ = (
        "admission",
        "begun_s",
        "budget_bytes",
        "finished",
        "load",
        "lookup",
        "namespace",
        "request",
        "settings",
        "stores",
        "wait_until_s",
    )

    def __init__(self, namespace: RequestNamespace | None, budget_bytes: int, settings: RequestSettings) -> None:
        self.namespace = namespace  # None: served without the cache
        self.settings = settings
        self.admission: Admission | None = None
        self.begun_s: dict[ReadLease | WriteLease | None, float] = {}  # time.monotonic(), of what is under way
        self.budget_bytes = budget_bytes
        self.request: Request | None = None
        self.lookup: Callable[[bytes], int] = _always_miss
        self.load: tuple[int, ReadLease] | None = None  # vLLM has at most one load of a request under way
        self.stores: dict[bytes, WriteLease] = {}
        self.wait_until_s: float | None = None  # for promotions, all of them; time.monotonic()
        self.finished = False

    def usable_namespace(self) -> bytes | None:
        """None: nothing may be loaded or published."""
        if self.namespace is not None and not self.namespace.holds():
            self.namespace = None
        return None if self.namespace is None else tagged(self.namespace.id, self.settings.tags)

    def end_request(self) -> None:
        if self.request is not None:
            self.request.end()
            self.request = None
        self.lookup = _always_miss
        self.wait_until_s = None

    def drop(self) -> None:
        """Lets go of everything, without waiting for jobs under way."""
        self.end_request()
        if self.load is not None:
            self.load[1].release()
            self.load = None
        for lease in set(self.stores.values()):
            lease.abort()
        self.stores.clear()
        self.begun_s.clear()

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
        self.noted = self._stats.noted
        self._log_requests = False
        self._events: EngineKeyEvents | None = None  # None: nobody takes them
        self._gaps: set[tuple[int, int]] = set()  # slots that a rank was never to fill: offset, generation
        self._promotion_deadline_s = 0.0
        self._closed = False
        # By the int that Request.source returns.
        sources = compat.CacheHitSource
        self._sources = (sources.EXTERNAL_UNSPECIFIED, sources.HOST, sources.DISK)

    def open(
        self,
        store: Store,
        description: dict[str, str],
        groups: Sequence[ChunkGroup],
        *,
        events: bool = False,
        log_requests: bool = False,
        stats: StatsReporter | None = None,
        promotion_deadline_s: float = 10.0,
    ) -> None:
        """The handshake told what the store needs. `description`: the namespace. `groups`: in vLLM's order. `events`: whether
        somebody takes them."""
        self._store = store
        self._log_requests = log_requests
        if stats is not None:
            self._stats, self.noted = stats, stats.noted
        if events:
            self._events = EngineKeyEvents(store)
        self._promotion_deadline_s = promotion_deadline_s
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
        namespace = self._namespaces.of(lora)
        settings = RequestSettings()
        try:
            settings = request_settings(req_context.kv_transfer_params)
        except InvalidArgument as error:
            logger.warning("request %s is served without the cache: %s", req_context.req_id, error)
            self.noted.without_cache("parameters")
            namespace = None
        else:
            if namespace is None:
                self.noted.without_cache("adapter")
        state = _RequestState(namespace, 0 if nvme else 1, settings)  # no chunk fits in a budget of one byte
        state.lookup = self._first_lookup(state)
        req_context.set_state(state)
        self._states.add(state)
        return compat.RequestOffloadingContext()

    def admitted(self, request_id: str, prompt: int, engine: int, external: int, nvme: int, req_context: Any) -> None:
        """vLLM scheduled the request, and counted on these tokens. Only the first time counts."""
        state: _RequestState | None = req_context.get_state(_RequestState)
        if state is None or state.namespace is None or state.admission is not None:
            return
        state.admission = Admission(prompt, engine, external - nvme, nvme)
        self.noted.admitted(state.admission)
        log_admission(request_id, state.admission, show=self._log_requests)

    def response(self, req_context: Any) -> dict[str, Any] | None:
        """What the response says of the request, when it asked for that."""
        state: _RequestState | None = req_context.get_state(_RequestState)
        return state.admission.response() if state is not None and state.settings.report and state.admission is not None else None

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
            state.request = self.store.begin_request(
                namespace, promotion_budget_bytes=state.budget_bytes, priority=state.settings.priority
            )
            state.lookup = state.request.lookup
            return state.lookup(key)

        return lookup

    # ---- loads --------------------------------------------------------------------------------------------------------

    def lookup(self, key: bytes, req_context: Any) -> Any:
        state: _RequestState = req_context.get_state(_RequestState)
        found = state.lookup(key)
        if found == _RETRY and self._waited_enough(state):
            found = state.lookup(key)
        return self._results[key[-_GROUP_BYTES:]][found]

    def _waited_enough(self, state: _RequestState) -> bool:
        """One deadline for all that a request promotes: after a window that came too late vLLM looks for the next. From then on it
        loads what is in host memory."""
        now = time.monotonic()
        if state.wait_until_s is None:
            state.wait_until_s = now + self._promotion_deadline_s
        if now < state.wait_until_s:
            return False
        namespace = state.usable_namespace()
        state.end_request()
        if namespace is not None:
            state.request = self.store.begin_request(namespace, promote=False, priority=state.settings.priority)
            state.lookup = state.request.lookup
        return True

    def nothing_to_load(self, req_context: Any) -> None:
        """vLLM scheduled the request without a load: what its lookups found is held for nothing."""
        state: _RequestState | None = req_context.get_state(_RequestState)
        if state is not None and state.request is not None:
            state.end_request()
            state.lookup = self._first_lookup(state)

    def get_load_source(self, key: bytes, req_context: Any) -> Any:
        state: _RequestState = req_context.get_state(_RequestState)
        return self._sources[0 if state.request is None else state.request.source(key)]

    def prepare_load(self, keys: Collection[bytes], req_context: Any) -> SlotLoadStoreSpec:
        """Cannot refuse: vLLM has counted on the hit. What cannot be leased any more becomes a load that fails."""
        state: _RequestState = req_context.get_state(_RequestState)
        self._serial += 1
        self._loads[self._serial] = state
        state.begun_s[None] = time.monotonic()
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
            failed = self._loads.pop(serial, None) is None  # loads_failed() came first
        else:
            failed = True
        if (begun_s := state.begun_s.pop(None, None)) is not None:
            self.noted.load_ended(self._tokens_of(keys), time.monotonic() - begun_s, failed=failed)
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
        slots: dict[tuple[int, bool], tuple[array[int], array[int]]] = {}
        for job in jobs:
            offsets, generations = slots.setdefault((job.rank, job.load), (array("Q"), array("I")))
            offsets += job.slots.offsets
            generations += job.slots.generations
            if job.expected:
                self._gaps.update(zip(job.slots.offsets, job.slots.generations, strict=True))
        for (rank, load), (offsets, generations) in slots.items():
            self.store.job_not_started(rank, offsets, generations, load=load)

    # ---- stores -------------------------------------------------------------------------------------------------------

    def prepare_store(self, keys: Collection[bytes], req_context: Any) -> Any:
        state: _RequestState = req_context.get_state(_RequestState)
        namespace = state.usable_namespace()
        if namespace is None or state.settings.skip_save:
            return compat.PrepareStoreOutput(keys_to_store=[], store_spec=SlotLoadStoreSpec.unleased(0), evicted_keys=[])
        offered: list[list[bytes]] = [[] for _ in self._groups]
        for key in keys:
            offered[self._numbers[key[-_GROUP_BYTES:]]].append(key)
        to_store: list[bytes] = []
        leases: list[WriteLease] = []
        by_lease: list[list[bytes]] = []
        offsets, generations, chunks = array("Q"), array("I"), [0] * len(self._groups)
        for number, (group, of_group) in enumerate(zip(self._groups, offered, strict=True)):
            if not of_group:
                continue
            try:
                lease = self.store.reserve_engine_keys(namespace, of_group, group.payload_bytes, for_worker=True)
            except ResourceExhausted:
                for other in leases:  # a hit needs every group
                    other.abort()
                return None  # vLLM offers the chunks again in its next step
            reserved = [of_group[position] for position in lease.positions]
            if not reserved:
                continue
            leases.append(lease)
            by_lease.append(reserved)
            to_store += reserved
            offsets += lease.slot_offsets()
            generations += lease.generations()
            chunks[number] = len(reserved)
        self._serial += 1
        now = time.monotonic()
        for lease, reserved in zip(leases, by_lease, strict=True):
            lease.set_priority(state.settings.priority)
            state.begun_s[lease] = now
            state.stores.update(dict.fromkeys(reserved, lease))
        if self._events is not None and to_store:
            self._events.storing(namespace, to_store)
        spec = SlotLoadStoreSpec(self._serial, offsets, generations, tuple(chunks))
        return compat.PrepareStoreOutput(keys_to_store=to_store, store_spec=spec, evicted_keys=[])

    def complete_store(self, keys: Collection[bytes], req_context: Any, success: bool = True) -> None:
        """The ranks' words in the slots decide what is published, not `success` alone."""
        state: _RequestState = req_context.get_state(_RequestState)
        groups = {lease: key[-_GROUP_BYTES:] for key in keys if (lease := state.stores.pop(key, None)) is not None}
        tokens, begun_s, failed = 0, time.monotonic(), False
        for lease, suffix in groups.items():
            offered, published = len(lease) - self._take_gaps(lease), 0
            if success and state.usable_namespace() is not None:
                published = lease.commit()
            else:
                lease.abort()
            tokens = max(tokens, published * self._groups[self._numbers[suffix]].chunk_tokens)
            begun_s = min(begun_s, state.begun_s.pop(lease, begun_s))
            failed |= published < offered
        if self._events is not None:
            self._events.stored(keys)
        if groups:
            self.noted.store_ended(tokens, time.monotonic() - begun_s, failed=failed)
        self._forget_if_idle(state)

    def _take_gaps(self, lease: WriteLease) -> int:
        """How many of its slots were not to be filled."""
        if not self._gaps:
            return 0
        gaps = self._gaps.intersection(zip(lease.slot_offsets(), lease.generations(), strict=True))
        self._gaps -= gaps
        return len(gaps)

    def _tokens_of(self, keys: Collection[bytes]) -> int:
        """Of the group that has most: groups hold KV of the same tokens."""
        found = [0] * len(self._groups)
        for key in keys:
            number = self._numbers[key[-_GROUP_BYTES:]]
            found[number] += self._groups[number].chunk_tokens
        return max(found, default=0)

    # ---- the rest -----------------------------------------------------------------------------------------------------

    def reset_cache(self) -> None:
        """Requests of before the reset may hold KV of the old weights: they load and store nothing any more."""
        self._namespaces.raise_epoch()
        for state in self._states:
            state.drop()
            state.namespace = None
        self._states = {state for state in self._states if not state.finished}
        self._loads.clear()
        self._gaps.clear()
        if self._events is not None:
            self._events.cleared()
        if self._store is not None:
            self._store.clear()

    def take_events(self) -> Iterable[Any]:
        """vLLM's OffloadingEvents, in order. What an earlier process left on NVMe has none: its engine keys are not known."""
        return [] if self._events is None or self._store is None else self._events.take()

    def get_stats(self) -> Any:
        if self._store is None or not self._stats.due():
            return None
        stores = len({lease for state in self._states for lease in state.stores.values()})
        return self._stats.report(self._store, len(self._loads), stores)

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
