// cuMemcpyBatchAsync, looked up in the driver when it is asked for: it came with CUDA 12.8, and changed its signature with 13.0.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "lmcn/paged_copy.hpp"
#include "lmcn/status.hpp"

namespace lmcn {

class BatchCopy {
 public:
  /// Copies of one call: drivers have faulted on batches of tens of thousands.
  static constexpr std::size_t kMaxCopies = 4096;

  /// kUnavailable: the driver has no such function, or this was built with a CUDA that cannot look it up (before 12.5).
  static Result<BatchCopy> look_up();

  /// One batch, in stream order as a whole, in any order within. Addresses are those of the device: host memory is mapped, and its
  /// part of a slot is left alone by all others until the batch has ended.
  /// kInvalidArgument: sizes differ, or exceed kMaxCopies. kUnsupported: a default stream, which the driver refuses. kIoError.
  /// REQUIRES: the stream's device is current on this thread.
  Status enqueue(std::span<const std::uint64_t> to, std::span<const std::uint64_t> from, std::span<const std::size_t> bytes,
                 CopyDirection direction, cudaStream_t stream) const;

 private:
  void* function_ = nullptr;
  bool reports_index_ = false;  // the signature of 12.8
};

}  // namespace lmcn
