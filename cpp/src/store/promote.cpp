// NVMe -> host arena.
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>

#include "store/store_core.hpp"

namespace lmcn {

SlotId StoreCore::start_promotion(EntryId id, const std::optional<NamespaceId>& ns) {
  const Extent extent = index.entry(id).extent;
  const SlotId slot = allocate_slot(std::uint64_t{extent.pages} * kPageBytes, kNoEntry);
  if (slot == kNoSlot) return kNoSlot;
  SlotRecord& record = slots[slot];
  record.entry = id;
  record.pins = 1;  // of the read; finish_promotion() drops it
  Entry& entry = index.entry(id);
  entry.host = HostState::kPromoting;
  entry.host_slot = slot;
  promote_queue.push_back({PromoterJob::Kind::kRead, slot, record.slot.offset, record.slot.generation, 0, extent, entry.key, ns});
  ++promotions_in_flight;
  changed();
  return slot;
}

// The only thread of the store that never waits for the device: it also watches over the device, and over what the keeper would
// do if it did not wait.
void StoreCore::promoter_loop(std::stop_token stop) {
  const auto check_every = std::min<std::chrono::nanoseconds>(std::chrono::seconds(1), options.nvme_io_timeout / 2);
  Clock::time_point next_check = Clock::now();
  std::unique_lock lock(mu);
  for (;;) {
    promote_cv.wait_until(lock, next_check, [&] { return stop.stop_requested() || !promote_queue.empty(); });
    if (const Clock::time_point now = Clock::now(); now >= next_check) {
      next_check = now + check_every;
      if (!log) continue;
      lock.unlock();
      log->check_deadlines();
      lock.lock();
      if (log->lost_paths() != 0) {
        sweep_quarantine();
        expire_requests();
      }
      if (promote_queue.empty() && !stop.stop_requested()) continue;
    }
    if (promote_queue.empty()) return;  // what is queued is still read: its requests wait for it
    const PromoterJob job = promote_queue.front();
    promote_queue.pop_front();
    const bool wanted = slots[job.slot].entry != kNoEntry;
    lock.unlock();
    if (job.kind != PromoterJob::Kind::kRead) {
      run_check(job);
    } else if (wanted) {
      log->read(job.extent, arena->base() + job.offset, job.key, job.ns ? &*job.ns : nullptr,
                [this, job](const Status& status) { finish_promotion(job, status); });
    } else {
      finish_promotion(job, Status(Code::kAborted, "cleared"));
    }
    lock.lock();
  }
}

void StoreCore::finish_promotion(const PromoterJob& promotion, const Status& status) {
  if (status.ok()) adopt_slot(arena->base() + promotion.offset, promotion.generation, parts());
  {
    std::lock_guard lock(mu);
    --promotions_in_flight;
    const SlotRecord& record = slots[promotion.slot];
    const EntryId id = record.entry;
    if (id != kNoEntry && status.ok()) {
      index.entry(id).host = HostState::kReady;
      policy->insert(id);
      ++counters.promoted_chunks;
      counters.promoted_bytes += record.slot.bytes;
      if (verify_all) start_check(promotion.slot, true);
    } else if (id != kNoEntry) {
      ++counters.promotion_failures;
      if (index.entry(id).extent == promotion.extent) drop_extent(id);
      drop_host_copy(id);
    }
    unpin(promotion.slot);
    maintenance_due = !evacuations.empty();
    changed();
  }
  promoted_cv.notify_all();
  if (verify_all) promote_cv.notify_one();
  keeper_cv.notify_one();  // writes may have waited for reads
  const std::uint64_t one = 1;
  // A full counter (never, in practice) is as readable as any.
  [[maybe_unused]] const ssize_t n = ::write(completion_event, &one, sizeof one);
}

}  // namespace lmcn
