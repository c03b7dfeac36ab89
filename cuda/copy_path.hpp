// The ways in which a lane's bytes can move between paged device memory and slots.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "copy/copy_geometry.hpp"
#include "lmcn/paged_copy.hpp"
#include "lmcn/status.hpp"

namespace lmcn {

class HostRegistration;
class PagedKernel;

/// In the order in which they are preferred when none is clearly faster: those that leave the multiprocessors to the model first.
enum class PathKind : std::uint8_t {
  kBatch,   // cuMemcpyBatchAsync, thousands of runs a call
  kMemcpy,  // cudaMemcpyAsync and cudaMemcpy2DAsync, a call a run; the only one for memory that CUDA does not know
  kStaged,  // a kernel to or from staging memory on the device, and one long copy between that and the slot
  kKernel,  // a kernel that reads or writes the slot where it is
};
inline constexpr std::array kAllPaths{PathKind::kBatch, PathKind::kMemcpy, PathKind::kStaged, PathKind::kKernel};
/// "batch", "memcpy", "staged", "kernel"
const char* path_name(PathKind kind) noexcept;
std::optional<PathKind> path_of(std::string_view name) noexcept;

/// Planes [plane_begin, plane_end) of job.items[items[k]].
struct PathTask {
  const CopyJob& job;
  std::span<const std::uint32_t> items;    // at most the path's max_items()
  std::span<std::byte* const> rank_parts;  // of each of `items`: in host memory or, where needs_mapped(), its address on the device
  std::size_t plane_begin = 0, plane_end = 0;
};

/// Of one lane; not thread-safe. The geometry and the registration it was made with outlive it.
class CopyPath {
 public:
  virtual ~CopyPath() = default;  // REQUIRES: what was enqueued has ended
  /// Enqueues the task's copies on `stream`; what it needs of the task it keeps. Not ok: a part may have been enqueued.
  /// REQUIRES: the job passed check_job(); the path's device is current on this thread; `stream` belongs to it and is not a default
  /// stream.
  virtual Status enqueue(const PathTask& task, cudaStream_t stream) = 0;
  virtual PathKind kind() const noexcept = 0;
  const char* name() const noexcept { return path_name(kind()); }
  virtual std::size_t max_items() const noexcept = 0;
  /// After an error: all that was enqueued on `stream` has ended since. REQUIRES: the path's device is current on this thread.
  virtual void drained(cudaStream_t) {}
  /// Each rank part must lie in memory that CUDA maps as one range.
  virtual bool needs_mapped() const noexcept = 0;
};

/// Makes the paths of one copier; what is shared between them is made once, when it is first needed.
/// make(): kUnavailable when this machine lacks what the path needs, kResourceExhausted when there is no memory for it.
class PathMaker {
 public:
  /// `registration`: knows the borders that no copy may cross; null: there are none. All outlive the paths.
  PathMaker(const CopyGeometry& geometry, int device, const HostRegistration* registration)
      : geometry_(geometry), device_(device), registration_(registration) {}
  /// REQUIRES: the device is current on this thread.
  Result<std::unique_ptr<CopyPath>> make(PathKind kind);

 private:
  Result<std::shared_ptr<PagedKernel>> kernel();

  const CopyGeometry& geometry_;
  const int device_;
  const HostRegistration* const registration_;
  std::shared_ptr<PagedKernel> kernel_;
};

}  // namespace lmcn
