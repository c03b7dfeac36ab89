// Lets g++ compile cuda/*.cu as C++, the very files that nvcc compiles, and run their kernels on threads of the CPU, in the fake
// runtime's streams (../fake_cudart.hpp). Included before everything else in them: g++ -x c++ -include cuda_on_cpu.hpp.
//
// Shown here: index arithmetic, bounds and kind of every address touched through launch.cuh, alignment, races between threads of a
// block and between blocks (under TSan), missing __syncthreads. Not shown: what the compiler for the device makes of it, the
// device's memory model, speed.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks whose threads wait for each other run one after another
#define __syncthreads() ::cpu_cuda::sync_threads()
#define LMCN_CUDA_ON_CPU 1

extern thread_local uint3 threadIdx, blockIdx;
extern thread_local dim3 blockDim, gridDim;

namespace cpu_cuda {

/// Puts the kernel into the fake stream, after checking the launch as the runtime does. `in_step`: one thread per CUDA thread,
/// block after block; otherwise CUDA threads are dealt out to a few threads, so that neighbours run on different ones.
cudaError_t enqueue(dim3 grid, dim3 block, bool in_step, cudaStream_t stream, std::function<void()> kernel);
void sync_threads();
/// Whether the kernel may touch these bytes; if not, the device has failed (fake_cuda::fault() says how).
bool may_touch(const void* address, std::size_t bytes, std::size_t alignment, bool write);

}  // namespace cpu_cuda

namespace lmcn {

enum class Threads;

template <Threads kThreads, class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream, Arguments&&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> values(arguments...);  // as of now
  return cpu_cuda::enqueue(grid, block, kThreads == Threads{1}, stream, [kernel, values] { std::apply(kernel, values); });
}

template <class T>
T load(const T* address) {
  T value{};
  if (cpu_cuda::may_touch(address, sizeof(T), alignof(T), false)) std::memcpy(&value, address, sizeof(T));
  return value;
}
template <class T>
void store(T* address, T value) {
  if (cpu_cuda::may_touch(address, sizeof(T), alignof(T), true)) std::memcpy(address, &value, sizeof(T));
}
template <class T>
T load_once(const T* address) {
  return load(address);
}
template <class T>
void store_once(T* address, T value) {
  store(address, value);
}

}  // namespace lmcn
