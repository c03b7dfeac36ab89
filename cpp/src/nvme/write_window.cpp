#include "nvme/write_window.hpp"

#include <algorithm>
#include <numeric>

namespace lmcn::nvme {
namespace {

constexpr std::chrono::hours kHour{1};

// Moves every hour's bytes `hours` places on; those that leave the day are forgotten.
void shift(std::array<std::uint64_t, WriteWindow::kHours>& bytes, std::uint64_t hours) {
  const std::size_t by = std::min<std::uint64_t>(hours, bytes.size());
  std::shift_right(bytes.begin(), bytes.end(), static_cast<std::ptrdiff_t>(by));
  std::fill_n(bytes.begin(), by, 0);
}

}  // namespace

void WriteWindow::roll(Clock::time_point now) const {
  if (hour_began_ == Clock::time_point{}) hour_began_ = now;
  const auto passed = std::max<std::int64_t>(0, (now - hour_began_) / kHour);
  if (passed == 0) return;
  shift(bytes_, static_cast<std::uint64_t>(passed));
  hour_began_ += passed * kHour;
}

void WriteWindow::add(std::uint64_t bytes, Clock::time_point now) {
  std::lock_guard lock(mutex_);
  roll(now);
  bytes_[0] += bytes;
}

std::uint64_t WriteWindow::last_day_bytes(Clock::time_point now) const {
  std::lock_guard lock(mutex_);
  roll(now);
  return std::accumulate(bytes_.begin(), bytes_.end(), std::uint64_t{0});
}

WriteWindow::Hours WriteWindow::saved(std::int64_t now_unix_s, Clock::time_point now) const {
  std::lock_guard lock(mutex_);
  roll(now);
  return {.began_unix_s = now_unix_s - std::chrono::duration_cast<std::chrono::seconds>(now - hour_began_).count(),
          .bytes = bytes_};
}

void WriteWindow::restore(const Hours& hours, std::int64_t now_unix_s, Clock::time_point now) {
  if (hours.began_unix_s == 0) return;
  std::array<std::uint64_t, kHours> bytes = hours.bytes;
  const std::chrono::seconds passed(std::max<std::int64_t>(0, now_unix_s - hours.began_unix_s));
  shift(bytes, static_cast<std::uint64_t>(passed / kHour));
  std::lock_guard lock(mutex_);
  roll(now);
  hour_began_ = std::min(hour_began_, now - passed % kHour);
  for (std::size_t i = 0; i < kHours; ++i) bytes_[i] += bytes[i];
}

}  // namespace lmcn::nvme
