#include <cuda_runtime_api.h>

#include "lmcn/version.hpp"

namespace lmcn {

CudaStatus cuda_status() {
  CudaStatus status;
  status.built = true;
  const cudaError_t error = cudaGetDeviceCount(&status.devices);
  status.error = static_cast<int>(error);
  if (error == cudaSuccess) {
    status.message = std::to_string(status.devices) + " CUDA device(s)";
  } else {
    static_cast<void>(cudaGetLastError());
    status.devices = 0;
    status.message = std::string("cudaGetDeviceCount: ") + cudaGetErrorString(error) + " (" + std::to_string(status.error) + ")";
  }
  return status;
}

}  // namespace lmcn
