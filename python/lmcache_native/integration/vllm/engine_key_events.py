"""vLLM's OffloadingEvents of NativeOffloadingConnector: which of the engine's keys came into a tier, or left it.

What an earlier process left on NVMe has no events: its engine keys are not known.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lmcache_native import KeyDeriver, Store, Tier
from lmcache_native.integration.vllm import compat


@dataclass(slots=True)
class _Known:
    engine_key: bytes
    stores: int = 0  # under way
    tiers: set[Tier] = field(default_factory=set)


class EngineKeyEvents:
    """One thread. Memory: the engine's key of each chunk that is in a tier or on its way."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[bytes, _Known] = {}  # by chunk key
        self._storing: dict[bytes, list[bytes]] = {}  # engine key -> chunk keys, of stores under way
        self._ended: list[bytes] = []  # chunk keys of stores that ended since take()
        store.watch_changes()

    def storing(self, namespace: bytes, engine_keys: Iterable[bytes]) -> None:
        deriver = KeyDeriver(namespace)
        for engine_key in engine_keys:
            key = deriver.derive(engine_key)
            self._known.setdefault(key, _Known(engine_key)).stores += 1
            self._storing.setdefault(engine_key, []).append(key)

    def stored(self, engine_keys: Iterable[bytes]) -> None:
        """Their stores ended, in whichever way; keys of no store are left out."""
        for engine_key in engine_keys:
            keys = self._storing.get(engine_key)
            if keys is None:
                continue
            key = keys.pop(0)
            if not keys:
                del self._storing[engine_key]
            self._known[key].stores -= 1
            self._ended.append(key)

    def cleared(self) -> None:
        self._known.clear()
        self._storing.clear()
        self._ended.clear()

    def take(self) -> list[Any]:
        """Since the last call, in order."""
        events: list[Any] = []
        settled, self._ended = self._ended, []
        for key, tier, stored in self._store.take_changes():
            known = self._known.get(key)
            if known is None:
                continue
            if stored:
                known.tiers.add(tier)
            else:
                known.tiers.discard(tier)
                settled.append(key)
            medium = compat.Medium.CPU if tier == Tier.HOST else compat.Medium.STORAGE
            last = events[-1] if events else None
            if last is None or last.medium != medium or last.removed == stored:
                last = compat.OffloadingEvent(keys=[], medium=medium, removed=not stored, removal_expected=True)
                events.append(last)
            last.keys.append(known.engine_key)
        for key in settled:
            known = self._known.get(key)
            if known is not None and not known.tiers and known.stores == 0:
                del self._known[key]
        return events
