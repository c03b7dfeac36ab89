#include <algorithm>

#include "store/request.hpp"
#include "store/store_core.hpp"

namespace lmcn {

PrefixHit StoreCore::lookup(std::span<const ChunkKey> keys) const {
  constexpr std::size_t kAhead = 8;
  PrefixHit hit;
  if (inherited()) return hit;
  std::lock_guard lock(mu);
  for (std::size_t i = 0; i < std::min(kAhead, keys.size()); ++i) index.prefetch(keys[i]);
  for (std::size_t i = 0; i < keys.size(); ++i) {
    if (i + kAhead < keys.size()) index.prefetch(keys[i + kAhead]);
    const EntryId id = index.find(keys[i]);
    if (id == kNoEntry) break;
    const Entry& entry = index.entry(id);
    if (entry.host == HostState::kReady) {
      ++hit.host;
    } else if (log && on_nvme(entry)) {
      ++hit.nvme;
    } else {
      break;
    }
    ++hit.hit;
  }
  lookups.fetch_add(hit.hit + (hit.hit < keys.size() ? 1 : 0), std::memory_order_relaxed);
  return hit;
}

Result<WriteLease> StoreCore::reserve(const NamespaceId& ns, std::span<const ChunkKey> keys, std::uint64_t payload_bytes,
                                      bool for_worker) {
  if (payload_bytes == 0 || payload_bytes > options.max_payload_bytes || payload_bytes % parts() != 0) {
    return Status(Code::kInvalidArgument,
                  "payload_bytes=" + std::to_string(payload_bytes) + ": must be 1.." + std::to_string(options.max_payload_bytes) +
                      " (max_payload_bytes of the store) and a multiple of its " + std::to_string(parts()) + " part(s)");
  }
  if (inherited()) return inherited_status();
  WriteLease lease;
  lease.payload_bytes_ = payload_bytes;
  bool full = false;
  bool writes_behind = false;
  {
    std::lock_guard lock(mu);
    if (closed) return Status(Code::kUnavailable, "the store is closed");
    for (std::uint32_t i = 0; i < keys.size(); ++i) {
      const EntryId present = index.find(keys[i]);
      if (present != kNoEntry && index.entry(present).host != HostState::kNone) {
        if (index.entry(present).host == HostState::kReady) {
          policy->access(present);
          writes_behind |= offer_to_nvme(present, true);
        }
        continue;
      }
      // Allocation may evict and so erase entries: the id is taken afterwards.
      const SlotId slot = allocate_slot(image_bytes(payload_bytes), kNoEntry);
      if (slot == kNoSlot) {
        full = true;
        break;
      }
      const EntryId id = index.insert(keys[i]);
      SlotRecord& record = slots[slot];
      record.entry = id;
      record.pins = 1;
      Entry& entry = index.entry(id);
      entry.host = HostState::kFilling;
      entry.host_slot = slot;
      entry.flags = 0;
      lease.positions_.push_back(i);
      lease.slots_.push_back({record.slot.offset, record.slot.generation});
      lease.slot_ids_.push_back(slot);
    }
    counters.reserved_chunks += lease.slots_.size();
    if (full) ++counters.reserve_failures;
    if (!lease.slots_.empty()) changed();
  }
  if (writes_behind) keeper_cv.notify_one();
  if (full && lease.slots_.empty()) {
    return Status(Code::kResourceExhausted, "host arena of " + std::to_string(options.host_bytes) +
                                                " bytes: no slot can be evicted for a chunk of " + std::to_string(payload_bytes) +
                                                " bytes (all are leased or being filled)");
  }
  // Outside the lock: the first touch of a page may fault. The lease's pin keeps the slots ours.
  for (std::size_t i = 0; i < lease.slots_.size(); ++i) {
    begin_slot(arena->base() + lease.slots_[i].offset, keys[lease.positions_[i]], ns, payload_bytes, parts(),
               lease.slots_[i].generation);
  }
  if (for_worker && !lease.slots_.empty()) {
    std::lock_guard lock(mu);
    for (const SlotId id : lease.slot_ids_) slots[id].worker_fill = true;
  }
  if (!lease.slots_.empty()) lease.store_ = this;
  return lease;
}

std::unique_ptr<Request> StoreCore::begin_request(const NamespaceId& ns, const RequestOptions& request_options) {
  return std::make_unique<RequestImpl>(*this, ns, request_options);
}

Result<ReadLease> StoreCore::acquire(const NamespaceId& ns, std::span<const ChunkKey> keys, std::chrono::milliseconds deadline) {
  if (keys.empty()) return ReadLease();
  if (inherited()) return inherited_status();
  const Clock::time_point until = Clock::now() + deadline;
  RequestImpl request(*this, ns, RequestOptions{.promotion_budget_bytes = options.host_bytes, .promotion_deadline = deadline});
  std::uint32_t ready = 0;
  for (;;) {
    const std::uint64_t seen = version.load(std::memory_order_acquire);
    ready = 0;
    bool waiting = false;
    for (const ChunkKey& key : keys) {
      const Presence presence = request.lookup(key);
      if (presence == Presence::kMiss) break;
      if (presence != Presence::kHit) waiting = true;
      if (!waiting) ++ready;
    }
    if (!waiting || Clock::now() >= until) break;
    std::unique_lock lock(mu);
    if (!promoted_cv.wait_until(lock, until, [&] { return version.load(std::memory_order_acquire) != seen; })) break;
  }
  if (ready == 0) return Status(Code::kNotFound, "chunk " + keys[0].to_hex() + ": in no tier, or not readable before the deadline");
  return request.acquire(keys.first(ready), false);
}

void StoreCore::touch(std::span<const ChunkKey> keys) {
  if (inherited()) return;
  std::lock_guard lock(mu);
  for (const ChunkKey& key : keys) {
    const EntryId id = index.find(key);
    if (id != kNoEntry && index.entry(id).host == HostState::kReady) policy->access(id);
  }
}

std::vector<RecordPlace> StoreCore::locate(std::span<const ChunkKey> keys) {
  std::vector<RecordPlace> places;
  if (inherited()) return places;
  std::lock_guard lock(mu);
  for (std::uint32_t i = 0; log && i < keys.size(); ++i) {
    const EntryId id = index.find(keys[i]);
    if (id == kNoEntry || !on_nvme(index.entry(id))) continue;
    std::optional<RecordPlace> place = log->place(index.entry(id).extent);
    if (!place) continue;
    place->position = i;
    places.push_back(*place);
    count_hit(index.entry(id));
    ++counters.hits_nvme;
  }
  return places;
}

void StoreCore::count_writes(std::uint32_t path, std::uint64_t bytes) {
  if (inherited()) return;
  std::lock_guard lock(mu);
  if (!log) return;
  log->count_writes(path, bytes);
  log_changed = true;  // the next checkpoint keeps it
}

void StoreCore::record_failed(const ChunkKey& key, const RecordPlace& place) {
  if (inherited()) return;
  std::lock_guard lock(mu);
  const EntryId id = index.find(key);
  if (!log || id == kNoEntry || !index.entry(id).extent.valid()) return;
  const std::optional<RecordPlace> now = log->place(index.entry(id).extent);
  if (!now || now->path != place.path || now->offset_bytes != place.offset_bytes || now->region_sequence != place.region_sequence)
    return;
  ++counters.corrupt_records;
  drop_extent(id);
  changed();
}

bool StoreCore::erase(const ChunkKey& key) {
  if (inherited()) return false;
  std::lock_guard lock(mu);
  const EntryId id = index.find(key);
  if (id == kNoEntry) return false;
  const bool in_host = index.entry(id).host_slot != kNoSlot;
  drop_extent(id);
  if (in_host) drop_host_copy(id);
  pin_epoch.fetch_add(1, std::memory_order_acq_rel);
  changed();
  return true;
}

void StoreCore::clear() {
  if (inherited()) return;
  {
    std::lock_guard lock(mu);
    ++clear_epoch;
    pin_epoch.fetch_add(1, std::memory_order_acq_rel);
    while (!evacuations.empty()) end_evacuation(evacuations.begin()->first);
    index.clear();
    policy = make_eviction_policy(options.cache_policy, index).value();  // the name was good at open()
    dirty_queue.clear();
    dirty_bytes = 0;
    dirty_chunks = 0;
    low_slots.clear();
    changes.clear();
    for (SlotId id = 0; id < slots.size(); ++id) {
      if (!slots[id].in_use || slots[id].entry == kNoEntry) continue;
      slots[id].entry = kNoEntry;
      free_or_quarantine(id);
    }
    ++counters.cleared;
    clear_pending = static_cast<bool>(log);  // else attach() sees the epoch
    next_to_offer = kNoEntry;
    changed();
  }
  keeper_cv.notify_one();
  promoted_cv.notify_all();
}

}  // namespace lmcn
