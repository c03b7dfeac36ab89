#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <thread>

#include "store/store_fixture.hpp"

namespace lmcn {
namespace {

TEST_F(StoreTest, WhatIsPutIsFound) {
  open();
  put_all(0, 10);
  for (int i = 0; i < 10; ++i) EXPECT_EQ(get(i), "hit") << i;
  EXPECT_EQ(get(10), "miss");
}

TEST_F(StoreTest, LookupCountsTheLeadingKeysOnly) {
  open();
  put_all(0, 3);
  put_all(4, 6);
  const PrefixHit hit = store->lookup(keys(0, 6));
  EXPECT_EQ(hit.hit, 3u);
  EXPECT_EQ(hit.host, 3u);
  EXPECT_EQ(hit.nvme, 0u);
}

TEST_F(StoreTest, NothingIsVisibleBeforeCommit) {
  open();
  auto lease = store->reserve(ns, keys(0, 2), kPayload, false);
  ASSERT_TRUE(lease.ok());
  fill(lease->payload(0), kPayload, 0);
  lease->mark_filled(0);
  EXPECT_FALSE(in_host(0));
  EXPECT_EQ(lease->commit(), 1u);  // slot 1 was never marked
  EXPECT_TRUE(in_host(0));
  EXPECT_FALSE(in_host(1));
  EXPECT_EQ(store->stats().aborted_chunks, 1u);
}

TEST_F(StoreTest, ADroppedWriteLeaseLeavesNothing) {
  open();
  const std::uint64_t before = store->stats().host_used_bytes;
  {
    auto lease = store->reserve(ns, keys(0, 4), kPayload, false);
    ASSERT_TRUE(lease.ok());
    lease->mark_filled(0);
  }
  EXPECT_FALSE(in_host(0));
  EXPECT_EQ(store->stats().host_used_bytes, before);
  EXPECT_EQ(store->stats().index_entries, 0u);
}

TEST_F(StoreTest, EveryRankMustSayOk) {
  options.rank_count = 2;
  open();
  for (const RankState second : {RankState::kOk, RankState::kFailed}) {
    const int i = second == RankState::kOk ? 0 : 1;
    auto lease = store->reserve(ns, keys(i, i + 1), kPayload, true);
    ASSERT_TRUE(lease.ok());
    std::byte* at = store->arena_base() + lease->slots()[0].offset;
    publish_rank(at, 0, lease->slots()[0].generation, RankState::kOk);
    publish_rank(at, 1, lease->slots()[0].generation, second);
    EXPECT_EQ(lease->commit(), second == RankState::kOk ? 1u : 0u);
    EXPECT_EQ(in_host(i), second == RankState::kOk);
  }
}

TEST_F(StoreTest, AWordOfAnotherGenerationDoesNotPublish) {
  open();
  auto lease = store->reserve(ns, keys(0, 1), kPayload, true);
  ASSERT_TRUE(lease.ok());
  std::byte* at = store->arena_base() + lease->slots()[0].offset;
  publish_rank(at, 0, lease->slots()[0].generation - 1, RankState::kOk);
  EXPECT_EQ(lease->commit(), 0u);
  EXPECT_EQ(store->stats().host_quarantined_slots, 1u);
}

TEST_F(StoreTest, PresentKeysAreNotReservedAgain) {
  open();
  put_all(1, 2);
  auto lease = store->reserve(ns, keys(0, 3), kPayload, false);
  ASSERT_TRUE(lease.ok());
  EXPECT_EQ(lease->positions(), (std::vector<std::uint32_t>{0, 2}));
  auto second = store->reserve(ns, keys(0, 3), kPayload, false);
  ASSERT_TRUE(second.ok());
  EXPECT_TRUE(second->empty());
}

TEST_F(StoreTest, TheColdestIsEvictedAndLeasedOnesStay) {
  open();
  put_all(0, 4);
  auto lease = store->acquire(ns, keys(0, 1), 1s);
  ASSERT_TRUE(lease.ok());
  evict_all(1000);
  EXPECT_TRUE(in_host(0));
  EXPECT_FALSE(in_host(1));
  EXPECT_TRUE(holds(lease->payload(0), 0));
  EXPECT_LE(store->stats().host_used_bytes, options.host_bytes);
}

TEST_F(StoreTest, AFullyLeasedArenaRefusesAndNamesTheBound) {
  open();
  std::vector<WriteLease> held;
  for (int i = 0;; ++i) {
    auto lease = store->reserve(ns, keys(i, i + 1), kPayload, false);
    if (!lease.ok()) {
      EXPECT_EQ(lease.status().code(), Code::kResourceExhausted);
      EXPECT_NE(lease.status().message().find("8388608"), std::string::npos) << lease.status().message();
      break;
    }
    held.push_back(std::move(*lease));
    ASSERT_LT(i, 1000);
  }
  held.clear();
  EXPECT_TRUE(put(0));
}

TEST_F(StoreTest, WhenNotAllFitTheLeadingOnesAreReserved) {
  open();
  auto lease = store->reserve(ns, keys(0, 500), kPayload, false);
  ASSERT_TRUE(lease.ok());
  ASSERT_GT(lease->positions().size(), 100u);
  for (std::uint32_t i = 0; i < lease->positions().size(); ++i) EXPECT_EQ(lease->positions()[i], i);
}

TEST_F(StoreTest, NvmeAnswersAfterARestart) {
  with_nvme();
  open();
  put_all(0, 20);
  reopen();
  EXPECT_EQ(store->stats().recovered_chunks, 20u);
  EXPECT_EQ(store->lookup(keys(0, 20)).nvme, 20u);
  for (int i = 0; i < 20; ++i) EXPECT_EQ(get(i), "hit") << i;
  EXPECT_EQ(store->stats().hits_nvme, 20u);
}

TEST_F(StoreTest, NvmeAnswersAfterAKill) {
  with_nvme();
  const pid_t child = ::fork();
  if (child == 0) {
    open();
    for (int i = 0; i < 20; ++i) put(i);
    const bool flushed = store->flush(20s).ok();
    ::kill(::getpid(), flushed ? SIGKILL : SIGTERM);
    ::_exit(1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
  open();
  for (int i = 0; i < 20; ++i) EXPECT_EQ(get(i), "hit") << i;
}

TEST_F(StoreTest, EvictedChunksComeBackFromNvme) {
  with_nvme();
  open();
  put_all(0, 10);
  flush();
  evict_all(1000);
  EXPECT_TRUE(on_nvme_only(0));
  for (int i = 0; i < 10; ++i) EXPECT_EQ(get(i), "hit") << i;
}

TEST_F(StoreTest, PayloadsOfAnyLengthKeepIt) {
  with_nvme();
  open();
  const std::vector<std::uint64_t> sizes = {1, 4095, 4096, 4097, 65536, 100001, 1 << 20};
  for (int i = 0; i < static_cast<int>(sizes.size()); ++i) {
    auto lease = store->reserve(ns, keys(i, i + 1), sizes[static_cast<std::size_t>(i)], false);
    ASSERT_TRUE(lease.ok());
    fill(lease->payload(0), sizes[static_cast<std::size_t>(i)], i);
    lease->mark_filled(0);
    ASSERT_EQ(lease->commit(), 1u);
  }
  reopen();
  for (int i = 0; i < static_cast<int>(sizes.size()); ++i) {
    auto lease = store->acquire(ns, keys(i, i + 1), 10s);
    ASSERT_TRUE(lease.ok()) << lease.status().to_string();
    ASSERT_EQ(lease->payload(0).size(), sizes[static_cast<std::size_t>(i)]);
    for (std::size_t at = 0; at < lease->payload(0).size(); ++at)
      ASSERT_EQ(lease->payload(0)[at], pattern(i, at)) << i << " " << at;
  }
}

TEST_F(StoreTest, AnotherNamespaceNeverHits) {
  with_nvme();
  open();
  put_all(0, 1);
  reopen();
  const NamespaceId other = make_namespace("other");
  // The very key, as if forged: the record says which namespace it belongs to.
  auto lease = store->acquire(other, keys(0, 1), 5s);
  EXPECT_FALSE(lease.ok());
  EXPECT_EQ(store->stats().misplaced_reads, 1u);
  EXPECT_EQ(store->stats().promotion_failures, 1u);
}

TEST_F(StoreTest, ClearForgetsEveryTierAlsoAfterARestart) {
  with_nvme();
  open();
  put_all(0, 10);
  flush();
  store->clear();
  EXPECT_EQ(get(0), "miss");
  put_all(20, 22);
  reopen();
  EXPECT_EQ(get(0), "miss");
  EXPECT_EQ(get(20), "hit");
  EXPECT_EQ(store->stats().recovered_chunks, 2u);
}

TEST_F(StoreTest, EraseForgetsOneChunk) {
  with_nvme();
  open();
  put_all(0, 3);
  flush();
  EXPECT_TRUE(store->erase(key(1)));
  EXPECT_FALSE(store->erase(key(1)));
  EXPECT_EQ(get(0), "hit");
  EXPECT_EQ(get(1), "miss");
}

TEST_F(StoreTest, WritesBehindWithoutBeingAsked) {
  with_nvme();
  open();
  put_all(0, 5);
  const auto until = Clock::now() + 20s;
  while (store->stats().demoted_chunks != 5 && Clock::now() < until) std::this_thread::yield();
  EXPECT_EQ(store->stats().demoted_chunks, 5u);
}

TEST_F(StoreTest, MoreThanTheNvmeLimitIsWrittenAndTheLimitHolds) {
  with_nvme(32 << 20);
  open();
  for (int round = 0; round < 12; ++round) {
    put_all(round * 100, round * 100 + 100);
    flush();
    EXPECT_LE(store->stats().nvme_allocated_bytes, options.nvme_bytes);
  }
  EXPECT_GT(store->stats().reclaimed_regions, 0u);
  EXPECT_EQ(store->stats().demotion_failures, 0u);
  EXPECT_EQ(get(1199), "hit");
  EXPECT_EQ(get(0), "miss");
  for (int i = 800; i < 1200; ++i) EXPECT_NE(get(i), "wrong") << i;
}

TEST_F(StoreTest, ALockedDirectoryIsDoneWithoutOrRefused) {
  with_nvme();
  open();
  StoreOptions second = options;
  second.lock_wait = 50ms;
  auto without = TieredStore::open(second);
  ASSERT_TRUE(without.ok()) << without.status().to_string();
  EXPECT_FALSE((*without)->nvme_ready());
  EXPECT_NE((*without)->nvme_warning().find(std::to_string(::getpid())), std::string::npos) << (*without)->nvme_warning();
  second.fail_when_locked = true;
  auto refused = TieredStore::open(second);
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.status().code(), Code::kLocked);
}

TEST_F(StoreTest, BadOptionsNameFieldValueAndWhatIsRight) {
  const auto refused = [&](const char* field, auto change) {
    StoreOptions bad = options;
    change(bad);
    auto opened = TieredStore::open(bad);
    ASSERT_FALSE(opened.ok()) << field;
    EXPECT_EQ(opened.status().code(), Code::kInvalidArgument) << opened.status().to_string();
    EXPECT_NE(opened.status().message().find(field), std::string::npos) << opened.status().message();
  };
  refused("host_bytes", [](StoreOptions& o) { o.host_bytes = 4096; });
  refused("bytes", [](StoreOptions& o) { o.host_bytes = 1ULL << 50; });
  refused("rank_count", [](StoreOptions& o) { o.rank_count = 65; });
  refused("max_payload_bytes", [](StoreOptions& o) { o.max_payload_bytes = 1 << 30; });
  refused("nvme_bytes", [](StoreOptions& o) { o.nvme_bytes = 1 << 30; });
  refused("nvme_bytes", [&](StoreOptions& o) { o.directories = {(root / "x").string()}; });
  refused("/proc/none", [](StoreOptions& o) {
    o.directories = {"/proc/none"};
    o.nvme_bytes = 1 << 30;
  });
  refused("numa_nodes[0] is 1023", [&](StoreOptions& o) {
    o.directories = {(root / "x").string()};
    o.nvme_bytes = 1 << 30;
    o.numa_nodes = {1023};
  });
  refused("LRU", [](StoreOptions& o) { o.cache_policy = "LRV"; });
  EXPECT_FALSE(std::filesystem::exists(root / "x"));
}

TEST_F(StoreTest, TheEventDescriptorTellsOfPromotions) {
  with_nvme();
  open();
  put_all(0, 1);
  reopen();
  pollfd ready{.fd = store->event_fd(), .events = POLLIN, .revents = 0};
  EXPECT_EQ(::poll(&ready, 1, 0), 0);
  auto request = store->begin_request(ns, {});
  EXPECT_EQ(request->lookup(key(0)), Presence::kRetry);
  EXPECT_EQ(::poll(&ready, 1, 20'000), 1);
  EXPECT_EQ(request->lookup(key(0)), Presence::kHit);
}

TEST_F(StoreTest, ACloseThatIsRepeatedIsHarmlessAndAClosedStoreRefuses) {
  with_nvme();
  open();
  put_all(0, 1);
  EXPECT_TRUE(store->close(10s).ok());
  EXPECT_TRUE(store->close(10s).ok());
  EXPECT_EQ(store->reserve(ns, keys(1, 2), kPayload, false).status().code(), Code::kUnavailable);
  EXPECT_EQ(get(0), "miss");
}

}  // namespace
}  // namespace lmcn
