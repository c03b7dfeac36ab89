"""vLLM's KV events (BlockStored, BlockRemoved) of LMCacheNativeConnector: one block is one chunk, its hash the chunk's key, its
medium the tier: CPU or STORAGE.

A chunk that this process stored has its tokens and its parent in every BlockStored, also when it comes to NVMe or back from it. Of
a chunk that an earlier process left on NVMe only the hash is known: block_size is 0 and token_ids is empty, as in vLLM's own events
of offloading.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmcache_native import Store, Tier
from lmcache_native.integration.vllm import compat

MEDIUM = {Tier.HOST: "CPU", Tier.NVME: "STORAGE"}


@dataclass(slots=True)
class _Payload:
    parent: bytes | None
    token_ids: array[int]  # "I"
    lora_id: int | None
    lora_name: str | None
    tiers: set[Tier]


class ChunkEvents:
    """One thread. Memory: a description of each chunk in any tier."""

    def __init__(self, store: Store, chunk_tokens: int) -> None:
        self._store = store
        self._chunk_tokens = chunk_tokens
        self._payloads: dict[bytes, _Payload] = {}
        self._events: list[Any] = []
        store.watch_changes()

    def describe(self, key: bytes, parent: bytes | None, token_ids: Sequence[int], lora_request: Any) -> None:
        """Before the chunk is published; forget() when it then was not."""
        lora_id = None if lora_request is None else lora_request.lora_int_id
        lora_name = None if lora_request is None else lora_request.lora_name
        before = self._payloads.get(key)
        tiers: set[Tier] = set() if before is None else before.tiers
        self._payloads[key] = _Payload(parent, array("I", token_ids), lora_id, lora_name, tiers)

    def forget(self, key: bytes) -> None:
        if (payload := self._payloads.get(key)) is not None and not payload.tiers:
            del self._payloads[key]

    def cleared(self) -> None:
        self._payloads.clear()
        self._events = [compat.AllBlocksCleared()]

    def take(self) -> list[Any]:
        """Events since the last call, in order."""
        events, self._events = self._events, []
        for key, tier, stored in self._store.take_changes():
            events.append(self._stored(key, tier) if stored else self._removed(key, tier))
        return events

    def _stored(self, key: bytes, tier: Tier) -> Any:
        payload = self._payloads.get(key)
        if payload is None:
            payload = _Payload(None, array("I"), None, None, set())
        payload.tiers.add(tier)
        return compat.BlockStored(
            block_hashes=[key],
            parent_block_hash=payload.parent,
            token_ids=list(payload.token_ids),
            block_size=self._chunk_tokens if payload.token_ids else 0,
            lora_id=payload.lora_id,
            medium=MEDIUM[tier],
            lora_name=payload.lora_name,
        )

    def _removed(self, key: bytes, tier: Tier) -> Any:
        payload = self._payloads.get(key)
        if payload is not None:
            payload.tiers.discard(tier)
            if not payload.tiers:
                del self._payloads[key]
        return compat.BlockRemoved(block_hashes=[key], medium=MEDIUM[tier])
