#include "store/store_core.hpp"

namespace lmcn {
namespace {
constexpr std::uint32_t kVictimScan = 256;
constexpr int kMaxCrossClassEvictions = 4096;
}  // namespace

bool StoreCore::busy(SlotRecord& record) const {
  if (record.pins != 0) return true;
  const std::byte* at = arena->base() + record.slot.offset;
  if (record.worker_fill) {
    for (std::uint32_t rank = 0; rank < parts(); ++rank) {
      if (rank_state(at, rank, record.slot.generation) == RankState::kEmpty) return true;
    }
    record.worker_fill = false;
  }
  if (record.loads_settled != record.loads_issued) {
    for (std::uint32_t rank = 0; rank < options.rank_count; ++rank) {
      if (loads_done(at, rank) != record.loads_issued) return true;
    }
    record.loads_settled = record.loads_issued;
  }
  return false;
}

SlotId StoreCore::allocate_slot(std::uint64_t bytes, EntryId entry) {
  std::optional<Slot> place = allocator->allocate(bytes);
  if (!place && !quarantine.empty()) {
    sweep_quarantine();
    place = allocator->allocate(bytes);
  }
  for (int tries = 0; !place && tries < kMaxCrossClassEvictions; ++tries) {
    if (!evict_one(bytes)) return kNoSlot;
    place = allocator->allocate(bytes);
  }
  if (!place) return kNoSlot;
  SlotId id;
  if (free_slot_ids.empty()) {
    id = static_cast<SlotId>(slots.size());
    slots.emplace_back();
  } else {
    id = free_slot_ids.back();
    free_slot_ids.pop_back();
  }
  slots[id] = SlotRecord{.slot = *place, .entry = entry, .in_use = true};
  return id;
}

// Clean chunks of the wanted class first; then unwritten ones (their NVMe write is dropped); then any class, until a slab is free.
// Busy chunks that a scan passed over go to the end of the order, so that pins that grew cold cannot wall off the rest.
bool StoreCore::evict_one(std::uint64_t bytes) {
  const std::uint64_t wanted = allocator->class_bytes(bytes);
  if (evict_low(wanted)) return true;
  std::vector<EntryId> passed;
  const auto idle = [&](EntryId id) {
    if (!busy(slots[index.entry(id).host_slot])) return true;
    passed.push_back(id);
    return false;
  };
  const auto same_class = [&](EntryId id) { return slots[index.entry(id).host_slot].slot.bytes == wanted; };
  const auto clean = [&](EntryId id) { return (index.entry(id).flags & (kDirty | kWriting)) == 0; };
  for (std::uint64_t scanned = 0; scanned <= policy->size(); scanned += kVictimScan) {
    passed.clear();
    std::optional<EntryId> victim =
        policy->victim([&](EntryId id) { return same_class(id) && clean(id) && idle(id); }, kVictimScan);
    if (!victim) victim = policy->victim([&](EntryId id) { return same_class(id) && idle(id); }, kVictimScan);
    if (!victim) victim = policy->victim(idle, kVictimScan);
    for (const EntryId id : passed) policy->postpone(id);
    if (!victim) continue;
    evict(*victim);
    return true;
  }
  return false;
}

// Whether it is still the chunk that was stored there, and no request of another priority has used it.
bool StoreCore::is_low(SlotId id, std::uint32_t generation) const {
  const SlotRecord& record = slots[id];
  return record.in_use && record.slot.generation == generation && record.entry != kNoEntry && record.priority == Priority::kLow;
}

// Of the oldest, the first that nobody holds.
bool StoreCore::evict_low(std::uint64_t class_bytes) {
  for (std::size_t scanned = std::min<std::size_t>(low_slots.size(), kVictimScan); scanned > 0; --scanned) {
    const LowSlot low = low_slots.front();
    low_slots.pop_front();
    if (!is_low(low.slot, low.generation)) continue;
    SlotRecord& record = slots[low.slot];
    if (record.slot.bytes == class_bytes && !busy(record)) {
      evict(record.entry);
      return true;
    }
    low_slots.push_back(low);
  }
  return false;
}

void StoreCore::evict(EntryId id) {
  ++counters.evicted_chunks;
  counters.evicted_bytes += slots[index.entry(id).host_slot].slot.bytes;
  drop_host_copy(id);
  changed();
}

void StoreCore::drop_host_copy(EntryId id) {
  Entry& entry = index.entry(id);
  const SlotId slot = entry.host_slot;
  if (slot == kNoSlot) return;
  if (entry.host == HostState::kReady) {
    policy->remove(id);
    note_change(entry.key, Tier::kHost, false);
  }
  if ((entry.flags & kDirty) != 0) {
    no_longer_dirty(slots[slot]);
    ++counters.demotion_drops;
    ++counters.dropped_evicted;
  }
  entry.flags = 0;
  entry.host = HostState::kNone;
  entry.host_slot = kNoSlot;
  slots[slot].entry = kNoEntry;
  erase_if_nowhere(id);
  free_or_quarantine(slot);
}

void StoreCore::drop_extent(EntryId id) {
  Entry& entry = index.entry(id);
  if (entry.extent.valid()) {
    if (nvme::RegionLog* const of = log ? log.get() : attaching; of != nullptr) of->forget(entry.extent);
    entry.extent = Extent{};
    note_change(entry.key, Tier::kNvme, false);
    log_changed = true;
  }
  erase_if_nowhere(id);
}

void StoreCore::erase_if_nowhere(EntryId id) {
  const Entry& entry = index.entry(id);
  if (entry.host == HostState::kNone && !entry.extent.valid()) index.erase(id);
}

void StoreCore::unpin(SlotId id) {
  SlotRecord& record = slots[id];
  --record.pins;
  if (record.pins == 0 && record.entry == kNoEntry) free_or_quarantine(id);
}

void StoreCore::free_or_quarantine(SlotId id) {
  SlotRecord& record = slots[id];
  if (busy(record)) {
    if (record.pins == 0 && !record.quarantined) {
      record.quarantined = true;
      quarantine.push_back(id);
    }
    return;
  }
  allocator->release(record.slot);
  record = SlotRecord{};
  free_slot_ids.push_back(id);
}

void StoreCore::sweep_quarantine() {
  std::vector<SlotId> waiting;
  waiting.swap(quarantine);
  for (const SlotId id : waiting) {
    slots[id].quarantined = false;
    free_or_quarantine(id);
  }
}

}  // namespace lmcn
