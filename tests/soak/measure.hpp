// What a process that runs for long must not let grow, and how that is judged.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lmcn::soak {

struct Sample {
  std::uint64_t resident_bytes = 0;
  std::uint64_t descriptors = 0;
  std::uint64_t nvme_allocated_bytes = 0;
};

/// Of this process now; nvme_allocated_bytes is the caller's.
Sample sample_process();

/// The median of the last quarter may exceed that of the second (the first warms up) by kMemoryBytes and kDescriptors.
struct Growth {
  static constexpr std::uint64_t kMemoryBytes = 16ull << 20;
  static constexpr std::uint64_t kDescriptors = 2;

  Sample second_quarter, last_quarter;  // medians
  /// Empty: nothing grew. `judge_memory`: false under sanitizers, which keep what was freed.
  std::string complaint(bool judge_memory) const;
};
/// REQUIRES: at least 8 samples.
Growth growth_of(const std::vector<Sample>& samples);

}  // namespace lmcn::soak
