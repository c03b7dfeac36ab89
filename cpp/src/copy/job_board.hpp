// Which jobs are under way and which have ended: the book-keeping every copier shares. Thread-safe; never waits except in wait().
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <span>
#include <unordered_set>
#include <vector>

#include "lmcn/paged_copy.hpp"
#include "lmcn/status.hpp"

namespace lmcn {

class JobBoard {
 public:
  /// kInvalidArgument: a job with this id is under way.
  Status begin(std::uint64_t id);
  /// REQUIRES: begin(done.id) and not ended yet. The job's result is visible to poll() before wait() returns.
  void end(CopyDone done);
  std::vector<CopyDone> poll();
  Status wait(std::span<const std::uint64_t> ids, std::chrono::milliseconds timeout);

 private:
  std::mutex mutex_;
  std::condition_variable ended_;
  std::unordered_set<std::uint64_t> under_way_;
  std::vector<CopyDone> done_;
};

}  // namespace lmcn
