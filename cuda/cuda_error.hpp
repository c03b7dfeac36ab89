// cudaError_t -> Status.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "lmcn/status.hpp"

namespace lmcn {

/// Ok, or "cudaMemcpyAsync: an illegal memory access was encountered (700)". Clears the thread's last error: the engine's own
/// checks on this thread must not find ours.
inline Status cuda_check(cudaError_t error, const char* call, Code code = Code::kIoError) {
  if (error == cudaSuccess) return {};
  static_cast<void>(cudaGetLastError());
  return {code, std::string(call) + ": " + cudaGetErrorString(error) + " (" + std::to_string(static_cast<int>(error)) + ")"};
}

/// Makes `device` current on this thread until the end of the block. Going back to a device that this process never used creates a
/// context there, so guard only calls that depend on the current device: event creation, and the default streams.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device, Code code = Code::kIoError) {
    status_ = cuda_check(cudaGetDevice(&before_), "cudaGetDevice", code);
    if (!status_.ok() || before_ == device) return;
    status_ = cuda_check(cudaSetDevice(device), "cudaSetDevice", code);
    changed_ = status_.ok();
  }
  ~DeviceGuard() {
    // Nobody is left to tell; a device that was current a moment ago is accepted again.
    if (changed_) static_cast<void>(cudaSetDevice(before_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  const Status& status() const noexcept { return status_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  Status status_;
};

}  // namespace lmcn
