// What all tests on the fake runtime share: a stream that stands still, and memory of a fake device as the copier suite wants it.
#pragma once

#include <cstring>
#include <latch>
#include <vector>

#include "copier_suite.hpp"
#include "fake_cudart.hpp"

namespace lmcn {

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

/// Paged memory of `device` whose every allocation begins `shift` bytes after an address that is a multiple of 16.
class FakeDeviceBackend : public copier_suite::Backend {
 public:
  explicit FakeDeviceBackend(int device, std::size_t shift = 0) : device_(device), shift_(shift) {}
  ~FakeDeviceBackend() override { release(); }
  std::byte* allocate(std::size_t bytes) override {
    memory_.push_back(fake_cuda::allocate(bytes + shift_, device_));
    return memory_.back() + shift_;
  }
  void release_all() override { release(); }
  void upload(std::byte* to, const std::byte* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }
  void download(std::byte* to, const std::byte* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }

 private:
  void release() {
    for (std::byte* memory : memory_) fake_cuda::release(memory);
    memory_.clear();
  }
  const int device_;
  const std::size_t shift_;
  std::vector<std::byte*> memory_;
};

}  // namespace lmcn
