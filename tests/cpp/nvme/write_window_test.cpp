#include "nvme/write_window.hpp"

#include <gtest/gtest.h>

namespace lmcn::nvme {
namespace {

using namespace std::chrono_literals;
using Clock = WriteWindow::Clock;
const Clock::time_point kStart = Clock::time_point{} + 1000h;

TEST(WriteWindow, ForgetsWhatIsADayOld) {
  WriteWindow window;
  window.add(100, kStart);
  window.add(10, kStart + 90min);
  EXPECT_EQ(window.last_day_bytes(kStart + 24h + 59min), 110u);
  EXPECT_EQ(window.last_day_bytes(kStart + 25h), 10u);
  window.add(1, kStart + 25h);
  EXPECT_EQ(window.last_day_bytes(kStart + 26h), 1u);
  EXPECT_EQ(window.last_day_bytes(kStart + 1000h), 0u);
  window.add(7, kStart + 1000h);
  EXPECT_EQ(window.last_day_bytes(kStart + 1000h), 7u);
}

TEST(WriteWindow, GoesOnAfterARestart) {
  WriteWindow before;
  before.add(100, kStart);
  before.add(10, kStart + 2h);
  const WriteWindow::Hours saved = before.saved(1'000'000, kStart + 2h);
  for (const auto& [later_s, expected] : {std::pair{0, 111u}, {22 * 3600, 111u}, {23 * 3600, 11u}, {25 * 3600, 1u}}) {
    WriteWindow after;
    after.add(1, kStart);
    after.restore(saved, 1'000'000 + later_s, kStart);
    EXPECT_EQ(after.last_day_bytes(kStart), expected) << later_s;
  }
}

TEST(WriteWindow, ShortLivesDoNotKeepBytesForEver) {
  WriteWindow::Hours hours;
  std::int64_t unix_s = 1'000'000;
  for (int life = 0; life < 40; ++life) {
    WriteWindow window;
    window.restore(hours, unix_s, kStart);
    window.add(life == 0 ? 1000 : 1, kStart);
    unix_s += 50 * 60;
    hours = window.saved(unix_s, kStart + 50min);
  }
  WriteWindow last;
  last.restore(hours, unix_s, kStart);
  EXPECT_LT(last.last_day_bytes(kStart), 40u) << "written 33 hours ago";
  EXPECT_GE(last.last_day_bytes(kStart), 24u * 60 / 50);
}

TEST(WriteWindow, AClockThatWentBackwardsForgetsNothing) {
  WriteWindow before, after, never;
  before.add(100, kStart);
  after.restore(before.saved(1'000'000, kStart), 500'000, kStart);
  EXPECT_EQ(after.last_day_bytes(kStart), 100u);
  EXPECT_EQ(after.last_day_bytes(kStart + 25h), 0u) << "and keeps it no longer than a day";
  never.restore(WriteWindow::Hours{.began_unix_s = 0, .bytes = {5}}, 500'000, kStart);
  EXPECT_EQ(never.last_day_bytes(kStart), 0u);
}

}  // namespace
}  // namespace lmcn::nvme
