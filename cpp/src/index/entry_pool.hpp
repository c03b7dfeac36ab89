// The entries of ChunkIndex: blocks that never move, addressed by 32-bit ids.
#pragma once

#include <array>
#include <cassert>
#include <cstdint>
#include <memory>
#include <vector>

#include "index/chunk_index.hpp"

namespace lmcn {

/// Ids of freed entries are given out again, the last freed first. Not thread-safe.
class EntryPool {
 public:
  static constexpr std::uint32_t kBlockEntries = 64;  // small, so that a new block costs little per entry and little time

  EntryId allocate() {
    EntryId id = free_;
    if (id != kNoEntry) {
      free_ = (*this)[id].host_slot;
    } else {
      id = end_;
      if (id / kBlockEntries == blocks_.size()) blocks_.push_back(std::make_unique<Block>());
      ++end_;
    }
    (*this)[id] = Entry{};
    block(id).live[word(id)] |= bit(id);
    ++size_;
    return id;
  }

  void free(EntryId id) noexcept {
    assert(live(id));
    block(id).live[word(id)] &= ~bit(id);
    (*this)[id].host_slot = free_;  // the free list runs through the dead
    free_ = id;
    --size_;
  }

  bool live(EntryId id) const noexcept { return id < end_ && (blocks_[id / kBlockEntries]->live[word(id)] & bit(id)) != 0; }
  Entry& operator[](EntryId id) noexcept { return block(id).entries[id % kBlockEntries]; }
  const Entry& operator[](EntryId id) const noexcept { return blocks_[id / kBlockEntries]->entries[id % kBlockEntries]; }

  EntryId end() const noexcept { return end_; }  // ids given out so far are below
  std::uint64_t size() const noexcept { return size_; }
  std::uint64_t memory_bytes() const noexcept {
    return blocks_.size() * (sizeof(Block) + kMallocHeaderBytes) + blocks_.capacity() * sizeof(blocks_[0]);
  }

 private:
  struct Block {
    std::array<Entry, kBlockEntries> entries;
    std::array<std::uint64_t, kBlockEntries / 64> live{};
  };
  static constexpr std::size_t kMallocHeaderBytes = 16;

  static std::uint32_t word(EntryId id) noexcept { return id % kBlockEntries / 64; }
  static std::uint64_t bit(EntryId id) noexcept { return std::uint64_t{1} << (id % 64); }
  Block& block(EntryId id) noexcept { return *blocks_[id / kBlockEntries]; }

  std::vector<std::unique_ptr<Block>> blocks_;
  EntryId free_ = kNoEntry;
  EntryId end_ = 0;
  std::uint64_t size_ = 0;
};

}  // namespace lmcn
