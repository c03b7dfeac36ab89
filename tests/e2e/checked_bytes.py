"""Checks every byte that NativeOffloadingConnector stores and loads in a running engine: what a store copies is what the step that
computed it left, and what a load brings is what was stored under that key."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from engine import InProcessEngine, _replaced

Place = tuple[bytes, int]  # engine key, block within the chunk


@dataclass
class Checked:
    stored_blocks: int = 0
    loaded_blocks: int = 0
    incomplete_chunks: int = 0  # offered without their first blocks: not stored
    contents: dict[Place, set[bytes]] = field(default_factory=lambda: defaultdict(set))  # all that was ever stored under it


class _Watch:
    def __init__(self, engine: InProcessEngine) -> None:
        worker = engine.worker
        self.found = Checked()
        self.keys: dict[int, list[bytes]] = {}  # by the manager's number of a load or store
        self._per_chunk = worker._blocks_per_chunk
        by_address = {tensor.data_ptr(): tensor for tensor in worker.tensors}
        self._pages = [[(by_address[page.base], page.bytes) for page in memory.pages] for memory in worker.memories]

    def content(self, group: int, block: int) -> bytes:
        return b"".join(tensor[block].numpy().tobytes()[:size] for tensor, size in self._pages[group])

    def places(self, spec: Any, slots: Any) -> Iterator[tuple[Place, bytes]]:
        """Of each block of a job: what it is part of, and what it holds now."""
        keys, begin = iter(self.keys[slots.serial]), 0
        for group, (size, first) in enumerate(zip(spec.group_sizes, spec.block_indices, strict=True)):
            blocks = spec.block_ids[begin : begin + size]
            begin += size
            of_group = [next(keys) for _ in range(slots.group_chunks[group])]
            for number, block in enumerate(blocks, first % self._per_chunk):
                yield (of_group[number // self._per_chunk], number % self._per_chunk), self.content(group, int(block))


@contextlib.contextmanager
def checked_bytes(engine: InProcessEngine) -> Iterator[Checked]:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    watch = _Watch(engine)
    found = watch.found
    worker, manager, vllms = engine.worker, engine.manager, get_kv_transfer_group().connector_worker
    prepare_store, prepare_load = manager.prepare_store, manager.prepare_load
    step_ends, submit_store, submit_load, get_finished = (
        vllms.prepare_store_kv,
        worker.submit_store,
        worker.submit_load,
        worker.get_finished,
    )
    loads: dict[int, tuple[Any, Any]] = {}

    def watching_prepare_store(keys: Any, req_context: Any) -> Any:
        output = prepare_store(keys, req_context)
        if output is not None:
            watch.keys[output.store_spec.serial] = list(output.keys_to_store)
        return output

    def watching_prepare_load(keys: Any, req_context: Any) -> Any:
        slots = prepare_load(keys, req_context)
        watch.keys[slots.serial] = list(keys)
        return slots

    def whole(spec: Any, slots: Any) -> bool:
        expected = [
            chunks * watch._per_chunk - first % watch._per_chunk
            for chunks, first in zip(slots.group_chunks, spec.block_indices, strict=True)
        ]
        return all(size in (0, want) for size, want in zip(spec.group_sizes, expected, strict=True))

    def watching_step_ends(metadata: Any) -> None:
        for job in metadata.store_jobs.values():
            if whole(job.src_spec, job.dst_spec):
                for place, content in watch.places(job.src_spec, job.dst_spec):
                    found.contents[place].add(content)
        step_ends(metadata)

    def watching_submit_store(job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        if whole(src_spec, dst_spec):
            for place, content in watch.places(src_spec, dst_spec):
                assert content in found.contents[place] or not found.contents[place], "a block was written before it was stored"
                found.contents[place].add(content)
                found.stored_blocks += 1
        missing = [first % watch._per_chunk for first in src_spec.block_indices]
        found.incomplete_chunks += sum(bool(of) for of in missing) + (not whole(src_spec, dst_spec))
        return bool(submit_store(job_id, src_spec, dst_spec))

    def watching_submit_load(job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        loads[job_id] = (dst_spec, src_spec)
        return bool(submit_load(job_id, src_spec, dst_spec))

    def watching_get_finished() -> list[Any]:
        results = list(get_finished())
        for result in results:
            if result.job_id in loads:
                for place, content in watch.places(*loads.pop(result.job_id)):
                    assert content in found.contents[place], f"block {place[1]} of a chunk came back with bytes never stored"
                    found.loaded_blocks += 1
        return results

    with (
        _replaced(manager, prepare_store=watching_prepare_store, prepare_load=watching_prepare_load),
        _replaced(vllms, prepare_store_kv=watching_step_ends),
        _replaced(worker, submit_store=watching_submit_store, submit_load=watching_submit_load, get_finished=watching_get_finished),
    ):
        yield found
        engine.drain()
