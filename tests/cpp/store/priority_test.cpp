// Priority: who leaves host memory first, who is written while writes are dear, who is promoted first.
#include "base/seq_points.hpp"
#include "store_fixture.hpp"

namespace lmcn {
namespace {

class PriorityTest : public StoreTest {
 protected:
  bool put_with(int i, Priority priority) {
    auto lease = store->reserve(ns, keys(i, i + 1), kPayload, false);
    if (!lease.ok() || lease->empty()) return false;
    fill(lease->payload(0), kPayload, i);
    lease->mark_filled(0);
    lease->set_priority(priority);
    return lease->commit() == 1;
  }
  int slots() const { return static_cast<int>(options.host_bytes / (kPayload + kPageBytes)); }
  int host_chunks(int from, int to) const {
    int found = 0;
    for (int i = from; i < to; ++i) found += in_host(i) ? 1 : 0;
    return found;
  }
};

TEST_F(PriorityTest, LowLeavesHostMemoryFirstThoughItIsNewer) {
  open();
  put_all(0, slots() / 2);
  for (int i = 1000; i < 1000 + slots() / 4; ++i) ASSERT_TRUE(put_with(i, Priority::kLow));
  const int normal = host_chunks(0, slots() / 2);
  ASSERT_EQ(normal, slots() / 2);
  const int fillers = slots() / 2;  // more than are free, fewer than are free or low
  put_all(2000, 2000 + fillers);
  EXPECT_EQ(host_chunks(0, slots() / 2), normal) << "older, but of normal priority";
  EXPECT_EQ(host_chunks(2000, 2000 + fillers), fillers);
  EXPECT_LT(host_chunks(1000, 1000 + slots() / 4), slots() / 4);
}

TEST_F(PriorityTest, LowThatAnotherUsesIsNormalFromThenOn) {
  open();
  put_all(0, slots() - 8);  // as good as full
  ASSERT_TRUE(put_with(1000, Priority::kLow));
  ASSERT_TRUE(put_with(1001, Priority::kLow));
  EXPECT_EQ(get(1000), "hit");  // as of normal priority
  put_all(2000, 2012);
  EXPECT_TRUE(in_host(1000));
  EXPECT_FALSE(in_host(1001));
}

TEST_F(PriorityTest, LowIsWrittenWhenUsedOnly) {
  with_nvme();
  open();
  ASSERT_TRUE(put_with(0, Priority::kLow));
  ASSERT_TRUE(put_with(1, Priority::kLow));
  ASSERT_TRUE(put(2));
  flush();
  EXPECT_EQ(store->stats().demoted_chunks, 1u);
  EXPECT_EQ(get(1), "hit");
  flush();
  EXPECT_EQ(store->stats().demoted_chunks, 2u);
}

TEST_F(PriorityTest, HighIsWrittenWhereFirstTouchIsRefused) {
  with_nvme();
  options.admission = "second_touch";
  open();
  ASSERT_TRUE(put(0));
  ASSERT_TRUE(put_with(1, Priority::kHigh));
  flush();
  EXPECT_EQ(store->stats().demoted_chunks, 1u);
  EXPECT_EQ(store->stats().refused_first_touch, 1u);
  reopen();
  EXPECT_EQ(get(1), "hit");
  EXPECT_EQ(get(0), "miss");
}

TEST_F(PriorityTest, PromotionsOfHigherPriorityAreReadFirst) {
  with_nvme();
  options.admission = "always";
  open();
  put_all(0, 6);
  flush();
  reopen();
  std::unique_lock lock(store->mu);  // the promoter takes nothing
  for (const auto& [i, priority] : {std::pair{0, Priority::kLow},
                                    {1, Priority::kNormal},
                                    {2, Priority::kHigh},
                                    {3, Priority::kNormal},
                                    {4, Priority::kHigh},
                                    {5, Priority::kLow}}) {
    ASSERT_NE(store->start_promotion(store->index.find(key(i)), ns, priority), kNoSlot);
  }
  std::vector<ChunkKey> order;
  for (const auto& job : store->promote_queue) order.push_back(job.key);
  EXPECT_EQ(order, (std::vector{key(2), key(4), key(1), key(3), key(0), key(5)}));
  lock.unlock();
  store->promote_cv.notify_one();
  wait_for_promotions();
}

class Changes : public StoreTest {
 protected:
  std::string taken() {
    std::string text;
    for (const TierChange& change : store->take_changes()) {
      int name = -1;
      for (int i = 0; i < 20; ++i) {
        if (key(i) == change.key) name = i;
      }
      if (name < 0) continue;  // a filler
      text.append(change.stored ? "+" : "-").append(std::to_string(name)).append(change.tier == Tier::kHost ? "host " : "nvme ");
    }
    return text;
  }
};

TEST_F(Changes, FollowAChunkThroughItsTiers) {
  with_nvme();
  open();
  ASSERT_TRUE(put(9));
  flush();
  EXPECT_EQ(taken(), "") << "nobody watches";
  store->watch_changes();
  ASSERT_TRUE(put(0));
  EXPECT_EQ(taken(), "+0host ");
  flush();
  EXPECT_EQ(taken(), "+0nvme ");
  evict_all(1000);
  EXPECT_EQ(taken(), "-9host -0host ");
  ASSERT_EQ(get(0), "hit");
  EXPECT_EQ(taken(), "+0host ");
  ASSERT_TRUE(store->erase(key(0)));
  EXPECT_EQ(taken(), "-0nvme -0host ");
  ASSERT_TRUE(put(1));
  store->clear();
  EXPECT_EQ(taken(), "") << "clear() is the caller's to tell";
  EXPECT_EQ(store->stats().lost_changes, 0u);
}

TEST_F(Changes, AReclaimedRegionsChunksLeaveNvme) {
  with_nvme(24 << 20);
  options.admission = "always";  // on a busy machine, too
  open();
  store->watch_changes();
  put_all(0, 5);
  flush();
  taken();
  std::string all;
  for (int round = 0; round < 8 && all.find("-0nvme") == std::string::npos; ++round) {
    evict_all(1000 * (round + 1));
    flush();
    all += taken();
  }
  for (const char* left : {"-0nvme", "-1nvme", "-2nvme", "-3nvme", "-4nvme"}) EXPECT_NE(all.find(left), std::string::npos) << left;
}

}  // namespace
}  // namespace lmcn
