"""Where a job's chunks lie in the arena: what goes from the scheduler to the workers with each job."""

from __future__ import annotations

from array import array

from lmcache_native.integration.vllm import compat


class SlotLoadStoreSpec(compat.LoadStoreSpec):  # type: ignore[misc]
    """Compact and picklable. A load that could not be leased has no slots: it fails, and the engine recomputes."""

    __slots__ = ("generations", "offsets", "serial")

    def __init__(self, serial: int, offsets: array[int], generations: array[int]) -> None:
        self.serial = serial  # the manager's number of this load or store
        self.offsets = offsets
        self.generations = generations

    @classmethod
    def unleased(cls, serial: int) -> SlotLoadStoreSpec:
        return cls(serial, array("Q"), array("I"))

    def __len__(self) -> int:
        return len(self.offsets)

    def __repr__(self) -> str:
        return f"SlotLoadStoreSpec({self.serial}: {len(self)} chunks)"

    def __reduce__(self) -> tuple[type[SlotLoadStoreSpec], tuple[int, array[int], array[int]]]:
        return (SlotLoadStoreSpec, (self.serial, self.offsets, self.generations))
