// Host arena -> NVMe, and the log's other duties. The keeper thread is the log's single writer.
#include <time.h>

#include <algorithm>

#include "memory/checksum.hpp"
#include "store/request.hpp"
#include "store/store_core.hpp"

namespace lmcn {
namespace {

constexpr std::uint64_t kMaxDemotionsInFlight = 8;
constexpr auto kTick = std::chrono::milliseconds(500);
constexpr auto kFullRetry = std::chrono::milliseconds(2);  // while the log prepares a region
constexpr auto kCheckpointEvery = std::chrono::seconds(30);
constexpr std::uint64_t kRegisterPieceBytes = 256ULL << 20;  // I/O waits meanwhile: about 30 ms with 4 KiB pages
constexpr std::uint64_t kRegisterPieces = 1000;              // the ring's table has 1024 places
constexpr std::uint64_t kHugePageBytes = 2ULL << 20;
constexpr std::uint64_t kDemotionsBesideReads = 2;          // in flight while promotions wait
constexpr std::uint64_t kCheckpointRegionBytes = 16 << 10;  // what a checkpoint says of about 1000 regions
constexpr auto kBehind = std::chrono::seconds(1);
constexpr auto kEvacuationPatience = std::chrono::seconds(10);  // space was found elsewhere

}  // namespace

void StoreCore::mark_dirty(EntryId id, bool again) {
  Entry& entry = index.entry(id);
  const SlotRecord& record = slots[entry.host_slot];
  entry.flags = static_cast<std::uint8_t>(entry.flags | kDirty);
  dirty_queue.push_back({entry.host_slot, record.slot.generation, Clock::now(), again});
  dirty_bytes += record.slot.bytes;
  ++dirty_chunks;
}

// mu held. `touched`: used since it was stored, or stored before.
bool StoreCore::offer_to_nvme(EntryId id, bool touched, bool again) {
  if (!log || !nvme_ready()) return false;
  const Entry& entry = index.entry(id);
  if (on_nvme(entry) || (entry.flags & (kDirty | kWriting)) != 0) return false;
  if (verify_all && !slots[entry.host_slot].has_checksum) return false;  // offered when it has one
  if (entry.extent.valid()) drop_extent(id);                             // on a path that is lost
  const Priority priority = slots[entry.host_slot].priority;
  const Admission::Offer offer{
      .bytes = slots[entry.host_slot].slot.bytes,
      .touched = touched || priority == Priority::kHigh,
      .low = priority == Priority::kLow,
      .device_behind = !dirty_queue.empty() && Clock::now() - dirty_queue.front().since > kBehind,
      .day_bytes = log->last_day_bytes() + dirty_bytes,
  };
  switch (admission->decide(entry.key, offer)) {
    case Admitted::kYes:
      mark_dirty(id, again);
      return true;
    case Admitted::kFirstTouch:
      ++(offer.device_behind ? counters.refused_device_behind : counters.refused_first_touch);
      return false;
    case Admitted::kOverBudget:
      ++counters.refused_over_budget;
      return false;
  }
  return false;
}

// What was stored while another process had the directories, as soon as nothing else waits for the device.
void StoreCore::offer_earlier_chunks(std::unique_lock<std::mutex>& lock) {
  constexpr EntryId kSlice = 256;
  while (next_to_offer != kNoEntry && dirty_queue.empty()) {
    const EntryId end = index.end_id(), slice_end = std::min<EntryId>(next_to_offer + kSlice, end);
    for (EntryId id = next_to_offer; id < slice_end; ++id) {
      if (index.live(id) && index.entry(id).host == HostState::kReady)
        static_cast<void>(offer_to_nvme(id, index.entry(id).hits != 0));
    }
    next_to_offer = slice_end < end ? slice_end : kNoEntry;
    lock.unlock();
    std::this_thread::yield();
    lock.lock();
  }
}

// Reads go first: someone waits for them.
std::uint64_t StoreCore::max_demotions() const {
  const std::uint64_t stuck = log ? log->stuck().reads : 0;
  return promotions_in_flight > stuck ? kDemotionsBesideReads : kMaxDemotionsInFlight;
}

std::uint64_t StoreCore::live_demotions() const {
  return demotions_in_flight - std::min(demotions_in_flight, log ? log->stuck().writes : 0);
}

void StoreCore::keeper_loop(std::stop_token stop) {
  Clock::time_point next_tick = Clock::now() + kTick;
  Clock::time_point next_checkpoint = Clock::now() + kCheckpointEvery;
  std::unique_lock lock(mu);
  const auto drained = [&] {
    return dirty_queue.empty() && next_to_offer == kNoEntry && checksums_in_flight == 0 && live_demotions() == 0;
  };
  while (!stop.stop_requested()) {
    const bool full = log_full_since != Clock::time_point{} && !dirty_queue.empty();
    keeper_cv.wait_until(lock, full ? std::min(next_tick, Clock::now() + kFullRetry) : next_tick, [&] {
      return stop.stop_requested() || clear_pending || maintenance_due || (next_to_offer != kNoEntry && dirty_queue.empty()) ||
             (checkpoints_wanted != checkpoints_written && drained()) || (checkpoint_due && live_demotions() == 0) ||
             (!full && !checkpoint_due && !dirty_queue.empty() && live_demotions() < max_demotions());
    });
    if (stop.stop_requested()) break;
    if (dirty_queue.empty()) log_full_since = {};
    if (log && clear_pending) clear_log(lock);
    if (next_to_offer != kNoEntry && dirty_queue.empty()) offer_earlier_chunks(lock);
    while (!clear_pending && !checkpoint_due && live_demotions() < max_demotions() && demote_next(lock)) {
    }
    const Clock::time_point now = Clock::now();
    if (log && log_changed && now >= next_checkpoint) checkpoint_due = true;
    if (checkpoints_wanted != checkpoints_written && drained()) checkpoint_due = true;
    if (checkpoint_due && !clear_pending && live_demotions() == 0) {
      next_checkpoint = now + kCheckpointEvery;
      const std::uint64_t wanted = drained() ? checkpoints_wanted : checkpoints_written;
      lock.unlock();
      Status written = write_checkpoint();
      lock.lock();
      if (!written.ok()) {
        // One that has no room is no error: open() then reads footers.
        if (written.code() != Code::kResourceExhausted) ++counters.write_errors;
        log_changed = true;
      }
      checkpoint_due = false;
      checkpoints_written = wanted;
      last_checkpoint = std::move(written);
      flushed_cv.notify_all();
    }
    if (now >= next_tick || maintenance_due) {
      next_tick = now + kTick;
      maintenance_due = false;
      tick(lock);
    }
  }
}

void StoreCore::clear_log(std::unique_lock<std::mutex>& lock) {
  clear_pending = false;
  log_changed = false;
  lock.unlock();
  const Status cleared = log->clear();
  lock.lock();
  if (!cleared.ok()) ++counters.write_errors;
}

void StoreCore::tick(std::unique_lock<std::mutex>& lock) {
  sweep_quarantine();
  expire_requests();
  if (log && log->lost_paths() != forgotten_paths) forget_lost_paths(lock);
  for (auto next = evacuations.begin(); next != evacuations.end();) {
    const auto evacuation = next++;
    if (Clock::now() - evacuation->second.since > kEvacuationPatience) end_evacuation(evacuation->first);
  }
  lock.unlock();
  bool failed = false;
  if (log) failed = !log->maintain().ok();
  if (log && registered_bytes < arena->bytes() && arena->stats().populate_done) register_next_piece();
  lock.lock();
  if (failed) ++counters.write_errors;
}

// Writes the oldest unwritten chunk; false when there is none or the log takes none now.
bool StoreCore::demote_next(std::unique_lock<std::mutex>& lock) {
  while (!dirty_queue.empty()) {
    const DirtyItem item = dirty_queue.front();
    dirty_queue.pop_front();
    SlotRecord& record = slots[item.slot];
    if (!record.in_use || record.slot.generation != item.generation || record.entry == kNoEntry) continue;
    const EntryId id = record.entry;
    Entry& entry = index.entry(id);
    if ((entry.flags & kDirty) == 0) continue;
    if (Clock::now() - item.since > options.write_deadline) {
      entry.flags = 0;
      no_longer_dirty(record);
      ++counters.demotion_drops;
      ++counters.dropped_late;
      continue;
    }
    entry.flags = kWriting;
    ++record.pins;
    ++demotions_in_flight;
    const std::uint64_t epoch = clear_epoch;
    std::byte* const at = image(item.slot);
    const std::uint64_t slot_bytes = record.slot.bytes, published = record.checksum;
    lock.unlock();
    const std::uint64_t payload = slot_header(at)->payload_bytes, bytes = image_bytes(payload);
    if (bytes > slot_bytes || (verify_all && checksum64(at + kPageBytes, payload) != published)) {
      finish_demotion(item, id, epoch, Status(Code::kAborted, "not what was published"), Extent{});
      lock.lock();
      drop_corrupt(item, id);
      return true;
    }
    const auto done = [this, item, id, epoch](const Status& status, Extent extent) {
      finish_demotion(item, id, epoch, status, extent);
    };
    Status appended = log->append(at, bytes, id, done, item.again);
    if (appended.code() == Code::kResourceExhausted && log->maintain().ok())
      appended = log->append(at, bytes, id, done, item.again);
    if (appended.code() == Code::kResourceExhausted) {
      lock.lock();
      return put_back(lock, item, id, epoch, appended);
    }
    log_full_since = {};
    if (!appended.ok()) finish_demotion(item, id, epoch, appended, Extent{});
    lock.lock();
    return true;
  }
  return false;
}

// Its bytes in host memory are no longer those that were published: not to be sealed with new checksums.
void StoreCore::drop_corrupt(const DirtyItem& item, EntryId id) {
  const SlotRecord& record = slots[item.slot];
  if (!record.in_use || record.slot.generation != item.generation || record.entry != id) return;
  ++counters.corrupt_host_chunks;
  drop_host_copy(id);
  pin_epoch.fetch_add(1, std::memory_order_acq_rel);
  changed();
}

// The log has no region ready: the chunk waits at the head of the queue, or is given up when that lasts too long.
bool StoreCore::put_back(std::unique_lock<std::mutex>& lock, const DirtyItem& item, EntryId id, std::uint64_t epoch,
                         const Status& why) {
  const Clock::time_point now = Clock::now();
  if (log_full_since == Clock::time_point{}) log_full_since = now;
  const bool current = epoch == clear_epoch && slots[item.slot].entry == id;
  if (!current || now - item.since > options.write_deadline) {
    lock.unlock();
    finish_demotion(item, id, epoch, why, Extent{});
    lock.lock();
    return true;
  }
  index.entry(id).flags = kDirty;
  --demotions_in_flight;
  dirty_queue.push_front(item);
  unpin(item.slot);
  return false;
}

void StoreCore::finish_demotion(const DirtyItem& item, EntryId id, std::uint64_t epoch, const Status& status, Extent extent) {
  {
    std::lock_guard lock(mu);
    --demotions_in_flight;
    SlotRecord& record = slots[item.slot];  // pinned: still this generation
    const bool current = epoch == clear_epoch;
    if (current) no_longer_dirty(record);
    if (!status.ok() && status.code() != Code::kAborted) {
      const bool no_room = status.code() == Code::kResourceExhausted;
      ++(no_room ? counters.demotion_drops : counters.demotion_failures);
      if (no_room) ++counters.dropped_no_room;
    }
    if (status.ok()) latency.write_wait.add(Clock::now() - item.since);
    const bool wanted = current && record.entry == id;
    if (wanted) {
      Entry& entry = index.entry(id);
      entry.flags = 0;
      if (status.ok()) {
        entry.extent = extent;
        note_change(entry.key, Tier::kNvme, true);
        entry.hits = 0;
        ++counters.demoted_chunks;
        counters.demoted_bytes += record.slot.bytes;
        if (item.again) {
          ++counters.reappended_chunks;
          counters.reappended_bytes += record.slot.bytes;
        }
        log_changed = true;
      }
    } else if (status.ok() && current) {
      log->forget(extent);
    }
    unpin(item.slot);
  }
  keeper_cv.notify_one();
}

Status StoreCore::flush(std::chrono::milliseconds deadline) {
  if (inherited()) return inherited_status();
  const Clock::time_point until = Clock::now() + deadline;
  std::unique_lock lock(mu);
  if (!log) return Status();
  if (closed) return Status(Code::kUnavailable, "the store is closed");
  const std::uint64_t ticket = ++checkpoints_wanted;
  keeper_cv.notify_one();
  const bool done = flushed_cv.wait_until(lock, until, [&] { return checkpoints_written >= ticket; });
  // A checkpoint that has no room is no loss: open() then reads footers.
  if (done) return last_checkpoint.code() == Code::kResourceExhausted ? Status() : last_checkpoint;
  return Status(Code::kDeadlineExceeded, "flush: " + std::to_string(dirty_bytes) + " bytes not yet on NVMe");
}

// No append is under way (the keeper starts none now), so the walk may let others in between its slices: they only take
// extents away, which the log allows.
Status StoreCore::write_checkpoint() {
  constexpr EntryId kSlice = 4096;
  constexpr auto kSlicePause = std::chrono::microseconds(50);
  std::vector<nvme::RecoveredRecord> entries;
  std::vector<nvme::RecoveredRecord> slice;
  slice.reserve(kSlice);
  log->settle();
  std::unique_lock lock(mu);
  const std::uint64_t epoch = clear_epoch;
  log_changed = false;
  for (EntryId from = 0; from < index.end_id(); from += kSlice) {
    for (EntryId id = from; id < std::min<EntryId>(from + kSlice, index.end_id()); ++id) {
      if (!index.live(id)) continue;
      const Entry& entry = index.entry(id);
      if (entry.extent.valid()) slice.push_back({entry.key, entry.extent, entry.hits});
    }
    lock.unlock();
    entries.insert(entries.end(), slice.begin(), slice.end());
    slice.clear();
    std::this_thread::sleep_for(kSlicePause);  // a mutex alone would not let the others in
    lock.lock();
    if (clear_epoch != epoch) return Status();  // the log is about to be cleared too
  }
  lock.unlock();
  const std::uint64_t bytes =
      sizeof(nvme::CheckpointHeader) + entries.size() * sizeof(nvme::CheckpointEntry) + kCheckpointRegionBytes;
  if (log->last_day_bytes() + bytes > daily_bytes) {
    return {Code::kResourceExhausted, "no checkpoint: the day's limit of " + std::to_string(daily_bytes) + " bytes is spent"};
  }
  return log->checkpoint([&](const nvme::RegionLog::EntrySink& sink) {
    for (const auto& [key, extent, hits] : entries) sink(key, extent, hits);
  });
}

void StoreCore::expire_requests() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
  const std::int64_t now_ns = std::int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
  const std::int64_t ttl_ns = std::chrono::nanoseconds(options.request_ttl).count();
  for (RequestImpl* request : requests) request->expire_if_idle(now_ns, ttl_ns);
}

// After population: registering pins the pages, which would fault them all in here and keep them from being collapsed. One piece
// a tick, because I/O waits meanwhile.
void StoreCore::register_next_piece() {
  const std::uint64_t share = (arena->bytes() / kRegisterPieces + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  const std::uint64_t bytes = std::min(std::max(kRegisterPieceBytes, share), arena->bytes() - registered_bytes);
  Status registered;
  for (const auto& engine : engines) {
    if (registered.ok()) registered = engine->register_buffer({arena->base() + registered_bytes, bytes});
  }
  registered_bytes += bytes;
  if (registered.ok()) return;
  registered_bytes = arena->bytes();
  std::lock_guard lock(mu);
  engine_note += "; buffers not all registered (" + registered.message() + ")";
}

}  // namespace lmcn
