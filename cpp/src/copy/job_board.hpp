// Which jobs are under way and which have ended: the book-keeping every copier shares. Thread-safe; never waits except in wait().
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <span>
#include <unordered_set>
#include <utility>
#include <vector>

#include "lmcn/paged_copy.hpp"
#include "lmcn/status.hpp"

namespace lmcn {

/// Far enough, and safe to add to a time point.
inline constexpr std::chrono::milliseconds kLongestWait = std::chrono::hours(24 * 365);

class JobBoard {
 public:
  /// kInvalidArgument: a job with this id is under way.
  Status begin(std::uint64_t id);
  /// REQUIRES: begin(done.id) and not ended yet. The job's result is visible to poll() before wait() returns.
  /// `remember`: for ended(), beyond poll().
  void end(CopyDone done, bool remember = false);
  /// The job may never end, and nobody can tell: poll() never reports it, wait() says so at once. REQUIRES: as end().
  void strand(std::uint64_t id, const Status& why);
  /// Why the first one was stranded; ok: none was.
  Status stranded() const;
  std::vector<CopyDone> poll();
  Status wait(std::span<const std::uint64_t> ids, std::chrono::milliseconds timeout);
  /// How a job ended, if it is among the last kRemembered that were to be remembered: ok, or kAborted with its message.
  /// kInvalidArgument: it is under way (a caller that asks here did not find it among its jobs layer by layer). kNotFound.
  Status ended(std::uint64_t id);

 private:
  static constexpr std::size_t kRemembered = 1024;

  mutable std::mutex mutex_;
  std::condition_variable ended_;
  std::unordered_set<std::uint64_t> under_way_;
  std::unordered_set<std::uint64_t> stranded_;  // of those under way
  Status why_stranded_;
  std::vector<CopyDone> done_;
  std::deque<std::pair<std::uint64_t, Status>> remembered_;  // the oldest first
};

}  // namespace lmcn
