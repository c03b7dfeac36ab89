// What stats() and latencies() say of chunks whose way is known.
#include <numeric>

#include "store_fixture.hpp"

namespace lmcn {
namespace {

class Stats : public StoreTest {
 protected:
  static constexpr std::uint64_t kSlot = kPayload + kPageBytes;

  static std::uint64_t count(const LatencyHistogram& histogram) {
    return std::accumulate(histogram.count.begin(), histogram.count.end(), std::uint64_t{0});
  }
  static std::uint64_t total_ns(const LatencyHistogram& histogram) {
    return std::accumulate(histogram.total_ns.begin(), histogram.total_ns.end(), std::uint64_t{0});
  }
  /// Each bucket's mean lies within its bounds, so that who observes it so often fills the same bucket.
  static void expect_means_within_bounds(const LatencyHistogram& histogram) {
    for (std::size_t i = 0; i < kLatencyBuckets; ++i) {
      if (histogram.count[i] == 0) continue;
      const std::uint64_t mean = histogram.total_ns[i] / histogram.count[i];
      EXPECT_GE(mean, i == 0 ? 0 : kLatencyBoundsNs[i - 1]) << i;
      EXPECT_LE(mean, i == kLatencyBoundsNs.size() ? UINT64_MAX : kLatencyBoundsNs[i]) << i;
    }
  }
  StoreStats stats() const { return store->stats(); }
  void SetUp() override {
    StoreTest::SetUp();
    options.admission = "always";  // also when writes wait, as on a busy machine
  }
};

TEST_F(Stats, EveryChunkOfEachStageIsTimedOnce) {
  with_nvme();
  open();
  put_all(0, 5);
  flush();
  evict_all(1000);
  flush();
  const std::uint64_t written = stats().demoted_chunks;
  for (int i = 0; i < 3; ++i) ASSERT_EQ(get(i), "hit");
  const StoreLatencies all = store->latencies();
  EXPECT_EQ(count(all.promotion), 3u);
  EXPECT_EQ(count(all.read), 3u);
  EXPECT_EQ(count(all.verify), 3u);
  EXPECT_EQ(count(all.write), count(all.write_wait));
  EXPECT_GE(count(all.write), written);
  for (const LatencyHistogram* histogram : {&all.promotion, &all.read, &all.verify, &all.write, &all.write_wait}) {
    EXPECT_GT(total_ns(*histogram), 0u);
    expect_means_within_bounds(*histogram);
  }
  EXPECT_GE(total_ns(all.promotion), total_ns(all.read)) << "a promotion holds its read";
  EXPECT_GE(total_ns(all.write_wait), total_ns(all.write)) << "so does a write's wait";
  EXPECT_EQ(stats().nvme_read_bytes, 3 * kSlot);
  EXPECT_EQ(stats().verified_bytes, 3 * kSlot);
}

TEST_F(Stats, WithoutVerificationNothingIsTimedOrCountedAsVerified) {
  with_nvme();
  options.verify = "off";
  open();
  put_all(0, 2);
  flush();
  evict_all(1000);
  ASSERT_EQ(get(0), "hit");
  EXPECT_EQ(count(store->latencies().read), 1u);
  EXPECT_EQ(count(store->latencies().verify), 0u);
  EXPECT_EQ(stats().verified_bytes, 0u);
}

TEST_F(Stats, VerifyAllCountsWhatItComputesInHostMemory) {
  options.verify = "all";
  open();
  put_all(0, 1);
  ASSERT_EQ(get(0), "hit");
  EXPECT_EQ(count(store->latencies().verify), 2u) << "when it was published, and when it was asked for";
  EXPECT_EQ(stats().verified_bytes, 2 * kPayload);
}

TEST_F(Stats, EvictionsAreCountedInBytes) {
  open();
  evict_all(0);
  ASSERT_GT(stats().evicted_chunks, 0u);
  EXPECT_EQ(stats().evicted_bytes, stats().evicted_chunks * kSlot);
}

TEST_F(Stats, DirtyChunksEndAsWrittenOrDropped) {
  with_nvme();
  open();
  put_all(0, 20);
  flush();
  EXPECT_EQ(stats().nvme_dirty_chunks, 0u);
  EXPECT_EQ(stats().nvme_dirty_bytes, 0u);
  EXPECT_EQ(stats().demotions_in_flight, 0u);
  put_all(20, 40);
  store->clear();
  EXPECT_EQ(stats().nvme_dirty_chunks, 0u);
  put_all(40, 60);
  for (int i = 40; i < 60; ++i) store->erase(key(i));
  ASSERT_TRUE(becomes([&] { return stats().demotions_in_flight == 0; }));
  EXPECT_EQ(stats().nvme_dirty_chunks, 0u);
  EXPECT_EQ(stats().nvme_dirty_bytes, 0u);
  const StoreStats s = stats();
  EXPECT_EQ(s.demotion_drops, s.dropped_late + s.dropped_evicted + s.dropped_no_room);
}

TEST_F(Stats, RefusalsOfPromotionsHaveTheirReason) {
  with_nvme();
  open();
  put_all(0, 4);
  flush();
  evict_all(1000);
  const auto small = store->begin_request(ns, {.promotion_budget_bytes = kSlot});
  EXPECT_EQ(small->lookup(key(0)), Presence::kRetry);
  EXPECT_EQ(small->lookup(key(1)), Presence::kMiss);
  EXPECT_EQ(stats().refused_request_budget, 1u);
  store->request_pin_limit_bytes = kSlot;  // spent by the request above
  const auto large = store->begin_request(ns, {});
  EXPECT_EQ(large->lookup(key(2)), Presence::kMiss);
  EXPECT_EQ(stats().refused_pin_limit, 1u);
  EXPECT_EQ(stats().refused_no_slot, 0u);
  EXPECT_EQ(stats().promotion_refusals, 2u);
  wait_for_promotions();
}

}  // namespace
}  // namespace lmcn
