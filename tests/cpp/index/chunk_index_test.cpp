#include "index/chunk_index.hpp"

#include <gtest/gtest.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <unordered_set>
#include <vector>

#include "index/eviction_policy.hpp"

namespace lmcn {
namespace {

/// `prefix` fills the 8 bytes that the table hashes, `rest` makes the key another one.
ChunkKey make_key(std::uint64_t prefix, std::uint64_t rest) {
  ChunkKey key;
  std::memcpy(key.bytes.data(), &prefix, sizeof prefix);
  std::memcpy(key.bytes.data() + 24, &rest, sizeof rest);
  return key;
}

ChunkKey uniform_key(std::uint64_t number) {
  std::uint64_t mixed = (number + 1) * 0x9E37'79B9'7F4A'7C15;  // splitmix64
  mixed = (mixed ^ (mixed >> 30)) * 0xBF58'476D'1CE4'E5B9;
  mixed = (mixed ^ (mixed >> 27)) * 0x94D0'49BB'1331'11EB;
  return make_key(mixed ^ (mixed >> 31), number);
}

struct KeyLess {
  bool operator()(const ChunkKey& a, const ChunkKey& b) const { return a.bytes < b.bytes; }
};

/// A ChunkIndex beside the std::map that says what it should hold.
class Checked {
 public:
  void insert(const ChunkKey& key) {
    const auto known = model_.find(key);
    const EntryId id = index_.insert(key);
    ASSERT_TRUE(index_.live(id));
    if (known != model_.end()) {
      EXPECT_EQ(id, known->second.id);
      return;
    }
    ASSERT_TRUE(live_ids_.insert(id).second) << "id " << id << " was live already";
    Entry& entry = index_.entry(id);
    EXPECT_EQ(entry.key, key);
    EXPECT_EQ(entry.host, HostState::kNone);
    EXPECT_FALSE(entry.extent.valid());
    EXPECT_EQ(entry.host_slot, 0xFFFFFFFFu);
    EXPECT_EQ(entry.hits, 0);
    EXPECT_EQ(entry.flags, 0);
    entry.extent = Extent{next_value_, next_value_, 1};
    entry.host_slot = next_value_;
    entry.hits = 7;
    model_[key] = Known{id, &entry, next_value_++};
  }

  void erase(const ChunkKey& key) {
    const auto known = model_.find(key);
    ASSERT_NE(known, model_.end());
    const EntryId id = index_.find(key);
    ASSERT_EQ(id, known->second.id);
    index_.erase(id);
    EXPECT_FALSE(index_.live(id));
    EXPECT_EQ(index_.find(key), kNoEntry);
    live_ids_.erase(id);
    model_.erase(known);
  }

  void check_one(const ChunkKey& key) const {
    const auto known = model_.find(key);
    index_.prefetch(key);
    const EntryId id = index_.find(key);
    if (known == model_.end()) {
      EXPECT_EQ(id, kNoEntry);
      return;
    }
    ASSERT_EQ(id, known->second.id);
    EXPECT_EQ(&index_.entry(id), known->second.address);
    EXPECT_EQ(index_.entry(id).extent.page, known->second.value);
  }

  void check_all() {
    EXPECT_EQ(index_.size(), model_.size());
    for (const auto& [key, known] : model_) check_one(key);
    std::set<ChunkKey, KeyLess> seen;
    index_.for_each([&](EntryId id, Entry& entry) {
      EXPECT_TRUE(seen.insert(entry.key).second);
      const auto known = model_.find(entry.key);
      ASSERT_NE(known, model_.end());
      EXPECT_EQ(id, known->second.id);
    });
    EXPECT_EQ(seen.size(), model_.size());
  }

  void clear() {
    index_.clear();
    model_.clear();
    live_ids_.clear();
  }

  bool holds(const ChunkKey& key) const { return model_.count(key) > 0; }
  std::size_t size() const { return model_.size(); }
  ChunkIndex& index() { return index_; }

 private:
  struct Known {
    EntryId id;
    Entry* address;
    std::uint32_t value;
  };
  ChunkIndex index_;
  std::map<ChunkKey, Known, KeyLess> model_;
  std::unordered_set<EntryId> live_ids_;
  std::uint32_t next_value_ = 1;
};

/// Random inserts, erases and finds among `keys`.
void random_walk(const std::vector<ChunkKey>& keys, std::uint32_t operations, std::uint32_t seed) {
  Checked checked;
  std::mt19937_64 random(seed);
  std::uint64_t insert_percent = 70;
  for (std::uint32_t i = 0; i < operations; ++i) {
    if (i % 2048 == 0) {
      insert_percent = 20 + random() % 75;  // grows for a while, shrinks for a while
      ASSERT_NO_FATAL_FAILURE(checked.check_all()) << "operation " << i;
    }
    const ChunkKey& key = keys[random() % keys.size()];
    if (random() % 100 < insert_percent) {
      ASSERT_NO_FATAL_FAILURE(checked.insert(key)) << "operation " << i;
    } else if (checked.holds(key)) {
      ASSERT_NO_FATAL_FAILURE(checked.erase(key)) << "operation " << i;
    } else {
      ASSERT_NO_FATAL_FAILURE(checked.check_one(key)) << "operation " << i;
    }
  }
  checked.check_all();
}

std::vector<ChunkKey> keys_with(std::uint32_t count, std::uint64_t (*prefix)(std::uint64_t)) {
  std::vector<ChunkKey> keys;
  for (std::uint64_t i = 0; i < count; ++i) keys.push_back(make_key(prefix(i), i));
  return keys;
}

TEST(ChunkIndex, UniformKeys) {
  std::vector<ChunkKey> keys;
  for (std::uint64_t i = 0; i < 6000; ++i) keys.push_back(uniform_key(i));
  random_walk(keys, 60'000, 1);
}

TEST(ChunkIndex, KeysOfOnePrefix) {
  random_walk(keys_with(700, [](std::uint64_t) -> std::uint64_t { return 0x0123'4567'89AB'CDEF; }), 12'000, 2);
}

// The end of the table, from where clusters wrap to its beginning.
TEST(ChunkIndex, KeysAtTheEndOfTheTable) {
  random_walk(keys_with(1200, [](std::uint64_t i) { return ~std::uint64_t{0} - (i % 3) * (std::uint64_t{1} << 40); }), 20'000, 3);
}

TEST(ChunkIndex, FewPrefixesNextToEachOther) {
  random_walk(keys_with(3000, [](std::uint64_t i) { return (i % 60) << 54; }), 30'000, 4);
}

TEST(ChunkIndex, PrefixesThatDifferInTheUnusedHalfOnly) {
  random_walk(keys_with(500, [](std::uint64_t i) { return i; }), 10'000, 5);
}

// At every size around the points where the table grows, all keys are found, whichever table they are in.
TEST(ChunkIndex, EveryKeyIsFoundAtEverySizeWhileGrowing) {
  ChunkIndex index;
  std::vector<ChunkKey> keys;
  std::vector<EntryId> ids;
  for (std::uint64_t i = 0; i < 2000; ++i) {
    keys.push_back(uniform_key(i));
    ids.push_back(index.insert(keys.back()));
    for (std::size_t j = 0; j < keys.size(); ++j) ASSERT_EQ(index.find(keys[j]), ids[j]) << j << " of " << i;
    ASSERT_EQ(index.find(uniform_key(i + 1'000'000)), kNoEntry);
  }
}

TEST(ChunkIndex, ErasingWhileGrowingFindsBothTables) {
  for (std::uint64_t stop = 445; stop < 520; ++stop) {  // the first table of 512 slots is full at 448
    ChunkIndex index;
    for (std::uint64_t i = 0; i < stop; ++i) index.insert(uniform_key(i));
    for (std::uint64_t i = 0; i < stop; i += 2) index.erase(index.find(uniform_key(i)));
    for (std::uint64_t i = 0; i < stop; ++i) ASSERT_EQ(index.find(uniform_key(i)) != kNoEntry, i % 2 == 1) << i << " of " << stop;
  }
}

// The table of 32768 slots is full at 28672; while it is emptied its pages are given back piece by piece.
TEST(ChunkIndex, KeysAreFoundWhileALargeTableIsGivenBack) {
  ChunkIndex index;
  std::vector<EntryId> ids;
  for (std::uint64_t i = 0; i < 31'000; ++i) {
    ids.push_back(index.insert(uniform_key(i)));
    if (i % 5 == 4) {
      index.erase(ids[i - 3]);
      ids[i - 3] = index.insert(uniform_key(i - 3));
    }
    if (i < 28'600 || i % 50 != 0) continue;
    for (std::size_t j = 0; j < ids.size(); ++j) ASSERT_EQ(index.find(uniform_key(j)), ids[j]) << j << " of " << i;
  }
}

TEST(ChunkIndex, InsertOfAPresentKeyChangesNothing) {
  ChunkIndex index;
  const EntryId id = index.insert(uniform_key(1));
  index.entry(id).host_slot = 5;
  EXPECT_EQ(index.insert(uniform_key(1)), id);
  EXPECT_EQ(index.entry(id).host_slot, 5u);
  EXPECT_EQ(index.size(), 1u);
}

TEST(ChunkIndex, FreedIdsAreUsedAgain) {
  ChunkIndex index;
  std::set<EntryId> ids;
  for (std::uint64_t i = 0; i < 1000; ++i) ids.insert(index.insert(uniform_key(i)));
  for (std::uint64_t i = 0; i < 1000; i += 3) index.erase(index.find(uniform_key(i)));
  for (std::uint64_t i = 0; i < 334; ++i) {
    const EntryId id = index.insert(uniform_key(5000 + i));
    EXPECT_TRUE(ids.count(id)) << "a new id although freed ones remain";
    EXPECT_EQ(index.entry(id).host_slot, 0xFFFFFFFFu);
  }
  EXPECT_EQ(index.size(), 1000u);
}

TEST(ChunkIndex, MemoryDoesNotGrowUnderChurn) {
  ChunkIndex index;
  for (std::uint64_t i = 0; i < 5000; ++i) index.insert(uniform_key(i));
  for (std::uint64_t i = 5000; i < 10'000; ++i) {
    index.erase(index.find(uniform_key(i - 5000)));
    index.insert(uniform_key(i));
  }
  const std::uint64_t settled_bytes = index.memory_bytes();
  for (std::uint64_t i = 10'000; i < 100'000; ++i) {
    index.erase(index.find(uniform_key(i - 5000)));
    index.insert(uniform_key(i));
  }
  EXPECT_EQ(index.memory_bytes(), settled_bytes);
  EXPECT_EQ(index.size(), 5000u);
}

TEST(ChunkIndex, LiveSaysNoToIdsNeverGiven) {
  ChunkIndex index;
  EXPECT_FALSE(index.live(0));
  EXPECT_FALSE(index.live(kNoEntry));
  const EntryId id = index.insert(uniform_key(1));
  EXPECT_TRUE(index.live(id));
  EXPECT_FALSE(index.live(id + 1));
}

TEST(ChunkIndex, ClearDropsAllAndStartsAnew) {
  Checked checked;
  for (std::uint64_t i = 0; i < 3000; ++i) checked.insert(uniform_key(i));
  const std::uint64_t full_bytes = checked.index().memory_bytes();
  checked.clear();
  EXPECT_EQ(checked.index().size(), 0u);
  EXPECT_LT(checked.index().memory_bytes(), full_bytes / 10);
  for (std::uint64_t i = 0; i < 3000; ++i) EXPECT_EQ(checked.index().find(uniform_key(i)), kNoEntry);
  for (std::uint64_t i = 0; i < 3000; ++i) checked.insert(uniform_key(i + 1500));
  checked.check_all();
}

TEST(ChunkIndex, ClearInTheMiddleOfGrowing) {
  Checked checked;
  for (std::uint64_t i = 0; i < 450; ++i) checked.insert(uniform_key(i));
  checked.clear();
  checked.check_all();
  for (std::uint64_t i = 0; i < 2000; ++i) checked.insert(uniform_key(i));
  checked.check_all();
}

TEST(ChunkIndex, ForEachMayEraseTheCurrentEntryAndOthers) {
  ChunkIndex index;
  for (std::uint64_t i = 0; i < 2000; ++i) index.entry(index.insert(uniform_key(i))).host_slot = static_cast<std::uint32_t>(i);
  std::set<std::uint32_t> seen;
  index.for_each([&](EntryId id, Entry& entry) {
    const std::uint32_t number = entry.host_slot;
    EXPECT_TRUE(seen.insert(number).second);
    if (number % 3 == 0) index.erase(id);
    if (number % 3 == 1) {  // the one that follows
      if (const EntryId other = index.find(uniform_key(number + 1)); other != kNoEntry) index.erase(other);
    }
  });
  for (std::uint64_t i = 0; i < 2000; ++i) EXPECT_EQ(index.find(uniform_key(i)) != kNoEntry, i % 3 == 1) << i;
  for (std::uint32_t i = 0; i < 2000; ++i) EXPECT_EQ(seen.count(i), i % 3 == 2 ? 0u : 1u) << i;
}

TEST(ChunkIndex, AtMost96BytesAnEntryWithTableAndAnyPolicyAtAnyLoad) {
  ChunkIndex index;
  std::vector<std::unique_ptr<EvictionPolicy>> policies;
  for (const char* name : {"LRU", "S3FIFO", "LFU", "FIFO", "MRU"}) {
    policies.push_back(std::move(make_eviction_policy(name, index)).value());
  }
  double worst = 0;
  std::string where;
  std::mt19937_64 random(1);
  for (std::uint64_t size = 1; size <= 300'000; ++size) {
    const EntryId id = index.insert(make_key(random(), size));
    for (const auto& policy : policies) {
      policy->insert(id);
      if (size % 8 == 0) {  // what policies remember of the evicted counts too
        const EntryId victim = policy->victim([](EntryId) { return true; }, 1).value();
        policy->remove(victim);
        policy->insert(victim);
      }
      const double bytes = static_cast<double>(index.memory_bytes() + policy->memory_bytes()) / static_cast<double>(size);
      if (size < 1000 || bytes <= worst) continue;
      worst = bytes;
      where = std::string(policy->name()) + " at " + std::to_string(size) + " entries";
    }
  }
  EXPECT_LE(worst, 96.0) << where;
  std::printf("[ figure   ] worst: %.2f bytes an entry, %s\n", worst, where.c_str());
}

}  // namespace
}  // namespace lmcn
