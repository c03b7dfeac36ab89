// One byte of one structure flipped, for every byte; the structure cut, at every length. What open() then says was written, is
// where it was written and reads as written; and nothing is lost but what only the damaged structure knew. open_and_check() looks
// at the first half of that, these tests at the second.
#include <gtest/gtest.h>

#include <algorithm>

#include "store_under_test.hpp"

namespace lmcn::fuzz {
namespace {

// Sanitizers make each open several times slower: then only every so many bytes, those of the fields all the same.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::size_t kStep = 61;
#else
constexpr std::size_t kStep = 1;
#endif
constexpr std::size_t kFieldBytes = 128;
constexpr std::size_t kGoesOnEach = 64;  // how often the store is also written to and opened once more

class EveryByte : public testing::Test {
 protected:
  const MadeStore& store_ = small_store();
  StoreFiles files_ = small_store().files;

  std::size_t region_bytes() const { return store_.region_pages * kPageBytes; }
  std::span<std::byte> page(std::uint32_t region, std::uint32_t number) {
    return std::span(files_.data).subspan(region * region_bytes() + number * kPageBytes, kPageBytes);
  }
  std::span<std::byte> footer(std::uint32_t region) { return page(region, store_.region_pages - 1); }

  /// Ids of all records that were written, of those in a region, or of all but those in it.
  template <class Which>
  std::vector<std::uint32_t> ids(Which&& which) const {
    std::vector<std::uint32_t> found;
    for (const MadeStore::Written& w : store_.written) {
      if (which(w.extent)) found.push_back(w.id);
    }
    return found;
  }
  std::vector<std::uint32_t> all() const {
    return ids([](Extent) { return true; });
  }
  std::vector<std::uint32_t> all_but(std::uint32_t region) const {
    return ids([=](Extent extent) { return extent.region != region; });
  }

  Outcome open(std::size_t at, bool payloads_as_written = true) {
    return open_and_check(store_, files_, {.payloads_as_written = payloads_as_written, .goes_on = at % kGoesOnEach == 0});
  }
  void expect_ids(const Outcome& outcome, const std::vector<std::uint32_t>& expected) const {
    std::vector<std::uint32_t> found;
    for (const nvme::RecoveredRecord& record : outcome.recovered) found.push_back(store_.ids.at(record.key));
    std::sort(found.begin(), found.end());
    EXPECT_EQ(found, expected);
  }

  /// Runs `check(at)` with each byte flipped.
  template <class Check>
  void flip_each(std::span<std::byte> bytes, Check&& check) {
    for (std::size_t at = 0; at < bytes.size() && !HasFailure(); at = next(at, bytes.size())) {
      SCOPED_TRACE("byte " + std::to_string(at) + " flipped");
      const std::byte before = bytes[at];
      bytes[at] ^= std::byte(1u << at % 8);
      check(at);
      bytes[at] = before;
    }
  }
  /// Runs `check(at)` with all bytes from `at` on zero, as a torn write leaves them, where that changes something.
  template <class Check>
  void tear_each(std::span<std::byte> bytes, Check&& check) {
    const Bytes whole(bytes.begin(), bytes.end());
    for (std::size_t at = 0; at < bytes.size() && !HasFailure(); at = next(at, bytes.size())) {
      SCOPED_TRACE("torn at byte " + std::to_string(at));
      std::fill(bytes.begin() + static_cast<std::ptrdiff_t>(at), bytes.end(), std::byte{0});
      if (!std::equal(whole.begin(), whole.end(), bytes.begin())) check(at);
      std::copy(whole.begin(), whole.end(), bytes.begin());
    }
  }
  /// Runs `check(length)` with the file at each length below its own.
  template <class Check>
  void cut_each(Bytes& file, Check&& check) {
    const Bytes whole = file;
    for (std::size_t length = 0; length < whole.size() && !HasFailure(); length = next(length, whole.size())) {
      SCOPED_TRACE("cut to " + std::to_string(length) + " bytes");
      file.assign(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(length));
      check(length);
    }
    file = whole;
  }

 private:
  // Fields are at the beginnings of structures, checksums and trailers at their ends.
  static std::size_t next(std::size_t at, std::size_t size) {
    return at < kFieldBytes || at + kFieldBytes >= size ? at + 1 : std::min(at + kStep, size - kFieldBytes);
  }
};

TEST_F(EveryByte, UndamagedAllIsFoundInEachWay) {
  const Outcome with = open(0);
  expect_ids(with, all());
  EXPECT_GT(with.from_checkpoint, 0u);
  EXPECT_LT(with.from_checkpoint, all().size());  // the rest from a footer and a walk
  files_.has_checkpoint = false;
  const Outcome without = open(0);
  expect_ids(without, all());
  EXPECT_EQ(without.from_checkpoint, 0u);
  EXPECT_FALSE(ids([](Extent extent) { return extent.region == 2; }).empty());
}

TEST_F(EveryByte, CheckpointFlipped) {
  flip_each(files_.checkpoint, [&](std::size_t at) {
    const Outcome outcome = open(at);
    expect_ids(outcome, all());
    EXPECT_EQ(outcome.from_checkpoint, 0u);
  });
}

TEST_F(EveryByte, CheckpointCut) {
  cut_each(files_.checkpoint, [&](std::size_t length) {
    const Outcome outcome = open(length);
    expect_ids(outcome, all());
    EXPECT_EQ(outcome.from_checkpoint, 0u);
  });
}

// The walk finds what the footer does not say.
TEST_F(EveryByte, FooterFlipped) {
  files_.has_checkpoint = false;
  for (const std::uint32_t region : {0u, 1u}) {
    flip_each(footer(region), [&](std::size_t at) { expect_ids(open(at), all()); });
  }
}

TEST_F(EveryByte, FooterFlippedBehindACheckpoint) {
  flip_each(footer(1), [&](std::size_t at) { expect_ids(open(at), all()); });
}

TEST_F(EveryByte, FooterTorn) {
  files_.has_checkpoint = false;
  tear_each(footer(0), [&](std::size_t at) { expect_ids(open(at), all()); });
}

// Its region has no content then, whatever checkpoint and footer say.
TEST_F(EveryByte, RegionHeaderFlipped) {
  for (std::uint32_t region = 0; region < 3; ++region) {
    files_.has_checkpoint = region % 2 == 0;
    flip_each(page(region, 0), [&](std::size_t at) { expect_ids(open(at), all_but(region)); });
  }
}

TEST_F(EveryByte, RegionHeaderTorn) {
  tear_each(page(1, 0), [&](std::size_t at) { expect_ids(open(at), all_but(1)); });
}

// The walk ends there; rank words mean nothing on disk.
TEST_F(EveryByte, SlotHeaderFlippedInTheOpenRegion) {
  files_.has_checkpoint = false;
  for (const MadeStore::Written& hit : store_.written) {
    if (hit.extent.region != 2) continue;
    const auto before_it = ids([&](Extent extent) { return extent.region != 2 || extent.page < hit.extent.page; });
    flip_each(page(2, hit.extent.page), [&](std::size_t at) {
      const bool covered = at < offsetof(SlotHeader, rank);
      expect_ids(open(at), covered ? before_it : all());
    });
  }
}

TEST_F(EveryByte, SlotHeaderTornInTheOpenRegion) {
  const MadeStore::Written& last = store_.written.back();
  ASSERT_EQ(last.extent.region, 2u);
  const auto before_it = ids([&](Extent extent) { return extent.region != 2 || extent.page < last.extent.page; });
  tear_each(page(2, last.extent.page).first(offsetof(SlotHeader, rank)), [&](std::size_t at) { expect_ids(open(at), before_it); });
}

// Whole and true, but of another region or life of it: what lies behind the header of a region that has just been made ready again
// looks like this.
TEST_F(EveryByte, WalkEndsAtARecordOfAnotherRegion) {
  files_.has_checkpoint = false;
  for (const MadeStore::Written& other : store_.written) {
    if (other.extent.region == 2) continue;
    const std::span<std::byte> from = page(other.extent.region, other.extent.page);
    std::copy(from.begin(), from.end(), page(2, 1).begin());
    expect_ids(open(0), all_but(2));
  }
}

TEST_F(EveryByte, SkipHeaderFlippedInTheOpenRegion) {
  // The record that failed is the second of its region.
  const Extent first = store_.written[store_.written.size() - 3].extent;
  ASSERT_EQ(first.page, 1u);
  const std::uint32_t skipped = first.page + first.pages;
  std::uint64_t magic = 0;
  std::memcpy(&magic, page(2, skipped).data(), sizeof magic);
  ASSERT_EQ(magic, nvme::kSkipMagic);
  const auto before_it = ids([&](Extent extent) { return extent.region != 2 || extent.page < skipped; });
  flip_each(page(2, skipped), [&](std::size_t at) { expect_ids(open(at), before_it); });
}

// Checkpoint and footer still name the record; it is a miss when it is read (open_and_check reads each).
TEST_F(EveryByte, SlotHeaderFlippedInASealedRegion) {
  const MadeStore::Written& hit = store_.written[1];
  ASSERT_EQ(hit.extent.region, 0u);
  flip_each(page(0, hit.extent.page), [&](std::size_t at) { expect_ids(open(at, false), all()); });
}

TEST_F(EveryByte, SuperblockFlipped) {
  flip_each(files_.superblock, [&](std::size_t) {
    const Outcome outcome = open_and_check(store_, files_, {.refusal_allowed = true});
    EXPECT_TRUE(outcome.refusal == Code::kCorruption || outcome.refusal == Code::kFormatVersion);
  });
}

TEST_F(EveryByte, SuperblockCut) {
  cut_each(files_.superblock,
           [&](std::size_t) { EXPECT_EQ(open_and_check(store_, files_, {.refusal_allowed = true}).refusal, Code::kCorruption); });
}

}  // namespace
}  // namespace lmcn::fuzz
