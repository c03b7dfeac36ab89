// A trace through a host tier of bounded size: the index and the policies of the store, and the best that any policy could do.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "trace.hpp"

namespace lmcn::simulator {

/// A trace as numbers of chunks: chunks are equal when their content and all before it is. A request's last, incomplete chunk is
/// left out, unless chunks are single blocks.
struct Chunks {
  std::vector<std::vector<std::uint32_t>> requests;
  std::uint32_t different = 0;
  std::uint64_t total = 0;
};
Chunks make_chunks(const Trace& trace, std::uint32_t blocks_per_chunk);

enum class Touch : std::uint8_t {
  kForward,   // as the store does: from the prompt's first chunk to its last
  kBackward,  // the first chunk last, so that of one prompt the last ones go first
};

struct ReplayOptions {
  std::uint64_t capacity_chunks = 0;
  Touch touch = Touch::kForward;
  std::uint32_t accesses_per_hit = 2;  // the store's: the lookup and the lease
};

struct Outcome {
  std::uint64_t hits = 0;       // chunks that were there, and all before them in their prompt too
  std::uint64_t evictions = 0;  // 0 of the optimum: not counted
};

/// As the store goes about it: the chunks in memory up to the first that is not are hits and stay pinned; the others are stored,
/// those that are there already count as used. What finds no place (all pinned) is not stored, nor what follows it.
/// kInvalidArgument: a policy that does not exist.
Result<Outcome> replay(const Chunks& chunks, const std::string& policy, const ReplayOptions& options);

/// Belady's: what is needed again the latest goes, and is not even stored when all that is there comes earlier. It never evicts a
/// chunk before those that need it, so that no policy has more hits.
Outcome replay_optimum(const Chunks& chunks, std::uint64_t capacity_chunks);

}  // namespace lmcn::simulator
