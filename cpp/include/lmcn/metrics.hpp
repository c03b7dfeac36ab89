// Counters and gauges of a store, as one plain snapshot.
#pragma once

#include <cstdint>

namespace lmcn {

/// Counters grow from open(); gauges are of now. Bytes are bytes of slot images unless named otherwise.
struct StoreStats {
  // gauges
  std::uint64_t host_limit_bytes = 0, host_used_bytes = 0, host_slots = 0, host_pinned_slots = 0, host_quarantined_slots = 0;
  std::uint64_t arena_populated_bytes = 0, arena_huge_bytes = 0;
  std::uint64_t index_entries = 0, index_memory_bytes = 0;
  std::uint64_t nvme_limit_bytes = 0, nvme_allocated_bytes = 0, nvme_live_bytes = 0, nvme_dirty_bytes = 0, nvme_quarantined = 0;
  std::uint64_t nvme_paths = 0, nvme_lost_paths = 0;           // configured; quarantined or left out at open
  std::uint64_t nvme_waiting = 0;  // 1: another process owns the directories; host memory only until it lets go
  std::uint64_t nvme_day_bytes = 0, nvme_day_limit_bytes = 0;  // written to all paths within 24 hours, also by earlier processes
  std::uint64_t promotions_in_flight = 0, requests = 0, attached_ranks = 0;
  // counters
  std::uint64_t lookups = 0, hits_host = 0, hits_nvme = 0, misses = 0;
  std::uint64_t reserved_chunks = 0, committed_chunks = 0, aborted_chunks = 0, reserve_failures = 0;
  std::uint64_t evicted_chunks = 0;
  std::uint64_t promoted_chunks = 0, promoted_bytes = 0, promotion_failures = 0, promotion_refusals = 0, promotion_timeouts = 0;
  std::uint64_t demoted_chunks = 0, demoted_bytes = 0, demotion_failures = 0, demotion_drops = 0;
  // Chunks that were not written to NVMe when they were offered: seen for the first time while writes are dear, or while the device
  // is behind; the day's budget was spent.
  std::uint64_t refused_first_touch = 0, refused_device_behind = 0, refused_over_budget = 0;
  std::uint64_t corrupt_records = 0, stale_reads = 0, misplaced_reads = 0, read_errors = 0, write_errors = 0;
  std::uint64_t corrupt_host_chunks = 0;  // verify=all: bytes in host memory that were no longer those published
  std::uint64_t recovered_chunks = 0, reclaimed_regions = 0, reclaimed_chunks = 0, reappended_chunks = 0, reappended_bytes = 0,
                cleared = 0;
};

}  // namespace lmcn
