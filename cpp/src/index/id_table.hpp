// The hash table of ChunkIndex: 32-bit hash -> entry id, 8 bytes a slot.
#pragma once

#include <bit>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "index/zeroed_pages.hpp"

namespace lmcn {

/// Robin Hood hashing with linear probing: slots lie in the cyclic order of their homes, so a search ends at the first slot that
/// is nearer to its home than the searched one would be, and erasing shifts the rest of the cluster back (no tombstones).
/// A home is the hash's top bits: a larger table keeps the order, so moving to it reads and writes memory in sequence.
/// Fixed size; the owner grows by moving clusters to another table. Not thread-safe.
class IdTable {
 public:
  static constexpr std::size_t kNotFound = ~std::size_t{0};
  static constexpr unsigned kMinLog2Slots = 9;  // one page

  explicit IdTable(unsigned log2_slots) : pages_((std::size_t{1} << log2_slots) * sizeof(Slot)), log2_slots_(log2_slots) {
    assert(log2_slots >= kMinLog2Slots && log2_slots <= 32);
  }

  unsigned log2_slots() const noexcept { return log2_slots_; }
  std::size_t slots() const noexcept { return std::size_t{1} << log2_slots_; }
  std::size_t size() const noexcept { return size_; }
  std::size_t memory_bytes() const noexcept { return pages_.bytes(); }
  /// At 7/8 a hit looks at 4.5 slots on average.
  bool full() const noexcept { return size_ >= slots() / 8 * 7; }

  /// Position of the slot with `hash` whose id satisfies `matches`, or kNotFound.
  template <class Matches>
  std::size_t find(std::uint32_t hash, Matches&& matches) const noexcept {
    std::size_t position = home(hash);
    for (std::size_t distance = 0;; ++distance, position = next(position)) {
      const Slot slot = slot_at(position);
      if (slot.empty() || distance_at(position, slot) < distance) return kNotFound;
      if (slot.hash == hash && matches(slot.id())) return position;
    }
  }

  /// REQUIRES: a free slot; `id` is not in the table.
  void insert(std::uint32_t hash, std::uint32_t id) noexcept {
    assert(size_ < slots());
    std::size_t position = home(hash);
    for (std::size_t distance = 0;; ++distance, position = next(position)) {
      const Slot slot = slot_at(position);
      if (slot.empty() || distance_at(position, slot) < distance) break;
    }
    for (Slot carried{hash, id + 1}; !carried.empty(); position = next(position)) std::swap(slot_at(position), carried);
    ++size_;
  }

  std::uint32_t id_at(std::size_t position) const noexcept { return slot_at(position).id(); }

  void erase_at(std::size_t position) noexcept {
    assert(!slot_at(position).empty());
    for (;;) {
      const std::size_t following = next(position);
      const Slot slot = slot_at(following);
      if (slot.empty() || distance_at(following, slot) == 0) break;
      slot_at(position) = slot;
      position = following;
    }
    slot_at(position) = Slot{};
    --size_;
  }

  /// Moves slots to `target`, from the first on: at least `count` (free ones counted), then on to the end of a cluster, so that no
  /// search of this table finds its way cut off. Each call goes on where the last one ended. After the first call erase_at() may
  /// come, insert() may not.
  void move_to(IdTable& target, std::size_t count) noexcept {
    for (std::size_t moved = 0; size_ > 0; ++moved) {
      Slot& slot = slot_at(moved_slots_);
      if (slot.empty()) {
        if (moved >= count) break;
      } else {
        target.insert(slot.hash, slot.id());
        slot = Slot{};
        --size_;
      }
      if (++moved_slots_ % kDiscardSlots == 0) {
        pages_.discard((moved_slots_ - kDiscardSlots) * sizeof(Slot), kDiscardSlots * sizeof(Slot));
      }
    }
  }

  /// False when move_to() has passed all places where `hash` can be: what is left lies in whole clusters after moved_slots_.
  bool may_hold(std::uint32_t hash) const noexcept { return home(hash) >= moved_slots_; }

  void prefetch(std::uint32_t hash) const noexcept { __builtin_prefetch(&slot_at(home(hash))); }

 private:
  struct Slot {
    std::uint32_t hash = 0;
    std::uint32_t id_plus_one = 0;  // 0: free, as fresh pages are
    bool empty() const noexcept { return id_plus_one == 0; }
    std::uint32_t id() const noexcept { return id_plus_one - 1; }
  };

  static constexpr std::size_t kDiscardSlots = 16 * 1024;  // 128 KiB at a time, some 10 us

  std::size_t home(std::uint32_t hash) const noexcept {
    return static_cast<std::size_t>(std::uint64_t{hash} >> (32 - log2_slots_));
  }
  std::size_t next(std::size_t position) const noexcept { return (position + 1) & (slots() - 1); }
  std::size_t distance_at(std::size_t position, Slot slot) const noexcept { return (position - home(slot.hash)) & (slots() - 1); }
  Slot& slot_at(std::size_t position) noexcept { return static_cast<Slot*>(pages_.data())[position]; }
  const Slot& slot_at(std::size_t position) const noexcept { return static_cast<const Slot*>(pages_.data())[position]; }

  ZeroedPages pages_;
  unsigned log2_slots_;
  std::size_t size_ = 0;
  std::size_t moved_slots_ = 0;  // all before are free
};

}  // namespace lmcn
