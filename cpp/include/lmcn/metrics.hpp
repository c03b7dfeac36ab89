// Counters and gauges of a store, as one plain snapshot.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace lmcn {

/// Counters grow from open(); gauges are of now. Bytes are bytes of slot images unless named otherwise.
struct StoreStats {
  // gauges
  std::uint64_t host_limit_bytes = 0, host_used_bytes = 0, host_slots = 0, host_pinned_slots = 0, host_quarantined_slots = 0;
  std::uint64_t arena_populated_bytes = 0, arena_huge_bytes = 0;
  std::uint64_t index_entries = 0, index_memory_bytes = 0;
  std::uint64_t nvme_limit_bytes = 0, nvme_allocated_bytes = 0, nvme_live_bytes = 0, nvme_dirty_bytes = 0, nvme_quarantined = 0;
  std::uint64_t nvme_dirty_chunks = 0,
                demotions_in_flight = 0;              // waiting for their write or being written; of those, being written
  std::uint64_t nvme_paths = 0, nvme_lost_paths = 0;  // configured; quarantined or left out at open
  std::uint64_t nvme_waiting = 0;                     // 1: another process owns the directories; host memory only until it lets go
  std::uint64_t nvme_day_bytes = 0, nvme_day_limit_bytes = 0;  // written to all paths within 24 hours, also by earlier processes
  std::uint64_t promotions_in_flight = 0, requests = 0, attached_ranks = 0;
  std::uint64_t checks_in_flight = 0;  // verify=all: checksums to be taken or compared
  // counters
  std::uint64_t lookups = 0, hits_host = 0, hits_nvme = 0, misses = 0;
  std::uint64_t reserved_chunks = 0, committed_chunks = 0, aborted_chunks = 0, reserve_failures = 0;
  std::uint64_t evicted_chunks = 0, evicted_bytes = 0;
  std::uint64_t promoted_chunks = 0, promoted_bytes = 0, promotion_failures = 0, promotion_refusals = 0, promotion_timeouts = 0;
  // Of promotion_refusals: beyond the request's budget, beyond what all requests may pin, no slot could be evicted.
  std::uint64_t refused_request_budget = 0, refused_pin_limit = 0, refused_no_slot = 0;
  std::uint64_t demoted_chunks = 0, demoted_bytes = 0, demotion_failures = 0, demotion_drops = 0;
  // Of demotion_drops: waited longer than write_deadline, left host memory before, no room in the log.
  std::uint64_t dropped_late = 0, dropped_evicted = 0, dropped_no_room = 0;
  std::uint64_t nvme_read_bytes = 0;  // what the device gave for promotions, also what did not verify
  std::uint64_t verified_bytes =
      0;  // images read from NVMe, and with verify=all payloads in host memory, whose checksums were computed
  // Chunks that were not written to NVMe when they were offered: seen for the first time while writes are dear, or while the device
  // is behind; the day's budget was spent.
  std::uint64_t refused_first_touch = 0, refused_device_behind = 0, refused_over_budget = 0;
  std::uint64_t corrupt_records = 0, stale_reads = 0, misplaced_reads = 0, read_errors = 0, write_errors = 0;
  std::uint64_t lost_changes = 0;         // beyond what take_changes() keeps
  std::uint64_t corrupt_host_chunks = 0;  // verify=all: bytes in host memory that were no longer those published
  std::uint64_t recovered_chunks = 0, reclaimed_regions = 0, reclaimed_chunks = 0, reappended_chunks = 0, reappended_bytes = 0,
                cleared = 0;
};

/// Upper bounds of a LatencyHistogram's buckets, inclusive. The last bucket has none.
inline constexpr std::array<std::uint64_t, 18> kLatencyBoundsNs = {
    50'000,     100'000,     250'000,     500'000,     1'000'000,     2'500'000,     5'000'000,     10'000'000,     25'000'000,
    50'000'000, 100'000'000, 250'000'000, 500'000'000, 1'000'000'000, 2'500'000'000, 5'000'000'000, 10'000'000'000, 30'000'000'000};
inline constexpr std::size_t kLatencyBuckets = kLatencyBoundsNs.size() + 1;

/// How many durations fell into each bucket since open(), and their sum by bucket.
struct LatencyHistogram {
  std::array<std::uint64_t, kLatencyBuckets> count{}, total_ns{};
  void add(const LatencyHistogram& other) noexcept {
    for (std::size_t i = 0; i < kLatencyBuckets; ++i) {
      count[i] += other.count[i];
      total_ns[i] += other.total_ns[i];
    }
  }
};

/// One observation a chunk.
struct StoreLatencies {
  LatencyHistogram promotion;   // NVMe -> host: from when it was queued until it could be looked up, or failed
  LatencyHistogram read;        // of that, from the read's submission until the device answered
  LatencyHistogram verify;      // checksums over a record that was read, or (verify=all) over a payload in host memory
  LatencyHistogram write_wait;  // host -> NVMe: from when it became dirty until it was written
  LatencyHistogram write;       // of that, from the write's submission until the device answered
};

}  // namespace lmcn
