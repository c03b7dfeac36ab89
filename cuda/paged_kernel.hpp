// Gather and scatter by kernels: for runs too short for copies by the copy engines. The kernels are in paged_copy.cu; here is what
// they need on the host: tables of planes on the device, and for each launch its plan.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "copy/copy_geometry.hpp"
#include "lmcn/paged_copy.hpp"
#include "lmcn/status.hpp"

namespace lmcn {

class PlanRing;
struct PlaneTable;

/// Thread-safe; launches of one direction are serialised. Errors of CUDA are kIoError.
class PagedKernel {
 public:
  /// Uploads the planes' table and allocates the rings of plans, `plan_bytes` for each direction; may wait for the device. launch()
  /// allocates no memory. `geometry` outlives this. kUnsupported: a plane of one block has 2^31 or more vectors of the width that
  /// its strides allow. kInvalidArgument: plan_bytes holds no plan.
  static Result<std::unique_ptr<PagedKernel>> make(const CopyGeometry& geometry, int device, std::size_t plan_bytes = 2 << 20);
  /// Waits for the launches that have not run.
  ~PagedKernel();
  PagedKernel(const PagedKernel&) = delete;
  PagedKernel& operator=(const PagedKernel&) = delete;

  /// Enqueues, on `stream`, the copy of planes [plane_begin, plane_end) of job.items[i] for i in `items`. rank_parts[k]: address,
  /// valid on the device, of this rank's part of items[k]'s slot, in mapped host memory or in a staging buffer of the same layout;
  /// a multiple of 16. What the launch needs of `job` is kept until it has run, so `job` may go at once. At most `max_ctas` thread
  /// blocks run at a time for it. Waits for the device only when the launches of this direction that have not run fill the ring.
  /// REQUIRES: `job` passed geometry.check_job(); the device is current on this thread and `stream` is one of its streams.
  /// kInvalidArgument: sizes of `items` and `rank_parts` differ, an item, plane or rank part is out of bounds, max_ctas is 0.
  /// After an error a part of the copy may have been enqueued; call drained() once it has ended, or it keeps its part of the ring.
  Status launch(const CopyJob& job, CopyDirection direction, std::span<const std::uint32_t> items,
                std::span<std::byte* const> rank_parts, std::size_t plane_begin, std::size_t plane_end, cudaStream_t stream,
                unsigned max_ctas);

  /// All that `stream` held has ended. REQUIRES: the device is current on this thread.
  void drained(cudaStream_t stream);

 private:
  PagedKernel(const CopyGeometry& geometry, std::size_t plan_bytes);

  const CopyGeometry& geometry_;
  const std::size_t plan_bytes_;
  std::unique_ptr<PlaneTable> table_;
  std::array<std::unique_ptr<PlanRing>, 2> rings_;  // of gathers, of scatters: neither waits for the other
};

}  // namespace lmcn
