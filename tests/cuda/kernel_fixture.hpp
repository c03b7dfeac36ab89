// What tests of kernels share: memory of the fake device 1, a stream on it, and an arena that is registered with the fake runtime.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "fake_device.hpp"

namespace lmcn {

constexpr int kKernelDevice = 1;  // not the one that is current by itself

class KernelBackend final : public FakeDeviceBackend {
 public:
  explicit KernelBackend(std::size_t shift = 0) : FakeDeviceBackend(kKernelDevice, shift) {}
  Result<std::unique_ptr<PagedCopier>> make(const PagedKvLayout&, const SlotLayout&, std::byte*, std::uint64_t,
                                            const CopierOptions&) override {
    return Status(Code::kUnsupported, "kernels are no copier");
  }
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
