#include "store/admission.hpp"

#include "store_fixture.hpp"

namespace lmcn {
namespace {

ChunkKey key_of(std::uint8_t i) {
  ChunkKey key{};
  key.bytes.fill(i);
  return key;
}

TEST(Admission, AutoTakesEverythingUntilWritesAreDear) {
  Admission admission(AdmissionMode::kAuto, 1000);
  EXPECT_EQ(admission.decide(key_of(1), {.bytes = 100}), Admitted::kYes);
  EXPECT_EQ(admission.decide(key_of(2), {.bytes = 100, .day_bytes = 650}), Admitted::kYes);
  EXPECT_EQ(admission.decide(key_of(3), {.bytes = 100, .day_bytes = 651}), Admitted::kFirstTouch);
  EXPECT_EQ(admission.decide(key_of(3), {.bytes = 100, .day_bytes = 651}), Admitted::kYes) << "seen before";
  EXPECT_EQ(admission.decide(key_of(4), {.bytes = 100, .touched = true, .day_bytes = 900}), Admitted::kYes);
  EXPECT_EQ(admission.decide(key_of(5), {.bytes = 100, .touched = true, .day_bytes = 901}), Admitted::kOverBudget);
  EXPECT_EQ(admission.decide(key_of(6), {.bytes = 100, .device_behind = true}), Admitted::kFirstTouch);
}

TEST(Admission, TheOtherModes) {
  Admission always(AdmissionMode::kAlways, 1000), second(AdmissionMode::kSecondTouch, 1000);
  EXPECT_EQ(always.decide(key_of(1), {.bytes = 100, .device_behind = true, .day_bytes = 900}), Admitted::kYes);
  EXPECT_EQ(always.decide(key_of(1), {.bytes = 100, .day_bytes = 901}), Admitted::kOverBudget);
  EXPECT_EQ(second.decide(key_of(1), {.bytes = 100}), Admitted::kFirstTouch);
  EXPECT_EQ(second.decide(key_of(1), {.bytes = 100}), Admitted::kYes);
  EXPECT_EQ(parse_admission_mode("sometimes").status().message(), "admission=sometimes: must be auto, always or second_touch");
}

class AdmissionTest : public StoreTest {
 protected:
  StoreStats stats() const { return store->stats(); }
};

TEST_F(AdmissionTest, SecondTouchWritesWhatIsUsedOrStoredAgain) {
  with_nvme();
  options.admission = "second_touch";
  open();
  put_all(0, 3);
  flush();
  EXPECT_EQ(stats().demoted_chunks, 0u);
  EXPECT_EQ(stats().refused_first_touch, 3u);
  EXPECT_EQ(get(0), "hit");  // used
  EXPECT_FALSE(put(1));      // offered again while it still is in host memory
  evict_all(1000);
  ASSERT_TRUE(put(2));  // computed anew
  flush();
  EXPECT_EQ(stats().demoted_chunks, 3u);
  reopen();
  for (const int i : {0, 1, 2}) EXPECT_EQ(get(i), "hit") << i;
  EXPECT_EQ(get(1000), "miss");
}

TEST_F(AdmissionTest, TheDaysBudgetIsAHardLimitOverRestarts) {
  with_nvme();
  const std::uint64_t record = kPayload + kPageBytes;
  options.nvme_daily_bytes = 10 * record + 4 * kPageBytes;  // with region headers and a footer
  options.admission = "always";
  open();
  for (int i = 0; i < 30; ++i) {
    put(i);
    if (i % 10 == 0) flush();
  }
  flush();
  EXPECT_GT(stats().demoted_chunks, 7u);
  EXPECT_EQ(stats().demoted_chunks + stats().refused_over_budget, 30u);
  EXPECT_LE(stats().nvme_day_bytes, options.nvme_daily_bytes);
  EXPECT_EQ(stats().nvme_day_limit_bytes, options.nvme_daily_bytes);
  reopen();
  EXPECT_GT(stats().nvme_day_bytes, 7 * record) << "another process goes on counting";
  put_all(100, 130);
  flush();
  EXPECT_LE(stats().demoted_chunks, 3u);
  EXPECT_LE(stats().nvme_day_bytes, options.nvme_daily_bytes);
}

TEST_F(AdmissionTest, WhatWaitedTooLongIsGivenUp) {
  with_nvme();
  io::FaultyEngine* faulty = nullptr;
  wrap_engine = [&](std::unique_ptr<io::IoEngine> inner) {
    auto wrapped = std::make_unique<io::FaultyEngine>(std::move(inner));
    faulty = wrapped.get();
    return wrapped;
  };
  options.write_deadline = 1ms;
  open();
  const auto hold = faulty->add(io::Fault::hold().on(io::Op::kWrite));
  put_all(0, 20);
  ASSERT_TRUE(faulty->wait_withheld(1));
  std::this_thread::sleep_until(Clock::now() + 2ms);  // the deadline is what is tested
  faulty->remove(hold);
  faulty->release();
  flush();
  EXPECT_EQ(stats().demoted_chunks + stats().demotion_drops, 20u);
  EXPECT_GT(stats().demotion_drops, 0u);
  EXPECT_EQ(stats().nvme_dirty_bytes, 0u);
  for (int i = 0; i < 20; ++i) EXPECT_EQ(get(i), "hit") << "they are still in host memory";
}

}  // namespace
}  // namespace lmcn
