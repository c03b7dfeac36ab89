// What LatencyHistogram (lmcn/metrics.hpp) is a snapshot of: a few relaxed atomics, from any thread, without a lock.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>

#include "lmcn/metrics.hpp"

namespace lmcn {

class LatencyRecorder {
 public:
  void add(std::chrono::nanoseconds duration) noexcept {
    const auto ns = static_cast<std::uint64_t>(std::max<std::int64_t>(duration.count(), 0));
    const auto bucket =
        static_cast<std::size_t>(std::lower_bound(kLatencyBoundsNs.begin(), kLatencyBoundsNs.end(), ns) - kLatencyBoundsNs.begin());
    total_ns_[bucket].fetch_add(ns, std::memory_order_relaxed);
    count_[bucket].fetch_add(1, std::memory_order_release);
  }

  /// What is counted is in the totals too; a total may hold a duration that is counted in the next snapshot only.
  LatencyHistogram snapshot() const noexcept {
    LatencyHistogram out;
    for (std::size_t i = 0; i < kLatencyBuckets; ++i) {
      out.count[i] = count_[i].load(std::memory_order_acquire);
      out.total_ns[i] = total_ns_[i].load(std::memory_order_relaxed);
    }
    return out;
  }

 private:
  std::array<std::atomic<std::uint64_t>, kLatencyBuckets> count_{}, total_ns_{};
};

/// Adds the time from its construction to its end.
class LatencyTimer {
 public:
  explicit LatencyTimer(LatencyRecorder& recorder) noexcept : recorder_(recorder) {}
  LatencyTimer(const LatencyTimer&) = delete;
  LatencyTimer& operator=(const LatencyTimer&) = delete;
  ~LatencyTimer() { recorder_.add(std::chrono::steady_clock::now() - begin_); }

 private:
  LatencyRecorder& recorder_;
  const std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

}  // namespace lmcn
