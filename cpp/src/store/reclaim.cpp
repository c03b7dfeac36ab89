// What the log's reclaim and its lost paths mean for the index. Keeper thread.
#include <algorithm>

#include "nvme/striped_log.hpp"
#include "store/store_core.hpp"

namespace lmcn {
namespace {

constexpr std::uint64_t kEvacuationPart = 16;  // of the arena that chunks which wait for a reclaim may pin

}  // namespace

// mu held. Those of a region's chunks that were used since they were written, most used first, up to the share and to most_bytes.
std::vector<EntryId> StoreCore::worth_keeping(std::uint32_t region, std::span<const std::uint32_t> cookies,
                                              std::uint64_t most_bytes) const {
  std::uint64_t region_bytes = 0;
  std::vector<EntryId> used;
  for (const EntryId id : cookies) {
    if (!index.live(id) || index.entry(id).extent.region != region) continue;
    region_bytes += std::uint64_t{index.entry(id).extent.pages} * kPageBytes;
    if (index.entry(id).hits != 0) used.push_back(id);
  }
  std::stable_sort(used.begin(), used.end(), [&](EntryId a, EntryId b) { return index.entry(a).hits > index.entry(b).hits; });
  auto room = std::min(most_bytes, static_cast<std::uint64_t>(reappend_share * static_cast<double>(region_bytes)));
  std::erase_if(used, [&](EntryId id) {
    const std::uint64_t bytes = std::uint64_t{index.entry(id).extent.pages} * kPageBytes;
    if (bytes > room) return true;
    room -= bytes;
    return false;
  });
  return used;
}

// What is worth keeping and has left host memory is read back, once, and all of it held until on_reclaim().
bool StoreCore::evacuated(std::uint32_t region, std::span<const std::uint32_t> cookies) {
  bool all_here = true;
  {
    std::lock_guard lock(mu);
    std::uint64_t held_bytes = 0;
    for (const auto& [other, evacuation] : evacuations) {
      for (const SlotId slot : evacuation.slots) held_bytes += slots[slot].slot.bytes;
    }
    const std::uint64_t most_bytes = arena->bytes() / kEvacuationPart;
    const auto [held, first] = evacuations.try_emplace(region, Evacuation{.since = Clock::now(), .slots = {}});
    std::vector<EntryId> chosen;
    if (first) chosen = worth_keeping(region, cookies, most_bytes - std::min(most_bytes, held_bytes));
    for (const EntryId id : chosen) {
      const Entry& entry = index.entry(id);
      const SlotId slot = entry.host == HostState::kNone ? start_promotion(id, std::nullopt) : entry.host_slot;
      if (slot == kNoSlot) continue;
      ++slots[slot].pins;
      held->second.slots.push_back(slot);
    }
    for (const SlotId slot : held->second.slots) {
      const EntryId id = slots[slot].entry;  // none: the read failed, or the chunk was erased
      if (id != kNoEntry && index.entry(id).host == HostState::kPromoting) all_here = false;
    }
  }
  promote_cv.notify_one();
  return all_here;
}

// mu held.
void StoreCore::end_evacuation(std::uint32_t region) {
  const auto held = evacuations.extract(region);
  if (held.empty()) return;
  for (const SlotId slot : held.mapped().slots) unpin(slot);
}

void StoreCore::on_reclaim(std::uint32_t region, std::span<const std::uint32_t> cookies) {
  std::lock_guard lock(mu);
  ++counters.reclaimed_regions;
  const std::vector<EntryId> kept = worth_keeping(region, cookies, UINT64_MAX);
  for (const EntryId id : cookies) {
    if (!index.live(id) || index.entry(id).extent.region != region) continue;
    index.entry(id).extent = Extent{};  // the region dies: nothing to forget in the log
    note_change(index.entry(id).key, Tier::kNvme, false);
    ++counters.reclaimed_chunks;
  }
  for (const EntryId id : kept) {
    if (index.entry(id).host == HostState::kReady) static_cast<void>(offer_to_nvme(id, true, true));
  }
  for (const EntryId id : cookies) {
    if (index.live(id) && !index.entry(id).extent.valid()) erase_if_nowhere(id);
  }
  end_evacuation(region);
  log_changed = true;
  changed();
}

// What lies on a path that is quarantined is as good as gone. In slices: lookups have passed it over since it was lost.
void StoreCore::forget_lost_paths(std::unique_lock<std::mutex>& lock) {
  constexpr EntryId kSlice = 4096;
  forgotten_paths = log->lost_paths();
  for (auto next = evacuations.begin(); next != evacuations.end();) {
    const std::uint32_t region = (next++)->first;
    if ((forgotten_paths >> (region >> nvme::kPathShift) & 1) != 0) end_evacuation(region);
  }
  for (EntryId id = 0; id < index.end_id(); ++id) {
    if (index.live(id) && index.entry(id).extent.valid() && !on_nvme(index.entry(id))) drop_extent(id);
    if (id % kSlice == kSlice - 1) {
      changed();
      lock.unlock();
      std::this_thread::yield();
      lock.lock();
    }
  }
  changed();
}

bool StoreCore::on_nvme(const Entry& entry) const noexcept {
  return entry.extent.valid() && (log->lost_paths() >> nvme::path_of(entry.extent) & 1) == 0;
}

}  // namespace lmcn
