// Slots: fixed places in the arena, from size-classed slabs.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "lmcn/status.hpp"

namespace lmcn {

/// A place handed out. Generations count up over the whole arena, so no two lives of overlapping places share one.
struct Slot {
  std::uint64_t offset = 0;      // bytes from the arena's base, 4 KiB-aligned
  std::uint64_t bytes = 0;       // size of the class: >= the bytes asked for, 4 KiB multiple
  std::uint32_t generation = 0;  // never 0 for a live slot
};

/// Book-keeping only (never touches the arena's memory). Not thread-safe: the store's lock covers it.
/// The arena is cut into slabs; a slab serves one size class until all its slots are free, then it returns to the pool, where
/// neighbours join. A slab is a stretch of exactly n slots (about 2 MiB, or 1/64 of the arena if that is less; at least one slot),
/// so a single size class loses less than one slot at the arena's end. Several classes can leave holes shorter than a slot.
/// Size classes: 4 KiB multiples, exact while <= 16 distinct sizes have slots, else rounded up by <= 1/8.
/// allocate() and release() are O(1) inside slabs, O(log slabs) when a slab is made or ends.
class SlotAllocator {
 public:
  explicit SlotAllocator(std::uint64_t arena_bytes);
  ~SlotAllocator();

  /// nullopt: no free slot of that class and no free slab (the store then evicts and tries again); or 0 bytes, or more than the
  /// arena has.
  std::optional<Slot> allocate(std::uint64_t bytes);
  /// REQUIRES: a slot from allocate() of this generation. (Assert in debug builds, ignored and counted otherwise.)
  void release(const Slot& slot);

  struct Stats {
    std::uint64_t arena_bytes = 0;  // rounded down to 4 KiB
    std::uint64_t used_bytes = 0;   // of slots handed out, by class size
    std::uint64_t used_slots = 0;
    std::uint64_t slab_bytes = 0;  // in slabs of any class; minus used_bytes: free, but for that class only
    std::uint64_t free_slabs = 0;  // slabs of the usual length that the pool could still give
    std::uint64_t bad_releases = 0;
  };
  Stats stats() const;
  /// The size class `bytes` falls in now: the store prefers victims whose Slot::bytes is that (slots of other classes help only
  /// once a whole slab of theirs is free).
  std::uint64_t class_bytes(std::uint64_t bytes) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lmcn
