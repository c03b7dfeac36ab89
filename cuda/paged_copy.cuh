// The copy kernels and what they are told. Where elements lie comes from copy/paged_address.hpp alone.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "copy/paged_address.hpp"
#include "lmcn/paged_copy.hpp"

namespace lmcn {

/// Division of n < 2^31 by a constant 1 <= d <= 2^31: one multiplication and a shift.
struct Divisor {
  std::uint32_t divisor = 0;
  std::uint32_t multiplier = 0, shift = 0;  // multiplier = ceil(2^shift / divisor), in [2^31, 2^32)

  static constexpr Divisor of(std::uint32_t d) {
    std::uint32_t log2 = 0;
    while ((std::uint64_t{1} << log2) < d) ++log2;
    const std::uint32_t shift = 31 + log2;
    return {d, static_cast<std::uint32_t>(((std::uint64_t{1} << shift) + d - 1) / d), shift};
  }
  LMCN_HD std::uint32_t quotient(std::uint32_t n) const {
    return static_cast<std::uint32_t>((static_cast<std::uint64_t>(n) * multiplier) >> shift);
  }
  /// Of a quotient that was computed already.
  LMCN_HD std::uint32_t remainder(std::uint32_t n, std::uint32_t quotient) const { return n - quotient * divisor; }
};

inline constexpr std::uint32_t kMaxVectorBytes = 16;
/// Vectors of one unit (below); so that indices of vectors are 32 bits wide.
inline constexpr std::int64_t kMaxUnitVectors = std::int64_t{1} << 31;

/// A plane as the kernels see it. `vector_bytes` (1, 2, 4, 8 or 16) divides every address, stride and length of its runs.
struct KernelPlane {
  PlaneGeometry geometry;
  std::uint32_t vector_bytes = 0;
  Divisor vectors_per_run;  // of kBlock, where all is one run: 2^31
  Divisor runs_per_outer;   // RunGroup::inner.count; of kBlock and kToken, where outer.count is 1: 2^31
};

/// Tokens of one item that lie in one block.
struct alignas(32) KernelPiece {
  std::byte* rank_part = nullptr;
  std::int64_t block_id = 0;
  std::uint32_t token_of_chunk = 0, token_in_block = 0, tokens = 0;
};

/// A unit is one piece of one plane: unit u is piece u / plane_count, plane u % plane_count. Thread block x takes units in a row:
/// one more than units_per_block if x < blocks_with_one_more. Blocks that differ only in z share the vectors of their units.
struct KernelPlan {
  const KernelPlane* planes = nullptr;
  const KernelPiece* pieces = nullptr;
  std::uint32_t vector_bytes = 0;  // of all these planes
  Divisor plane_count;
  std::uint32_t units_per_block = 0, blocks_with_one_more = 0;
  PageCounts counts;
};
static_assert(std::is_trivially_copyable_v<KernelPlan> && std::is_trivially_copyable_v<KernelPlane>);

inline constexpr unsigned kMaxCopyThreads = 256;  // per block; a multiple of 32
/// Loads that a thread has in flight.
inline constexpr unsigned kVectorsInFlight = 4;

/// Enqueues one launch. `planes` and `pieces` are read on the device until it has run.
cudaError_t enqueue_paged_copy(const KernelPlan& plan, CopyDirection direction, dim3 grid, unsigned threads, cudaStream_t stream);

}  // namespace lmcn
