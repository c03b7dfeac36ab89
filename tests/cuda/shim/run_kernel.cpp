#include <algorithm>
#include <barrier>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include "../fake_cudart.hpp"
#include "cuda_on_cpu.hpp"

thread_local uint3 threadIdx, blockIdx;
thread_local dim3 blockDim, gridDim;

namespace cpu_cuda {
namespace {

constexpr std::uint64_t kWorkers = 3;

/// What all threads of a launch share. Read-only while it runs.
struct Launch {
  dim3 grid, block;
  const std::function<void()>& kernel;
  std::vector<fake_cuda::Range> accessible;  // sorted
  int device = 0;

  std::uint64_t threads() const { return std::uint64_t{block.x} * block.y * block.z; }
  std::uint64_t blocks() const { return std::uint64_t{grid.x} * grid.y * grid.z; }
};

thread_local const Launch* t_launch = nullptr;
thread_local std::barrier<>* t_barrier = nullptr;

void run_one(const Launch& launch, std::uint64_t block, std::uint64_t thread) {
  const auto split = [](std::uint64_t i, dim3 of) {
    return uint3{static_cast<unsigned>(i % of.x), static_cast<unsigned>(i / of.x % of.y), static_cast<unsigned>(i / of.x / of.y)};
  };
  blockIdx = split(block, launch.grid);
  threadIdx = split(thread, launch.block);
  launch.kernel();
}

template <class F>
void on_threads(const Launch& launch, std::uint64_t count, F&& f) {
  std::vector<std::thread> threads;
  for (std::uint64_t i = 0; i < count; ++i) {
    threads.emplace_back([&launch, &f, i] {
      t_launch = &launch;
      gridDim = launch.grid;
      blockDim = launch.block;
      f(i);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

void run_alone(const Launch& launch) {
  const std::uint64_t all = launch.blocks() * launch.threads();
  on_threads(launch, kWorkers, [&](std::uint64_t worker) {
    for (std::uint64_t i = worker; i < all; i += kWorkers) run_one(launch, i / launch.threads(), i % launch.threads());
  });
}

void run_in_step(const Launch& launch) {
  static std::mutex one_at_a_time;  // __shared__ is static
  std::lock_guard lock(one_at_a_time);
  const auto count = static_cast<std::ptrdiff_t>(launch.threads());
  std::barrier<> in_block(count), between_blocks(count);
  on_threads(launch, launch.threads(), [&](std::uint64_t thread) {
    t_barrier = &in_block;
    for (std::uint64_t block = 0; block < launch.blocks(); ++block) {
      run_one(launch, block, thread);
      between_blocks.arrive_and_wait();
    }
  });
}

}  // namespace

cudaError_t enqueue(dim3 grid, dim3 block, bool in_step, cudaStream_t stream, std::function<void()> kernel) {
  const bool fits = grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= INT32_MAX && grid.y <= 65535 && grid.z <= 65535 &&
                    block.x >= 1 && block.y >= 1 && block.z >= 1 && block.x <= 1024 && block.y <= 1024 && block.z <= 64 &&
                    std::uint64_t{block.x} * block.y * block.z <= 1024;
  return fake_cuda::launch(stream, grid, fits, [=](int device) {
    const Launch launch{grid, block, kernel, fake_cuda::kernel_memory(device), device};
    in_step ? run_in_step(launch) : run_alone(launch);
  });
}

void sync_threads() {
  if (t_barrier == nullptr) {
    std::fprintf(stderr, "__syncthreads in a kernel that was launched with Threads::kAlone\n");
    std::abort();
  }
  t_barrier->arrive_and_wait();
}

bool may_touch(const void* address, std::size_t bytes, std::size_t alignment, bool write) {
  const auto* const begin = static_cast<const std::byte*>(address);
  const auto& ranges = t_launch->accessible;
  const auto after = std::upper_bound(ranges.begin(), ranges.end(), begin,
                                      [](const std::byte* a, const fake_cuda::Range& range) { return a < range.begin; });
  const bool inside =
      after != ranges.begin() && begin < (after - 1)->end && bytes <= static_cast<std::size_t>((after - 1)->end - begin);
  const bool aligned = reinterpret_cast<std::uintptr_t>(address) % alignment == 0;
  if (inside && aligned) return true;
  char what[160];
  std::snprintf(what, sizeof what, "%s of %zu bytes at %p by block (%u,%u,%u) thread %u: %s", write ? "store" : "load", bytes,
                address, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, inside ? "not aligned" : "not memory of the device");
  fake_cuda::fault(inside ? cudaErrorMisalignedAddress : cudaErrorIllegalAddress, what);
  return false;
}

}  // namespace cpu_cuda
