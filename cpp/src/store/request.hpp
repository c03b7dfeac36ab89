// One engine request's lookups: memo, promotions within a budget, pins.
#pragma once

#include <array>
#include <unordered_map>
#include <vector>

#include "store/store_core.hpp"

namespace lmcn {

/// Two threads touch a request: its user (lookup, acquire, end) and the keeper (expire_if_idle). The memo path takes no lock;
/// it is safe against the keeper because the user stores last_lookup_ns_ before it reads expired_, and the keeper stores
/// expired_ before it reads last_lookup_ns_ (both sequentially consistent): one of the two sees the other. A scan of many keys may
/// outlast the time to live: scanning_, stored and read in the same order, keeps the keeper away until it ends.
class RequestImpl final : public Request {
 public:
  RequestImpl(StoreCore& core, const NamespaceId& ns, const RequestOptions& options);
  ~RequestImpl() override;

  Presence lookup(std::span<const std::byte> engine_key) override;
  Presence lookup(const ChunkKey& key) override;
  PrefixPresence lookup_prefix(std::span<const ChunkKey> keys) override;
  PrefixPresence lookup_tiers(std::span<const ChunkKey> keys) override;
  std::uint32_t prefetch(std::span<const ChunkKey> keys) override;
  Tier source(std::span<const std::byte> engine_key) override;
  Tier source(const ChunkKey& key) override;
  SourceCount count_sources(std::span<const ChunkKey> keys) override;
  Result<ReadLease> acquire(std::span<const ChunkKey> keys, bool for_worker) override;
  Result<ReadLease> acquire_engine_keys(std::span<const std::span<const std::byte>> keys, bool for_worker) override;
  void end() override;

  /// mu held; the keeper's thread, or the promoter's in its place.
  void expire_if_idle(std::int64_t now_ns, std::int64_t ttl_ns);

 private:
  static constexpr std::size_t kInlineKeyBytes = 47;

  struct Item {
    ChunkKey key;
    std::array<std::byte, kInlineKeyBytes> engine_key{};
    std::uint8_t engine_key_bytes = 0;  // 0: known by chunk key only
    Presence last = Presence::kMiss;
    Tier tier = Tier::kNone;
    bool promoting = false;  // a promotion was started or joined for this item
    bool refused = false;    // budget, deadline or failed read
    SlotId pinned = kNoSlot;
    std::uint32_t check = 0;    // verify=all: number of the slot's check that this item waits for; 0: none yet
    std::uint64_t version = 0;  // of the store when `last` was found
    std::uint64_t epoch = 0;    // pin_epoch when `pinned` was taken
    Clock::time_point deadline;
  };

  bool matches(const Item& item, std::span<const std::byte> engine_key) const noexcept;
  Item& locate(std::span<const std::byte> engine_key);
  Item& locate(const ChunkKey& key);
  void note_use();
  Presence answer(Item& item);
  bool remembered(const Item& item) const noexcept;
  Presence answer_slow(Item& item);
  Presence look(Item& item);
  bool on_nvme(const Item& item) const;
  bool check_passed(Item& item);
  bool may_pin(std::uint64_t bytes, bool promotion) const noexcept;
  bool take_pin(Item& item, SlotId slot, bool promotion);
  void drop_pin(Item& item);
  void drop_all_pins();
  Presence refuse(Item& item, std::uint64_t& reason);          // reason: the counter of it
  std::uint64_t& refusal(std::uint64_t bytes) const noexcept;  // why may_pin(bytes, true) is false

  StoreCore& core_;
  KeyDeriver deriver_;
  const bool promote_;
  const Priority priority_;
  const std::uint64_t budget_bytes_;
  const std::chrono::milliseconds deadline_;
  std::vector<Item> items_;
  std::unordered_map<ChunkKey, std::uint32_t, ChunkKeyHash> item_of_;  // each key has one item
  std::size_t cursor_ = 0;                                             // where a scan in order will look next
  std::uint64_t promoted_bytes_ = 0;
  bool ended_ = false;
  std::atomic<std::int64_t> last_lookup_ns_;
  std::atomic<bool> expired_{false};
  std::atomic<bool> scanning_{false};
};

}  // namespace lmcn
