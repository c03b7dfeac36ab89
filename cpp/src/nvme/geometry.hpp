// How a limit in bytes becomes regions.
#pragma once

#include <cstdint>
#include <string>

#include "lmcn/status.hpp"
#include "nvme/region_log.hpp"

namespace lmcn::nvme {

struct Geometry {
  std::uint64_t region_bytes = 0;
  std::uint32_t region_pages = 0;
  std::uint32_t max_regions = 0;  // that may be allocated at once
};

/// Part of the limit that regions may not take: superblock and LOCK, two checkpoints of normal size (old and new), and what the
/// file system adds to the data file (extent blocks).
std::uint64_t reserved_bytes(std::uint64_t limit_bytes) noexcept;
/// Of the reserve, what checkpoints may not take either.
std::uint64_t overhead_bytes(std::uint64_t limit_bytes) noexcept;

/// `existing_region_bytes`: of the store found in the directory, 0 for a new one; wins over the options, `note` then says so.
/// kInvalidArgument names the value and the minimum or maximum.
Result<Geometry> choose_geometry(const LogOptions& options, std::uint64_t existing_region_bytes, std::uint64_t file_system_bytes,
                                 std::string* note);

}  // namespace lmcn::nvme
