#include "index/eviction_policy.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <list>
#include <random>
#include <string>
#include <vector>

namespace lmcn {
namespace {

constexpr std::uint32_t kNoLimit = 0xFFFFFFFFu;

class LruTest : public ::testing::Test {
 protected:
  void insert(std::initializer_list<EntryId> ids) {
    for (const EntryId id : ids) policy_->insert(id);
  }

  /// All ids in eviction order, found by passing over those seen.
  std::vector<EntryId> order() {
    std::vector<EntryId> ids;
    policy_->victim(
        [&](EntryId id) {
          ids.push_back(id);
          return false;
        },
        kNoLimit);
    return ids;
  }

  std::optional<EntryId> victim_without(const std::vector<EntryId>& pinned, std::uint32_t max_scan = kNoLimit) {
    return policy_->victim([&](EntryId id) { return std::find(pinned.begin(), pinned.end(), id) == pinned.end(); }, max_scan);
  }

  std::unique_ptr<EvictionPolicy> policy_ = std::move(make_eviction_policy("LRU")).value();
};

using Ids = std::vector<EntryId>;

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

TEST_F(LruTest, MatchesAListUnderRandomUse) {
  std::list<EntryId> model;  // coldest first
  std::mt19937_64 random(7);
  for (int i = 0; i < 30'000; ++i) {
    const auto id = static_cast<EntryId>(random() % 600);
    const auto at = std::find(model.begin(), model.end(), id);
    if (at == model.end()) {
      policy_->insert(id);
      model.push_back(id);
    } else if (random() % 3 == 0) {
      policy_->remove(*at);
      model.erase(at);
    } else {
      policy_->access(*at);
      model.splice(model.end(), model, at);
    }
    ASSERT_EQ(policy_->size(), model.size());
    ASSERT_EQ(victim_without({}), model.empty() ? std::nullopt : std::optional(model.front()));
    if (i % 500 == 0) {
      ASSERT_EQ(order(), Ids(model.begin(), model.end()));
    }
  }
  EXPECT_EQ(order(), Ids(model.begin(), model.end()));
}

TEST(MakeEvictionPolicy, NamesOfLruInAnyCase) {
  for (const char* name : {"lru", "LRU", "Lru"}) {
    const auto made = make_eviction_policy(name);
    ASSERT_TRUE(made.ok()) << name;
    EXPECT_EQ((*made)->name(), "LRU");
  }
}

TEST(MakeEvictionPolicy, OthersAreNamedWithWhatExists) {
  for (const std::string name : {"LFU", "FIFO", "S3-FIFO", "s3fifo", "MRU"}) {
    const auto made = make_eviction_policy(name);
    ASSERT_FALSE(made.ok());
    EXPECT_EQ(made.status().code(), Code::kInvalidArgument);
    EXPECT_EQ(made.status().message(), "cache_policy is \"" + name + "\", which is not yet available; available: \"LRU\"");
  }
  for (const std::string name : {"", "LRUU", "clock"}) {
    const auto made = make_eviction_policy(name);
    ASSERT_FALSE(made.ok());
    EXPECT_EQ(made.status().message(), "cache_policy is \"" + name + "\", which is not known; available: \"LRU\"");
  }
}

}  // namespace
}  // namespace lmcn
