// The order in which an engine starts its requests, and the bound on how many are at the device. Shared by all engines.
#pragma once

#include <cstddef>
#include <deque>
#include <span>

#include "io/io_engine.hpp"

namespace lmcn::io {

/// Reads start before writes and syncs; first come, first served within each class. Invariant: in_flight() <= depth, and each
/// request pushed leaves exactly once, through start() or cancel(). Not thread-safe: the engine's mutex guards it.
class RequestQueue {
 public:
  /// REQUIRES: depth >= 1
  explicit RequestQueue(unsigned depth) noexcept : depth_(depth) {}

  void push(std::span<const IoRequest> requests) {
    for (const IoRequest& request : requests) (request.op == Op::kRead ? reads_ : writes_).push_back(request);
  }

  bool can_start() const noexcept { return in_flight_ < depth_ && !empty(); }

  /// The next request, now counted as in flight. false: nothing waits, or the bound is reached.
  bool start(IoRequest& out) {
    if (!can_start()) return false;
    take(out);
    ++in_flight_;
    return true;
  }

  /// One started request ended.
  void finish() noexcept { --in_flight_; }

  /// The next request that never started, whatever the bound. false: nothing waits.
  bool cancel(IoRequest& out) {
    if (empty()) return false;
    take(out);
    return true;
  }

  bool empty() const noexcept { return reads_.empty() && writes_.empty(); }
  unsigned in_flight() const noexcept { return in_flight_; }

 private:
  void take(IoRequest& out) {
    std::deque<IoRequest>& from = reads_.empty() ? writes_ : reads_;
    out = from.front();
    from.pop_front();
  }

  unsigned depth_;
  unsigned in_flight_ = 0;
  std::deque<IoRequest> reads_, writes_;
};

}  // namespace lmcn::io
