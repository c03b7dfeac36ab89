// Which resident entry to evict next.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string_view>

#include "lmcn/status.hpp"

namespace lmcn {

using EntryId = std::uint32_t;
inline constexpr EntryId kNoEntry = 0xFFFFFFFFu;

class ChunkIndex;

/// 32 bits of the key of an entry, the same ones whenever that key comes back (ids are given to other keys). Called in insert() and
/// remove(), for the entry concerned.
using KeyBits = std::function<std::uint32_t(EntryId)>;

/// Order of the entries that live in host memory. Not thread-safe: the store's lock covers it. No allocation on access().
class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;
  virtual void insert(EntryId id) = 0;  // became resident. REQUIRES: not resident
  virtual void access(EntryId id) = 0;  // was hit. REQUIRES: resident
  virtual void remove(EntryId id) = 0;  // evicted or dropped. REQUIRES: resident
  /// Was busy when its turn to be evicted came: goes to the end of the eviction order, so that entries that stay busy cannot wall
  /// off the others from scans of bounded length. REQUIRES: resident
  virtual void postpone(EntryId id) = 0;
  /// First entry in eviction order for which `may_evict` holds (pinned and busy ones are passed over), or nullopt.
  /// Does not remove it; `may_evict` does not change the policy. Looks at `max_scan` entries at most, so that a fully pinned cache
  /// costs bounded time.
  virtual std::optional<EntryId> victim(const std::function<bool(EntryId)>& may_evict, std::uint32_t max_scan) = 0;
  virtual std::uint64_t size() const = 0;
  virtual std::uint64_t memory_bytes() const = 0;
  virtual std::string_view name() const = 0;
};

/// "LRU", "S3FIFO", "LFU", "FIFO" or "MRU" (list_policy.hpp, s3fifo_policy.hpp, lfu_policy.hpp), in any case of letters.
/// kInvalidArgument names these.
Result<std::unique_ptr<EvictionPolicy>> make_eviction_policy(std::string_view name, KeyBits key_bits);
/// For entries of `index`, which must outlive the policy.
Result<std::unique_ptr<EvictionPolicy>> make_eviction_policy(std::string_view name, const ChunkIndex& index);

}  // namespace lmcn
