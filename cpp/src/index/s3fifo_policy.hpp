// S3-FIFO: a small queue on probation, a main queue with second chances, and a memory of what left the small one.
// After J. Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "index/eviction_policy.hpp"
#include "index/id_links.hpp"

namespace lmcn {

/// Fingerprints of keys, 32 bits each, in buckets of 16: a key's bucket is decided by its fingerprint, and the oldest of a full
/// bucket gives way. So it remembers about as many of the last keys as it has places, never more, in 4 bytes each. Two keys with
/// one fingerprint are one to it. Not thread-safe.
class GhostKeys {
 public:
  static constexpr std::uint32_t kBucketKeys = 16;

  /// Remembers a key. `wanted`: how many keys it should hold; when that is more than 5/4 of what it was made for, it is made anew
  /// for as many, and empty.
  void add(std::uint32_t fingerprint, std::uint64_t wanted);
  /// Whether the key is remembered; it no longer is afterwards.
  bool take(std::uint32_t fingerprint) noexcept;

  std::uint64_t places() const noexcept { return buckets_.size() * kBucketKeys; }
  std::uint64_t memory_bytes() const noexcept { return buckets_.capacity() * sizeof(Bucket); }

 private:
  using Bucket = std::array<std::uint32_t, kBucketKeys>;  // newest first; 0: free

  Bucket& bucket(std::uint32_t fingerprint) noexcept {
    return buckets_[static_cast<std::size_t>(std::uint64_t{fingerprint} * buckets_.size() >> 32)];
  }

  std::vector<Bucket> buckets_;
  std::uint64_t made_for_ = 0;
};

/// New entries go to the small queue. From its front an entry that was hit at least twice moves to the main queue, with its hits
/// forgotten; another is evicted, and its key remembered: when it comes back soon it goes to the main queue at once. From the front
/// of the main queue an entry that was hit goes to the back with one hit less; another is evicted. Hits count to 3. The small
/// queue gives the victim while it holds at least a tenth of all entries.
///
/// A tenth of the entries, not of the bytes: chunks of one engine are all of one size but for a prompt's last ones, and the number
/// of entries is known here without asking anyone, as is the size of the cache: when something must go it is size(). The keys
/// remembered are at most nine tenths of that, as many as the main queue has entries.
///
/// Order of victim(): the queue whose turn it is, then the other, each from its front, those that the queues would keep last. Moves
/// of kept entries from the front happen in victim(), at most kMoves in one call, so its time is bounded; calling it again changes
/// nothing more unless that bound was reached. Entries that were postponed since the last removal come at the very end; from
/// the next removal on they stand at the back of the main queue.
///
/// 9 bytes an id, 3.6 a resident entry for the keys remembered. access() is O(1), the others are O(1) amortised.
class S3FifoPolicy final : public EvictionPolicy {
 public:
  explicit S3FifoPolicy(KeyBits key_bits) : key_bits_(std::move(key_bits)) {}
  void insert(EntryId id) override;
  void access(EntryId id) override;
  void postpone(EntryId id) override;
  void remove(EntryId id) override;
  std::optional<EntryId> victim(const std::function<bool(EntryId)>& may_evict, std::uint32_t max_scan) override;
  std::uint64_t size() const override { return size_; }
  std::uint64_t memory_bytes() const override;
  std::string_view name() const override { return "S3FIFO"; }

 private:
  static constexpr std::uint8_t kMaxHits = 3;
  static constexpr std::uint32_t kMoves = 1024;

  struct State {
    std::uint8_t hits : 2;
    std::uint8_t main : 1;
  };

  bool kept(EntryId id) noexcept;
  bool small_is_next() const noexcept;
  void push_main(EntryId id, std::uint8_t hits) noexcept;
  void unlink(EntryId id) noexcept;
  void move_kept_from_the_front() noexcept;

  const KeyBits key_bits_;
  IdLinks<State> links_;
  IdList small_, main_;  // oldest first
  /// Of main_: from here on postponed since the last removal, or moved there after such a one. kNoEntry: none.
  EntryId postponed_ = kNoEntry;
  EntryId last_victim_ = kNoEntry;  // what victim() said; removing it now is an eviction
  std::uint64_t size_ = 0, small_size_ = 0;
  GhostKeys ghost_;
  std::vector<EntryId> passed_over_;  // scratch of victim()
};

}  // namespace lmcn
