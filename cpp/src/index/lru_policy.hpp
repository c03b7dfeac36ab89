// Least recently used first.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "index/eviction_policy.hpp"

namespace lmcn {

/// A list through arrays indexed by EntryId (8 bytes an id, in blocks): no node is allocated, each operation is O(1).
class LruPolicy final : public EvictionPolicy {
 public:
  void insert(EntryId id) override;
  void access(EntryId id) override;
  void remove(EntryId id) override;
  std::optional<EntryId> victim(const std::function<bool(EntryId)>& may_evict, std::uint32_t max_scan) override;
  std::uint64_t size() const override { return size_; }
  std::uint64_t memory_bytes() const override { return sizeof(*this) + directory_bytes() + block_count_ * kBlockBytes; }
  std::string_view name() const override { return "LRU"; }

 private:
  static constexpr std::uint32_t kBlockLinks = 256;
  static constexpr EntryId kAbsent = kNoEntry - 1;  // in Links::colder of ids that are not resident

  struct Links {
    EntryId colder = kAbsent;
    EntryId hotter = kAbsent;
  };
  using Block = std::array<Links, kBlockLinks>;
  static constexpr std::size_t kBlockBytes = sizeof(Block) + 16;  // and malloc's header

  Links& links(EntryId id) noexcept { return (*blocks_[id / kBlockLinks])[id % kBlockLinks]; }
  std::size_t directory_bytes() const noexcept { return blocks_.capacity() * sizeof(blocks_[0]); }
  bool resident(EntryId id) noexcept;
  void push_hottest(EntryId id) noexcept;
  void unlink(EntryId id) noexcept;

  std::vector<std::unique_ptr<Block>> blocks_;  // null: no id of that range was ever resident
  std::size_t block_count_ = 0;
  EntryId coldest_ = kNoEntry;
  EntryId hottest_ = kNoEntry;
  std::uint64_t size_ = 0;
};

}  // namespace lmcn
