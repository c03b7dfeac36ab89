// Devices that fail: a record is readable only if all of it was written, and nothing else is lost with it.
#include "log_fixture.hpp"

namespace lmcn::nvme {
namespace {

class Faults : public LogFixture, public testing::WithParamInterface<io::EngineKind> {
 protected:
  Faults() { use_engine(GetParam()); }
  void fail_next_write(int error) { engine->add(io::Fault::fail_with(error).on(io::Op::kWrite).only(1)); }
  /// With a region open and others prepared: the next write is a record's.
  void open_quietly() {
    open();
    put_many(0, 1);
    idle();
  }
  /// Beyond every byte of the data file.
  static constexpr std::uint64_t kEnd = 64 * kMiB;
};
INSTANTIATE_TEST_SUITE_P(Engines, Faults, testing::Values(io::EngineKind::kThreads, io::EngineKind::kIoUring),
                         [](const auto& info) { return info.param == io::EngineKind::kThreads ? "threads" : "io_uring"; });

TEST_P(Faults, DeviceErrorsQuarantine) {
  for (const int error : {ENOSPC, EIO, EROFS, ENODEV}) {
    kill();
    std::filesystem::remove_all(options.directory);
    open();
    put_many(0, 3);
    fail_next_write(error);
    EXPECT_EQ(put(3).code(), Code::kIoError);
    EXPECT_TRUE(log->stats().quarantined);
    EXPECT_TRUE(log->quarantined());
    EXPECT_NE(log->quarantine_reason().find("data.000"), std::string::npos) << log->quarantine_reason();
    const std::uint64_t requests = engine->counts().requests;
    EXPECT_EQ(put(4).code(), Code::kUnavailable);
    EXPECT_EQ(get(0).code(), Code::kUnavailable);
    EXPECT_EQ(log->clear().code(), Code::kUnavailable);
    EXPECT_TRUE(log->maintain().ok());
    EXPECT_EQ(close().code(), Code::kUnavailable);
    EXPECT_EQ(engine->counts().requests, requests) << "I/O after quarantine";
    open();
    EXPECT_EQ(recovered.size(), 3u);
    expect_readable(0, 3);
  }
}

TEST_P(Faults, OneFailedWriteFailsOneRecord) {
  open();
  put_many(0, 3);
  fail_next_write(EAGAIN);
  EXPECT_EQ(put(3).code(), Code::kIoError);
  put_many(4, 8);
  EXPECT_FALSE(log->stats().quarantined);
  EXPECT_EQ(log->stats().write_errors, 1u);
  kill_and_open();  // the walk steps over it
  EXPECT_EQ(recovered.size(), 7u);
  EXPECT_EQ(get(3).code(), Code::kNotFound);
  expect_readable(4, 8);
}

TEST_P(Faults, FailedRecordsAreNotInTheFooter) {
  open_quietly();
  fail_next_write(EAGAIN);
  EXPECT_EQ(put(1).code(), Code::kIoError);
  put_many(2, 40);
  kill_and_open();
  EXPECT_EQ(log->stats().recovered_from_footers, 22u);
  EXPECT_EQ(get(1).code(), Code::kNotFound);
  expect_no_lies();
  expect_readable(2, 40);
}

TEST_P(Faults, ShortWriteIsAFailedWrite) {
  open_quietly();
  engine->add(io::Fault::short_by(kPageBytes).on(io::Op::kWrite).only(1));
  EXPECT_EQ(put(1).code(), Code::kIoError);
  engine->add(io::Fault::short_by(1).on(io::Op::kWrite).only(1));
  EXPECT_EQ(put(2).code(), Code::kIoError);
  put_many(3, 5);
  EXPECT_FALSE(log->stats().quarantined);
  kill_and_open();
  EXPECT_EQ(recovered.size(), 3u);
  expect_readable(3, 5);
}

// The skip header fails too: the region is closed, and its footer lists what is good.
TEST_P(Faults, FailedSkipHeaderClosesTheRegion) {
  open();
  put_many(0, 3);
  engine->add(io::Fault::fail_with(EAGAIN).on(io::Op::kWrite).only(1));
  engine->add(io::Fault::fail_with(EAGAIN).on(io::Op::kWrite).only(2));
  EXPECT_EQ(put(3).code(), Code::kIoError);
  put_many(4, 6);
  EXPECT_NE(index[4].region, index[0].region);
  kill_and_open();
  EXPECT_EQ(recovered.size(), 5u);
  expect_readable(0, 3);
  expect_readable(4, 6);
}

TEST_P(Faults, FailedFooterIsWrittenLater) {
  open();
  put_many(0, 23);
  engine->add(io::Fault::fail_with(EAGAIN).on(io::Op::kWrite).in_range(kMiB - kPageBytes, kMiB).only(1));
  put_many(23, 26);
  idle();
  EXPECT_EQ(log->stats().write_errors, 1u);
  ASSERT_TRUE(log->maintain().ok());
  kill_and_open();
  EXPECT_EQ(log->stats().recovered_from_footers, 23u);
  expect_readable(0, 26);
}

TEST_P(Faults, TornFooterIsWalked) {
  open();
  put_many(0, 23);
  engine->add(io::Fault::torn_after(100).on(io::Op::kWrite).in_range(kMiB - kPageBytes, kMiB).only(1));
  put_many(23, 26);
  kill_and_open();
  EXPECT_EQ(log->stats().recovered_from_footers, 0u);
  expect_no_lies();
  expect_readable(0, 26);
}

TEST_P(Faults, FailedRegionHeaderIsTriedAgain) {
  open();
  idle();
  for (std::uint64_t region = 0; region < 7; ++region) {
    engine->add(io::Fault::fail_with(EAGAIN).on(io::Op::kWrite).in_range(region * kMiB, region * kMiB + kPageBytes).only(1));
  }
  put_many(0, 23 * 9);
  EXPECT_FALSE(log->stats().quarantined);
  EXPECT_GE(log->stats().write_errors, 5u);
  kill_and_open();
  expect_no_lies();
  EXPECT_EQ(get(23 * 9 - 1).to_string(), "ok");
}

TEST_P(Faults, TornWritesAreMissesNotLies) {
  open_quietly();
  for (const std::uint64_t bytes : {0ull, 100ull, 4096ull, 4097ull, 30'000ull}) {
    engine->add(io::Fault::torn_after(bytes).on(io::Op::kWrite).only(1));
    ASSERT_TRUE(put(0).ok());  // the device said so
    EXPECT_EQ(get(0).code(), Code::kCorruption) << bytes;
  }
  EXPECT_EQ(log->stats().corrupt_reads, 5u);
  EXPECT_EQ(log->stats().read_errors, 0u);
}

TEST_P(Faults, FlippedBitsOfAReadAreMisses) {
  open();
  put_many(0, 1);
  for (const std::uint64_t at : {0ull, 20ull, 90ull, 104ull, 130ull, 4096ull, 30'000ull, 45'055ull}) {
    engine->add(io::Fault::flip_bit(at).on(io::Op::kRead).only(1));
    EXPECT_EQ(get(0).code(), Code::kCorruption) << at;
  }
  expect_readable(0, 1);
}

TEST_P(Faults, ReadErrorsAreCountedApart) {
  open();
  put_many(0, 2);
  engine->add(io::Fault::fail_with(EIO).on(io::Op::kRead).only(1));
  EXPECT_EQ(get(0).code(), Code::kIoError);
  engine->add(io::Fault::short_by(4096).on(io::Op::kRead).only(1));
  EXPECT_EQ(get(0).code(), Code::kIoError);
  EXPECT_EQ(log->stats().read_errors, 2u);
  EXPECT_EQ(log->stats().corrupt_reads, 0u);
  EXPECT_FALSE(log->stats().quarantined);
  expect_readable(0, 2);
}

TEST_P(Faults, ADeviceThatReadsNothingIsQuarantined) {
  open();
  put_many(0, 1);
  engine->add(io::Fault::fail_with(EIO).on(io::Op::kRead));
  for (int i = 0; i < 8; ++i) EXPECT_EQ(get(0).code(), Code::kIoError);
  EXPECT_EQ(get(0).code(), Code::kUnavailable);
  EXPECT_TRUE(log->stats().quarantined);
}

TEST_P(Faults, FailedSyncQuarantines) {
  open();
  put_many(0, 3);
  engine->add(io::Fault::fail_with(EIO).on(io::Op::kSync).only(1));
  ASSERT_TRUE(log->maintain().ok());
  idle();
  EXPECT_TRUE(log->stats().quarantined);
}

// L2, first half: no footer names records that a power loss could take.
TEST_P(Faults, FooterWaitsForTheSyncOfItsRecords) {
  open_quietly();
  put_many(1, 23);
  engine->add(io::Fault::hold().on(io::Op::kSync));
  put_many(23, 25);  // closes the first region
  ASSERT_TRUE(engine->wait_withheld(1));
  const auto has_footer = [&] {
    const std::vector<char> data = bytes_of("data.000");
    std::uint64_t magic = 0;
    std::memcpy(&magic, data.data() + kMiB - sizeof(FooterTrailer), sizeof magic);
    return magic == kFooterMagic;
  };
  EXPECT_FALSE(has_footer());
  engine->clear();
  engine->release();
  idle();
  EXPECT_TRUE(has_footer());
}

// L2, second half: nothing is overwritten before the region's new header is durable.
TEST_P(Faults, ReusedRegionWaitsForTheSyncOfItsHeader) {
  open_quietly();
  put_many(1, 23 * 6 + 1);  // the last region is open, the first one reclaimed and clean
  idle();
  ASSERT_EQ(reclaims.size(), 1u);
  engine->add(io::Fault::hold().on(io::Op::kSync));
  std::uint32_t id = 23 * 6 + 1;
  Status status;
  for (; status.ok() && id < 23 * 9; ++id) {
    PageBuffer& image = images.emplace_back(make_image(id, 40 * kKiB));
    ids = id + 1;
    status = log->append(image.data(), image.bytes(), id, [](const Status&, Extent) {});
  }
  EXPECT_EQ(status.code(), Code::kResourceExhausted) << "a region was taken whose header is not durable";
  // Two regions being sealed, and the next one's header.
  EXPECT_TRUE(engine->wait_withheld(3, std::chrono::seconds(10)));
  EXPECT_EQ(log->append(images.back().data(), images.back().bytes(), id, [](const Status&, Extent) {}).code(), status.code());
  engine->clear();
  engine->release();
  idle();
  EXPECT_TRUE(put(id).ok());
}

TEST_P(Faults, FailedCheckpointLeavesTheOldOne) {
  open();
  put_many(0, 3);
  ASSERT_TRUE(checkpoint().ok());
  put_many(3, 5);
  const auto before = bytes_of("index.ckpt");
  fail_next_write(ENOSPC);
  EXPECT_EQ(checkpoint().code(), Code::kIoError);
  EXPECT_FALSE(log->stats().quarantined);
  EXPECT_EQ(bytes_of("index.ckpt"), before);
  EXPECT_FALSE(std::filesystem::exists(file("index.ckpt.tmp")));
  kill_and_open();
  expect_readable(0, 5);
}

TEST_P(Faults, FailedClearQuarantines) {
  open();
  put_many(0, 3);
  const Extent extent = index[0];
  fail_next_write(EIO);
  EXPECT_EQ(log->clear().code(), Code::kIoError);
  EXPECT_TRUE(log->stats().quarantined);
  EXPECT_FALSE(read(extent, 0).ok());
}

TEST_P(Faults, EverythingFailsAtOpen) {
  open();
  put_many(0, 30);
  kill();
  engine->add(io::Fault::fail_with(EIO).on(io::Op::kRead).in_range(0, kEnd));
  EXPECT_EQ(try_open().code(), Code::kIoError);
  engine->clear();
  engine->add(io::Fault::fail_with(EIO).on(io::Op::kRead).in_range(kMiB, kEnd));
  open();
  EXPECT_EQ(recovered.size(), 23u);
  expect_no_lies();
}

// Faults of all kinds at random moments, many reopens: never a wrong byte, never a record that was not written.
TEST_P(Faults, RandomFaultsNeverLie) {
  Random random(static_cast<std::uint64_t>(GetParam()) + 42);
  std::uint32_t id = 0;
  open();
  for (int round = 0; round < 20; ++round) {
    engine->add(io::Fault::torn_after(random() % 45'000).on(io::Op::kWrite).only(random() % 20 + 1));
    engine->add(io::Fault::fail_with(EAGAIN).on(io::Op::kWrite).only(random() % 20 + 1));
    engine->add(io::Fault::short_by(random() % 45'000 + 1).on(io::Op::kWrite).only(random() % 20 + 1));
    for (int i = 0; i < 15; ++i) static_cast<void>(put(id++, random() % (100 * kKiB) + 1));
    if (round % 7 == 3) {
      static_cast<void>(checkpoint());
    }
    idle();
    engine->clear();
    kill_and_open();
    for (const RecoveredRecord& record : recovered) {
      const Status status = read(record.extent, id_of(record.key));
      EXPECT_TRUE(status.ok() || status.code() == Code::kCorruption) << status.to_string();
    }
  }
  EXPECT_FALSE(log->stats().quarantined);
}

}  // namespace
}  // namespace lmcn::nvme
