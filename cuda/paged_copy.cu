#include "launch.cuh"
#include "paged_copy.cuh"

namespace lmcn {
namespace {

// Of a multiprocessor: what hides the latency of memory. It bounds the registers, which nvcc spends freely otherwise.
constexpr unsigned kMinResidentBlocks = 3;

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

template <bool kGather, class Vector>
__device__ __forceinline__ void copy_unit(const KernelPlane& plane, const PageCounts& counts, const KernelPiece& piece) {
  const std::int64_t heads = plane.geometry.level == RunLevel::kElement ? counts.heads : 1;
  for (std::int64_t head = 0; head < heads; ++head) {
    const ElementPlace first{paged_address(plane.geometry, piece.block_id, piece.token_in_block, head, 0),
                             slot_offset(plane.geometry, counts, piece.token_of_chunk, head, 0)};
    copy_runs<kGather, Vector>(plane, runs_from(plane.geometry, counts, first, piece.tokens), piece.rank_part);
  }
}

template <bool kGather, class Vector>
__global__ void __launch_bounds__(kMaxCopyThreads, kMinResidentBlocks) paged_copy(KernelPlan plan) {
  const std::uint32_t extra = plan.blocks_with_one_more;
  const std::uint32_t begin = blockIdx.x * plan.units_per_block + (blockIdx.x < extra ? blockIdx.x : extra);
  const std::uint32_t end = begin + plan.units_per_block + (blockIdx.x < extra ? 1 : 0);
  std::uint32_t piece = plan.plane_count.quotient(begin);
  for (std::uint32_t unit = begin; unit < end; ++piece) {
    // Read once for all its planes: it lies in host memory.
    const KernelPiece at = load(plan.pieces + piece);
    const std::uint32_t first = piece * plan.plane_count.divisor;
    for (; unit < end && unit - first < plan.plane_count.divisor; ++unit) {
      copy_unit<kGather, Vector>(plan.planes[unit - first], plan.counts, at);
    }
  }
}

template <class Vector>
cudaError_t enqueue(const KernelPlan& plan, CopyDirection direction, dim3 grid, unsigned threads, cudaStream_t stream) {
  return launch<Threads::kAlone>(direction == CopyDirection::kGather ? paged_copy<true, Vector> : paged_copy<false, Vector>, grid,
                                 dim3(threads), stream, plan);
}

}  // namespace

cudaError_t enqueue_paged_copy(const KernelPlan& plan, CopyDirection direction, dim3 grid, unsigned threads, cudaStream_t stream) {
  switch (plan.vector_bytes) {
    case 16:
      return enqueue<uint4>(plan, direction, grid, threads, stream);
    case 8:
      return enqueue<uint2>(plan, direction, grid, threads, stream);
    case 4:
      return enqueue<unsigned>(plan, direction, grid, threads, stream);
    case 2:
      return enqueue<unsigned short>(plan, direction, grid, threads, stream);
    default:
      return enqueue<unsigned char>(plan, direction, grid, threads, stream);
  }
}

}  // namespace lmcn
