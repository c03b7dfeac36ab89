#include <sys/stat.h>
#include <sys/statvfs.h>

#include <thread>

#include "base/seq_points.hpp"
#include "log_fixture.hpp"

namespace lmcn::nvme {
namespace {

class Limit : public LogFixture {
 protected:
  std::uint64_t bytes_on_device() const {
    std::uint64_t bytes = 0;
    for (const auto& entry : std::filesystem::directory_iterator(options.directory)) {
      struct stat found{};
      EXPECT_EQ(::stat(entry.path().c_str(), &found), 0);
      bytes += static_cast<std::uint64_t>(found.st_blocks) * 512;
    }
    return bytes;
  }
};

TEST_F(Limit, HoldsWhileFourTimesAsMuchIsWritten) {
  open();
  std::uint64_t written = 0;
  for (std::uint32_t id = 0; written < 4 * options.limit_bytes; ++id) {
    ASSERT_EQ(put(id, 100 * kKiB).to_string(), "ok");
    written += 104 * kKiB;
    EXPECT_LE(bytes_on_device(), options.limit_bytes);
    EXPECT_LE(log->stats().allocated_bytes, options.limit_bytes);
    if (id % 50 == 0) {
      ASSERT_TRUE(checkpoint().ok());
      EXPECT_LE(bytes_on_device(), options.limit_bytes);
    }
  }
  EXPECT_EQ(log->stats().regions, 7u);
  EXPECT_GT(log->stats().reclaimed_regions, 20u);
  for (const auto& [id, extent] : index) EXPECT_EQ(read(extent, id).to_string(), "ok");
  reopen();
  expect_no_lies();
  EXPECT_LE(bytes_on_device(), options.limit_bytes);
}

TEST_F(Limit, OldestRegionGoesFirst) {
  open();
  put_many(0, 23 * 9);
  ASSERT_GE(reclaims.size(), 2u);
  std::uint32_t expected = 0;
  for (const Reclaim& reclaim : reclaims) {
    ASSERT_EQ(reclaim.cookies.size(), 23u);
    for (const std::uint32_t cookie : reclaim.cookies) EXPECT_EQ(cookie, expected++);
  }
  expect_readable(expected, 23 * 9);
}

TEST_F(Limit, OldestFirstAlsoAcrossReopen) {
  open();
  put_many(0, 23 * 5);
  reopen();
  put_many(23 * 5, 23 * 9);
  ASSERT_GE(reclaims.size(), 2u);
  EXPECT_EQ(reclaims[0].cookies.front(), 0u);
  EXPECT_EQ(reclaims[1].cookies.front(), 23u);
}

TEST_F(Limit, ReclaimUncountsWhatWasLive) {
  open();
  put_many(0, 23 * 20);
  std::uint64_t live = 0;
  for (const auto& [id, extent] : index) live += extent.pages * kPageBytes;
  EXPECT_EQ(log->stats().live_record_bytes, live);
}

TEST_F(Limit, CleanRegionsAreKeptAhead) {
  options.limit_bytes = 16 * kMiB;
  open();
  put_many(0, 23 * 30);
  idle();
  ASSERT_TRUE(log->maintain().ok());
  idle();
  EXPECT_GE(log->stats().clean_regions, 2u);
}

// I2. A reader holds an extent, its region is reused while the read is under way: a miss, whatever the bytes were.
TEST_F(Limit, ReaderOfAReusedRegionGetsAMiss) {
  open();
  put_many(0, 23);
  const Extent extent = index[0];
  SeqPoints::hold("nvme.read_completed");
  const SeqPointScope scope;
  PageBuffer image(extent.pages);
  std::promise<Status> done;
  log->read(extent, image.data(), key_of(0), &kTestNamespace, [&](const Status& status) { done.set_value(status); });
  ASSERT_TRUE(SeqPoints::wait_until_reached("nvme.read_completed", std::chrono::seconds(30)));  // good bytes are in memory
  std::uint32_t id = 23;
  while (reclaims.empty()) {  // the read is under way, so idle() would wait for it
    images.clear();
    PageBuffer& next = images.emplace_back(make_image(id, 40 * kKiB));
    std::promise<Status> appended;
    ids = id + 1;
    const Status status = log->append(next.data(), next.bytes(), id, [&](const Status& s, Extent) { appended.set_value(s); });
    if (status.code() == Code::kResourceExhausted) {
      ASSERT_TRUE(log->maintain().ok());
      continue;
    }
    ASSERT_TRUE(status.ok()) << status.to_string();
    ASSERT_TRUE(appended.get_future().get().ok());
    ++id;
  }
  ASSERT_EQ(reclaims[0].region, extent.region);
  SeqPoints::release("nvme.read_completed");
  EXPECT_EQ(done.get_future().get().code(), Code::kCorruption);
  EXPECT_EQ(log->stats().stale_reads, 1u);
  EXPECT_EQ(log->stats().corrupt_reads, 0u);
}

TEST_F(Limit, ReaderThatHeldItsExtentTooLongGetsAMiss) {
  open();
  put_many(0, 23);
  const Extent extent = index[0];
  put_many(23, 23 * 9);
  EXPECT_EQ(read(extent, 0).code(), Code::kCorruption);
  EXPECT_EQ(log->stats().misplaced_reads, 1u);
}

TEST_F(Limit, LowerLimitDropsTheOldest) {
  options.limit_bytes = 16 * kMiB;
  open();
  put_many(0, 23 * 10);
  ASSERT_TRUE(close().ok());
  options.limit_bytes = 6 * kMiB;  // 5 regions
  open();
  expect_no_lies();
  EXPECT_LE(bytes_on_device(), options.limit_bytes);
  EXPECT_LE(log->stats().regions, 5u);
  ASSERT_FALSE(index.empty());
  EXPECT_EQ(index.rbegin()->first, 23u * 10 - 1);
  EXPECT_EQ(index.begin()->first + index.size(), 23u * 10);
  put_many(23 * 10, 23 * 20);
  EXPECT_LE(bytes_on_device(), options.limit_bytes);
  kill_and_open();
  expect_no_lies();
  EXPECT_LE(bytes_on_device(), options.limit_bytes);
}

TEST_F(Limit, LowerLimitCanBeRefused) {
  options.limit_bytes = 16 * kMiB;
  open();
  put_many(0, 23 * 10);
  ASSERT_TRUE(close().ok());
  options.limit_bytes = 6 * kMiB;
  options.allow_shrink_below_contents = false;
  EXPECT_EQ(try_open().code(), Code::kInvalidArgument);
  options.limit_bytes = 16 * kMiB;
  open();
  expect_readable(0, 23 * 10);
}

TEST_F(Limit, HigherLimitGrows) {
  open();
  put_many(0, 23 * 6);
  ASSERT_TRUE(close().ok());
  options.limit_bytes = 16 * kMiB;
  open();
  put_many(23 * 6, 23 * 12);
  EXPECT_TRUE(reclaims.empty());
  expect_readable(0, 23 * 12);
}

TEST_F(Limit, CheckpointThatDoesNotFitIsNotWritten) {
  open();
  put_many(0, 23 * 7 * 5, 4 * kKiB);
  const Status status = log->checkpoint([&](const RegionLog::EntrySink& sink) {
    for (std::uint32_t i = 0; i < 100'000; ++i) sink(key_of(0), Extent{i % 7, 1, 2});
  });
  EXPECT_EQ(status.code(), Code::kResourceExhausted) << status.to_string();
  EXPECT_FALSE(std::filesystem::exists(file("index.ckpt.tmp")));
  EXPECT_LE(bytes_on_device(), options.limit_bytes);
  kill_and_open();
  expect_no_lies();
}

TEST_F(Limit, FreeSpaceFloorMakesRegionsBeReused) {
  open();
  put_many(0, 23 * 3 - 2);
  idle();
  ASSERT_TRUE(close().ok());
  options.free_space_floor_bytes = 1ull << 60;
  open();
  const std::uint64_t before = log->stats().regions;
  put_many(200, 400);
  EXPECT_EQ(log->stats().regions, before);
  EXPECT_GE(log->stats().refused_allocations, 1u);
  EXPECT_FALSE(reclaims.empty());
  EXPECT_FALSE(log->stats().quarantined);
}

TEST_F(Limit, FreeSpaceFloorFromTheStart) {
  options.free_space_floor_bytes = 1ull << 60;
  open();
  const Status status = put(0);
  EXPECT_EQ(status.code(), Code::kResourceExhausted);
  EXPECT_NE(status.message().find("must stay free"), std::string::npos) << status.message();
  EXPECT_EQ(log->stats().regions, 0u);
}

TEST_F(Limit, TooSmallSaysTheMinimum) {
  options.limit_bytes = 1 * kMiB;
  const Status status = try_open();
  ASSERT_EQ(status.code(), Code::kInvalidArgument);
  const std::size_t at = status.message().find("at least ");
  ASSERT_NE(at, std::string::npos) << status.message();
  options.limit_bytes = std::stoull(status.message().substr(at + 9)) - kMiB;
  EXPECT_EQ(try_open().code(), Code::kInvalidArgument);
  options.limit_bytes += kMiB;
  open();
  put_many(0, 100);
}

TEST_F(Limit, LargerThanTheFileSystemNamesBoth) {
  options.limit_bytes = 1ull << 55;
  const Status status = try_open();
  ASSERT_EQ(status.code(), Code::kInvalidArgument);
  struct statvfs found{};
  ASSERT_EQ(::statvfs(root.path().c_str(), &found), 0);
  EXPECT_NE(status.message().find(std::to_string(options.limit_bytes)), std::string::npos) << status.message();
  EXPECT_NE(status.message().find(std::to_string(std::uint64_t{found.f_blocks} * found.f_frsize)), std::string::npos);
}

TEST_F(Limit, DefaultRegionSizes) {
  std::string note;
  LogOptions o;
  o.max_record_bytes = 2 * kMiB;
  const auto region_for = [&](std::uint64_t limit, std::uint64_t record) {
    o.limit_bytes = limit;
    o.max_record_bytes = record;
    const auto geometry = choose_geometry(o, 0, 1ull << 60, &note);
    if (geometry.ok()) {
      EXPECT_LE(geometry->max_regions * geometry->region_bytes + reserved_bytes(limit), limit);
      EXPECT_GE(geometry->max_regions, 4u);
    }
    return geometry.ok() ? geometry->region_bytes : 0;
  };
  EXPECT_EQ(region_for(1ull << 42, 2 * kMiB), 256 * kMiB);
  EXPECT_EQ(region_for(1ull << 30, 2 * kMiB), 127 * kMiB);
  EXPECT_EQ(region_for(70 * kMiB, 2 * kMiB), 16 * kMiB);
  EXPECT_EQ(region_for(60 * kMiB, 2 * kMiB), 0u);
  EXPECT_EQ(region_for(1ull << 42, 200 * kMiB), 401 * kMiB);
  EXPECT_EQ(region_for(1ull << 30, 200 * kMiB), 0u);
}

TEST_F(Limit, ExistingRegionSizeWins) {
  open();
  put_many(0, 30);
  ASSERT_TRUE(close().ok());
  options.region_bytes = 2 * kMiB;
  options.limit_bytes = 16 * kMiB;
  open();
  expect_readable(0, 30);
  ASSERT_FALSE(log->notes().empty());
  EXPECT_NE(log->notes()[0].find("region_bytes 2097152 not used"), std::string::npos) << log->notes()[0];
}

TEST_F(Limit, BadRegionSizesAreRefused) {
  for (const std::uint64_t bytes : {4096ull, 1'048'577ull, 1'000'000ull, 1ull << 50}) {
    options.region_bytes = bytes;
    EXPECT_EQ(try_open().code(), Code::kInvalidArgument) << bytes;
  }
  options.region_bytes = kMiB;
  options.max_record_bytes = 600 * kKiB;
  EXPECT_EQ(try_open().code(), Code::kInvalidArgument);
}

// tmpfs: no O_DIRECT on older kernels, and another fallocate.
TEST_F(Limit, OnTmpfs) {
  if (!std::filesystem::exists("/dev/shm")) GTEST_SKIP() << "no /dev/shm";
  const TemporaryDirectory memory("/dev/shm");
  options.directory = (memory.path() / "store").string();
  open();
  put_many(0, 400);
  EXPECT_LE(bytes_on_device(), options.limit_bytes);
  const auto before = index;
  kill_and_open();
  EXPECT_EQ(index, before);
  expect_no_lies();
  kill();
}

}  // namespace
}  // namespace lmcn::nvme
