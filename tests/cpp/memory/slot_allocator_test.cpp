#include "memory/slot_allocator.hpp"

#include <gtest/gtest.h>

#include <chrono>
#include <cstdio>
#include <functional>
#include <map>
#include <random>
#include <unordered_set>
#include <vector>

namespace lmcn {
namespace {

constexpr std::uint64_t kMiB = 1ull << 20;

std::vector<Slot> fill(SlotAllocator& allocator, std::uint64_t bytes) {
  std::vector<Slot> slots;
  while (auto slot = allocator.allocate(bytes)) slots.push_back(*slot);
  return slots;
}

// What is live, by offset: knows nothing of slabs.
class Model {
 public:
  explicit Model(std::uint64_t arena_bytes) : arena_bytes_(arena_bytes) {}

  void add(const Slot& slot, std::uint64_t asked) {
    ASSERT_GE(slot.bytes, asked);
    ASSERT_EQ(slot.bytes % 4096, 0u);
    ASSERT_EQ(slot.offset % 4096, 0u);
    ASSERT_LE(slot.offset + slot.bytes, arena_bytes_);
    ASSERT_NE(slot.generation, 0u);
    ASSERT_TRUE(generations_.insert(slot.generation).second) << "generation handed out twice";
    const auto after = live_.lower_bound(slot.offset);
    ASSERT_TRUE(after == live_.end() || slot.offset + slot.bytes <= after->first) << "overlaps the next slot";
    if (after != live_.begin()) {
      const auto before = std::prev(after);
      ASSERT_LE(before->first + before->second.bytes, slot.offset) << "overlaps the slot before";
    }
    live_.emplace(slot.offset, slot);
    offsets_.push_back(slot.offset);
    bytes_ += slot.bytes;
  }
  Slot take(std::uint64_t choice) {
    std::swap(offsets_[choice % offsets_.size()], offsets_.back());
    const auto it = live_.find(offsets_.back());
    offsets_.pop_back();
    const Slot slot = it->second;
    live_.erase(it);
    bytes_ -= slot.bytes;
    return slot;
  }
  bool empty() const { return live_.empty(); }
  std::uint64_t slots() const { return live_.size(); }
  std::uint64_t bytes() const { return bytes_; }

 private:
  std::uint64_t arena_bytes_;
  std::uint64_t bytes_ = 0;
  std::map<std::uint64_t, Slot> live_;
  std::vector<std::uint64_t> offsets_;  // of live_, in any order
  std::unordered_set<std::uint32_t> generations_;
};

struct Mix {
  const char* name;
  std::uint64_t arena_bytes;
  std::function<std::uint64_t(std::mt19937_64&)> size;
};

class AllocatorAgainstModel : public ::testing::TestWithParam<int> {};

Mix mix(int which) {
  switch (which) {
    case 0:
      return {"one size", 64 * kMiB, [](auto&) { return 6 * kMiB / 8 + 4096; }};
    case 1:
      return {"three sizes", 100 * kMiB + 4096, [](auto& r) { return std::vector<std::uint64_t>{8192, 69632, 3 * kMiB}[r() % 3]; }};
    case 2:
      return {"any size", 16 * kMiB, [](auto& r) { return 1 + r() % (1ull << (r() % 22)); }};
    case 3:
      return {"sizes that change over time", 64 * kMiB, [n = std::uint64_t{0}](auto& r) mutable {
                const std::uint64_t phase = ++n / 4000;
                return (1 + phase * 7 % 13) * 40960 + r() % 2 * 4096;
              }};
    default:
      return {"an arena of one page", 4096, [](auto& r) { return 1 + r() % 5000; }};
  }
}

TEST_P(AllocatorAgainstModel, NeverOverlapsAndFreesAll) {
  Mix m = mix(GetParam());
  SCOPED_TRACE(m.name);
  std::mt19937_64 random(static_cast<std::uint64_t>(GetParam()) + 1);
  SlotAllocator allocator(m.arena_bytes);
  Model model(m.arena_bytes);
  std::uint64_t refused = 0;
  for (int step = 0; step < 60'000; ++step) {
    // Swings between filling and draining, so that slabs are made and end.
    const bool filling = step / 3000 % 2 == 0 ? random() % 100 < 65 : random() % 100 < 35;
    if (filling || model.empty()) {
      const std::uint64_t bytes = m.size(random);
      const std::uint64_t class_bytes = allocator.class_bytes(bytes);
      if (const auto slot = allocator.allocate(bytes)) {
        ASSERT_EQ(slot->bytes, class_bytes);
        ASSERT_LE(slot->bytes, (bytes + 4095) / 4096 * 4096 * 9 / 8 + 4095) << "rounded by more than 1/8";
        ASSERT_NO_FATAL_FAILURE(model.add(*slot, bytes));
      } else {
        ++refused;
      }
    } else {
      allocator.release(model.take(random()));
    }
    const auto stats = allocator.stats();
    ASSERT_EQ(stats.used_slots, model.slots());
    ASSERT_EQ(stats.used_bytes, model.bytes());
    ASSERT_LE(stats.used_bytes, stats.slab_bytes);
    ASSERT_LE(stats.slab_bytes, stats.arena_bytes);
  }
  EXPECT_GT(refused, 0u) << "the mix never filled the arena";
  while (!model.empty()) allocator.release(model.take(random()));
  const auto stats = allocator.stats();
  EXPECT_EQ(stats.used_bytes, 0u);
  EXPECT_EQ(stats.slab_bytes, 0u);
  EXPECT_EQ(stats.bad_releases, 0u);
  const auto whole = allocator.allocate(m.arena_bytes);
  ASSERT_TRUE(whole) << "all freed, yet not in one piece";
  EXPECT_EQ(whole->offset, 0u);
  EXPECT_EQ(whole->bytes, m.arena_bytes);
}

INSTANTIATE_TEST_SUITE_P(Mixes, AllocatorAgainstModel, ::testing::Range(0, 5));

TEST(SlotAllocator, OneSizeLosesLessThanTwoPercent) {
  for (const std::uint64_t slot : std::vector<std::uint64_t>{65536, 69632, 200'000, kMiB, 2 * kMiB, 2 * kMiB + 4096, 3 * kMiB,
                                                             6 * kMiB, 6 * kMiB + 4096, 16 * kMiB - 4096}) {
    const std::uint64_t image = (slot + 4095) / 4096 * 4096;
    for (const std::uint64_t arena : std::vector<std::uint64_t>{64 * image, 64 * image + image - 4096, 1024 * kMiB}) {
      SlotAllocator allocator(arena);
      const std::uint64_t used = fill(allocator, slot).size() * image;
      EXPECT_GE(static_cast<double>(used), 0.98 * static_cast<double>(arena)) << "slot " << slot << " arena " << arena;
      EXPECT_EQ(used, allocator.stats().used_bytes);
    }
  }
}

TEST(SlotAllocator, MemoryGoesFromOneClassToAnotherAndGenerationsStayUnique) {
  SlotAllocator allocator(64 * kMiB);
  std::unordered_set<std::uint32_t> seen;
  for (const std::uint64_t bytes : std::vector<std::uint64_t>{65536 + 4096, 6 * kMiB, 8192, 64 * kMiB, 100'000}) {
    const auto slots = fill(allocator, bytes);
    ASSERT_FALSE(slots.empty()) << bytes;
    for (const Slot& slot : slots) EXPECT_TRUE(seen.insert(slot.generation).second);
    for (const Slot& slot : slots) allocator.release(slot);
    EXPECT_EQ(allocator.stats().slab_bytes, 0u);
  }
}

TEST(SlotAllocator, SeventeenthSizeIsRounded) {
  SlotAllocator allocator(1024 * kMiB);
  std::vector<Slot> slots;
  for (std::uint64_t i = 0; i < 16; ++i) {
    slots.push_back(*allocator.allocate((100 + i) * 4096));
    EXPECT_EQ(slots.back().bytes, (100 + i) * 4096);
  }
  const auto rounded = allocator.allocate(201 * 4096);
  ASSERT_TRUE(rounded);
  EXPECT_EQ(rounded->bytes, 208u * 4096);
  EXPECT_EQ(allocator.class_bytes(202 * 4096), 208u * 4096) << "shares the class";
  allocator.release(slots[3]);
  EXPECT_EQ(allocator.class_bytes(301 * 4096), 301u * 4096) << "the place of a size that is no longer used";
}

TEST(SlotAllocator, RefusesWhatCannotBe) {
  SlotAllocator allocator(8 * kMiB);
  EXPECT_FALSE(allocator.allocate(0));
  EXPECT_FALSE(allocator.allocate(8 * kMiB + 1));
  EXPECT_FALSE(allocator.allocate(~0));
  SlotAllocator none(0);
  EXPECT_FALSE(none.allocate(1));
  SlotAllocator less_than_a_page(4095);
  EXPECT_FALSE(less_than_a_page.allocate(1));
}

TEST(SlotAllocator, BadReleasesAreCountedAndHarmless) {
  SlotAllocator allocator(8 * kMiB);
  const Slot slot = *allocator.allocate(65536);
  const Slot other = *allocator.allocate(65536);
  std::vector<Slot> bad(8, slot);
  bad[0].generation ^= 1u << 20;
  bad[1].generation = 0;
  bad[2].offset += 4096;
  bad[3].bytes += 4096;
  bad[4].offset = 8 * kMiB;
  bad[5].offset = ~0 - 4095;
  bad[6].offset = 7 * kMiB;  // in the pool
  bad[7].offset = other.offset;
#ifdef NDEBUG
  for (const Slot& b : bad) allocator.release(b);
  EXPECT_EQ(allocator.stats().bad_releases, bad.size());
  EXPECT_EQ(allocator.stats().used_slots, 2u);
  allocator.release(slot);
  allocator.release(slot);
  EXPECT_EQ(allocator.stats().bad_releases, bad.size() + 1) << "released twice";
#else
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  for (const Slot& b : bad) EXPECT_DEATH(allocator.release(b), "not a slot that is handed out");
  allocator.release(slot);
  EXPECT_DEATH(allocator.release(slot), "not a slot that is handed out");
#endif
}

TEST(SlotAllocator, PrintsTimePerOperation) {
  for (const std::uint64_t bytes : std::vector<std::uint64_t>{65536 + 4096, 2 * kMiB + 4096, 6 * kMiB + 4096}) {
    SlotAllocator allocator(64ull << 30);
    std::vector<Slot> slots = fill(allocator, bytes);
    std::mt19937_64 random(1);
    const int rounds = 200'000;
    std::vector<std::size_t> choices(rounds);
    for (auto& c : choices) c = random() % slots.size();
    const auto start = std::chrono::steady_clock::now();
    for (const std::size_t c : choices) {
      allocator.release(slots[c]);
      slots[c] = *allocator.allocate(bytes);
    }
    const double ns = std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count() / (2.0 * rounds);
    std::printf("[ figure   ] %zu slots of %llu bytes in 64 GiB: %.0f ns an allocate or release\n", slots.size(),
                static_cast<unsigned long long>(bytes), ns);
  }
}

}  // namespace
}  // namespace lmcn
