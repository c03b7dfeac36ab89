// A CUDA copier on device 1 of the fake runtime, with a path that the test says, and an engine's stream.
#pragma once

#include <cstdlib>
#include <future>
#include <string>
#include <thread>

#include "copier_fixture.hpp"
#include "fake_cudart.hpp"
#include "fake_device.hpp"

namespace lmcn::copier_suite {

constexpr int kDevice = 1;

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
  /// The fixture's copier anew, by what LMCN_COPY_PATH says now.
  Status remake() {
    copier_.reset();
    auto made = backend_->make(paged_->layout(), slot_, arena_->base(), arena_->bytes(), case_.options);
    if (!made.ok()) return made.status();
    copier_ = std::move(made).value();
    return {};
  }
  /// Slots 0 and 1 as they are handed out.
  void begin_slots() {
    for (const std::size_t s : {0, 1}) {
      begin_slot(arena_->image(s), {}, {}, ArenaModel::kRanks * static_cast<std::uint64_t>(slot_.rank_bytes), ArenaModel::kRanks,
                 ArenaModel::generation(s));
    }
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
