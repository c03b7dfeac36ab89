// What the process really holds for an index and a policy, seen from outside of both.
#pragma once

#include <malloc.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <utility>

#include "index/chunk_index.hpp"

namespace lmcn::bench {

/// Bytes of this process in memory now. 0: /proc does not say.
inline double resident_bytes() {
  std::FILE* file = std::fopen("/proc/self/statm", "re");
  if (file == nullptr) return 0;
  long long total = 0, resident = 0;
  const int fields = std::fscanf(file, "%lld %lld", &total, &resident);
  std::fclose(file);
  return fields == 2 ? static_cast<double>(resident) * static_cast<double>(::sysconf(_SC_PAGESIZE)) : 0;
}

struct IndexMemory {
  double resident_bytes = 0;  // by which the process grew
  double counted_bytes = 0;   // what memory_bytes() of both says
};

/// Fills an index and a policy with `entries` keys made up on the way, as many evicted and stored again as the policy then knows
/// of. The process should hold no freed memory that the allocator could give out again without growing.
inline IndexMemory measure_index_memory(const std::string& policy_name, std::uint64_t entries) {
  ::malloc_trim(0);
  const double before = resident_bytes();
  ChunkIndex index;
  const auto policy = std::move(make_eviction_policy(policy_name, index)).value();
  std::uint64_t state = 1;
  for (std::uint64_t i = 0; i < entries; ++i) {
    ChunkKey key;
    for (std::size_t at = 0; at < key.bytes.size(); at += 8) {
      std::uint64_t word = state += 0x9E37'79B9'7F4A'7C15;  // splitmix64
      word = (word ^ (word >> 30)) * 0xBF58'476D'1CE4'E5B9;
      word = (word ^ (word >> 27)) * 0x94D0'49BB'1331'11EB;
      word ^= word >> 31;
      std::memcpy(key.bytes.data() + at, &word, sizeof word);
    }
    policy->insert(index.insert(key));
  }
  for (std::uint64_t i = 0; i < entries; ++i) {
    const EntryId id = policy->victim([](EntryId) { return true; }, 1).value();
    policy->remove(id);
    policy->insert(id);
  }
  return {resident_bytes() - before, static_cast<double>(index.memory_bytes() + policy->memory_bytes())};
}

}  // namespace lmcn::bench
