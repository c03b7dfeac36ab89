// Doubly linked lists of entry ids, without nodes: arrays of neighbours indexed by id, 8 bytes an id.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <vector>

#include "index/eviction_policy.hpp"

namespace lmcn {

/// First and last id of one list; kNoEntry both when empty.
struct IdList {
  EntryId first = kNoEntry;
  EntryId last = kNoEntry;
  bool empty() const noexcept { return first == kNoEntry; }
};

/// The neighbours of ids in any number of lists; an id is in one list at most. Blocks are allocated by add() only. Each operation
/// is O(1). `State`: bytes that each id carries besides. Not thread-safe.
template <class State>
class IdLinks {
 public:
  /// Makes room for `id`. REQUIRES: not in a list.
  void add(EntryId id) {
    const std::size_t block = id / kBlockIds;
    if (block >= blocks_.size()) blocks_.resize(block + 1);
    if (blocks_[block]) return;
    blocks_[block] = std::make_unique<Block>();
    ++block_count_;
  }
  bool linked(EntryId id) const noexcept {
    const std::size_t block = id / kBlockIds;
    return block < blocks_.size() && blocks_[block] && next(id) != kAbsent;
  }
  State& state(EntryId id) noexcept { return blocks_[id / kBlockIds]->state[id % kBlockIds]; }

  EntryId next(EntryId id) const noexcept { return links(id).next; }
  EntryId previous(EntryId id) const noexcept { return links(id).previous; }

  /// REQUIRES: add(id) once, and not in a list.
  void push_back(IdList& list, EntryId id) noexcept {
    links(id) = Links{.previous = list.last, .next = kNoEntry};
    (list.empty() ? list.first : links(list.last).next) = id;
    list.last = id;
  }
  void push_front(IdList& list, EntryId id) noexcept {
    links(id) = Links{.previous = kNoEntry, .next = list.first};
    (list.empty() ? list.last : links(list.first).previous) = id;
    list.first = id;
  }
  /// REQUIRES: `id` is in `list`.
  void unlink(IdList& list, EntryId id) noexcept {
    const Links around = links(id);
    (around.previous == kNoEntry ? list.first : links(around.previous).next) = around.next;
    (around.next == kNoEntry ? list.last : links(around.next).previous) = around.previous;
    links(id) = Links{};
  }

  std::uint64_t memory_bytes() const noexcept {
    return blocks_.capacity() * sizeof(blocks_[0]) + block_count_ * (sizeof(Block) + kMallocHeaderBytes);
  }

 private:
  static constexpr std::uint32_t kBlockIds = 128;
  static constexpr EntryId kAbsent = kNoEntry - 1;  // in Links::next of ids that are in no list
  static constexpr std::size_t kMallocHeaderBytes = 16;

  struct Links {
    EntryId previous = kAbsent;
    EntryId next = kAbsent;
  };
  struct Block {
    std::array<Links, kBlockIds> links;
    [[no_unique_address]] std::array<State, kBlockIds> state{};
  };

  Links& links(EntryId id) noexcept { return blocks_[id / kBlockIds]->links[id % kBlockIds]; }
  const Links& links(EntryId id) const noexcept { return blocks_[id / kBlockIds]->links[id % kBlockIds]; }

  std::vector<std::unique_ptr<Block>> blocks_;  // null: no id of that range was ever added
  std::size_t block_count_ = 0;
};

}  // namespace lmcn
