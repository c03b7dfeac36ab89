// How kernels are launched and how they touch memory that they read or write once. Kernels are compiled twice: by nvcc, and as C++
// for tests on the CPU, which include their own version of this (tests/cuda/shim). So: no <<<>>>, no warp intrinsics.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <utility>

namespace lmcn {

/// Whether threads of a block wait for each other (__syncthreads). Matters on the CPU only.
enum class Threads { kAlone, kInStep };

#if defined(__CUDACC__)

template <Threads, class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

/// T: unsigned char, short, int, uint2 or uint4; `address` is aligned to its size.
template <class T>
__device__ __forceinline__ T load_once(const T* address) {
  return __ldcs(address);
}
template <class T>
__device__ __forceinline__ void store_once(T* address, T value) {
  __stcs(address, value);
}
/// For what other threads read as well.
template <class T>
__device__ __forceinline__ T load(const T* address) {
  return *address;
}
template <class T>
__device__ __forceinline__ void store(T* address, T value) {
  *address = value;
}

#elif !defined(LMCN_CUDA_ON_CPU)
#error "kernels are compiled by nvcc, or with tests/cuda/shim/cuda_on_cpu.hpp included first"
#endif

}  // namespace lmcn
