#include "index/s3fifo_policy.hpp"

#include <gtest/gtest.h>

#include <deque>
#include <map>
#include <optional>
#include <random>
#include <unordered_map>

#include "index/policy_support.hpp"

namespace lmcn {
namespace {

/// A cache of `capacity` entries: ids are given again, keys are what is asked for.
class Cache {
 public:
  explicit Cache(std::size_t capacity) : capacity_(capacity) {
    for (std::size_t i = capacity; i > 0; --i) free_.push_back(static_cast<EntryId>(i - 1));
  }
  bool holds(std::uint32_t key) const { return ids_.contains(key); }
  /// The key that went to make room, if any.
  std::optional<std::uint32_t> ask(std::uint32_t key) {
    if (const auto at = ids_.find(key); at != ids_.end()) {
      policy->access(at->second);
      return std::nullopt;
    }
    std::optional<std::uint32_t> gone;
    if (free_.empty()) {
      const EntryId id = evict(*policy);
      gone = keys_.at(id);
      ids_.erase(*gone);
      free_.push_back(id);
    }
    const EntryId id = free_.back();
    free_.pop_back();
    keys_[id] = key;
    ids_[key] = id;
    policy->insert(id);
    return gone;
  }
  void ask_all(std::initializer_list<std::uint32_t> keys) {
    for (const std::uint32_t key : keys) ask(key);
  }
  void drop(std::uint32_t key) {
    policy->remove(ids_.at(key));
    free_.push_back(ids_.at(key));
    ids_.erase(key);
  }
  EntryId id_of(std::uint32_t key) const { return ids_.at(key); }

  std::unique_ptr<EvictionPolicy> policy =
      make_policy("S3FIFO", [this](EntryId id) { return static_cast<std::uint32_t>(keys_.at(id) * 2654435761u); });

 private:
  const std::size_t capacity_;
  std::vector<EntryId> free_;
  std::unordered_map<EntryId, std::uint32_t> keys_;
  std::unordered_map<std::uint32_t, EntryId> ids_;
};

/// The paper's algorithm, with counted queues of keys. The small queue takes a tenth, the ghost has 16 places: what a cache of 17
/// has, in one bucket.
class Paper {
 public:
  static constexpr std::size_t kCapacity = 17, kGhost = 16;

  std::optional<std::uint32_t> ask(std::uint32_t key) {
    if (const auto at = frequency_.find(key); at != frequency_.end()) {
      at->second = std::min(at->second + 1, 3);
      return std::nullopt;
    }
    std::optional<std::uint32_t> gone;
    while (small_.size() + main_.size() >= kCapacity) gone = evict_one();
    const auto ghost = std::find(ghost_.begin(), ghost_.end(), key);
    if (ghost != ghost_.end()) {
      ghost_.erase(ghost);
      main_.push_back(key);
    } else {
      small_.push_back(key);
    }
    frequency_[key] = 0;
    return gone;
  }

 private:
  std::uint32_t evict_one() {
    for (;;) {
      const bool from_small = small_.size() * 10 >= kCapacity || main_.empty();
      std::deque<std::uint32_t>& queue = from_small ? small_ : main_;
      const std::uint32_t key = queue.front();
      int& frequency = frequency_.at(key);
      queue.pop_front();
      if (from_small && frequency > 1) {
        frequency = 0;
        main_.push_back(key);
      } else if (!from_small && frequency > 0) {
        --frequency;
        main_.push_back(key);
      } else {
        if (from_small) ghost_.push_back(key);
        if (ghost_.size() > kGhost) ghost_.pop_front();
        frequency_.erase(key);
        return key;
      }
    }
  }

  std::deque<std::uint32_t> small_, main_, ghost_;
  std::map<std::uint32_t, int> frequency_;
};

TEST(S3Fifo, EvictsWhatThePapersAlgorithmEvicts) {
  for (const unsigned keys : {20u, 30u, 60u, 200u}) {
    Cache cache(Paper::kCapacity);
    Paper paper;
    std::mt19937_64 random(keys);
    for (int i = 0; i < 20'000; ++i) {
      // Half of the requests go to the first few keys, and now and then a scan comes by.
      auto key = static_cast<std::uint32_t>(random() % (random() % 2 == 0 ? 12 : keys));
      if (i % 500 < 30) key = static_cast<std::uint32_t>(10'000 + i);
      ASSERT_EQ(cache.ask(key), paper.ask(key)) << "request " << i << " of " << keys << " keys";
    }
  }
}

TEST(S3Fifo, AScanPassesThroughTheSmallQueueOnly) {
  Cache cache(100);
  for (std::uint32_t key = 0; key < 100; ++key) cache.ask(key);
  for (std::uint32_t key = 0; key < 100; ++key) cache.ask_all({key, key});
  for (std::uint32_t key = 1000; key < 1010; ++key) cache.ask(key);  // makes the hot ones pass into the main queue
  for (std::uint32_t key = 2000; key < 12'000; ++key) cache.ask(key);
  int left = 0;
  for (std::uint32_t key = 0; key < 100; ++key) left += cache.holds(key) ? 1 : 0;
  EXPECT_EQ(left, 90);
}

TEST(S3Fifo, WhatComesBackSoonGoesToTheMainQueue) {
  Cache cache(20);
  for (std::uint32_t key = 0; key < 21; ++key) cache.ask(key);
  ASSERT_FALSE(cache.holds(0));
  cache.ask(0);
  for (std::uint32_t key = 100; key < 200; ++key) cache.ask(key);
  EXPECT_TRUE(cache.holds(0));
  EXPECT_FALSE(cache.holds(1));
}

TEST(S3Fifo, WhatComesBackLateStartsAnew) {
  Cache cache(20);
  for (std::uint32_t key = 0; key < 100; ++key) cache.ask(key);  // 18 places are for those after it
  cache.ask(0);
  for (std::uint32_t key = 200; key < 300; ++key) cache.ask(key);
  EXPECT_FALSE(cache.holds(0));
}

TEST(S3Fifo, WhatWasDroppedIsNotRemembered) {
  Cache cache(20);
  for (std::uint32_t key = 0; key < 20; ++key) cache.ask(key);
  cache.policy->victim([](EntryId) { return true; }, 1);  // says 0
  cache.drop(1);
  cache.ask_all({20, 1});
  for (std::uint32_t key = 100; key < 200; ++key) cache.ask(key);
  EXPECT_FALSE(cache.holds(1));
}

// An id alone says nothing: another key in its place is new.
TEST(S3Fifo, RemembersKeysNotIds) {
  std::uint32_t key = 1;
  const auto policy = make_policy("S3FIFO", [&](EntryId) { return key << 20; });
  const auto stays = [&](std::uint32_t second) {
    key = 1;
    for (EntryId id = 0; id < 20; ++id) policy->insert(id);
    const EntryId id = evict(*policy);
    key = second;
    policy->insert(id);
    const bool last = order_of(*policy).back() == id;  // the main queue has its turn after the small one
    while (policy->size() > 0) policy->remove(order_of(*policy).front());
    return last && second == 1;
  };
  EXPECT_TRUE(stays(1));
  EXPECT_FALSE(stays(2));
}

TEST(S3Fifo, AVictimInUseDoesNotCostAHotEntryBehindIt) {
  const auto policy = make_policy("S3FIFO");
  for (EntryId id = 0; id < 10; ++id) policy->insert(id);
  for (const EntryId id : {1u, 2u, 3u}) {
    policy->access(id);
    policy->access(id);
  }
  EXPECT_EQ(policy->victim([](EntryId id) { return id != 0; }, 4), 4u);
  EXPECT_EQ(order_of(*policy), (Ids{0, 4, 5, 6, 7, 8, 9, 1, 2, 3}));
}

TEST(S3Fifo, OneCallMovesABoundedNumber) {
  const auto policy = make_policy("S3FIFO");
  constexpr EntryId kEntries = 100'000;
  for (EntryId id = 0; id < kEntries; ++id) policy->insert(id);
  for (int hit = 0; hit < 3; ++hit) {
    for (EntryId id = 0; id < kEntries; ++id) policy->access(id);
  }
  int looked = 0;
  EXPECT_EQ(policy->victim(
                [&](EntryId) {
                  ++looked;
                  return false;
                },
                10),
            std::nullopt);
  EXPECT_EQ(looked, 10);
  // 1024 of 100000 moved, 1024 passed over: the next ones have their turn.
  EXPECT_EQ(policy->victim([](EntryId) { return true; }, 1), 3 * 1024u);
}

TEST(GhostKeys, HoldsAsManyAsWantedTheLastOnes) {
  GhostKeys ghost;
  std::mt19937 random(1);
  std::vector<std::uint32_t> keys(20'000);
  for (std::uint32_t& key : keys) key = static_cast<std::uint32_t>(random());
  for (const std::uint32_t key : keys) ghost.add(key, 8000);
  EXPECT_EQ(ghost.places(), 8000u);
  EXPECT_EQ(ghost.memory_bytes(), 8000u * 4);
  const auto known = [&](std::size_t begin, std::size_t end) {
    int count = 0;
    for (std::size_t i = begin; i < end; ++i) count += ghost.take(keys[i]) ? 1 : 0;
    return count;
  };
  EXPECT_EQ(known(0, 2000), 0);
  EXPECT_EQ(known(19'000, 20'000), 1000);
  EXPECT_EQ(known(19'000, 20'000), 0) << "a key that was taken is still there";
  EXPECT_GT(known(2000, 19'000), 6000);
}

TEST(GhostKeys, GrowsWhenMoreAreWantedAndNotBefore) {
  GhostKeys ghost;
  EXPECT_FALSE(ghost.take(7));
  ghost.add(7, 0);
  EXPECT_FALSE(ghost.take(7));
  ghost.add(0, 160);
  ghost.add(8, 200);
  EXPECT_EQ(ghost.places(), 160u);
  EXPECT_TRUE(ghost.take(0));
  ghost.add(9, 201);
  EXPECT_EQ(ghost.places(), 208u);
  EXPECT_FALSE(ghost.take(8));
  EXPECT_TRUE(ghost.take(9));
}

}  // namespace
}  // namespace lmcn
