// One store over several paths: a Log for each, chunks striped over them. Each path has its own directory, lock, limit, index and
// quarantine, so that one that fails, or is not there at start, costs its chunks only.
//
// Invariants
//  P1  An extent's region carries its path (path_of()); path 0's regions are numbered as without stripes, so a store of one path
//      is a plain Log.
//  P2  A path's writes are appended by the one writer thread; the sequences of different paths say nothing about each other. A key
//      may be recovered from two paths: both records are of the same chunk.
#pragma once

#include <memory>
#include <span>
#include <string>

#include "nvme/region_log.hpp"

namespace lmcn::nvme {

inline constexpr std::uint32_t kPathShift = 29;
inline constexpr std::uint32_t kMaxPaths = 7;
inline constexpr std::uint32_t kMaxRegionsPerPath = (1u << kPathShift) - 1;

/// REQUIRES: extent.valid().
inline constexpr std::uint32_t path_of(Extent extent) noexcept {
  return extent.region >> kPathShift;
}

/// Locks every path before it reads any: on kLocked nothing was read or written. Then opens each. One that cannot be read or
/// written (kIoError) is left out, which notes() and lost_paths() say, while another can; any other error is returned, and so is
/// the first path's when none could be opened. kInvalidArgument: more than kMaxPaths, two paths that are one. `options`, `engines`:
/// one per path: a device that is silent fills its engine's queue, which must not be another path's.
Result<std::unique_ptr<RegionLog>> open_paths(std::span<const LogOptions> options, std::span<io::IoEngine* const> engines,
                                              LogClient& client);

}  // namespace lmcn::nvme
