#include <cassert>
#include <utility>

#include "store/store_core.hpp"

namespace lmcn {
namespace {
StoreCore& core_of(TieredStore* store) {
  return *static_cast<StoreCore*>(store);
}
}  // namespace

WriteLease::WriteLease(WriteLease&& other) noexcept {
  *this = std::move(other);
}

WriteLease& WriteLease::operator=(WriteLease&& other) noexcept {
  if (this == &other) return *this;
  abort();
  store_ = std::exchange(other.store_, nullptr);
  positions_ = std::exchange(other.positions_, {});
  slots_ = std::exchange(other.slots_, {});
  slot_ids_ = std::exchange(other.slot_ids_, {});
  payload_bytes_ = std::exchange(other.payload_bytes_, 0);
  priority_ = other.priority_;
  return *this;
}

WriteLease::~WriteLease() {
  abort();
}

std::byte* WriteLease::payload(std::size_t i) noexcept {
  assert(i < slots_.size());
  return store_->arena_base() + slots_[i].offset + kPageBytes;
}

void WriteLease::mark_filled(std::size_t i, std::uint32_t rank) noexcept {
  assert(i < slots_.size());
  publish_rank(store_->arena_base() + slots_[i].offset, rank, slots_[i].generation, RankState::kOk);
}

std::uint32_t WriteLease::commit() {
  return store_ == nullptr ? 0 : core_of(store_).end_write(*this, true);
}

void WriteLease::abort() noexcept {
  if (store_ != nullptr) core_of(store_).end_write(*this, false);
}

ReadLease::ReadLease(ReadLease&& other) noexcept {
  *this = std::move(other);
}

ReadLease& ReadLease::operator=(ReadLease&& other) noexcept {
  if (this == &other) return *this;
  release();
  store_ = std::exchange(other.store_, nullptr);
  slots_ = std::exchange(other.slots_, {});
  slot_ids_ = std::exchange(other.slot_ids_, {});
  return *this;
}

ReadLease::~ReadLease() {
  release();
}

std::span<const std::byte> ReadLease::payload(std::size_t i) const noexcept {
  assert(i < slots_.size());
  const std::byte* at = store_->arena_base() + slots_[i].offset;
  return {at + kPageBytes, slot_header(at)->payload_bytes};
}

void ReadLease::release() noexcept {
  if (store_ != nullptr) core_of(store_).end_read(*this);
}

std::uint32_t StoreCore::end_write(WriteLease& lease, bool publish) {
  std::uint32_t published = 0;
  bool writes_behind = false;
  if (!inherited()) {
    std::lock_guard lock(mu);
    for (const SlotId id : lease.slot_ids_) {
      SlotRecord& record = slots[id];
      const EntryId entry_id = record.entry;  // none: cleared or erased meanwhile
      bool complete = publish;
      for (std::uint32_t rank = 0; complete && rank < parts(); ++rank) {
        complete = rank_state(image(id), rank, record.slot.generation) == RankState::kOk;
      }
      if (entry_id != kNoEntry && complete) {
        record.worker_fill = false;
        Entry& entry = index.entry(entry_id);
        entry.host = HostState::kReady;
        entry.hits = 0;
        policy->insert(entry_id);
        record.priority = lease.priority_;
        if (record.priority == Priority::kLow) {
          while (!low_slots.empty() && !is_low(low_slots.front().slot, low_slots.front().generation)) low_slots.pop_front();
          low_slots.push_back({id, record.slot.generation});
        }
        note_change(entry.key, Tier::kHost, true);
        if (verify_all) {
          start_check(id, true);  // which offers it to NVMe
        } else {
          writes_behind |= offer_to_nvme(entry_id, false);
        }
        ++counters.committed_chunks;
        ++published;
      } else if (entry_id != kNoEntry) {
        ++counters.aborted_chunks;
        drop_host_copy(entry_id);
      }
      unpin(id);
    }
    changed();
  }
  lease.store_ = nullptr;
  lease.positions_.clear();
  lease.slots_.clear();
  lease.slot_ids_.clear();
  if (inherited()) return 0;
  promoted_cv.notify_all();  // acquire() may wait for what was being filled
  if (writes_behind) keeper_cv.notify_one();
  if (verify_all) promote_cv.notify_one();
  return published;
}

void StoreCore::end_read(ReadLease& lease) {
  if (!inherited()) {
    std::lock_guard lock(mu);
    for (const SlotId id : lease.slot_ids_) unpin(id);
  }
  lease.store_ = nullptr;
  lease.slots_.clear();
  lease.slot_ids_.clear();
}

}  // namespace lmcn
