// Which path is the fastest here, for a layout on a device: measured once, and remembered in the user's cache folder.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <span>
#include <string>
#include <vector>

#include "copy_path.hpp"
#include "lmcn/kv_layout.hpp"
#include "lmcn/status.hpp"

namespace lmcn {

/// GB/s (1e9 bytes), by device events.
struct PathRate {
  PathKind path = PathKind::kMemcpy;
  double gather_gb_s = 0, scatter_gb_s = 0;
  double of(CopyDirection direction) const { return direction == CopyDirection::kGather ? gather_gb_s : scatter_gb_s; }
};

struct Calibration {
  std::vector<PathRate> rates;     // of what was measured
  std::vector<std::string> notes;  // what was not, and why
};

/// The candidates worth measuring: long runs need no kernel.
std::vector<PathKind> candidates_of(const CopyGeometry& geometry);

struct MeasureLimits {
  std::chrono::milliseconds budget{0};
  std::chrono::milliseconds turn{10'000};   // within which a turn, of a few ms, must end
  const std::atomic<bool>* stop = nullptr;  // once it is true nothing more is asked of CUDA; outlives the call
};

/// Copies part of a chunk between memory of its own, on the device and registered on the host, in turns and both directions;
/// medians. Each candidate has one turn that is not counted and one that is; the others begin within `limits.budget` after the
/// first ones. Whatever fails is a note, and its candidate has no rate. A turn that does not end, or limits.stop, leaves no rate at
/// all, and the memory is kept for ever: copies may still be under way. REQUIRES: the device is current on this thread, which waits
/// for the device, by polling.
Calibration measure_paths(const PagedKvLayout& paged, const SlotLayout& slot, int device, std::span<const PathKind> candidates,
                          const MeasureLimits& limits);

/// The fastest; within a twentieth of it the first in the order of PathKind. nullopt: nothing was measured.
std::optional<PathKind> fastest(const Calibration& calibration, CopyDirection direction);

/// "batch 23.1, memcpy 7.2"
std::string describe(const Calibration& calibration, CopyDirection direction);

}  // namespace lmcn
