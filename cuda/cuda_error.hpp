// cudaError_t -> Status.
#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <string>
#include <thread>

#include "lmcn/status.hpp"

namespace lmcn {

/// Ok, or "cudaMemcpyAsync: an illegal memory access was encountered (700)". Clears the thread's last error: the engine's own
/// checks on this thread must not find ours.
inline Status cuda_check(cudaError_t error, const char* call, Code code = Code::kIoError) {
  if (error == cudaSuccess) return {};
  static_cast<void>(cudaGetLastError());
  return {code, std::string(call) + ": " + cudaGetErrorString(error) + " (" + std::to_string(static_cast<int>(error)) + ")"};
}

/// First on each thread of ours that calls CUDA. An engine captures its graphs in global mode, in which allocating, registering and
/// asking for events fails on every thread that did not say otherwise, and spoils the capture; nothing of ours is on its streams.
inline Status begin_cuda_thread(int device, Code code = Code::kIoError) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  if (Status status = cuda_check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode", code);
      !status.ok()) {
    return status;
  }
  return cuda_check(cudaSetDevice(device), "cudaSetDevice", code);
}

/// Whether nothing on the context can run or be asked any more: such an error comes back from every later call, so waiting for
/// another answer would never end. Any other error says nothing about the work that is under way.
constexpr bool is_lost(cudaError_t error) noexcept {
  switch (error) {
    case cudaErrorCudartUnloading:
    case cudaErrorNoDevice:
    case cudaErrorDevicesUnavailable:
    case cudaErrorDeviceUninitialized:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorInvalidResourceHandle:  // of a stream: its context was destroyed
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorContextIsDestroyed:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorTensorMemoryLeak:
    case cudaErrorContained:
    case cudaErrorMpsRpcFailure:
    case cudaErrorMpsClientTerminated:
    case cudaErrorExternalDevice:
    case cudaErrorUnknown:
      return true;
    default:
      return false;
  }
}

/// After a call that failed: waits until all that was handed to `stream` has ended, however often asking fails. Not ok: the device
/// is lost, and whether it has ended cannot be known.
inline Status drain(cudaStream_t stream) {
  for (;;) {
    const cudaError_t error = cudaStreamSynchronize(stream);
    if (error == cudaSuccess || is_lost(error)) return cuda_check(error, "cudaStreamSynchronize");
    static_cast<void>(cudaGetLastError());
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // between two questions
  }
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
