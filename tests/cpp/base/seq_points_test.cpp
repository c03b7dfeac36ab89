#include "base/seq_points.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace lmcn {
namespace {

using std::chrono::milliseconds;
constexpr milliseconds kLong{30'000};  // only a broken test waits for it

class SeqPointsTest : public ::testing::Test {
 protected:
  ~SeqPointsTest() override { SeqPoints::reset(); }
};

TEST_F(SeqPointsTest, PointThatNobodyHoldsDoesNotStop) {
  LMCN_SEQ_POINT("test.free");
  SeqPoints::hold("test.other");
  LMCN_SEQ_POINT("test.free");
}

TEST_F(SeqPointsTest, HeldThreadWaitsForRelease) {
  SeqPoints::hold("test.before_write");
  SeqPoints::hold("test.after_write");
  std::atomic<int> value{0};
  std::jthread writer([&] {
    LMCN_SEQ_POINT("test.before_write");
    value = 1;
    LMCN_SEQ_POINT("test.after_write");
    value = 2;
  });
  SeqPointScope scope;
  ASSERT_TRUE(SeqPoints::wait_until_reached("test.before_write", kLong));
  EXPECT_EQ(value, 0);
  EXPECT_FALSE(SeqPoints::wait_until_reached("test.after_write", milliseconds(20)));
  EXPECT_EQ(value, 0);
  SeqPoints::release("test.before_write");
  ASSERT_TRUE(SeqPoints::wait_until_reached("test.after_write", kLong));
  EXPECT_EQ(value, 1);
  SeqPoints::release("test.after_write");
  writer.join();
  EXPECT_EQ(value, 2);
}

TEST_F(SeqPointsTest, ThreadsRunInTheOrderOfTheScript) {
  constexpr int kThreads = 8;
  std::string order;  // each thread writes it alone, between its release and its end
  for (int i = 0; i < kThreads; ++i) SeqPoints::hold("test.turn" + std::to_string(i));
  std::vector<std::jthread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&order, i] {
      LMCN_SEQ_POINT("test.turn" + std::to_string(i));
      order += std::to_string(i);
    });
  }
  SeqPointScope scope;
  for (int i = kThreads - 1; i >= 0; --i) {
    ASSERT_TRUE(SeqPoints::wait_until_reached("test.turn" + std::to_string(i), kLong));
    SeqPoints::release("test.turn" + std::to_string(i));
    threads[static_cast<std::size_t>(i)].join();
  }
  EXPECT_EQ(order, "76543210");
}

TEST_F(SeqPointsTest, CountsArrivalsAndReleasesAllOfThem) {
  SeqPoints::hold("test.crowd");
  std::atomic<int> passed{0};
  std::vector<std::jthread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      LMCN_SEQ_POINT("test.crowd");
      ++passed;
    });
  }
  SeqPointScope scope;
  ASSERT_TRUE(SeqPoints::wait_until_reached("test.crowd", kLong, 4));
  EXPECT_FALSE(SeqPoints::wait_until_reached("test.crowd", milliseconds(1), 5));
  EXPECT_EQ(passed, 0);
  SeqPoints::release("test.crowd");
  threads.clear();
  EXPECT_EQ(passed, 4);
}

TEST_F(SeqPointsTest, StepLetsOneRoundThroughAndStopsTheNext) {
  SeqPoints::hold("test.gate");
  std::atomic<int> rounds{0};
  std::jthread walker([&] {
    for (int i = 0; i < 3; ++i) {
      LMCN_SEQ_POINT("test.gate");
      ++rounds;
    }
  });
  SeqPointScope scope;
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(SeqPoints::wait_until_reached("test.gate", kLong));
    EXPECT_EQ(rounds, i);
    SeqPoints::step("test.gate");
  }
  walker.join();
  EXPECT_EQ(rounds, 3);
}

// A thread that was let go leaves even when the point is held again before it wakes.
TEST_F(SeqPointsTest, HoldAfterReleaseStopsOnlyLaterArrivals) {
  SeqPoints::hold("test.gate");
  std::jthread walker([] { LMCN_SEQ_POINT("test.gate"); });
  SeqPointScope scope;
  ASSERT_TRUE(SeqPoints::wait_until_reached("test.gate", kLong));
  SeqPoints::release("test.gate");
  SeqPoints::hold("test.gate");
  walker.join();
  std::jthread late([] { LMCN_SEQ_POINT("test.gate"); });
  SeqPointScope scope_of_late;
  EXPECT_TRUE(SeqPoints::wait_until_reached("test.gate", kLong));
}

TEST_F(SeqPointsTest, ReleasedPointStillCounts) {
  SeqPoints::hold("test.passed");
  SeqPoints::release("test.passed");
  std::jthread walker([] { LMCN_SEQ_POINT("test.passed"); });
  EXPECT_TRUE(SeqPoints::wait_until_reached("test.passed", kLong));
}

TEST_F(SeqPointsTest, ResetFreesWaitingThreadsAndForgetsNames) {
  SeqPoints::hold("test.stuck");
  {
    std::jthread stuck([] { LMCN_SEQ_POINT("test.stuck"); });
    SeqPointScope scope;
    ASSERT_TRUE(SeqPoints::wait_until_reached("test.stuck", kLong));
  }
  EXPECT_THROW(SeqPoints::release("test.stuck"), std::logic_error);
}

TEST_F(SeqPointsTest, MisuseIsAnError) {
  EXPECT_THROW(SeqPoints::release("test.tpyo"), std::logic_error);
  EXPECT_THROW(static_cast<void>(SeqPoints::wait_until_reached("test.tpyo", milliseconds(0))), std::logic_error);
  SeqPoints::hold("test.twice");
  EXPECT_THROW(SeqPoints::hold("test.twice"), std::logic_error);
  SeqPoints::release("test.twice");
  EXPECT_THROW(SeqPoints::step("test.twice"), std::logic_error);
}

}  // namespace
}  // namespace lmcn
