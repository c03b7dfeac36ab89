// A cut or flipped byte anywhere is at most a loss: what is recovered was written, is where it was written, and reads as written.
#include "log_fixture.hpp"

namespace lmcn::nvme {
namespace {

class Damage : public LogFixture {
 protected:
  static constexpr std::uint32_t kRecords = 60;  // 23 a region: two sealed, one open

  /// A store with records, killed; with or without a checkpoint of all of them.
  void make_store(bool with_checkpoint) {
    open();
    put_many(0, kRecords);
    idle();
    if (with_checkpoint) {
      ASSERT_TRUE(checkpoint().ok());
    }
    kill();
  }
  void open_and_check() {
    open();
    expect_no_lies();
  }
};

TEST_F(Damage, CheckpointCutAnywhere) {
  make_store(true);
  const std::vector<char> whole = bytes_of("index.ckpt");
  ASSERT_GT(whole.size(), kPageBytes + kRecords * sizeof(CheckpointEntry));
  for (std::size_t size = 0; size < whole.size(); size += 64) {
    write_file("index.ckpt", {whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size)});
    open_and_check();
    EXPECT_EQ(log->stats().recovered_from_checkpoint, 0u) << size;
    EXPECT_EQ(recovered.size(), kRecords) << size;
    kill();
  }
  std::vector<char> longer = whole;
  longer.resize(longer.size() + sizeof(CheckpointEntry));
  write_file("index.ckpt", longer);
  open_and_check();
  EXPECT_EQ(log->stats().recovered_from_checkpoint, 0u);
}

TEST_F(Damage, CheckpointByteFlipped) {
  make_store(true);
  const std::vector<char> whole = bytes_of("index.ckpt");
  for (std::size_t at = 0; at < whole.size(); at += at < 96 ? 1 : 61) {
    std::vector<char> bytes = whole;
    bytes[at] = static_cast<char>(bytes[at] ^ 0x10);
    write_file("index.ckpt", bytes);
    open_and_check();
    EXPECT_EQ(log->stats().recovered_from_checkpoint, 0u) << at;
    EXPECT_EQ(recovered.size(), kRecords) << at;
    kill();
  }
  write_file("index.ckpt", whole);
  open_and_check();
  EXPECT_EQ(log->stats().recovered_from_checkpoint, kRecords);
}

// Whole and with good checksums, but of another moment, epoch or store.
TEST_F(Damage, CheckpointOfBeforeRegionsWereReused) {
  make_store(true);
  const std::vector<char> old = bytes_of("index.ckpt");
  open();
  put_many(kRecords, 400);
  kill();
  write_file("index.ckpt", old);
  open_and_check();
  EXPECT_EQ(recovered.back().key, key_of(399));
}

TEST_F(Damage, CheckpointOfBeforeAClear) {
  make_store(true);
  const std::vector<char> old = bytes_of("index.ckpt");
  open();
  ASSERT_TRUE(log->clear().ok());
  put_many(kRecords, kRecords + 5);
  kill();
  write_file("index.ckpt", old);
  open_and_check();
  EXPECT_EQ(recovered.size(), 5u);
}

TEST_F(Damage, CheckpointWithImpossibleEntries) {
  make_store(true);
  std::vector<char> bytes = bytes_of("index.ckpt");
  auto* header = reinterpret_cast<CheckpointHeader*>(bytes.data());
  auto* entry = reinterpret_cast<CheckpointEntry*>(bytes.data() + kPageBytes);
  entry[0].region = 5000;
  entry[1].page = 0;
  entry[2].pages = 0xFFFFFFF0u;
  entry[3].page = entry[4].page + 1;  // overlaps its neighbour
  header->body_checksum = checksum_bytes(entry, bytes.size() - kPageBytes);
  seal_page(*header);
  write_file("index.ckpt", bytes);
  open();
  EXPECT_GE(recovered.size(), kRecords - 6);
  EXPECT_LE(recovered.size(), kRecords - 3);
  for (const RecoveredRecord& record : recovered) EXPECT_LE(record.extent.page + record.extent.pages, kMiB / kPageBytes);
}

TEST_F(Damage, FooterByteFlipped) {
  make_store(false);
  const std::uint64_t footer = kMiB - kPageBytes;  // one page
  for (std::uint64_t at = footer; at < kMiB; at += at < kMiB - 64 ? 41 : 1) {
    if (at >= footer + 23 * sizeof(FooterEntry) && at < kMiB - 64) continue;  // zeros between entries and trailer
    flip_byte("data.000", at);
    open_and_check();
    EXPECT_EQ(log->stats().recovered_from_footers, 23u) << at;  // the other one
    EXPECT_EQ(recovered.size(), kRecords) << at;                // walked instead
    kill();
    flip_byte("data.000", at);
  }
}

TEST_F(Damage, FooterCut) {
  make_store(false);
  const std::vector<char> whole = bytes_of("data.000");
  const auto end = whole.begin() + kMiB;
  for (std::uint64_t cut = 64; cut <= kPageBytes; cut += 64) {
    write_bytes("data.000", kMiB - cut, std::vector<char>(cut));
    open_and_check();
    EXPECT_EQ(recovered.size(), kRecords) << cut;
    kill();
    write_bytes("data.000", kMiB - kPageBytes, {end - kPageBytes, end});
  }
}

// Sealed again by maintain(), so that the next open need not walk.
TEST_F(Damage, LostFooterIsWrittenAgain) {
  make_store(false);
  flip_byte("data.000", kMiB - 8);
  open();
  ASSERT_TRUE(log->maintain().ok());
  kill_and_open();
  EXPECT_EQ(log->stats().recovered_from_footers, 46u);
  expect_no_lies();
}

TEST_F(Damage, FooterOfAnotherLifeOfTheRegion) {
  make_store(false);
  const std::vector<char> old = bytes_of("data.000");
  open();
  put_many(kRecords, 400);
  kill();
  std::vector<char> bytes = bytes_of("data.000");
  for (std::size_t region = 0; region < 2; ++region) {
    const auto end = static_cast<std::ptrdiff_t>((region + 1) * kMiB);
    std::copy(old.begin() + end - 4096, old.begin() + end, bytes.begin() + end - 4096);
  }
  write_file("data.000", bytes);
  open_and_check();
}

TEST_F(Damage, RegionHeaderByteFlipped) {
  make_store(false);
  const std::vector<char> whole = bytes_of("data.000");
  for (std::uint64_t at = 0; at < kPageBytes; at += at < 64 ? 1 : 251) {
    write_bytes("data.000", 0, {whole.begin(), whole.begin() + kMiB});  // open() gave the region's space back
    flip_byte("data.000", at);
    open_and_check();
    EXPECT_EQ(recovered.size(), kRecords - 23) << at;
    kill();
  }
}

TEST_F(Damage, RegionsInEachOthersPlaces) {
  make_store(false);
  std::vector<char> bytes = bytes_of("data.000");
  std::swap_ranges(bytes.begin(), bytes.begin() + kMiB, bytes.begin() + kMiB);
  write_file("data.000", bytes);
  open_and_check();
  EXPECT_EQ(recovered.size(), kRecords - 46);
}

TEST_F(Damage, TwoRegionsWithOneSequence) {
  make_store(false);
  std::vector<char> bytes = bytes_of("data.000");
  auto* first = reinterpret_cast<RegionHeader*>(bytes.data());
  auto* second = reinterpret_cast<RegionHeader*>(bytes.data() + kMiB);
  second->sequence = first->sequence;
  seal_page(*second);
  write_file("data.000", bytes);
  open_and_check();
  EXPECT_EQ(recovered.size(), kRecords - 46);
}

TEST_F(Damage, RecordHeaderByteFlipped) {
  make_store(false);
  const std::uint64_t open_region = 2 * kMiB;
  const std::uint64_t record = open_region + kPageBytes + 3 * 44 * kKiB;  // the fourth of 14
  for (std::uint64_t at = 0; at < 3072; at += at < 160 ? 1 : 211) {
    flip_byte("data.000", record + at);
    open_and_check();
    EXPECT_EQ(recovered.size(), 46u + 3u) << at;
    kill();
    flip_byte("data.000", record + at);
  }
  open_and_check();
  EXPECT_EQ(recovered.size(), kRecords);
}

TEST_F(Damage, PayloadByteFlippedIsAMiss) {
  make_store(true);
  flip_byte("data.000", kPageBytes + kPageBytes + 12'345);
  open();
  EXPECT_EQ(get(0).code(), Code::kCorruption);
  EXPECT_EQ(log->stats().corrupt_reads, 1u);
  EXPECT_EQ(log->stats().read_errors, 0u);
  expect_readable(1, kRecords);
}

TEST_F(Damage, DataFileCut) {
  make_store(true);
  std::filesystem::resize_file(file("data.000"), kMiB + 12'345);
  open_and_check();
  EXPECT_EQ(recovered.size(), 23u);
  put_many(kRecords, kRecords + 40);
  expect_readable(kRecords, kRecords + 40);
}

TEST_F(Damage, SuperblockDamagedIsRefusedAndKept) {
  make_store(false);
  const std::vector<char> data = bytes_of("data.000");
  for (const std::uint64_t at : {0ull, 20ull, 33ull, 41ull, 2000ull, 4095ull}) {
    flip_byte("superblock", at);
    const std::vector<char> superblock = bytes_of("superblock");
    EXPECT_EQ(try_open().code(), Code::kCorruption) << at;
    EXPECT_EQ(bytes_of("superblock"), superblock);
    flip_byte("superblock", at);
  }
  std::filesystem::rename(file("superblock"), file("elsewhere"));
  EXPECT_EQ(try_open().code(), Code::kCorruption);
  std::filesystem::rename(file("elsewhere"), file("superblock"));
  EXPECT_EQ(bytes_of("data.000"), data);
  open_and_check();
  EXPECT_EQ(recovered.size(), kRecords);
}

TEST_F(Damage, OtherFormatVersionIsRefusedAndKept) {
  make_store(true);
  std::vector<char> superblock = bytes_of("superblock");
  superblock[8] = 2;
  write_file("superblock", superblock);
  const auto data = bytes_of("data.000"), index_bytes = bytes_of("index.ckpt");
  const Status status = try_open();
  EXPECT_EQ(status.code(), Code::kFormatVersion);
  EXPECT_NE(status.message().find("format version 2, this build knows 1"), std::string::npos) << status.message();
  EXPECT_EQ(bytes_of("superblock"), superblock);
  EXPECT_EQ(bytes_of("data.000"), data);
  EXPECT_EQ(bytes_of("index.ckpt"), index_bytes);
}

}  // namespace
}  // namespace lmcn::nvme
