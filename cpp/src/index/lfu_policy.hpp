// Least frequently used first, with counts that saturate and age.
#pragma once

#include <array>
#include <cstdint>

#include "index/eviction_policy.hpp"
#include "index/id_links.hpp"

namespace lmcn {

/// Each entry has a count: 1 when it is inserted, 1 more with each hit, 63 at most. The lowest count goes first; among equal ones
/// the entry that has had it the longest, or, at 63, was hit the longest ago.
///
/// Aging: whenever a removal leaves no entry with count 0, all counts fall by the lowest that is left, so that it becomes 0 (as in
/// LFU with dynamic aging). Chunks that are stored and never hit therefore push the others down by one each time all of them have
/// been replaced: an entry with count c that is hit no more is evicted after about c such rounds, however often it was hit before.
/// A hot entry that stays away from the bottom stays.
///
/// postpone() takes an entry to the back of the highest count in use, and it keeps that count.
///
/// 9 bytes an id; each operation is O(1): a list for each count in a ring of 64, where aging turns the ring.
class LfuPolicy final : public EvictionPolicy {
 public:
  void insert(EntryId id) override;
  void access(EntryId id) override;
  void postpone(EntryId id) override;
  void remove(EntryId id) override;
  std::optional<EntryId> victim(const std::function<bool(EntryId)>& may_evict, std::uint32_t max_scan) override;
  std::uint64_t size() const override { return size_; }
  std::uint64_t memory_bytes() const override { return sizeof(*this) + links_.memory_bytes(); }
  std::string_view name() const override { return "LFU"; }

 private:
  static constexpr std::uint8_t kCounts = 64;

  std::uint8_t place_of(std::uint8_t count) const noexcept { return static_cast<std::uint8_t>((base_ + count) % kCounts); }
  std::uint8_t count_at(std::uint8_t place) const noexcept {
    return static_cast<std::uint8_t>((place + kCounts - base_) % kCounts);
  }
  /// Counts in use: bit c for count c.
  std::uint64_t used() const noexcept;
  void link(EntryId id, std::uint8_t count) noexcept;
  void unlink(EntryId id) noexcept;

  IdLinks<std::uint8_t> links_;  // and its place in the ring
  std::array<IdList, kCounts> ring_;
  std::uint64_t used_places_ = 0;  // bit p: ring_[p] is not empty
  std::uint8_t base_ = 0;          // place of count 0
  std::uint64_t size_ = 0;
};

}  // namespace lmcn
