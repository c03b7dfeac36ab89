// Slots: fixed places in the arena, from size-classed slabs.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "lmcn/status.hpp"

namespace lmcn {

/// Offset in the arena plus size; generation changes each time the place is handed out.
struct Slot {
  std::uint64_t offset = 0;       // bytes from the arena's base, 4 KiB-aligned
  std::uint64_t bytes = 0;        // size of the class: >= the bytes asked for, 4 KiB multiple
  std::uint32_t generation = 0;   // never 0 for a live slot
};

/// Book-keeping only (never touches the arena's memory). Not thread-safe: the store's lock covers it.
/// The arena is cut into slabs; a slab serves one size class until all its slots are free, then it returns to the pool.
/// Size classes: 4 KiB multiples, exact for the sizes asked for most (a class per distinct size while there are
/// <= 16 distinct sizes, else rounded up by <= 1/8). Worst-case waste is reported by stats().
class SlotAllocator {
 public:
  explicit SlotAllocator(std::uint64_t arena_bytes);
  ~SlotAllocator();

  /// nullopt: no free slot of that class and no free slab (the store then evicts and tries again).
  std::optional<Slot> allocate(std::uint64_t bytes);
  /// REQUIRES: a slot from allocate() of this generation. (Assert in debug builds, ignored and counted otherwise.)
  void release(const Slot& slot);

  struct Stats {
    std::uint64_t arena_bytes = 0, used_bytes = 0, used_slots = 0, slab_bytes = 0, free_slabs = 0, bad_releases = 0;
  };
  Stats stats() const;
  /// Would allocate(bytes) succeed after releasing slots of other classes only if a whole slab became free?
  /// Returns the size class `bytes` falls in, so that the store can prefer victims of that class.
  std::uint64_t class_bytes(std::uint64_t bytes) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lmcn
