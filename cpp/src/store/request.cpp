#include "store/request.hpp"

#include <time.h>

#include <algorithm>
#include <cstring>

#include "base/seq_points.hpp"

namespace lmcn {
namespace {

std::int64_t coarse_now_ns() noexcept {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
  return std::int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

}  // namespace

RequestImpl::RequestImpl(StoreCore& core, const NamespaceId& ns, const RequestOptions& options)
    : core_(core),
      deriver_(ns),
      promote_(options.promote),
      priority_(options.priority),
      budget_bytes_(options.promotion_budget_bytes != 0 ? options.promotion_budget_bytes : core.promotion_budget_bytes),
      deadline_(options.promotion_deadline.count() != 0 ? options.promotion_deadline : core.options.promotion_deadline),
      last_lookup_ns_(coarse_now_ns()) {
  if (core_.inherited()) return;  // every lookup is a miss
  std::lock_guard lock(core_.mu);
  core_.requests.push_back(this);
}

RequestImpl::~RequestImpl() {
  end();
}

void RequestImpl::end() {
  if (core_.inherited()) return;
  std::lock_guard lock(core_.mu);
  if (ended_) return;
  ended_ = true;
  drop_all_pins();
  auto& all = core_.requests;
  all.erase(std::find(all.begin(), all.end(), this));
}

bool RequestImpl::matches(const Item& item, std::span<const std::byte> engine_key) const noexcept {
  return item.engine_key_bytes == engine_key.size() &&
         std::memcmp(item.engine_key.data(), engine_key.data(), engine_key.size()) == 0;
}

// Engines scan a prefix in order, again and again: almost always the next item, or the first one anew.
RequestImpl::Item& RequestImpl::locate(std::span<const std::byte> engine_key) {
  for (const std::size_t at : {cursor_, cursor_ - 1, std::size_t{0}}) {
    if (at < items_.size() && matches(items_[at], engine_key)) {
      cursor_ = at + 1;
      return items_[at];
    }
  }
  Item& item = locate(deriver_.derive(engine_key));
  item.engine_key_bytes = static_cast<std::uint8_t>(engine_key.size());
  std::memcpy(item.engine_key.data(), engine_key.data(), engine_key.size());
  return item;
}

RequestImpl::Item& RequestImpl::locate(const ChunkKey& key) {
  if (cursor_ < items_.size() && items_[cursor_].key == key) return items_[cursor_++];
  const auto [place, is_new] = item_of_.try_emplace(key, static_cast<std::uint32_t>(items_.size()));
  if (is_new) items_.emplace_back().key = key;
  cursor_ = place->second + 1;
  return items_[place->second];
}

Presence RequestImpl::lookup(std::span<const std::byte> engine_key) {
  if (engine_key.empty() || engine_key.size() > kInlineKeyBytes) return lookup(deriver_.derive(engine_key));
  note_use();
  return answer(locate(engine_key));
}

Presence RequestImpl::lookup(const ChunkKey& key) {
  note_use();
  return answer(locate(key));
}

void RequestImpl::note_use() {
  last_lookup_ns_.store(coarse_now_ns());
  if (expired_.load() && !core_.inherited()) {
    std::lock_guard lock(core_.mu);  // the keeper may be dropping pins
    expired_.store(false);
  }
}

Presence RequestImpl::answer(Item& item) {
  if (core_.inherited()) return Presence::kMiss;
  core_.lookups.fetch_add(1, std::memory_order_relaxed);
  return remembered(item) ? item.last : answer_slow(item);
}

// Whether item.last is still true.
bool RequestImpl::remembered(const Item& item) const noexcept {
  if (item.version == 0) return false;
  if (item.version == core_.version.load(std::memory_order_acquire)) return item.last != Presence::kRetry;
  // Pinned: only clear() and erase() can take it, and they raise pin_epoch.
  return item.last == Presence::kHit && item.pinned != kNoSlot && item.epoch == core_.pin_epoch.load(std::memory_order_acquire);
}

PrefixPresence RequestImpl::lookup_prefix(std::span<const ChunkKey> keys) {
  PrefixPresence found;
  if (core_.inherited()) return {.hits = 0, .next = Presence::kMiss};
  scanning_.store(true);
  note_use();
  for (const ChunkKey& key : keys) {
    Item& item = locate(key);
    found.next = remembered(item) ? item.last : answer_slow(item);
    if (found.next != Presence::kHit) break;
    ++found.hits;
  }
  core_.lookups.fetch_add(found.hits + (found.next != Presence::kHit ? 1 : 0), std::memory_order_relaxed);
  last_lookup_ns_.store(coarse_now_ns());
  LMCN_SEQ_POINT("request.scanned");
  scanning_.store(false);
  return found;
}

PrefixPresence RequestImpl::lookup_tiers(std::span<const ChunkKey> keys) {
  PrefixPresence found;
  if (core_.inherited()) return {.hits = 0, .next = Presence::kMiss};
  note_use();
  std::unique_lock lock(core_.mu);  // the keeper drops pins under it, too
  const std::size_t queued = core_.promote_queue.size();
  for (const ChunkKey& key : keys) {
    Item& item = locate(key);
    const bool first = item.version == 0 || item.last != Presence::kMiss;
    if (!remembered(item)) {
      item.last = ended_ || core_.closed ? Presence::kMiss : look(item);
      item.version = core_.version.load(std::memory_order_relaxed);
    }
    found.next = item.last == Presence::kMiss && on_nvme(item) ? Presence::kHit : item.last;
    if (found.next == Presence::kMiss && first) ++core_.counters.misses;
    if (found.next != Presence::kHit) break;
    ++found.hits;
  }
  core_.lookups.fetch_add(found.hits + (found.next != Presence::kHit ? 1 : 0), std::memory_order_relaxed);
  last_lookup_ns_.store(coarse_now_ns());
  const bool more = core_.promote_queue.size() > queued;  // checks of chunks in host memory
  lock.unlock();
  if (more) core_.promote_cv.notify_one();
  return found;
}

// mu held.
bool RequestImpl::on_nvme(const Item& item) const {
  if (ended_ || core_.closed || !core_.log) return false;
  const EntryId id = core_.index.find(item.key);
  return id != kNoEntry && core_.on_nvme(core_.index.entry(id));
}

Presence RequestImpl::answer_slow(Item& item) {
  if (core_.inherited()) return Presence::kMiss;
  bool wake_promoter = false;
  Presence presence;
  {
    std::lock_guard lock(core_.mu);
    const std::size_t queued = core_.promote_queue.size();
    presence = ended_ || core_.closed ? Presence::kMiss : look(item);
    wake_promoter = core_.promote_queue.size() > queued;
    if (presence == Presence::kMiss && (item.version == 0 || item.last != Presence::kMiss)) ++core_.counters.misses;
    item.last = presence;
    item.version = core_.version.load(std::memory_order_relaxed);
  }
  if (wake_promoter) core_.promote_cv.notify_one();
  return presence;
}

// mu held.
Presence RequestImpl::look(Item& item) {
  if (item.pinned != kNoSlot && core_.slots[item.pinned].entry == kNoEntry) {  // cleared, or the promotion failed
    drop_pin(item);
    if (item.promoting) {
      item.promoting = false;
      item.refused = true;
    }
  }
  const EntryId id = core_.index.find(item.key);
  if (id == kNoEntry) return Presence::kMiss;
  const Entry& entry = core_.index.entry(id);
  switch (entry.host) {
    case HostState::kReady:
      core_.policy->access(id);
      item.tier = item.promoting ? Tier::kNvme : Tier::kHost;
      item.refused = false;
      if (item.pinned != kNoSlot) {
        item.epoch = core_.pin_epoch.load(std::memory_order_relaxed);
      } else if (!take_pin(item, entry.host_slot, false) && core_.verify_all) {
        return refuse(item, core_.counters.refused_pin_limit);
      }
      return check_passed(item) ? Presence::kHit : Presence::kRetry;
    case HostState::kFilling:
      return Presence::kPending;
    case HostState::kPromoting:
      if (item.refused) return Presence::kMiss;
      if (!item.promoting) {
        if (!take_pin(item, entry.host_slot, true)) return refuse(item, refusal(core_.slots[entry.host_slot].slot.bytes));
      } else if (Clock::now() > item.deadline) {
        ++core_.counters.promotion_timeouts;
        drop_pin(item);
        item.promoting = false;
        item.refused = true;
        return Presence::kMiss;
      }
      return Presence::kRetry;
    case HostState::kNone:
      break;
  }
  if (item.refused || !promote_ || !core_.log || !core_.on_nvme(entry)) return Presence::kMiss;
  const std::uint64_t bytes = core_.allocator->class_bytes(std::uint64_t{entry.extent.pages} * kPageBytes);
  if (!may_pin(bytes, true)) return refuse(item, refusal(bytes));
  const SlotId slot = core_.start_promotion(id, deriver_.ns(), priority_);
  if (slot == kNoSlot || !take_pin(item, slot, true)) return refuse(item, core_.counters.refused_no_slot);
  return Presence::kRetry;
}

// mu held. What this request promoted itself was verified when it was read.
bool RequestImpl::check_passed(Item& item) {
  if (!core_.verify_all || item.promoting) return true;
  const SlotRecord& record = core_.slots[item.pinned];
  if (item.check == 0) {
    core_.start_check(item.pinned, false);
    item.check = record.checks_wanted;
  }
  return record.checks_done >= item.check;
}

Presence RequestImpl::refuse(Item& item, std::uint64_t& reason) {
  ++core_.counters.promotion_refusals;
  ++reason;
  item.refused = true;
  return Presence::kMiss;
}

// Pins are bounded over all requests, so that stores always find slots to evict; promotions also by the request's budget. A plain
// host hit beyond the bound is reported unpinned (it is looked up again before it is used), a promotion is refused.
bool RequestImpl::may_pin(std::uint64_t bytes, bool promotion) const noexcept {
  if (promotion && promoted_bytes_ + bytes > budget_bytes_) return false;
  return core_.request_pinned_bytes + bytes <= core_.request_pin_limit_bytes;
}

std::uint64_t& RequestImpl::refusal(std::uint64_t bytes) const noexcept {
  StoreStats& counters = core_.counters;
  return promoted_bytes_ + bytes > budget_bytes_ ? counters.refused_request_budget : counters.refused_pin_limit;
}

bool RequestImpl::take_pin(Item& item, SlotId slot, bool promotion) {
  SlotRecord& record = core_.slots[slot];
  const std::uint64_t bytes = record.slot.bytes;
  if (!may_pin(bytes, promotion)) return false;
  if (promotion) {
    promoted_bytes_ += bytes;
    item.promoting = true;
    item.deadline = Clock::now() + deadline_;
  }
  core_.request_pinned_bytes += bytes;
  ++record.pins;
  item.pinned = slot;
  item.epoch = core_.pin_epoch.load(std::memory_order_relaxed);
  return true;
}

void RequestImpl::drop_pin(Item& item) {
  if (item.pinned == kNoSlot) return;
  const std::uint64_t bytes = core_.slots[item.pinned].slot.bytes;
  core_.request_pinned_bytes -= bytes;
  if (item.promoting) promoted_bytes_ -= std::min(promoted_bytes_, bytes);
  core_.unpin(item.pinned);
  item.pinned = kNoSlot;
  item.check = 0;
  item.version = 0;
}

void RequestImpl::drop_all_pins() {
  for (Item& item : items_) {
    drop_pin(item);
    item.promoting = false;
  }
}

std::uint32_t RequestImpl::prefetch(std::span<const ChunkKey> keys) {
  std::uint32_t length = 0;
  for (const ChunkKey& key : keys) {
    if (lookup(key) == Presence::kMiss) break;
    ++length;
  }
  return length;
}

Tier RequestImpl::source(std::span<const std::byte> engine_key) {
  return source(deriver_.derive(engine_key));
}

Tier RequestImpl::source(const ChunkKey& key) {
  const auto found = item_of_.find(key);
  return found == item_of_.end() ? Tier::kNone : items_[found->second].tier;
}

SourceCount RequestImpl::count_sources(std::span<const ChunkKey> keys) {
  SourceCount count;
  std::size_t next = 0;  // keys come in the order of their lookups, almost always
  for (const ChunkKey& key : keys) {
    if (next >= items_.size() || items_[next].key != key) {
      const auto found = item_of_.find(key);
      if (found == item_of_.end()) continue;
      next = found->second;
    }
    const Tier tier = items_[next++].tier;
    if (tier == Tier::kHost) ++count.host;
    if (tier == Tier::kNvme) ++count.nvme;
  }
  return count;
}

Result<ReadLease> RequestImpl::acquire(std::span<const ChunkKey> keys, bool for_worker) {
  ReadLease lease;
  bool writes_behind = false;
  if (core_.inherited()) return StoreCore::inherited_status();
  std::lock_guard lock(core_.mu);
  if (core_.closed) return Status(Code::kUnavailable, "the store is closed");
  for (const ChunkKey& key : keys) {  // all or nothing
    const EntryId id = core_.index.find(key);
    const bool there = id != kNoEntry && core_.index.entry(id).host == HostState::kReady;
    const auto item = there && core_.verify_all ? item_of_.find(key) : item_of_.end();
    const bool checked =
        !core_.verify_all || (item != item_of_.end() && items_[item->second].pinned == core_.index.entry(id).host_slot &&
                              check_passed(items_[item->second]));
    if (!there || !checked) {
      return Status(Code::kNotFound, "chunk " + key.to_hex() + ": not in host memory (look it up again)");
    }
  }
  for (const ChunkKey& key : keys) {
    const EntryId id = core_.index.find(key);
    Entry& entry = core_.index.entry(id);
    SlotRecord& record = core_.slots[entry.host_slot];
    ++record.pins;
    if (for_worker) ++record.loads_issued;
    record.priority = std::max(record.priority, priority_);
    StoreCore::count_hit(entry);
    writes_behind |= core_.offer_to_nvme(id, true);
    core_.policy->access(id);
    lease.slots_.push_back({record.slot.offset, record.slot.generation});
    lease.slot_ids_.push_back(entry.host_slot);
    Tier tier = Tier::kHost;
    if (const auto found = item_of_.find(key); found != item_of_.end()) {
      Item& item = items_[found->second];
      tier = item.tier;
      drop_pin(item);  // the lease takes over
      item.promoting = false;
      item.version = 0;
    }
    ++(tier == Tier::kNvme ? core_.counters.hits_nvme : core_.counters.hits_host);
  }
  if (!lease.slots_.empty()) lease.store_ = &core_;
  if (for_worker) drop_all_pins();  // the engine has decided what it loads
  if (writes_behind) core_.keeper_cv.notify_one();
  return lease;
}

Result<ReadLease> RequestImpl::acquire_engine_keys(std::span<const std::span<const std::byte>> keys, bool for_worker) {
  std::vector<ChunkKey> chunk_keys;
  chunk_keys.reserve(keys.size());
  for (const auto& key : keys) chunk_keys.push_back(deriver_.derive(key));
  return acquire(chunk_keys, for_worker);
}

void RequestImpl::expire_if_idle(std::int64_t now_ns, std::int64_t ttl_ns) {
  if (expired_.load() || now_ns - last_lookup_ns_.load() < ttl_ns) return;
  expired_.store(true);
  if (scanning_.load() || now_ns - last_lookup_ns_.load() < ttl_ns) {
    expired_.store(false);
    return;
  }
  drop_all_pins();
}

}  // namespace lmcn
