// A CUDA copier on device 1 of the fake runtime, with a path that the test says, and an engine's stream.
#pragma once

#include <cstdlib>
#include <future>
#include <latch>
#include <string>
#include <thread>

#include "copier_fixture.hpp"
#include "fake_cudart.hpp"

namespace lmcn::copier_suite {

constexpr int kDevice = 1;

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

/// For copiers that are made while it lives.
class AskedPath {
 public:
  explicit AskedPath(const std::string& path) { ::setenv("LMCN_COPY_PATH", path.c_str(), 1); }
  ~AskedPath() { ::unsetenv("LMCN_COPY_PATH"); }
  AskedPath(const AskedPath&) = delete;
  AskedPath& operator=(const AskedPath&) = delete;
};

// AskedPath first: CopierFixture's constructor makes a copier.
class CudaFixture : private AskedPath, public CopierFixture {
 protected:
  explicit CudaFixture(const std::string& path) : AskedPath(path) { fake_cuda::reset(); }
  ~CudaFixture() override {
    copier_.reset();
    fake_cuda::destroy_stream(engine_);
    fake_cuda::reset();
  }
  CopyJob engine_job(std::uint64_t id, CopyDirection direction, const std::vector<std::size_t>& slots) {
    CopyJob made = job(id, direction, slots);
    made.stream = reinterpret_cast<std::uint64_t>(engine_);
    return made;
  }
  /// submit() on a thread of its own: false when it did not return in a minute.
  bool submits_at_once(const CopyJob& job) {
    std::packaged_task<Status()> task([&] { return copier_->submit(job); });
    std::future<Status> done = task.get_future();
    std::thread thread(std::move(task));
    const bool returned = done.wait_for(60s) == std::future_status::ready;
    if (returned) {
      thread.join();
      EXPECT_TRUE(done.get().ok());
    } else {
      thread.detach();
    }
    return returned;
  }

  const cudaStream_t engine_ = fake_cuda::create_stream(kDevice);
};

}  // namespace lmcn::copier_suite
