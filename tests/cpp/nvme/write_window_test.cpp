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
  EXPECT_EQ(window.last_day_bytes(kStart + 23h + 59min), 110u);
  EXPECT_EQ(window.last_day_bytes(kStart + 24h), 10u);
  window.add(1, kStart + 24h);
  EXPECT_EQ(window.last_day_bytes(kStart + 25h), 1u);
  EXPECT_EQ(window.last_day_bytes(kStart + 1000h), 0u);
  window.add(7, kStart + 1000h);
  EXPECT_EQ(window.last_day_bytes(kStart + 1000h), 7u);
}

TEST(WriteWindow, GoesOnAfterARestart) {
  WriteWindow before;
  before.add(100, kStart);
  before.add(10, kStart + 2h);
  const WriteWindow::Hours saved = before.saved(1'000'000, kStart + 2h);
  for (const auto& [later_s, expected] : {std::pair{0, 111u}, {21 * 3600, 111u}, {22 * 3600, 11u}, {24 * 3600, 1u}}) {
    WriteWindow after;
    after.add(1, kStart);
    after.restore(saved, 1'000'000 + later_s, kStart);
    EXPECT_EQ(after.last_day_bytes(kStart), expected) << later_s;
  }
}

TEST(WriteWindow, AClockThatWentBackwardsForgetsNothing) {
  WriteWindow before, after, never;
  before.add(100, kStart);
  after.restore(before.saved(1'000'000, kStart), 500'000, kStart);
  EXPECT_EQ(after.last_day_bytes(kStart), 100u);
  EXPECT_EQ(after.last_day_bytes(kStart + 24h), 0u) << "and keeps it no longer than a day";
  never.restore(WriteWindow::Hours{.saved_unix_s = 0, .bytes = {5}}, 500'000, kStart);
  EXPECT_EQ(never.last_day_bytes(kStart), 0u);
}

}  // namespace
}  // namespace lmcn::nvme
