#include "replay.hpp"

#include <algorithm>
#include <cstring>
#include <queue>
#include <unordered_map>

#include "index/chunk_index.hpp"

namespace lmcn::simulator {
namespace {

constexpr std::uint32_t kVictimScan = 256;  // the store's

std::uint64_t mix(std::uint64_t hash, std::uint64_t value) {  // splitmix64
  hash += (value + 1) * 0x9E37'79B9'7F4A'7C15;
  hash = (hash ^ (hash >> 30)) * 0xBF58'476D'1CE4'E5B9;
  hash = (hash ^ (hash >> 27)) * 0x94D0'49BB'1331'11EB;
  return hash ^ (hash >> 31);
}

ChunkKey key_of(std::uint32_t chunk) {
  ChunkKey key;
  for (std::uint64_t word = 0; word < 4; ++word) {
    const std::uint64_t bits = mix(word, chunk);
    std::memcpy(key.bytes.data() + word * 8, &bits, sizeof bits);
  }
  return key;
}

/// REQUIRES: a policy that exists.
class HostTier {
 public:
  HostTier(const std::string& policy, const ReplayOptions& options)
      : options_(options), policy_(std::move(make_eviction_policy(policy, index_)).value()) {}

  void request(const std::vector<std::uint32_t>& chunks) {
    ++now_;
    std::vector<EntryId> prefix;
    for (const std::uint32_t chunk : chunks) {
      const EntryId id = index_.find(key_of(chunk));
      if (id == kNoEntry) break;
      prefix.push_back(id);
      index_.entry(id).extent.page = now_;  // pinned until the request ends
    }
    outcome.hits += prefix.size();
    const std::size_t hits = prefix.size();
    if (options_.touch == Touch::kForward) {
      for (const EntryId id : prefix) touch(id);
      for (std::size_t i = hits; i < chunks.size() && store(chunks[i]); ++i) continue;
    } else {
      for (std::size_t i = std::min<std::size_t>(chunks.size(), options_.capacity_chunks); i > hits && store(chunks[i - 1]); --i)
        continue;
      for (std::size_t i = hits; i > 0; --i) touch(prefix[i - 1]);
    }
  }

  Outcome outcome;

 private:
  void touch(EntryId id) {
    for (std::uint32_t i = 0; i < options_.accesses_per_hit; ++i) policy_->access(id);
  }
  bool pinned(EntryId id) const { return index_.entry(id).extent.page == now_; }

  bool store(std::uint32_t chunk) {
    const ChunkKey key = key_of(chunk);
    EntryId id = index_.find(key);
    if (id != kNoEntry) {
      policy_->access(id);
    } else {
      if (index_.size() >= options_.capacity_chunks && !evict_one()) return false;
      id = index_.insert(key);
      policy_->insert(id);
    }
    index_.entry(id).extent.page = now_;
    return true;
  }

  // The store's own way: scans of bounded length, those in use go to the end of the order.
  bool evict_one() {
    std::vector<EntryId> passed;
    for (std::uint64_t scanned = 0; scanned <= policy_->size(); scanned += kVictimScan) {
      passed.clear();
      const std::optional<EntryId> victim = policy_->victim(
          [&](EntryId id) {
            if (!pinned(id)) return true;
            passed.push_back(id);
            return false;
          },
          kVictimScan);
      for (const EntryId id : passed) policy_->postpone(id);
      if (!victim) continue;
      policy_->remove(*victim);
      index_.erase(*victim);
      ++outcome.evictions;
      return true;
    }
    return false;
  }

  const ReplayOptions options_;
  ChunkIndex index_;
  std::unique_ptr<EvictionPolicy> policy_;
  std::uint32_t now_ = 0;
};

}  // namespace

Chunks make_chunks(const Trace& trace, std::uint32_t blocks_per_chunk) {
  Chunks chunks;
  std::unordered_map<std::uint64_t, std::uint32_t> numbers;
  for (const Request& request : trace) {
    std::vector<std::uint32_t>& of_request = chunks.requests.emplace_back();
    std::uint64_t hash = 0;
    for (std::size_t i = 0; i < request.blocks.size(); ++i) {
      hash = mix(hash, request.blocks[i]);
      if ((i + 1) % blocks_per_chunk != 0) continue;
      of_request.push_back(numbers.try_emplace(hash, static_cast<std::uint32_t>(numbers.size())).first->second);
    }
    chunks.total += of_request.size();
  }
  chunks.different = static_cast<std::uint32_t>(numbers.size());
  return chunks;
}

Result<Outcome> replay(const Chunks& chunks, const std::string& policy, const ReplayOptions& options) {
  {
    const ChunkIndex index;
    const auto known = make_eviction_policy(policy, index);
    if (!known.ok()) return known.status();
  }
  HostTier tier(policy, options);
  for (const auto& request : chunks.requests) tier.request(request);
  return tier.outcome;
}

Outcome replay_optimum(const Chunks& chunks, std::uint64_t capacity_chunks) {
  constexpr std::uint64_t kNever = ~std::uint64_t{0};
  // For each use of a chunk, when its next one comes: uses are numbered through all requests.
  std::vector<std::uint64_t> next_use(chunks.total);
  {
    std::vector<std::uint64_t> later(chunks.different, kNever);
    std::uint64_t use = chunks.total;
    for (std::size_t r = chunks.requests.size(); r > 0; --r) {
      const auto& request = chunks.requests[r - 1];
      for (std::size_t i = request.size(); i > 0; --i) {
        next_use[--use] = later[request[i - 1]];
        later[request[i - 1]] = use;
      }
    }
  }
  Outcome outcome;
  std::vector<std::uint64_t> held_until(chunks.different, 0);  // next use of what is there; 0: not there
  std::priority_queue<std::pair<std::uint64_t, std::uint32_t>> latest;
  std::uint64_t held = 0, use = 0;
  for (const auto& request : chunks.requests) {
    for (const std::uint32_t chunk : request) {
      const std::uint64_t next = next_use[use++];
      if (held_until[chunk] != 0) {
        ++outcome.hits;
        --held;
      }
      held_until[chunk] = 0;
      if (next == kNever) continue;
      held_until[chunk] = next;
      latest.push({next, chunk});
      ++held;
      while (held > capacity_chunks) {
        const auto [until, victim] = latest.top();
        latest.pop();
        if (held_until[victim] != until) continue;  // used since
        held_until[victim] = 0;
        --held;
      }
    }
  }
  return outcome;
}

}  // namespace lmcn::simulator
