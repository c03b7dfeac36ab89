#include "lmcn/metrics.hpp"

#include <nanobind/nanobind.h>

#include "bindings.hpp"

namespace lmcn::python {
namespace {

struct Field {
  const char* name;
  std::uint64_t StoreStats::* member;
};

#define LMCN_FIELD(name)     \
  Field {                    \
    #name, &StoreStats::name \
  }
constexpr Field kFields[] = {
    LMCN_FIELD(host_limit_bytes),
    LMCN_FIELD(host_used_bytes),
    LMCN_FIELD(host_slots),
    LMCN_FIELD(host_pinned_slots),
    LMCN_FIELD(host_quarantined_slots),
    LMCN_FIELD(arena_populated_bytes),
    LMCN_FIELD(arena_huge_bytes),
    LMCN_FIELD(index_entries),
    LMCN_FIELD(index_memory_bytes),
    LMCN_FIELD(nvme_limit_bytes),
    LMCN_FIELD(nvme_allocated_bytes),
    LMCN_FIELD(nvme_live_bytes),
    LMCN_FIELD(nvme_dirty_bytes),
    LMCN_FIELD(nvme_quarantined),
    LMCN_FIELD(nvme_dirty_chunks),
    LMCN_FIELD(demotions_in_flight),
    LMCN_FIELD(nvme_paths),
    LMCN_FIELD(nvme_lost_paths),
    LMCN_FIELD(nvme_waiting),
    LMCN_FIELD(nvme_day_bytes),
    LMCN_FIELD(nvme_day_limit_bytes),
    LMCN_FIELD(promotions_in_flight),
    LMCN_FIELD(requests),
    LMCN_FIELD(attached_ranks),
    LMCN_FIELD(checks_in_flight),
    LMCN_FIELD(lookups),
    LMCN_FIELD(hits_host),
    LMCN_FIELD(hits_nvme),
    LMCN_FIELD(misses),
    LMCN_FIELD(reserved_chunks),
    LMCN_FIELD(committed_chunks),
    LMCN_FIELD(aborted_chunks),
    LMCN_FIELD(reserve_failures),
    LMCN_FIELD(evicted_chunks),
    LMCN_FIELD(evicted_bytes),
    LMCN_FIELD(promoted_chunks),
    LMCN_FIELD(promoted_bytes),
    LMCN_FIELD(promotion_failures),
    LMCN_FIELD(promotion_refusals),
    LMCN_FIELD(promotion_timeouts),
    LMCN_FIELD(refused_request_budget),
    LMCN_FIELD(refused_pin_limit),
    LMCN_FIELD(refused_no_slot),
    LMCN_FIELD(demoted_chunks),
    LMCN_FIELD(demoted_bytes),
    LMCN_FIELD(demotion_failures),
    LMCN_FIELD(demotion_drops),
    LMCN_FIELD(dropped_late),
    LMCN_FIELD(dropped_evicted),
    LMCN_FIELD(dropped_no_room),
    LMCN_FIELD(nvme_read_bytes),
    LMCN_FIELD(verified_bytes),
    LMCN_FIELD(refused_first_touch),
    LMCN_FIELD(refused_device_behind),
    LMCN_FIELD(refused_over_budget),
    LMCN_FIELD(corrupt_records),
    LMCN_FIELD(stale_reads),
    LMCN_FIELD(misplaced_reads),
    LMCN_FIELD(read_errors),
    LMCN_FIELD(write_errors),
    LMCN_FIELD(lost_changes),
    LMCN_FIELD(corrupt_host_chunks),
    LMCN_FIELD(recovered_chunks),
    LMCN_FIELD(reclaimed_regions),
    LMCN_FIELD(reclaimed_chunks),
    LMCN_FIELD(reappended_chunks),
    LMCN_FIELD(reappended_bytes),
    LMCN_FIELD(cleared),
};
#undef LMCN_FIELD
static_assert(std::size(kFields) * sizeof(std::uint64_t) == sizeof(StoreStats), "a field of StoreStats is missing here");

}  // namespace

nb::dict stats_dict(const StoreStats& stats) {
  nb::dict out;
  for (const Field& field : kFields) out[field.name] = stats.*field.member;
  return out;
}

nb::dict latencies_dict(const StoreLatencies& latencies) {
  const auto buckets = [](const LatencyHistogram& histogram) {
    nb::list out;
    for (std::size_t i = 0; i < kLatencyBuckets; ++i) {
      const double seconds = static_cast<double>(histogram.total_ns[i]) / 1e9;
      out.append(nb::make_tuple(histogram.count[i], seconds));
    }
    return out;
  };
  nb::dict out;
  out["promotion"] = buckets(latencies.promotion);
  out["read"] = buckets(latencies.read);
  out["verify"] = buckets(latencies.verify);
  out["write_wait"] = buckets(latencies.write_wait);
  out["write"] = buckets(latencies.write);
  return out;
}

nb::tuple latency_bounds() {
  nb::list out;
  for (const std::uint64_t ns : kLatencyBoundsNs) out.append(static_cast<double>(ns) / 1e9);
  return nb::tuple(out);
}

}  // namespace lmcn::python
