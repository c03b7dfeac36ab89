#include <bit>
#include <utility>

#include "store/store_core.hpp"

namespace lmcn {
namespace {

constexpr std::size_t kMostChanges = 1'000'000;

}  // namespace

bool StoreCore::nvme_ready() const noexcept {
  return log && !inherited() && !log->quarantined();
}

std::string StoreCore::nvme_warning() const {
  if (inherited()) return inherited_status().message();
  {
    std::lock_guard lock(mu);
    if (!open_warning.empty()) return open_warning;
  }
  if (log && log->quarantined()) return "NVMe quarantined: " + log->quarantine_reason();
  if (log && log->lost_paths() != 0) {
    return std::to_string(std::popcount(log->lost_paths())) + " of " + std::to_string(options.directories.size()) +
           " NVMe paths not in use: " + log->quarantine_reason();
  }
  return {};
}

std::string StoreCore::io_engine_note() const {
  if (inherited()) return {};
  std::lock_guard lock(mu);
  return engine_note;
}

StoreStats StoreCore::stats() const {
  if (inherited()) return {};
  const ArenaStats arena_stats = arena->stats();
  const nvme::RegionLog* const open_log = log.get();
  const nvme::LogStats log_stats = open_log != nullptr ? open_log->stats() : nvme::LogStats{};
  std::lock_guard lock(mu);
  StoreStats s = counters;
  const SlotAllocator::Stats used = allocator->stats();
  s.host_limit_bytes = arena->bytes();
  s.host_used_bytes = used.used_bytes;
  s.host_slots = used.used_slots;
  for (const SlotRecord& record : slots) s.host_pinned_slots += record.in_use && record.pins != 0 ? 1 : 0;
  s.host_quarantined_slots = quarantine.size();
  s.arena_populated_bytes = arena_stats.populated_bytes;
  s.arena_huge_bytes = arena_stats.huge_bytes;
  s.index_entries = index.size();
  s.index_memory_bytes = index.memory_bytes() + policy->memory_bytes();
  s.nvme_limit_bytes = log_stats.limit_bytes;
  s.nvme_allocated_bytes = log_stats.allocated_bytes;
  s.nvme_live_bytes = log_stats.live_record_bytes;
  s.nvme_quarantined = log_stats.quarantined ? 1 : 0;
  s.nvme_waiting = taking_over ? 1 : 0;
  if (open_log != nullptr) {
    s.nvme_paths = options.directories.size();
    s.nvme_lost_paths = static_cast<std::uint64_t>(std::popcount(open_log->lost_paths()));
    s.nvme_day_bytes = open_log->last_day_bytes();
    s.nvme_day_limit_bytes = daily_bytes;
  }
  s.nvme_dirty_bytes = dirty_bytes;
  s.nvme_dirty_chunks = dirty_chunks;
  s.demotions_in_flight = demotions_in_flight;
  s.checks_in_flight = checks_in_flight;
  s.promotions_in_flight = promotions_in_flight;
  s.requests = requests.size();
  s.attached_ranks = rendezvous ? rendezvous->attached_ranks() : 0;
  s.corrupt_records += log_stats.corrupt_reads;  // what readers of their own told is there already
  s.stale_reads = log_stats.stale_reads;
  s.misplaced_reads = log_stats.misplaced_reads;
  s.read_errors = log_stats.read_errors;
  s.nvme_read_bytes = log_stats.read_bytes;
  s.verified_bytes += log_stats.verified_bytes;  // what check.cpp computed is there already
  s.write_errors += log_stats.write_errors;
  s.lookups = lookups.load(std::memory_order_relaxed);
  return s;
}

void StoreCore::watch_changes() {
  if (inherited()) return;
  std::lock_guard lock(mu);
  watching = true;
}

void StoreCore::add_change(const ChunkKey& key, Tier tier, bool stored) {
  if (changes.size() < kMostChanges) {
    changes.push_back({key, tier, stored});
  } else {
    ++counters.lost_changes;
  }
}

std::vector<TierChange> StoreCore::take_changes() {
  if (inherited()) return {};
  std::lock_guard lock(mu);
  return std::exchange(changes, {});
}

StoreLatencies StoreCore::latencies() const {
  if (inherited()) return {};
  StoreLatencies all;
  if (log) {
    const nvme::LogStats of_log = log->stats();
    all.read = of_log.read_latency;
    all.write = of_log.write_latency;
    all.verify = of_log.verify_latency;
  }
  all.verify.add(latency.check.snapshot());
  all.promotion = latency.promotion.snapshot();
  all.write_wait = latency.write_wait.snapshot();
  return all;
}

}  // namespace lmcn
