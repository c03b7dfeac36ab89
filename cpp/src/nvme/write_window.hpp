// Bytes written to a device within the last 24 hours, by the hour, over restarts.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <mutex>

namespace lmcn::nvme {

/// Any thread. Time is the steady clock's: a wall clock that is set backwards or forwards forgets and keeps nothing. The wall clock
/// is asked once, for how long ago the last process began its last hour.
class WriteWindow {
 public:
  static constexpr std::size_t kHours = 25;  // so that the oldest is forgotten 24 to 25 hours after it was written, never sooner
  using Clock = std::chrono::steady_clock;
  struct Hours {
    std::int64_t began_unix_s = 0;  // of the hour under way, [0]; 0: never saved
    std::array<std::uint64_t, kHours> bytes{};
  };

  void add(std::uint64_t bytes, Clock::time_point now = Clock::now());
  std::uint64_t last_day_bytes(Clock::time_point now = Clock::now()) const;

  Hours saved(std::int64_t now_unix_s, Clock::time_point now = Clock::now()) const;
  /// Adds what an earlier process wrote. A time in the future counts as now.
  void restore(const Hours& hours, std::int64_t now_unix_s, Clock::time_point now = Clock::now());

 private:
  void roll(Clock::time_point now) const;

  mutable std::mutex mutex_;
  mutable Clock::time_point hour_began_{};
  mutable std::array<std::uint64_t, kHours> bytes_{};
};

}  // namespace lmcn::nvme
