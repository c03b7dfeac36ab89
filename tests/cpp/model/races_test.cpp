// Races between the store's threads as numbered scripts: what is cleared, erased or reclaimed while the device works on it.
#include "base/seq_points.hpp"
#include "store/store_fixture.hpp"

namespace lmcn {
namespace {

class RacesTest : public StoreTest {
 protected:
  void SetUp() override {
    StoreTest::SetUp();
    with_nvme(24 << 20);
    options.io_engine = "threads";  // four of them: one that a point holds leaves the others
  }
  void TearDown() override {
    SeqPoints::reset();
    StoreTest::TearDown();
  }
  void expect_nothing_held() {
    std::lock_guard lock(store->mu);
    EXPECT_EQ(store->dirty_bytes, 0u);
    EXPECT_EQ(store->demotions_in_flight, 0u);
    EXPECT_EQ(store->promotions_in_flight, 0u);
    for (const SlotRecord& record : store->slots) EXPECT_EQ(record.pins, 0u);
  }
};

TEST_F(RacesTest, ClearedBetweenItsWriteAndItsAcknowledgement) {
  SeqPoints::hold("nvme.record_written");
  open();
  put_all(0, 1);
  ASSERT_TRUE(SeqPoints::wait_until_reached("nvme.record_written", 20s));  // 1. its bytes are on the device
  store->clear();                                                          // 2. everything is dropped
  put_all(1, 2);
  SeqPoints::release("nvme.record_written");  // 3. the log acknowledges, too late
  flush();
  EXPECT_EQ(get(0), "miss");
  EXPECT_EQ(get(1), "hit");
  expect_nothing_held();
  reopen();
  EXPECT_EQ(get(0), "miss");
  EXPECT_EQ(get(1), "hit");
}

TEST_F(RacesTest, ErasedAndStoredAnewBetweenItsWriteAndItsAcknowledgement) {
  SeqPoints::hold("nvme.record_written");
  open();
  put_all(0, 1);
  ASSERT_TRUE(SeqPoints::wait_until_reached("nvme.record_written", 20s));  // 1. its bytes are on the device
  ASSERT_TRUE(store->erase(key(0)));                                       // 2. the entry goes; its slot is still read
  put_all(0, 1);                                                           // 3. the key comes back in another slot
  SeqPoints::release("nvme.record_written");                               // 4. the first record ends: nobody's
  flush();
  expect_nothing_held();
  EXPECT_EQ(store->stats().demoted_chunks, 1u);
  EXPECT_EQ(store->stats().nvme_live_bytes, kPayload + kPageBytes);
  evict_all(1000);
  EXPECT_EQ(get(0), "hit");
  reopen();
  EXPECT_EQ(get(0), "hit");
}

TEST_F(RacesTest, StoredWhileAClearIsDurableButNotDone) {
  open();
  put_all(0, 4);
  flush();
  SeqPoints::hold("nvme.epoch_raised");
  store->clear();
  ASSERT_TRUE(SeqPoints::wait_until_reached("nvme.epoch_raised", 20s));  // 1. the superblock says it, the log does not yet
  EXPECT_EQ(get(0), "miss");
  put_all(0, 2);                            // 2. the same keys again
  SeqPoints::release("nvme.epoch_raised");  // 3. the log forgets its regions
  flush();
  reopen();
  for (int i = 0; i < 4; ++i) EXPECT_EQ(get(i), i < 2 ? "hit" : "miss") << i;
}

TEST_F(RacesTest, ReadOfARegionThatWasTakenButIsStillInTheIndex) {
  open();
  put_all(0, 1);  // in the first region, which is the first to be taken
  flush();
  SeqPoints::hold("nvme.sequence_raised");
  int next = 1;
  while (!SeqPoints::wait_until_reached("nvme.sequence_raised", 0ms)) {  // 1. the keeper took it, and has not told the store
    put(next++);
    ASSERT_LT(next, 100'000);
  }
  ASSERT_TRUE(on_nvme_only(0));
  EXPECT_EQ(get(0), "miss");  // 2. the bytes are all there still, but not for long
  EXPECT_FALSE(on_nvme_only(0));
  put_all(0, 1);  // 3. stored anew: the keeper still has the old one in its list
  SeqPoints::release("nvme.sequence_raised");
  flush();
  EXPECT_EQ(get(0), "hit");
  expect_nothing_held();
  reopen();
  EXPECT_EQ(get(0), "hit");
}

TEST_F(RacesTest, ClearedAndStoredAnewDuringItsPromotion) {
  open();
  put_all(0, 1);
  reopen();
  SeqPoints::hold("nvme.read_completed");
  const auto request = store->begin_request(ns, {});
  ASSERT_EQ(request->lookup(key(0)), Presence::kRetry);
  ASSERT_TRUE(SeqPoints::wait_until_reached("nvme.read_completed", 20s));  // 1. its bytes are in a slot, not yet verified
  store->clear();                                                          // 2. the slot is nobody's
  EXPECT_EQ(request->lookup(key(0)), Presence::kMiss);
  put_all(0, 1);  // 3. the key comes back in another slot
  EXPECT_EQ(request->lookup(key(0)), Presence::kHit);
  SeqPoints::release("nvme.read_completed");  // 4. the promotion ends
  wait_for_promotions();
  EXPECT_EQ(request->lookup(key(0)), Presence::kHit);
  const auto lease = request->acquire(keys(0, 1), false);
  ASSERT_TRUE(lease.ok());
  EXPECT_TRUE(holds(lease->payload(0), 0));
}

}  // namespace
}  // namespace lmcn
