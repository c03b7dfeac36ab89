#include "row_copy.hpp"

#include <algorithm>

#include "cuda_error.hpp"
#include "host_registration.hpp"

namespace lmcn {

Result<RowCopy> RowCopy::make(int device, const HostRegistration* registration) {
  int max_pitch = 0;
  if (Status status =
          cuda_check(cudaDeviceGetAttribute(&max_pitch, cudaDevAttrMaxPitch, device), "cudaDeviceGetAttribute", Code::kUnavailable);
      !status.ok()) {
    return status;
  }
  return RowCopy(max_pitch, registration);
}

Status RowCopy::enqueue(const Rows& rows, CopyDirection direction, cudaStream_t stream) const {
  const bool fits = rows.host_pitch >= rows.bytes && rows.device_pitch >= rows.bytes && rows.host_pitch <= max_pitch_bytes_ &&
                    rows.device_pitch <= max_pitch_bytes_;
  if (rows.count == 1 || !fits || crosses_border(rows)) {
    for (std::int64_t r = 0; r < rows.count; ++r) {
      LMCN_RETURN_IF_ERROR(
          enqueue_bytes(rows.host + r * rows.host_pitch, rows.device + r * rows.device_pitch, rows.bytes, direction, stream));
    }
    return {};
  }
  const auto host_pitch = static_cast<std::size_t>(rows.host_pitch), device_pitch = static_cast<std::size_t>(rows.device_pitch);
  const auto bytes = static_cast<std::size_t>(rows.bytes), count = static_cast<std::size_t>(rows.count);
  return cuda_check(
      direction == CopyDirection::kGather
          ? cudaMemcpy2DAsync(rows.host, host_pitch, rows.device, device_pitch, bytes, count, cudaMemcpyDeviceToHost, stream)
          : cudaMemcpy2DAsync(rows.device, device_pitch, rows.host, host_pitch, bytes, count, cudaMemcpyHostToDevice, stream),
      "cudaMemcpy2DAsync");
}

Status RowCopy::enqueue_bytes(std::byte* host, std::byte* device, std::int64_t bytes, CopyDirection direction,
                              cudaStream_t stream) const {
  while (bytes > 0) {
    const std::int64_t piece = registration_ == nullptr ? bytes : std::min(bytes, registration_->bytes_to_border(host));
    const auto count = static_cast<std::size_t>(piece);
    LMCN_RETURN_IF_ERROR(cuda_check(direction == CopyDirection::kGather
                                        ? cudaMemcpyAsync(host, device, count, cudaMemcpyDeviceToHost, stream)
                                        : cudaMemcpyAsync(device, host, count, cudaMemcpyHostToDevice, stream),
                                    "cudaMemcpyAsync"));
    host += piece;
    device += piece;
    bytes -= piece;
  }
  return {};
}

bool RowCopy::crosses_border(const Rows& rows) const {
  return registration_ != nullptr && registration_->bytes_to_border(rows.host) < (rows.count - 1) * rows.host_pitch + rows.bytes;
}

}  // namespace lmcn
