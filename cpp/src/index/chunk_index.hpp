// key -> where. Entries live in a pool addressed by 32-bit ids; the table holds ids only.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "index/eviction_policy.hpp"
#include "lmcn/key.hpp"

namespace lmcn {

/// Where on NVMe. 4 KiB units keep it at 12 bytes.
struct Extent {
  std::uint32_t region = 0xFFFFFFFFu;  // kNoRegion: not on NVMe
  std::uint32_t page = 0;              // 4 KiB pages from the region's start
  std::uint32_t pages = 0;             // length of the record, header page included
  bool valid() const noexcept { return region != 0xFFFFFFFFu; }
  bool operator==(const Extent&) const = default;
};
static_assert(sizeof(Extent) == 12);

/// State of the host copy.
enum class HostState : std::uint8_t {
  kNone,       // not in host memory
  kFilling,    // reserved by a write lease; not visible
  kPromoting,  // an NVMe read is filling it; not visible
  kReady,      // published: may be looked up, leased, demoted, evicted (when unpinned)
};

struct Entry {
  ChunkKey key;
  std::uint32_t host_slot = 0xFFFFFFFFu;  // index into the store's slot table
  Extent extent;
  std::uint16_t hits = 0;  // saturating, since written to NVMe
  HostState host = HostState::kNone;
  std::uint8_t flags = 0;  // kDirty...: store's
};
static_assert(sizeof(Entry) <= 64);

/// Open addressing over the pool. Not thread-safe: the store's lock covers it. Pointers to entries stay valid until erase()
/// (the pool grows in blocks). Memory per entry incl. table and any policy's state <= 96 bytes at any load (tested).
class ChunkIndex {
 public:
  ChunkIndex();
  ~ChunkIndex();
  EntryId find(const ChunkKey& key) const noexcept;  // kNoEntry: absent
  EntryId insert(const ChunkKey& key);               // existing id if present
  void erase(EntryId id);                            // REQUIRES: live
  Entry& entry(EntryId id) noexcept;                 // REQUIRES: live
  const Entry& entry(EntryId id) const noexcept;
  bool live(EntryId id) const noexcept;
  std::uint64_t size() const noexcept;
  std::uint64_t memory_bytes() const noexcept;
  void clear();
  /// Ids given out so far are below: for walks in slices, with live().
  EntryId end_id() const noexcept;
  void for_each(const std::function<void(EntryId, Entry&)>& f);
  /// Hides cache misses of the lookups to come.
  void prefetch(const ChunkKey& key) const noexcept;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lmcn
