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

/// How long asking may fail before a device counts as lost.
inline constexpr std::chrono::milliseconds kLostAfter{30'000};

/// After a call that failed: waits until all that was handed to `stream` has ended, though asking fails. Not ok: whether it has
/// ended cannot be known. kIoError: the device is lost, nothing runs on it any more. kUnavailable: asking has failed for
/// `lost_after`, and what was handed over may still run.
inline Status drain(cudaStream_t stream, std::chrono::milliseconds lost_after = kLostAfter) {
  const auto deadline = std::chrono::steady_clock::now() + lost_after;
  for (;;) {
    const cudaError_t error = cudaStreamSynchronize(stream);
    if (error == cudaSuccess || is_lost(error)) return cuda_check(error, "cudaStreamSynchronize");
    const Status failed = cuda_check(error, "cudaStreamSynchronize", Code::kUnavailable);
    if (std::chrono::steady_clock::now() >= deadline) {
      return {Code::kUnavailable, "the CUDA device counts as lost after " + std::to_string(lost_after.count()) +
                                      " ms of errors, and may still copy: " + failed.message()};
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // between two questions
  }
}

/// On a thread of its own with the device current there, and waits for it: whose thread this is keeps its device, and needs none.
/// Not ok: of making it so; `work` has run all the same.
template <class Work>
Status on_cuda_thread(int device, Work work) {
  Status begun;
  std::thread([&] {
    begun = begin_cuda_thread(device, Code::kUnavailable);
    work(begun);
  }).join();
  return begun;
}

/// Makes `device` current on this thread, and its capture mode relaxed, until the end of the block. Going back to a device that
/// this process never used creates a context there, so guard only calls that depend on the current device: event creation, and the
/// default streams.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device, Code code = Code::kIoError) {
    status_ = cuda_check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode", code);
    if (!status_.ok()) return;
    relaxed_ = true;
    status_ = cuda_check(cudaGetDevice(&before_), "cudaGetDevice", code);
    if (!status_.ok() || before_ == device) return;
    status_ = cuda_check(cudaSetDevice(device), "cudaSetDevice", code);
    changed_ = status_.ok();
  }
  ~DeviceGuard() {
    // Nobody is left to tell; a device that was current a moment ago is accepted again.
    if (changed_) static_cast<void>(cudaSetDevice(before_));
    if (relaxed_) static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  const Status& status() const noexcept { return status_; }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // that of the thread meanwhile
  int before_ = 0;
  bool relaxed_ = false, changed_ = false;
  Status status_;
};

}  // namespace lmcn
