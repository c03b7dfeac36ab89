// Where records are, for a reader of its own in another process: what it finds there, and how it learns that a place is old.
#include <fcntl.h>
#include <unistd.h>

#include "nvme/format.hpp"
#include "store_fixture.hpp"

namespace lmcn {
namespace {

class Locate : public StoreTest {
 protected:
  void SetUp() override {
    StoreTest::SetUp();
    options.directories = {path(0), path(1)};
    options.nvme_bytes = 2 * (24 << 20);
    options.region_bytes = 4 << 20;
  }
  std::string path(std::uint32_t i) const { return (root / ("nvme" + std::to_string(i))).string(); }

  // As a worker would: a descriptor of its own.
  nvme::PageBuffer read(const RecordPlace& place) const {
    nvme::PageBuffer image(place.image_bytes / kPageBytes);
    const int fd = ::open((path(place.path) + "/data.000").c_str(), O_RDONLY | O_CLOEXEC);
    EXPECT_GE(fd, 0);
    EXPECT_EQ(::pread(fd, image.data(), image.bytes(), static_cast<off_t>(place.offset_bytes)),
              static_cast<ssize_t>(image.bytes()));
    ::close(fd);
    return image;
  }
};

TEST_F(Locate, TheRecordIsThereForAnotherReader) {
  open();
  put_all(0, 40);
  flush();
  std::vector<ChunkKey> wanted = keys(0, 40);
  wanted.insert(wanted.begin() + 3, key(9999));  // absent
  const std::vector<RecordPlace> places = store->locate(wanted);
  ASSERT_EQ(places.size(), 40u);
  bool on_path[2] = {};
  for (const RecordPlace& place : places) {
    EXPECT_NE(place.position, 3u);
    on_path[place.path] = true;
    nvme::PageBuffer image = read(place);
    EXPECT_TRUE(verify_slot(image.data(), image.bytes(), wanted[place.position], ns).ok());
    EXPECT_EQ(slot_header(image.data())->region_sequence, place.region_sequence);
  }
  EXPECT_TRUE(on_path[0] && on_path[1]);
}

TEST_F(Locate, CountsAsAUse) {
  open();
  put_all(0, 2);
  flush();
  static_cast<void>(store->locate(keys(1, 2)));
  std::lock_guard lock(store->mu);
  EXPECT_EQ(store->index.entry(store->index.find(key(0))).hits, 0u);
  EXPECT_EQ(store->index.entry(store->index.find(key(1))).hits, 1u);
}

TEST_F(Locate, AReusedRegionShowsAnotherSequence) {
  open();
  put_all(0, 4);
  flush();
  const std::vector<RecordPlace> before = store->locate(keys(0, 4));
  ASSERT_EQ(before.size(), 4u);
  for (int i = 100; store->lookup(keys(0, 1)).hit != 0 || store->stats().reclaimed_regions < 8; ++i) {
    put(i);
    if (i % 32 == 0) flush();
    ASSERT_LT(i, 20'000);
  }
  flush();
  EXPECT_TRUE(store->locate(keys(0, 1)).empty());
  nvme::PageBuffer image = read(before[0]);
  const bool whole = verify_slot(image.data(), image.bytes(), key(0), ns).ok();
  EXPECT_FALSE(whole && slot_header(image.data())->region_sequence == before[0].region_sequence);
}

TEST_F(Locate, ARecordThatDoesNotHoldIsForgottenWhereItWas) {
  open();
  put_all(0, 4);
  flush();
  const std::vector<RecordPlace> places = store->locate(keys(0, 4));
  ASSERT_EQ(places.size(), 4u);
  RecordPlace other = places[1];
  ++other.region_sequence;
  store->record_failed(key(1), other);
  other = places[1];
  other.offset_bytes += kPageBytes;
  store->record_failed(key(1), other);
  store->record_failed(key(99), places[1]);
  EXPECT_EQ(store->locate(keys(0, 4)).size(), 4u);
  EXPECT_EQ(store->stats().corrupt_records, 0u);
  store->record_failed(key(1), places[1]);
  EXPECT_EQ(store->locate(keys(0, 4)).size(), 3u);
  EXPECT_EQ(store->stats().corrupt_records, 1u);
  EXPECT_EQ(get(1), "hit") << "host memory has it still";
  EXPECT_EQ(store->stats().hits_nvme, 11u);
}

TEST_F(Locate, WithoutPromotionWhatIsOnNvmeIsAMissThatCountsNowhere) {
  open();
  put_all(0, 4);
  evict_all(1000);
  ASSERT_TRUE(on_nvme_only(0));
  auto request = store->begin_request(ns, {.promote = false});
  EXPECT_EQ(request->lookup(key(0)), Presence::kMiss);
  EXPECT_EQ(store->stats().promotion_refusals, 0u);
  EXPECT_EQ(store->stats().promotions_in_flight, 0u);
}

TEST_F(Locate, NothingWithoutNvme) {
  options.directories = {};
  options.nvme_bytes = 0;
  open();
  put(0);
  EXPECT_TRUE(store->locate(keys(0, 1)).empty());
}

TEST_F(Locate, LeavesOutAPathThatIsQuarantined) {
  std::vector<io::FaultyEngine*> faulty;
  wrap_engine = [&faulty](std::unique_ptr<io::IoEngine> inner) {
    auto wrapped = std::make_unique<io::FaultyEngine>(std::move(inner));
    faulty.push_back(wrapped.get());
    return wrapped;
  };
  open();
  put_all(0, 20);
  flush();
  faulty[0]->add(io::Fault::fail_with(EIO));
  put_all(20, 40);
  ASSERT_TRUE(becomes([&] { return store->stats().nvme_lost_paths == 1; }));
  const std::vector<RecordPlace> places = store->locate(keys(0, 20));
  EXPECT_EQ(places.size(), 10u);
  for (const RecordPlace& place : places) EXPECT_EQ(place.path, 1u);
}

}  // namespace
}  // namespace lmcn
