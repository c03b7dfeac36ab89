// What tests of kernels share: memory of the fake device 1, a stream on it, and an arena that is registered with the fake runtime.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <latch>
#include <vector>

#include "copier_suite.hpp"
#include "fake_cudart.hpp"

namespace lmcn {

constexpr int kKernelDevice = 1;  // not the one that is current by itself

/// Paged memory whose every allocation begins `shift` bytes after an address that is a multiple of 16.
class KernelBackend final : public copier_suite::Backend {
 public:
  explicit KernelBackend(std::size_t shift = 0) : shift_(shift) {}
  ~KernelBackend() override { release_all(); }
  std::byte* allocate(std::size_t bytes) override {
    memory_.push_back(fake_cuda::allocate(bytes + shift_, kKernelDevice));
    return memory_.back() + shift_;
  }
  void release_all() override {
    for (std::byte* memory : memory_) fake_cuda::release(memory);
    memory_.clear();
  }
  void upload(std::byte* to, const std::byte* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }
  void download(std::byte* to, const std::byte* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }
  Result<std::unique_ptr<PagedCopier>> make(const PagedKvLayout&, const SlotLayout&, std::byte*, std::uint64_t,
                                            const CopierOptions&) override {
    return Status(Code::kUnsupported, "kernels are no copier");
  }

 private:
  const std::size_t shift_;
  std::vector<std::byte*> memory_;
};

/// A stream that does nothing until open().
class Gate {
 public:
  Gate(cudaStream_t stream, int device) {
    fake_cuda::enqueue(stream, device, [this] { latch_.wait(); });
  }
  ~Gate() { open(); }
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;
  void open() {
    if (!latch_.try_wait()) latch_.count_down();
  }

 private:
  std::latch latch_{1};
};

class KernelTest : public testing::Test {
 protected:
  KernelTest() {
    fake_cuda::reset();
    EXPECT_EQ(cudaSetDevice(kKernelDevice), cudaSuccess);
  }
  ~KernelTest() override {
    EXPECT_EQ(fake_cuda::fault(), "");
    fake_cuda::destroy_stream(stream_);
    fake_cuda::reset();
    EXPECT_EQ(cudaSetDevice(0), cudaSuccess);
  }

  const cudaStream_t stream_ = fake_cuda::create_stream(kKernelDevice);
};

}  // namespace lmcn
