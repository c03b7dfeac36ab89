// One engine request: promotions, budgets, deadlines, pins and the memo.
#include <thread>

#include "base/seq_points.hpp"
#include "store/store_fixture.hpp"

namespace lmcn {
namespace {

class RequestTest : public StoreTest {
 protected:
  /// Chunks [0, n) on NVMe only, reads under the test's control.
  void on_nvme(int n) {
    wrap_engine = [this](std::unique_ptr<io::IoEngine> inner) {
      auto wrapped = std::make_unique<io::FaultyEngine>(std::move(inner));
      faulty = wrapped.get();
      return wrapped;
    };
    with_nvme();
    open();
    put_all(0, n);
    reopen();
  }
  std::span<const std::byte> engine_key(const int& i) { return std::as_bytes(std::span(&i, 1)); }

  io::FaultyEngine* faulty = nullptr;
};

TEST_F(RequestTest, RetryThenHitFromNvme) {
  on_nvme(4);
  auto request = store->begin_request(ns, {});
  for (int i = 0; i < 4; ++i) EXPECT_EQ(request->lookup(engine_key(i)), Presence::kRetry);
  const int absent = 4;
  EXPECT_EQ(request->lookup(engine_key(absent)), Presence::kMiss);
  wait_for_promotions();
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(request->lookup(engine_key(i)), Presence::kHit);
    EXPECT_EQ(request->source(engine_key(i)), Tier::kNvme);
  }
  auto lease = request->acquire(keys(0, 4), false);
  ASSERT_TRUE(lease.ok());
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(holds(lease->payload(static_cast<std::size_t>(i)), i));
  EXPECT_EQ(store->stats().hits_nvme, 4u);
}

TEST_F(RequestTest, AHitIsPinnedUntilTheRequestEnds) {
  open();
  put_all(0, 2);
  auto request = store->begin_request(ns, {});
  EXPECT_EQ(request->lookup(key(0)), Presence::kHit);
  evict_all(1000);
  EXPECT_TRUE(in_host(0));
  EXPECT_FALSE(in_host(1));
  request->end();
  evict_all(5000);
  EXPECT_FALSE(in_host(0));
}

TEST_F(RequestTest, APromotedChunkIsPinnedBeforeItIsLookedUpAgain) {
  on_nvme(1);
  auto request = store->begin_request(ns, {});
  EXPECT_EQ(request->lookup(key(0)), Presence::kRetry);
  wait_for_promotions();
  evict_all(1000);
  EXPECT_EQ(request->lookup(key(0)), Presence::kHit);
}

TEST_F(RequestTest, TwoRequestsShareOnePromotion) {
  on_nvme(1);
  auto first = store->begin_request(ns, {});
  auto second = store->begin_request(ns, {});
  EXPECT_EQ(first->lookup(key(0)), Presence::kRetry);
  EXPECT_NE(second->lookup(key(0)), Presence::kMiss);
  wait_for_promotions();
  EXPECT_EQ(first->lookup(key(0)), Presence::kHit);
  EXPECT_EQ(second->lookup(key(0)), Presence::kHit);
  EXPECT_EQ(store->stats().promoted_chunks, 1u);
}

TEST_F(RequestTest, BeyondTheBudgetIsAMiss) {
  on_nvme(6);
  auto request = store->begin_request(ns, {.promotion_budget_bytes = 3 * (kPayload + kPageBytes)});
  for (int i = 0; i < 6; ++i) EXPECT_EQ(request->lookup(key(i)), i < 3 ? Presence::kRetry : Presence::kMiss) << i;
  wait_for_promotions();
  for (int i = 0; i < 6; ++i) EXPECT_EQ(request->lookup(key(i)), i < 3 ? Presence::kHit : Presence::kMiss) << i;
}

TEST_F(RequestTest, PastTheDeadlineIsAMissAndTheEngineGoesOn) {
  on_nvme(2);
  const auto gate = faulty->add(io::Fault::hold().on(io::Op::kRead));
  auto request = store->begin_request(ns, {.promotion_deadline = 1ms});
  EXPECT_EQ(request->lookup(key(0)), Presence::kRetry);
  while (request->lookup(key(0)) == Presence::kRetry) {  // bounded by the deadline, not by the device
  }
  EXPECT_EQ(request->lookup(key(0)), Presence::kMiss);
  EXPECT_EQ(store->stats().promotion_timeouts, 1u);
  EXPECT_TRUE(put(100));
  faulty->remove(gate);
  faulty->release();
  wait_for_promotions();
  auto later = store->begin_request(ns, {});
  EXPECT_EQ(later->lookup(key(0)), Presence::kHit);  // it did arrive, for others
}

TEST_F(RequestTest, AFlippedBitOnNvmeIsAMissAndCounted) {
  on_nvme(2);
  faulty->add(io::Fault::flip_bit(5000).on(io::Op::kRead));
  EXPECT_EQ(get(0), "miss");
  EXPECT_EQ(store->stats().corrupt_records, 1u);
  faulty->clear();
  EXPECT_EQ(get(1), "hit");
  EXPECT_EQ(get(0), "miss");  // forgotten, not asked again
}

TEST_F(RequestTest, AFailedReadIsAMissAndCounted) {
  on_nvme(1);
  faulty->add(io::Fault::fail_with(EIO).on(io::Op::kRead));
  EXPECT_EQ(get(0), "miss");
  EXPECT_EQ(store->stats().promotion_failures, 1u);
}

TEST_F(RequestTest, AChunkBeingStoredIsPending) {
  open();
  auto lease = store->reserve(ns, keys(0, 1), kPayload, false);
  auto request = store->begin_request(ns, {});
  EXPECT_EQ(request->lookup(key(0)), Presence::kPending);
  fill(lease->payload(0), kPayload, 0);
  lease->mark_filled(0);
  lease->commit();
  EXPECT_EQ(request->lookup(key(0)), Presence::kHit);
}

TEST_F(RequestTest, TheMemoSeesEveryChange) {
  open();
  put_all(0, 3);
  auto request = store->begin_request(ns, {});
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < 3; ++i) EXPECT_EQ(request->lookup(engine_key(i)), Presence::kHit);
  }
  const int next = 3;
  EXPECT_EQ(request->lookup(engine_key(next)), Presence::kMiss);
  put_all(3, 4);
  EXPECT_EQ(request->lookup(engine_key(next)), Presence::kHit);
  store->erase(key(1));
  for (int i = 0; i < 4; ++i) EXPECT_EQ(request->lookup(engine_key(i)), i == 1 ? Presence::kMiss : Presence::kHit) << i;
  store->clear();
  for (int i = 0; i < 4; ++i) EXPECT_EQ(request->lookup(engine_key(i)), Presence::kMiss) << i;
  put_all(0, 1);
  const int first = 0;
  EXPECT_EQ(request->lookup(engine_key(first)), Presence::kHit);
}

TEST_F(RequestTest, ScansMayStartAnywhere) {
  open();
  put_all(0, 8);
  auto request = store->begin_request(ns, {});
  for (const int start : {0, 3, 0, 7, 2, 5}) {
    for (int i = start; i < 10; ++i) EXPECT_EQ(request->lookup(engine_key(i)), i < 8 ? Presence::kHit : Presence::kMiss) << i;
  }
}

TEST_F(RequestTest, APrefixLookupIsItsKeysLookups) {
  open();
  put_all(0, 6);
  store->erase(key(4));
  auto lease = store->reserve(ns, keys(4, 5), kPayload, false);
  auto request = store->begin_request(ns, {});
  const auto look = [&](int from, int to) {
    const PrefixPresence found = request->lookup_prefix(keys(from, to));
    return std::pair(found.hits, found.next);
  };
  using Found = std::pair<std::uint32_t, Presence>;
  EXPECT_EQ(look(0, 0), Found(0, Presence::kHit));
  EXPECT_EQ(look(0, 4), Found(4, Presence::kHit));
  EXPECT_EQ(look(0, 6), Found(4, Presence::kPending));
  EXPECT_EQ(look(5, 8), Found(1, Presence::kMiss));
  EXPECT_EQ(look(9, 10), Found(0, Presence::kMiss));
  EXPECT_EQ(store->stats().lookups, 0u + 4 + 5 + 2 + 1);
  EXPECT_EQ(store->stats().misses, 2u);
  lease->abort();
  for (int round = 0; round < 2; ++round) {
    EXPECT_EQ(look(0, 6), Found(4, Presence::kMiss));
    EXPECT_EQ(store->stats().host_pinned_slots, 5u) << "0..3 and 5";
  }
  put_all(4, 5);
  EXPECT_EQ(look(0, 6), Found(6, Presence::kHit));
  store->erase(key(1));
  EXPECT_EQ(look(0, 6), Found(1, Presence::kMiss));
  store->clear();
  EXPECT_EQ(look(0, 6), Found(0, Presence::kMiss));
  request->end();
  EXPECT_EQ(look(0, 6), Found(0, Presence::kMiss));
}

TEST_F(RequestTest, APrefixLookupStartsOnePromotionAndNoMore) {
  on_nvme(4);
  put_all(10, 12);
  auto request = store->begin_request(ns, {});
  const std::vector<ChunkKey> mixed = {key(10), key(11), key(0), key(1)};
  const PrefixPresence first = request->lookup_prefix(mixed);
  EXPECT_EQ(first.hits, 2u);
  EXPECT_EQ(first.next, Presence::kRetry);
  wait_for_promotions();
  const PrefixPresence second = request->lookup_prefix(mixed);
  EXPECT_EQ(second.hits, 3u);
  EXPECT_EQ(second.next, Presence::kRetry);
  wait_for_promotions();
  EXPECT_EQ(request->lookup_prefix(mixed).hits, 4u);
  EXPECT_EQ(store->stats().promoted_chunks, 2u);

  const auto sources = [&](const std::vector<ChunkKey>& of) {
    const SourceCount count = request->count_sources(of);
    return std::pair(count.host, count.nvme);
  };
  using Count = std::pair<std::uint32_t, std::uint32_t>;
  EXPECT_EQ(sources(mixed), Count(2, 2));
  EXPECT_EQ(sources({key(0), key(2), key(3), key(10), key(1)}), Count(1, 2));
  EXPECT_EQ(sources({key(11)}), Count(1, 0));
  EXPECT_EQ(sources({}), Count(0, 0));
}

TEST_F(RequestTest, ALookupOfBothTiersPinsWhatIsInHostMemoryAndPromotesNothing) {
  on_nvme(4);
  put_all(10, 12);
  auto request = store->begin_request(ns, {.promote = false});
  const auto look = [&](const std::vector<ChunkKey>& of) {
    const PrefixPresence found = request->lookup_tiers(of);
    return std::pair(found.hits, found.next);
  };
  using Found = std::pair<std::uint32_t, Presence>;
  const std::uint64_t misses = store->stats().misses, lookups = store->stats().lookups;
  const std::vector<ChunkKey> mixed = {key(0), key(10), key(1), key(2), key(11), key(3)};
  for (int round = 0; round < 2; ++round) {
    EXPECT_EQ(look(mixed), Found(6, Presence::kHit));
    EXPECT_EQ(store->stats().host_pinned_slots, 2u);
  }
  EXPECT_EQ(store->stats().misses, misses) << "what is on NVMe is none";
  EXPECT_EQ(store->stats().lookups, lookups + 12);
  EXPECT_EQ(store->stats().promoted_chunks, 0u);
  EXPECT_EQ(request->lookup(key(0)), Presence::kMiss) << "by itself it is not to be had";
  for (int round = 0; round < 2; ++round) EXPECT_EQ(look({key(3), key(99), key(2)}), Found(1, Presence::kMiss));
  EXPECT_EQ(store->stats().misses, misses + 1);
  store->erase(key(1));
  EXPECT_EQ(look(mixed), Found(2, Presence::kMiss));
  request->end();
  EXPECT_EQ(look(mixed), Found(0, Presence::kMiss));
}

// A scan that outlasts the time to live keeps its pins until it ends: the keeper reads and drops them without a lock in common.
TEST_F(RequestTest, AScanIsNotIdleHoweverLongItTakes) {
  open();
  put_all(0, 5);
  auto request = store->begin_request(ns, {});
  const auto expire = [&] {
    std::lock_guard lock(store->mu);
    static_cast<RequestImpl*>(request.get())->expire_if_idle(INT64_MAX, 1);  // idle for ever, by this clock
  };
  SeqPoints::hold("request.scanned");
  std::jthread scan([&] { EXPECT_EQ(request->lookup_prefix(keys(0, 5)).hits, 5u); });
  const SeqPointScope scope;
  ASSERT_TRUE(SeqPoints::wait_until_reached("request.scanned", 20s));
  expire();
  EXPECT_EQ(store->stats().host_pinned_slots, 5u);
  SeqPoints::release("request.scanned");
  scan.join();
  expire();
  EXPECT_EQ(store->stats().host_pinned_slots, 0u);
  EXPECT_EQ(request->lookup_prefix(keys(0, 5)).hits, 5u);
  EXPECT_EQ(store->stats().host_pinned_slots, 5u);
}

TEST_F(RequestTest, AKeyHasOneItemHoweverItIsNamed) {
  on_nvme(3);
  auto request = store->begin_request(ns, {.promotion_budget_bytes = 3 * (kPayload + kPageBytes)});
  EXPECT_EQ(request->prefetch(keys(0, 3)), 3u);
  const int last = 2;
  for (int round = 0; round < 3; ++round) EXPECT_NE(request->lookup(engine_key(last)), Presence::kMiss);
  wait_for_promotions();
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(request->lookup(engine_key(i)), Presence::kHit);
    EXPECT_EQ(request->source(engine_key(i)), Tier::kNvme);
    EXPECT_EQ(request->source(key(i)), Tier::kNvme);
  }
  EXPECT_EQ(store->stats().host_pinned_slots, 3u);
  EXPECT_EQ(store->slots[0].pins, 1u);
}

TEST_F(RequestTest, AnIdleRequestLosesItsPins) {
  options.request_ttl = 1ms;
  open();
  put_all(0, 1);
  auto request = store->begin_request(ns, {});
  EXPECT_EQ(request->lookup(key(0)), Presence::kHit);
  for (int tries = 0; tries < 10'000 && in_host(0); ++tries) evict_all(1000 + tries * 200);
  EXPECT_FALSE(in_host(0));
  EXPECT_EQ(request->lookup(key(0)), Presence::kMiss);
}

TEST_F(RequestTest, PromotionsOfManyRequestsLeaveRoomForStores) {
  on_nvme(200);
  auto first = store->begin_request(ns, {});
  auto second = store->begin_request(ns, {});
  int refused = 0;
  for (int i = 0; i < 200; ++i) {
    if ((i % 2 == 0 ? first : second)->lookup(key(i)) == Presence::kMiss) ++refused;
  }
  EXPECT_GT(refused, 0);
  wait_for_promotions();
  EXPECT_LE(store->stats().host_pinned_slots * (kPayload + kPageBytes), options.host_bytes / 4 * 3);
  EXPECT_TRUE(put(1000));
}

TEST_F(RequestTest, PinsThatGrewColdDoNotWallOffTheRest) {
  options.host_bytes = 32 << 20;
  for (const char* policy : {"LRU", "S3FIFO", "LFU", "FIFO", "MRU"}) {
    SCOPED_TRACE(policy);
    options.cache_policy = policy;
    open();
    put_all(0, 300);
    auto request = store->begin_request(ns, {});
    for (int i = 0; i < 300; ++i) ASSERT_EQ(request->lookup(key(i)), Presence::kHit);
    for (int i = 1000; i < 2000; ++i) ASSERT_TRUE(put(i)) << i;
    EXPECT_TRUE(in_host(299));
    request.reset();
    store.reset();
  }
}

TEST_F(RequestTest, AWorkersLeaseTakesOverAllPins) {
  open();
  put_all(0, 4);
  auto request = store->begin_request(ns, {});
  for (int i = 0; i < 4; ++i) ASSERT_EQ(request->lookup(key(i)), Presence::kHit);
  auto lease = request->acquire(keys(0, 2), true);
  ASSERT_TRUE(lease.ok());
  EXPECT_EQ(store->stats().host_pinned_slots, 2u);
}

TEST_F(RequestTest, AFlushThatCouldNotSyncSaysSo) {
  on_nvme(1);
  ASSERT_TRUE(put(1));
  faulty->add(io::Fault::fail_with(EIO).on(io::Op::kSync));
  EXPECT_FALSE(store->flush(20s).ok());
  EXPECT_FALSE(store->nvme_ready());
  EXPECT_NE(store->nvme_warning().find("quarantined"), std::string::npos) << store->nvme_warning();
  EXPECT_TRUE(put(2));  // host memory goes on
}

TEST_F(RequestTest, AcquireIsAllOrNothing) {
  open();
  put_all(0, 2);
  auto request = store->begin_request(ns, {});
  EXPECT_EQ(request->acquire(keys(0, 3), false).status().code(), Code::kNotFound);
  EXPECT_EQ(store->stats().host_pinned_slots, 0u);
}

}  // namespace
}  // namespace lmcn
