#include "launch.cuh"
#include "paged_copy.cuh"

namespace lmcn {
namespace {

/// How the vectors of a RunGroup follow each other. By value: what lies in memory would be read again after every store.
struct Order {
  Divisor vectors_per_run, runs_per_outer;
};

/// Both addresses of a vector.
struct VectorPlace {
  std::byte* paged;
  std::byte* slot;
};

template <bool kOneRun, class Vector>
__device__ __forceinline__ VectorPlace place_of_vector(const RunGroup& runs, const Order& order, std::byte* rank_part,
                                                       std::uint32_t vector) {
  if constexpr (kOneRun) {
    const std::int64_t in_run = vector * std::int64_t{sizeof(Vector)};
    return {runs.paged + in_run, rank_part + runs.slot + in_run};
  } else {
    const std::uint32_t run = order.vectors_per_run.quotient(vector), outer = order.runs_per_outer.quotient(run);
    const std::int64_t in_run = order.vectors_per_run.remainder(vector, run) * std::int64_t{sizeof(Vector)};
    const std::int64_t inner = order.runs_per_outer.remainder(run, outer);
    return {runs.paged + (outer * runs.outer.paged + inner * runs.inner.paged + in_run),
            rank_part + (runs.slot + outer * runs.outer.slot + inner * runs.inner.slot + in_run)};
  }
}

/// The vectors of `runs` that are this thread's.
template <bool kGather, bool kOneRun, class Vector>
__device__ __forceinline__ void copy_vectors(const RunGroup& runs, const Order& order, std::byte* rank_part) {
  const auto vectors = static_cast<std::uint32_t>(runs.outer.count * runs.inner.count * runs.bytes / std::int64_t{sizeof(Vector)});
  const std::uint32_t step = gridDim.z * blockDim.x;
  for (std::uint32_t first = blockIdx.z * blockDim.x + threadIdx.x; first < vectors; first += kVectorsInFlight * step) {
    Vector loaded[kVectorsInFlight];
    std::byte* to[kVectorsInFlight];
#pragma unroll
    for (unsigned i = 0; i < kVectorsInFlight; ++i) {
      if (const std::uint32_t vector = first + i * step; vector < vectors) {
        const VectorPlace at = place_of_vector<kOneRun, Vector>(runs, order, rank_part, vector);
        loaded[i] = load_once(reinterpret_cast<const Vector*>(kGather ? at.paged : at.slot));
        to[i] = kGather ? at.slot : at.paged;
      }
    }
#pragma unroll
    for (unsigned i = 0; i < kVectorsInFlight; ++i) {
      if (first + i * step < vectors) store_once(reinterpret_cast<Vector*>(to[i]), loaded[i]);
    }
  }
}

template <bool kGather, class Vector>
__device__ __forceinline__ void copy_runs(const KernelPlane& plane, const RunGroup& runs, std::byte* rank_part) {
  const Order order{plane.vectors_per_run, plane.runs_per_outer};
  if (runs.contiguous()) {
    copy_vectors<kGather, true, Vector>(runs, order, rank_part);
  } else {
    copy_vectors<kGather, false, Vector>(runs, order, rank_part);
  }
}

template <bool kGather>
__device__ void copy_unit(const KernelPlane& plane, const PageCounts& counts, const KernelPiece& piece) {
  const std::int64_t heads = plane.geometry.level == RunLevel::kElement ? counts.heads : 1;
  for (std::int64_t head = 0; head < heads; ++head) {
    const ElementPlace first{paged_address(plane.geometry, piece.block_id, piece.token_in_block, head, 0),
                             slot_offset(plane.geometry, counts, piece.token_of_chunk, head, 0)};
    const RunGroup runs = runs_from(plane.geometry, counts, first, piece.tokens);
    switch (plane.vector_bytes) {  // the same for all threads of a block
      case 16:
        copy_runs<kGather, uint4>(plane, runs, piece.rank_part);
        break;
      case 8:
        copy_runs<kGather, uint2>(plane, runs, piece.rank_part);
        break;
      case 4:
        copy_runs<kGather, unsigned>(plane, runs, piece.rank_part);
        break;
      case 2:
        copy_runs<kGather, unsigned short>(plane, runs, piece.rank_part);
        break;
      default:
        copy_runs<kGather, unsigned char>(plane, runs, piece.rank_part);
        break;
    }
  }
}

template <bool kGather>
__global__ void __launch_bounds__(kMaxCopyThreads) paged_copy(KernelPlan plan) {
  const std::uint32_t extra = plan.blocks_with_one_more;
  const std::uint32_t begin = blockIdx.x * plan.units_per_block + (blockIdx.x < extra ? blockIdx.x : extra);
  const std::uint32_t end = begin + plan.units_per_block + (blockIdx.x < extra ? 1 : 0);
  std::uint32_t piece = plan.plane_count.quotient(begin);
  for (std::uint32_t unit = begin; unit < end; ++piece) {
    // Read once for all its planes: it lies in host memory.
    const KernelPiece at = load(plan.pieces + piece);
    const std::uint32_t first = piece * plan.plane_count.divisor;
    for (; unit < end && unit - first < plan.plane_count.divisor; ++unit) {
      copy_unit<kGather>(plan.planes[unit - first], plan.counts, at);
    }
  }
}

}  // namespace

cudaError_t enqueue_paged_copy(const KernelPlan& plan, CopyDirection direction, dim3 grid, unsigned threads, cudaStream_t stream) {
  return launch<Threads::kAlone>(direction == CopyDirection::kGather ? paged_copy<true> : paged_copy<false>, grid, dim3(threads),
                                 stream, plan);
}

}  // namespace lmcn
