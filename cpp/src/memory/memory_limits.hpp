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

struct HugePages {
  std::uint64_t total = 0;  // reserved in the kernel's pool
  std::uint64_t free = 0;   // of those, neither in use nor promised to a mapping
};

/// The pool of 2 MiB hugetlb pages; zeros when the kernel has none.
HugePages huge_pages_of_2mib(const std::string& root = {});

}  // namespace lmcn
