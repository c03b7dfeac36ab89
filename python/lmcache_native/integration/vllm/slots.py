"""Where a job's chunks lie in the arena: what goes from the scheduler to the workers with each job."""

from __future__ import annotations

from array import array

from lmcache_native.integration.vllm import compat


class SlotLoadStoreSpec(compat.LoadStoreSpec):  # type: ignore[misc]
    """Compact and picklable. A load that could not be leased has no slots: it fails, and the engine recomputes.

    `group_chunks`: how many of the chunks are of each KV cache group, in the order of the groups, which is that of the chunks.
    """

    __slots__ = ("generations", "group_chunks", "offsets", "serial")

    def __init__(self, serial: int, offsets: array[int], generations: array[int], group_chunks: tuple[int, ...]) -> None:
        self.serial = serial  # the manager's number of this load or store
        self.offsets = offsets
        self.generations = generations
        self.group_chunks = group_chunks

    @classmethod
    def unleased(cls, serial: int) -> SlotLoadStoreSpec:
        return cls(serial, array("Q"), array("I"), ())

    def group(self, index: int) -> SlotLoadStoreSpec:
        """Its chunks of one group, as a spec of their own."""
        begin = sum(self.group_chunks[:index])
        return self.chunks(begin, begin + self.group_chunks[index])

    def chunks(self, begin: int, end: int) -> SlotLoadStoreSpec:
        """REQUIRES: of one group."""
        return SlotLoadStoreSpec(self.serial, self.offsets[begin:end], self.generations[begin:end], (end - begin,))

    def __len__(self) -> int:
        return len(self.offsets)

    def __repr__(self) -> str:
        return f"SlotLoadStoreSpec({self.serial}: {'+'.join(map(str, self.group_chunks))} chunks)"

    def __reduce__(self) -> tuple[type[SlotLoadStoreSpec], tuple[int, array[int], array[int], tuple[int, ...]]]:
        return (SlotLoadStoreSpec, (self.serial, self.offsets, self.generations, self.group_chunks))
