#include "index/eviction_policy.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "index/policy_support.hpp"

namespace lmcn {
namespace {

class LruTest : public ::testing::Test {
 protected:
  void insert(std::initializer_list<EntryId> ids) {
    for (const EntryId id : ids) policy_->insert(id);
  }

  Ids order() { return order_of(*policy_); }

  std::optional<EntryId> victim_without(const std::vector<EntryId>& pinned, std::uint32_t max_scan = kNoLimit) {
    return policy_->victim([&](EntryId id) { return std::find(pinned.begin(), pinned.end(), id) == pinned.end(); }, max_scan);
  }

  std::unique_ptr<EvictionPolicy> policy_ = make_policy("LRU");
};

TEST_F(LruTest, EmptyHasNoVictim) {
  EXPECT_EQ(victim_without({}), std::nullopt);
  EXPECT_EQ(policy_->size(), 0u);
}

TEST_F(LruTest, OldestGoesFirst) {
  insert({5, 0, 700, 3});
  EXPECT_EQ(order(), (Ids{5, 0, 700, 3}));
  EXPECT_EQ(victim_without({}), 5u);
  EXPECT_EQ(policy_->size(), 4u);
}

TEST_F(LruTest, AccessMovesToTheHotEnd) {
  insert({1, 2, 3});
  policy_->access(1);  // from the cold end
  EXPECT_EQ(order(), (Ids{2, 3, 1}));
  policy_->access(3);  // from the middle
  EXPECT_EQ(order(), (Ids{2, 1, 3}));
  policy_->access(3);  // already there
  EXPECT_EQ(order(), (Ids{2, 1, 3}));
}

TEST_F(LruTest, AccessOfTheOnlyEntry) {
  insert({9});
  policy_->access(9);
  EXPECT_EQ(order(), (Ids{9}));
}

TEST_F(LruTest, RemoveFromEitherEndAndTheMiddle) {
  insert({1, 2, 3, 4, 5});
  policy_->remove(3);
  policy_->remove(1);
  policy_->remove(5);
  EXPECT_EQ(order(), (Ids{2, 4}));
  policy_->remove(2);
  policy_->remove(4);
  EXPECT_EQ(order(), Ids{});
  insert({4, 1});  // ids come again
  EXPECT_EQ(order(), (Ids{4, 1}));
}

TEST_F(LruTest, VictimPassesOverThePinnedAndRemovesNothing) {
  insert({1, 2, 3, 4});
  EXPECT_EQ(victim_without({1, 2}), 3u);
  EXPECT_EQ(victim_without({1, 2, 3, 4}), std::nullopt);
  EXPECT_EQ(order(), (Ids{1, 2, 3, 4}));
}

TEST_F(LruTest, VictimLooksAtNoMoreThanMaxScan) {
  for (EntryId id = 0; id < 1000; ++id) policy_->insert(id);
  std::uint32_t looked = 0;
  const auto never = [&](EntryId) {
    ++looked;
    return false;
  };
  EXPECT_EQ(policy_->victim(never, 64), std::nullopt);
  EXPECT_EQ(looked, 64u);
  EXPECT_EQ(victim_without({0, 1, 2}, 3), std::nullopt);
  EXPECT_EQ(victim_without({0, 1, 2}, 4), 3u);
  EXPECT_EQ(victim_without({}, 0), std::nullopt);
}

TEST_F(LruTest, PostponeMovesToTheHotEnd) {
  insert({1, 2, 3});
  policy_->postpone(1);
  EXPECT_EQ(order(), (Ids{2, 3, 1}));
}

class EveryPolicy : public ::testing::TestWithParam<std::string> {
 protected:
  Ids order() { return order_of(*policy_); }
  std::unique_ptr<EvictionPolicy> policy_ = make_policy(GetParam());
};

// `hits`: hits for each insertion or removal. Ids are dense and sparse; few of them are hit often, so that counts saturate; an id
// has another key each time, of some that come back. Evictions are the removals of what victim() said.
TEST_P(EveryPolicy, MatchesItsModelUnderRandomUse) {
  for (const unsigned hits : {1u, 4u, 40u}) {
    std::unordered_map<EntryId, std::uint32_t> key_bits;
    policy_ = make_policy(GetParam(), [&](EntryId id) { return key_bits.at(id); });
    const auto model = make_model(GetParam());
    std::mt19937_64 random(hits);
    for (int i = 0; i < 30'000; ++i) {
      const std::uint64_t kind = random() % (hits + 1);
      auto id = static_cast<EntryId>(random() % 200 * 7);
      if (kind != 0 && random() % 2 == 0) id = static_cast<EntryId>(random() % 5 * 7);
      if (!model->has(id)) {
        key_bits[id] = static_cast<std::uint32_t>((id / 7 + 200 * (random() % 2)) * 2654435761u);
        policy_->insert(id);
        model->insert(id, key_bits[id]);
      } else if (kind != 0) {
        policy_->access(id);
        model->access(id);
      } else if (random() % 3 == 0) {
        policy_->postpone(id);
        model->postpone(id);
      } else if (random() % 3 != 0) {
        ASSERT_EQ(evict(*policy_), model->evict()) << GetParam() << " after " << i;
      } else {
        policy_->remove(id);
        model->remove(id);
      }
      ASSERT_EQ(policy_->size(), model->size());
      if (i % 20 == 0) {
        ASSERT_EQ(order(), model->order()) << GetParam() << " after " << i;
      }
    }
    EXPECT_EQ(order(), model->order());
  }
}

TEST_P(EveryPolicy, VictimLooksAtNoMoreThanMaxScanAndChangesNothing) {
  for (EntryId id = 0; id < 1000; ++id) policy_->insert(id);
  for (EntryId id = 0; id < 1000; id += 3) policy_->access(id);
  const Ids before = order();
  std::uint32_t looked = 0;
  const auto never = [&](EntryId) {
    ++looked;
    return false;
  };
  EXPECT_EQ(policy_->victim(never, 700), std::nullopt);
  EXPECT_EQ(looked, 700u);
  EXPECT_EQ(policy_->victim([](EntryId) { return true; }, 0), std::nullopt);
  for (const std::uint32_t nth : {0u, 3u, 699u, 999u}) {
    const auto is_nth = [&](EntryId id) { return id == before[nth]; };
    EXPECT_EQ(policy_->victim(is_nth, nth), std::nullopt);
    EXPECT_EQ(policy_->victim(is_nth, nth + 1), before[nth]);
  }
  EXPECT_EQ(order(), before);
}

// As the store evicts: whatever stays busy, the rest is reached.
TEST_P(EveryPolicy, EntriesThatStayBusyDoNotWallOffTheRest) {
  constexpr std::uint32_t kScan = 16;
  for (EntryId id = 0; id < 200; ++id) policy_->insert(id);
  for (EntryId id = 0; id < 200; ++id) policy_->access(id);
  const Ids first = order();
  const std::vector<EntryId> busy(first.begin(), first.begin() + 150);
  std::optional<EntryId> victim;
  for (int scans = 0; !victim && scans < 15; ++scans) {
    Ids passed;
    victim = policy_->victim(
        [&](EntryId id) {
          if (std::ranges::find(busy, id) == busy.end()) return true;
          passed.push_back(id);
          return false;
        },
        kScan);
    for (const EntryId id : passed) policy_->postpone(id);
  }
  EXPECT_EQ(victim, first[150]);
}

INSTANTIATE_TEST_SUITE_P(All, EveryPolicy, testing::Values("LRU", "S3FIFO", "LFU", "FIFO", "MRU"),
                         [](const auto& tested) { return tested.param; });

TEST(Fifo, HitsDoNotMatter) {
  const auto policy = make_policy("FIFO");
  for (const EntryId id : {1, 2, 3}) policy->insert(id);
  policy->access(1);
  EXPECT_EQ(policy->victim([](EntryId) { return true; }, 1), 1u);
}

TEST(Mru, TheLastHitGoesFirst) {
  const auto policy = make_policy("MRU");
  for (const EntryId id : {1, 2, 3}) policy->insert(id);
  EXPECT_EQ(policy->victim([](EntryId) { return true; }, 1), 3u);
  policy->access(1);
  EXPECT_EQ(policy->victim([](EntryId) { return true; }, 1), 1u);
}

class Lfu : public ::testing::Test {
 protected:
  EntryId evict() { return lmcn::evict(*policy_); }
  void hit(EntryId id, int times) {
    for (int i = 0; i < times; ++i) policy_->access(id);
  }
  std::unique_ptr<EvictionPolicy> policy_ = make_policy("LFU");
};

TEST_F(Lfu, TheLeastHitGoesFirstAndAmongEqualsTheOneLongestThere) {
  for (const EntryId id : {1, 2, 3, 4}) policy_->insert(id);
  hit(1, 3);
  hit(4, 1);
  hit(2, 1);
  EXPECT_EQ(evict(), 3u);
  EXPECT_EQ(evict(), 4u);
  EXPECT_EQ(evict(), 2u);
  EXPECT_EQ(evict(), 1u);
}

// One entry was hit `hits` times and never again; the others are replaced again and again.
TEST_F(Lfu, WhatWasHotLongAgoIsEvictedAfterAsManyRounds) {
  constexpr EntryId kOthers = 100;
  for (const auto& [hits, rounds] : {std::pair{0, 0}, std::pair{10, 10}, std::pair{62, 62}, std::pair{1000, 62}}) {
    policy_ = make_policy("LFU");
    for (EntryId id = 0; id <= kOthers; ++id) policy_->insert(id);
    hit(0, hits);
    int evicted_before = 0;
    for (EntryId next = kOthers + 1; evict() != 0 && next < 10'000; ++next, ++evicted_before) policy_->insert(next);
    EXPECT_GE(evicted_before, 99 * rounds) << hits;
    EXPECT_LE(evicted_before, 100 * (rounds + 1)) << hits;
  }
}

TEST_F(Lfu, AScanDoesNotPushOutWhatIsHitNowAndThen) {
  for (const EntryId id : {0, 1, 2, 3}) policy_->insert(id);
  for (EntryId next = 4; next < 1000; ++next) {
    if (next % 2 == 0) policy_->access(0);  // less often than others are stored
    ASSERT_NE(evict(), 0u);
    policy_->insert(next);
  }
}

TEST(MakeEvictionPolicy, NamesInAnyCase) {
  for (const auto& [given, name] :
       {std::pair{"lru", "LRU"}, std::pair{"LRU", "LRU"}, std::pair{"Lru", "LRU"}, std::pair{"lfu", "LFU"},
        std::pair{"s3fifo", "S3FIFO"}, std::pair{"Fifo", "FIFO"}, std::pair{"MRU", "MRU"}}) {
    const auto made = make_eviction_policy(given, KeyBits());
    ASSERT_TRUE(made.ok()) << given;
    EXPECT_EQ((*made)->name(), name);
  }
}

TEST(MakeEvictionPolicy, AnUnknownNameIsAnErrorThatListsTheNames) {
  for (const std::string name : {"", "LRUU", "clock", "S3-FIFO"}) {
    const auto made = make_eviction_policy(name, KeyBits());
    ASSERT_FALSE(made.ok());
    EXPECT_EQ(made.status().code(), Code::kInvalidArgument);
    EXPECT_EQ(made.status().message(),
              "cache_policy is \"" + name + "\", which is not known; available: \"LRU\", \"S3FIFO\", \"LFU\", \"FIFO\", \"MRU\"");
  }
}

}  // namespace
}  // namespace lmcn
