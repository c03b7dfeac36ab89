// How much memory this process may still take.
#pragma once

#include <cstdint>
#include <string>

namespace lmcn {

struct AvailableMemory {
  std::uint64_t bytes = 0;
  std::string source;  // what set the limit: "MemAvailable" or the path of a cgroup file
};

/// The lowest of MemAvailable and, for each memory cgroup (v1 or v2) from this process's own to the root, its limit minus what is
/// used there beyond reclaimable page cache. bytes == 0 with source "/proc/meminfo" when nothing could be read.
/// `root` is prefixed to all paths (tests).
AvailableMemory available_memory(const std::string& root = {});

}  // namespace lmcn
