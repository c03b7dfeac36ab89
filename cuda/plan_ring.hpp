// Host memory that kernels read: filled before a launch, and not used again before an event says that the launch has run.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <vector>

#include "lmcn/status.hpp"

namespace lmcn {

/// Mapped memory used in a circle. Not thread-safe but for mutex(), which its user holds from take() to keep().
class PlanRing {
 public:
  struct Slice {
    std::byte* host = nullptr;
    const std::byte* device = nullptr;  // the same bytes as kernels address them
  };

  PlanRing() = default;
  ~PlanRing();  // waits for the launches that have not run
  PlanRing(const PlanRing&) = delete;
  PlanRing& operator=(const PlanRing&) = delete;

  /// Allocates `bytes`, rounded up to a multiple of 64. REQUIRES: the device is current; called once.
  Status create(std::size_t bytes);
  std::mutex& mutex() { return mutex_; }

  /// `bytes` in a row, 64-byte aligned; waits for the oldest launch while there is no room. REQUIRES: 1 <= bytes <= size of the
  /// ring.
  Status take(std::size_t bytes, Slice& slice);
  /// The slice taken last is read by what `stream` holds so far; also when a launch failed, for it may have begun. After an error
  /// the slice is not given out again before drained(stream): when it was read is not known.
  Status keep(cudaStream_t stream);
  /// All that `stream` held has ended: what was kept for it is free, and events that could not be asked are replaced.
  void drained(cudaStream_t stream);

  /// Launches not known to have run.
  std::size_t pending() const { return launches_.size(); }

 private:
  struct Launch {
    std::size_t begin = 0, end = 0;
    cudaEvent_t event = nullptr;
    cudaStream_t stream = nullptr;
    Status failure;  // of recording `event`: it says nothing
  };
  bool place(std::size_t bytes, std::size_t& begin) const;
  Status retire(bool wait);

  std::mutex mutex_;
  std::byte* host_ = nullptr;
  const std::byte* device_ = nullptr;
  std::size_t bytes_ = 0;
  std::size_t taken_begin_ = 0, taken_bytes_ = 0;
  std::deque<Launch> launches_;  // in order of place, the oldest first
  std::vector<cudaEvent_t> free_events_;
};

}  // namespace lmcn
