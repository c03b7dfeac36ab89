// What the writing process knows, in memory that outlives it: a page-locked account of what was attempted, what the store has
// acknowledged, and what may not come back. Written by the child before and after each operation, judged by whoever opens next.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <string>

#include "index/chunk_index.hpp"

namespace lmcn::crash {

inline constexpr std::uint32_t kIds = 2048;
inline constexpr std::uint32_t kMaxRegions = 16;
inline constexpr std::uint64_t kRegionBytes = 1 << 20;
inline constexpr std::uint32_t kRegionPages = kRegionBytes / 4096;

/// A record that the store had acknowledged.
struct Kept {
  std::uint32_t id;
  Extent extent;
  std::uint64_t sequence;  // of its region: while the region's header on disk says so, the record must be there
  bool sealed;             // the region's footer had been written
};

struct Snapshot {
  std::uint64_t clears = 0;  // begun before
  std::uint32_t count = 0;
  Kept kept[kIds];
};

/// In shared memory, zeros at first. Each field is stored before the kill could make it a lie: `attempted` before commit(),
/// `clears_begun` before clear(), acknowledgements after the call returned.
struct Ledger {
  std::atomic<std::uint64_t> attempted[kIds];  // clears begun + 1 at the last commit() of the id; 0: never
  std::atomic<bool> being_erased[kIds];        // neither its presence nor its absence says anything
  std::atomic<std::uint64_t> clears_begun;
  std::atomic<std::uint64_t> clears_acknowledged;  // clear() returned, and then flush() with ok
  std::atomic<std::uint32_t> current;              // which snapshot is whole
  Snapshot snapshots[2];

  // Seen by the witness between log and device. Sequences, so that they say nothing about a later life of the region.
  std::atomic<std::uint64_t> region_sequence[kMaxRegions];  // of the last header handed to the device
  std::atomic<std::uint64_t> sealed_sequence[kMaxRegions];  // of the last footer that the device has

  std::atomic<std::uint64_t> whole[kMaxRegions][kRegionPages];      // a record at that page was written in full, or read back whole
  std::atomic<std::uint64_t> recovered[kMaxRegions][kRegionPages];  // a record at that page was found by open(): perhaps not whole
  std::atomic<std::uint64_t> events;   // requests about to be handed to the device, or done and not heard of yet
  std::atomic<std::uint64_t> kill_at;  // the event at which the process dies; 0: none

  std::atomic<std::uint64_t> operations, puts, aborts, hits, erases, flushes, reopens, reclaimed_regions;
  std::atomic<bool> judged;  // by the child, after it opened the store
  std::atomic<bool> failed;
  char failure[1024];

  /// The first failure stays.
  void fail(const std::string& what) {
    bool first = false;
    if (failed.compare_exchange_strong(first, true)) std::snprintf(failure, sizeof failure, "%s", what.c_str());
  }
};

}  // namespace lmcn::crash
