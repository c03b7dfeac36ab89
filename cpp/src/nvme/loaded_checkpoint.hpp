// A checkpoint that holds, in memory while open() uses it.
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "nvme/log.hpp"

namespace lmcn::nvme {

struct Log::LoadedCheckpoint {
  std::uint64_t next_region_sequence = 0;
  std::uint64_t next_record_sequence = 0;
  std::vector<CheckpointRegion> regions;
  std::vector<CheckpointEntry> entries;  // by region, then page

  /// nullptr: it says nothing about this life of the region.
  const CheckpointRegion* find(std::uint32_t region, std::uint64_t sequence) const noexcept {
    return region < regions.size() && regions[region].sequence == sequence ? &regions[region] : nullptr;
  }
  std::span<const CheckpointEntry> of(std::uint32_t region) const noexcept {
    const auto begin =
        std::partition_point(entries.begin(), entries.end(), [=](const CheckpointEntry& e) { return e.region < region; });
    const auto end = std::partition_point(begin, entries.end(), [=](const CheckpointEntry& e) { return e.region == region; });
    return {begin, end};
  }
};

}  // namespace lmcn::nvme
