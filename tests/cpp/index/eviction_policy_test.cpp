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

TEST_F(LruTest, PostponeMovesToTheHotEnd) {
  insert({1, 2, 3});
  policy_->postpone(1);
  EXPECT_EQ(order(), (Ids{2, 3, 1}));
}

/// The policy called `name`, as its header describes it, over plain containers.
class Model {
 public:
  explicit Model(std::string name) : name_(std::move(name)) {}

  bool has(EntryId id) const { return find(id) != entries_.end(); }
  std::size_t size() const { return entries_.size(); }
  void insert(EntryId id) { entries_.push_back({id, 1}); }
  void access(EntryId id) {
    if (name_ == "FIFO") return;
    Entry entry = take(id);
    entry.count = std::min(entry.count + 1, 63);
    entries_.push_back(entry);
  }
  void remove(EntryId id) {
    take(id);
    if (name_ != "LFU" || entries_.empty()) return;
    const int lowest = std::ranges::min(entries_, {}, &Entry::count).count;
    for (Entry& entry : entries_) entry.count -= lowest;
  }
  void postpone(EntryId id) {
    const int highest = std::ranges::max(entries_, {}, &Entry::count).count;
    Entry entry = take(id);
    entry.count = highest;
    entries_.insert(name_ == "MRU" ? entries_.begin() : entries_.end(), entry);
  }
  Ids order() const {
    std::vector<Entry> sorted = entries_;
    if (name_ == "MRU") std::ranges::reverse(sorted);
    if (name_ == "LFU") std::ranges::stable_sort(sorted, {}, &Entry::count);
    Ids ids;
    for (const Entry& entry : sorted) ids.push_back(entry.id);
    return ids;
  }

 private:
  struct Entry {
    EntryId id;
    int count;
  };
  std::vector<Entry>::const_iterator find(EntryId id) const { return std::ranges::find(entries_, id, &Entry::id); }
  Entry take(EntryId id) {
    const auto at = find(id);
    const Entry entry = *at;
    entries_.erase(at);
    return entry;
  }

  const std::string name_;
  std::vector<Entry> entries_;  // in the order of insertions, hits (not of FIFO) and postponements
};

class EveryPolicy : public ::testing::TestWithParam<std::string> {
 protected:
  Ids order() {
    Ids ids;
    policy_->victim(
        [&](EntryId id) {
          ids.push_back(id);
          return false;
        },
        kNoLimit);
    return ids;
  }
  std::unique_ptr<EvictionPolicy> policy_ = std::move(make_eviction_policy(GetParam())).value();
};

// `hits`: hits for each insertion or removal. Ids are dense and sparse; few of them are hit often, so that counts saturate.
TEST_P(EveryPolicy, MatchesItsModelUnderRandomUse) {
  for (const unsigned hits : {1u, 40u}) {
    policy_ = std::move(make_eviction_policy(GetParam())).value();
    Model model(GetParam());
    std::mt19937_64 random(hits);
    for (int i = 0; i < 20'000; ++i) {
      const std::uint64_t kind = random() % (hits + 1);
      auto id = static_cast<EntryId>(random() % 200 * 7);
      if (kind != 0 && random() % 2 == 0) id = static_cast<EntryId>(random() % 5 * 7);
      if (!model.has(id)) {
        policy_->insert(id);
        model.insert(id);
      } else if (kind != 0) {
        policy_->access(id);
        model.access(id);
      } else if (random() % 3 == 0) {
        policy_->postpone(id);
        model.postpone(id);
      } else {
        if (random() % 2 == 0) id = model.order().front();  // as an eviction does
        policy_->remove(id);
        model.remove(id);
      }
      ASSERT_EQ(policy_->size(), model.size());
      if (i % 20 == 0) {
        ASSERT_EQ(order(), model.order()) << GetParam() << " after " << i;
      }
    }
    EXPECT_EQ(order(), model.order());
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

INSTANTIATE_TEST_SUITE_P(All, EveryPolicy, testing::Values("LRU", "LFU", "FIFO", "MRU"),
                         [](const auto& tested) { return tested.param; });

TEST(Fifo, HitsDoNotMatter) {
  const auto policy = std::move(make_eviction_policy("FIFO")).value();
  for (const EntryId id : {1, 2, 3}) policy->insert(id);
  policy->access(1);
  EXPECT_EQ(policy->victim([](EntryId) { return true; }, 1), 1u);
}

TEST(Mru, TheLastHitGoesFirst) {
  const auto policy = std::move(make_eviction_policy("MRU")).value();
  for (const EntryId id : {1, 2, 3}) policy->insert(id);
  EXPECT_EQ(policy->victim([](EntryId) { return true; }, 1), 3u);
  policy->access(1);
  EXPECT_EQ(policy->victim([](EntryId) { return true; }, 1), 1u);
}

class Lfu : public ::testing::Test {
 protected:
  EntryId evict() {
    const EntryId id = policy_->victim([](EntryId) { return true; }, 1).value();
    policy_->remove(id);
    return id;
  }
  void hit(EntryId id, int times) {
    for (int i = 0; i < times; ++i) policy_->access(id);
  }
  std::unique_ptr<EvictionPolicy> policy_ = std::move(make_eviction_policy("LFU")).value();
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
    policy_ = std::move(make_eviction_policy("LFU")).value();
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
  for (const auto& [given, name] : {std::pair{"lru", "LRU"}, std::pair{"LRU", "LRU"}, std::pair{"Lru", "LRU"},
                                    std::pair{"lfu", "LFU"}, std::pair{"Fifo", "FIFO"}, std::pair{"MRU", "MRU"}}) {
    const auto made = make_eviction_policy(given);
    ASSERT_TRUE(made.ok()) << given;
    EXPECT_EQ((*made)->name(), name);
  }
}

TEST(MakeEvictionPolicy, AnUnknownNameIsAnErrorThatListsTheNames) {
  for (const std::string name : {"", "LRUU", "clock", "S3-FIFO"}) {
    const auto made = make_eviction_policy(name);
    ASSERT_FALSE(made.ok());
    EXPECT_EQ(made.status().code(), Code::kInvalidArgument);
    EXPECT_EQ(made.status().message(),
              "cache_policy is \"" + name + "\", which is not known; available: \"LRU\", \"LFU\", \"FIFO\", \"MRU\"");
  }
}

}  // namespace
}  // namespace lmcn
