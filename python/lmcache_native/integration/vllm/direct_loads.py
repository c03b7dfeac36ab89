"""Loads past host memory, the scheduler's side: what is on NVMe alone is not promoted; each worker reads the records itself.

Only with workers that can (use_gds). A chunk in host memory is still copied from there. What a worker reads it checks; a record
that is not there any more is a failed load of its chunk.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmcache_native import Presence, Request, Store
from lmcache_native.errors import NotFound
from lmcache_native.integration.vllm.transfer import Records


@dataclass(frozen=True, slots=True)
class Placed:
    """Where the chunks of a load are. `keys` and `chunks` (their numbers in the request): those in host memory."""

    keys: list[bytes]
    chunks: array[int]
    records: Records | None = None


def place(store: Store, lookup: Request, wanted: Placed, namespace: bytes) -> Placed:
    """`wanted`, divided by tier. NotFound: a chunk is in neither any more."""
    in_host = [lookup.lookup_key(key) == Presence.HIT for key in wanted.keys]
    others = _only(wanted.keys, in_host, False)
    if not others:
        return wanted
    places = store.locate(others)
    if len(places) != len(others):
        found = {position for position, *_ in places}
        gone = next(key for i, key in enumerate(others) if i not in found)
        raise NotFound(f"chunk {gone.hex()} is neither in host memory nor on NVMe any more")
    _positions, paths, offsets, image_bytes, sequences = zip(*places, strict=True)
    records = Records(
        chunks=array("I", _only(wanted.chunks, in_host, False)),
        paths=array("I", paths),
        offsets=array("Q", offsets),
        image_bytes=array("Q", image_bytes),
        sequences=array("Q", sequences),
        keys=others,
        namespace=namespace,
    )
    return Placed(_only(wanted.keys, in_host, True), array("I", _only(wanted.chunks, in_host, True)), records)


def forget_bad(store: Store, records: Records, indexes: Sequence[int]) -> None:
    """So that they are stored anew."""
    for i in indexes:
        store.record_failed(records.keys[i], records.paths[i], records.offsets[i], records.sequences[i])


def _only(values: Sequence[Any], flags: list[bool], wanted: bool) -> list[Any]:
    return [value for value, flag in zip(values, flags, strict=True) if flag is wanted]
