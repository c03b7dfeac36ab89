// cudaMemcpyAsync and cudaMemcpy2DAsync between host memory and the device, cut where host memory must be.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "lmcn/paged_copy.hpp"
#include "lmcn/status.hpp"

namespace lmcn {

class HostRegistration;

/// `count` rows of `bytes`; pitches in bytes, without meaning for one row.
struct Rows {
  std::byte* host = nullptr;
  std::byte* device = nullptr;
  std::int64_t bytes = 0, count = 1;
  std::int64_t host_pitch = 0, device_pitch = 0;
};

/// A copy must not reach from one registered range of host memory into another or into memory that is not registered: the driver
/// refuses it. So what crosses a border is issued in pieces.
class RowCopy {
 public:
  /// kUnavailable: the device does not say what pitches it can.
  static Result<RowCopy> make(int device, const HostRegistration* registration);
  /// kGather: device to host. Errors of CUDA are kIoError.
  Status enqueue(const Rows& rows, CopyDirection direction, cudaStream_t stream) const;

 private:
  RowCopy(std::int64_t max_pitch_bytes, const HostRegistration* registration)
      : max_pitch_bytes_(max_pitch_bytes), registration_(registration) {}
  Status enqueue_bytes(std::byte* host, std::byte* device, std::int64_t bytes, CopyDirection direction, cudaStream_t stream) const;
  bool crosses_border(const Rows& rows) const;

  std::int64_t max_pitch_bytes_;
  const HostRegistration* registration_;
};

}  // namespace lmcn
