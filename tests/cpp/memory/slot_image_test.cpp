#include "memory/slot_image.hpp"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "memory/checksum.hpp"

namespace lmcn {
namespace {

ChunkKey key_of(std::uint8_t seed) {
  ChunkKey key;
  key.bytes.fill(seed);
  return key;
}
NamespaceId ns_of(std::uint8_t seed) {
  NamespaceId ns;
  ns.bytes.fill(seed);
  return ns;
}

// An image of random payload, sealed, in page-aligned memory that held 0xEE before.
class Image {
 public:
  explicit Image(std::uint64_t payload_bytes, std::uint32_t ranks = 1, std::uint32_t generation = 7)
      : payload_bytes_(payload_bytes) {
    memory_.reset(static_cast<std::byte*>(std::aligned_alloc(kPageBytes, static_cast<std::size_t>(bytes()))));
    std::memset(memory_.get(), 0xEE, static_cast<std::size_t>(bytes()));
    begin_slot(at(), key_of(1), ns_of(2), payload_bytes, ranks, generation);
    std::mt19937_64 random(payload_bytes);
    for (std::uint64_t i = 0; i < payload_bytes; ++i) payload()[i] = static_cast<std::byte>(random());
    seal_slot(at(), 3, 4);
  }
  std::byte* at() { return memory_.get(); }
  std::byte* payload() { return memory_.get() + kPageBytes; }
  std::uint64_t bytes() const { return image_bytes(payload_bytes_); }
  SlotHeader& header() { return *slot_header(at()); }
  Status verify() { return verify_slot(at(), bytes(), key_of(1), ns_of(2)); }
  void reseal() { seal_slot(at(), 3, 4); }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::uint64_t payload_bytes_;
  std::unique_ptr<std::byte, Free> memory_;
};

TEST(SlotImage, RoundTripsOfAllKindsOfLengths) {
  for (const std::uint64_t payload : {1ull, 2ull, 239ull, 240ull, 241ull, 4095ull, 4096ull, 4097ull, 65535ull, 65536ull, 65537ull,
                                      1000003ull, 368ull * 65536, 368ull * 65536 + 1}) {
    Image image(payload);
    EXPECT_TRUE(image.verify().ok()) << payload << " " << image.verify().to_string();
    EXPECT_EQ(image.bytes() % kPageBytes, 0u);
    EXPECT_EQ(image.header().region_sequence, 3u);
    EXPECT_EQ(image.header().record_sequence, 4u);
    EXPECT_EQ(image.header().payload_bytes, payload);
    for (std::uint64_t i = kPageBytes + payload; i < image.bytes(); ++i)
      ASSERT_EQ(image.at()[i], std::byte{0}) << "padding at " << i;
  }
}

TEST(SlotImage, SegmentsGrowSoThatTheTableFits) {
  EXPECT_EQ(segment_bytes_for(1), 65536u);
  EXPECT_EQ(segment_bytes_for(368ull * 65536), 65536u);
  EXPECT_EQ(segment_bytes_for(368ull * 65536 + 1), 131072u);
  EXPECT_EQ(segment_bytes_for(368ull * 131072 + 1), 262144u);
  EXPECT_EQ(segment_bytes_for(kMaxPayloadBytes), kMaxSegmentBytes);
}

TEST(SlotImage, ChecksumIsTheSameOnEveryCpu) {
  std::vector<std::byte> data(70000);
  std::mt19937_64 random(1);
  for (std::byte& b : data) b = static_cast<std::byte>(random());
  for (const std::size_t n : {0, 1, 3, 8, 16, 17, 128, 129, 240, 241, 1023, 1024, 1025, 65536, 70000}) {
    EXPECT_EQ(checksum64(data.data(), n), detail::checksum64_baseline(data.data(), n)) << n;
  }
  // The value of the empty input is published with XXH3: the format does not follow the machine that wrote it.
  EXPECT_EQ(checksum64(data.data(), 0), 0x2D06800538D394C2ULL);
}

TEST(SlotImage, EveryBitFlippedInHeaderAndTableIsCaught) {
  Image image(100'000, 4);
  for (std::size_t bit = 0; bit < offsetof(SlotHeader, rank) * 8; ++bit) {
    const auto mask = static_cast<std::byte>(1u << (bit % 8));
    image.at()[bit / 8] ^= mask;
    const Status status = image.verify();
    ASSERT_FALSE(status.ok()) << "bit " << bit;
    ASSERT_TRUE(status.code() == Code::kCorruption || status.code() == Code::kFormatVersion) << status.to_string();
    image.at()[bit / 8] ^= mask;
  }
  EXPECT_TRUE(image.verify().ok());
}

TEST(SlotImage, EveryBitFlippedInThePayloadIsCaught) {
  Image image(65536 + 37);
  for (const std::uint64_t byte : {0ull, 1ull, 1000ull, 65535ull, 65536ull, 65536ull + 36}) {
    for (int bit = 0; bit < 8; ++bit) {
      const auto mask = static_cast<std::byte>(1 << bit);
      image.payload()[byte] ^= mask;
      EXPECT_EQ(image.verify().code(), Code::kCorruption) << byte << "." << bit;
      image.payload()[byte] ^= mask;
    }
  }
  EXPECT_TRUE(image.verify().ok());
}

TEST(SlotImage, SwappedSegmentsAreCaught) {
  Image image(2 * 65536);
  std::swap_ranges(image.payload(), image.payload() + 65536, image.payload() + 65536);
  EXPECT_EQ(image.verify().code(), Code::kCorruption);
  std::swap(image.header().segment[0], image.header().segment[1]);
  EXPECT_EQ(image.verify().code(), Code::kCorruption) << "the root covers the order of the table";
}

TEST(SlotImage, RankWordsAndPaddingAreNotCovered) {
  Image image(5000, 2);
  publish_rank(image.at(), 1, 7, RankState::kOk);
  count_load_done(image.at(), 0);
  image.at()[image.bytes() - 1] = std::byte{9};
  EXPECT_TRUE(image.verify().ok());
}

TEST(SlotImage, AnotherKeyOrNamespaceIsCorruption) {
  Image image(5000);
  EXPECT_EQ(verify_slot(image.at(), image.bytes(), key_of(9), ns_of(2)).code(), Code::kCorruption);
  EXPECT_EQ(verify_slot(image.at(), image.bytes(), key_of(1), ns_of(9)).code(), Code::kCorruption);
}

TEST(SlotImage, TooFewBytesAreCorruption) {
  Image image(5000);
  for (const std::uint64_t bytes :
       {std::uint64_t{0}, std::uint64_t{100}, kPageBytes, kPageBytes + 4999, kPageBytes + 5000, image.bytes() - 1}) {
    EXPECT_EQ(check_header(image.at(), bytes).code(), Code::kCorruption) << bytes;
  }
  EXPECT_TRUE(check_header(image.at(), image.bytes()).ok());
  EXPECT_TRUE(check_header(image.at(), image.bytes() + kPageBytes).ok());
}

// Headers that lie but whose root holds: only the checks of the fields themselves stand against them.
class LyingHeader : public ::testing::Test {
 protected:
  Status check(const std::function<void(SlotHeader&)>& lie) {
    Image image(6 * 65536, 3);
    lie(image.header());
    image.header().root = root(image.header());
    return check_header(image.at(), image.bytes());
  }
  static std::uint64_t root(const SlotHeader& header) {
    std::vector<std::byte> covered(offsetof(SlotHeader, root) + offsetof(SlotHeader, rank) - offsetof(SlotHeader, segment));
    const auto* bytes = reinterpret_cast<const std::byte*>(&header);
    std::memcpy(covered.data(), bytes, offsetof(SlotHeader, root));
    std::memcpy(covered.data() + offsetof(SlotHeader, root), bytes + offsetof(SlotHeader, segment),
                offsetof(SlotHeader, rank) - offsetof(SlotHeader, segment));
    return checksum64(covered.data(), covered.size());
  }
};

TEST_F(LyingHeader, IsRefusedFieldByField) {
  EXPECT_TRUE(check([](SlotHeader&) {}).ok()) << "the root of this test is the root of seal_slot()";
  const auto refuses = [this](const char* field, const std::function<void(SlotHeader&)>& lie) {
    const Status status = check(lie);
    EXPECT_EQ(status.code(), Code::kCorruption) << field;
    EXPECT_NE(status.message().find(field), std::string::npos) << status.message();
  };
  refuses("magic", [](SlotHeader& h) { h.magic ^= 1; });
  refuses("header_bytes", [](SlotHeader& h) { h.header_bytes = 8192; });
  refuses("payload_bytes", [](SlotHeader& h) { h.payload_bytes = 0; });
  refuses("payload_bytes", [](SlotHeader& h) { h.payload_bytes += 1; });
  refuses("payload_bytes", [](SlotHeader& h) { h.payload_bytes = ~0ull; });
  refuses("payload_bytes", [](SlotHeader& h) { h.payload_bytes = ~0ull - 4095; });
  refuses("segment_bytes", [](SlotHeader& h) { h.segment_bytes *= 2; });
  refuses("segment_bytes", [](SlotHeader& h) { h.segment_bytes = 0; });
  refuses("segment_count", [](SlotHeader& h) { h.segment_count -= 1; });
  refuses("segment_count", [](SlotHeader& h) { h.segment_count = ~0u; });
  refuses("rank_count", [](SlotHeader& h) { h.rank_count = 0; });
  refuses("rank_count", [](SlotHeader& h) { h.rank_count = 65; });
  refuses("rank_count", [](SlotHeader& h) { h.rank_count = 5; });
  const Status future = check([](SlotHeader& h) { h.format = 2; });
  EXPECT_EQ(future.code(), Code::kFormatVersion);
  EXPECT_NE(future.message().find('2'), std::string::npos);
}

TEST(RankWords, CountOnlyForTheirGeneration) {
  Image image(4096, 2, 10);
  EXPECT_EQ(rank_state(image.at(), 0, 10), RankState::kEmpty);
  publish_rank(image.at(), 0, 10, RankState::kOk);
  publish_rank(image.at(), 1, 10, RankState::kFailed);
  EXPECT_EQ(rank_state(image.at(), 0, 10), RankState::kOk);
  EXPECT_EQ(rank_state(image.at(), 1, 10), RankState::kFailed);
  EXPECT_EQ(rank_state(image.at(), 0, 11), RankState::kEmpty) << "stale generation";
  EXPECT_EQ(rank_state(image.at(), 0, 9), RankState::kEmpty);

  begin_slot(image.at(), key_of(1), ns_of(2), 4096, 2, 11);
  for (std::uint32_t rank = 0; rank < kMaxRanks; ++rank) EXPECT_EQ(rank_state(image.at(), rank, 11), RankState::kEmpty);
  EXPECT_EQ(loads_done(image.at(), 0), 0u);
  publish_rank(image.at(), 0, 10, RankState::kOk);  // a job of the slot's earlier life
  EXPECT_EQ(rank_state(image.at(), 0, 11), RankState::kEmpty);
}

TEST(RankWords, UnknownStatesAreFailures) {
  Image image(4096, 1, 10);
  image.header().rank[0] = {.generation = 10, .state = static_cast<RankState>(77), .loads_done = 0, .reserved = 0};
  EXPECT_EQ(rank_state(image.at(), 0, 10), RankState::kFailed);
  EXPECT_EQ(rank_state(image.at(), kMaxRanks, 10), RankState::kFailed) << "no such rank";
}

TEST(RankWords, AdoptedSlotsAreOkForAllTheirRanks) {
  Image image(4096 * 3, 3, 10);
  adopt_slot(image.at(), 21, 3);
  EXPECT_EQ(image.header().generation, 21u);
  for (std::uint32_t rank = 0; rank < 3; ++rank) EXPECT_EQ(rank_state(image.at(), rank, 21), RankState::kOk);
  EXPECT_EQ(rank_state(image.at(), 3, 21), RankState::kEmpty);
  EXPECT_EQ(image.verify().code(), Code::kCorruption) << "the root no longer covers it";
  image.reseal();
  EXPECT_TRUE(image.verify().ok());
}

// What publishing relies on: once the word says ok, the payload that the other process wrote before is there.
TEST(RankWords, PublishAcrossProcesses) {
  constexpr std::uint32_t kRanks = 4;
  constexpr std::uint64_t kPayload = kRanks * 65536;
  constexpr std::uint32_t kRounds = 50;
  const std::uint64_t bytes = image_bytes(kPayload);
  void* const shared = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(shared, MAP_FAILED);
  auto* const image = static_cast<std::byte*>(shared);
  begin_slot(image, key_of(1), ns_of(2), kPayload, kRanks, 1);

  std::vector<pid_t> children;
  for (std::uint32_t rank = 0; rank < kRanks; ++rank) {
    const pid_t pid = ::fork();
    ASSERT_GE(pid, 0);
    if (pid == 0) {
      std::byte* const part = image + kPageBytes + rank * 65536;
      for (std::uint32_t generation = 1; generation <= kRounds; ++generation) {
        std::memset(part, static_cast<int>(generation + rank), 65536);
        publish_rank(image, rank, generation, RankState::kOk);
        while (loads_done(image, rank) < generation) std::this_thread::yield();
      }
      ::_exit(0);
    }
    children.push_back(pid);
  }
  std::uint64_t wrong = 0;
  for (std::uint32_t generation = 1; generation <= kRounds; ++generation) {
    for (std::uint32_t rank = 0; rank < kRanks; ++rank) {
      while (rank_state(image, rank, generation) == RankState::kEmpty) std::this_thread::yield();
      const std::byte* const part = image + kPageBytes + rank * 65536;
      for (std::size_t i = 0; i < 65536; ++i) wrong += part[i] != static_cast<std::byte>(generation + rank);
      count_load_done(image, rank);
    }
  }
  EXPECT_EQ(wrong, 0u);
  for (const pid_t pid : children) {
    int status = -1;
    ASSERT_EQ(::waitpid(pid, &status, 0), pid);
    EXPECT_EQ(status, 0);
  }
  ::munmap(shared, bytes);
}

TEST(SlotImage, PrintsChecksumRate) {
  Image image(64ull << 20);
  double best = 1e9;
  for (int i = 0; i < 5; ++i) {
    const auto start = std::chrono::steady_clock::now();
    ASSERT_TRUE(image.verify().ok());
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::printf("[ figure   ] verify_slot of 64 MiB: %.1f GB/s\n", static_cast<double>(image.bytes()) / best / 1e9);
}

}  // namespace
}  // namespace lmcn
