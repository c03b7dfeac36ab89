// The policies that are one list: LRU, FIFO, MRU.
#pragma once

#include "index/eviction_policy.hpp"
#include "index/id_links.hpp"

namespace lmcn {

enum class ListOrder : std::uint8_t {
  kLeastRecent,  // "LRU": the entry whose last hit, or insertion, is the longest ago goes first
  kOldest,       // "FIFO": the entry inserted first goes first, hits do not matter
  kMostRecent,   // "MRU": the entry hit or inserted last goes first (for cyclic scans of more than fits)
};

/// A list from the oldest to the newest entry, where a hit may make an entry the newest. Each operation is O(1).
class ListPolicy final : public EvictionPolicy {
 public:
  explicit ListPolicy(ListOrder order) noexcept : order_(order) {}
  void insert(EntryId id) override;
  void access(EntryId id) override;
  void postpone(EntryId id) override;
  void remove(EntryId id) override;
  std::optional<EntryId> victim(const std::function<bool(EntryId)>& may_evict, std::uint32_t max_scan) override;
  std::uint64_t size() const override { return size_; }
  std::uint64_t memory_bytes() const override { return sizeof(*this) + links_.memory_bytes(); }
  std::string_view name() const override;

 private:
  struct Nothing {};

  const ListOrder order_;
  IdLinks<Nothing> links_;
  IdList list_;  // newest last
  std::uint64_t size_ = 0;
};

}  // namespace lmcn
