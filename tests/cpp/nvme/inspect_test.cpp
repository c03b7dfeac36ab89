// Looking at, verifying and clearing stores that nobody has open.
#include "inspect_fixture.hpp"

namespace lmcn::nvme {
namespace {

TEST_F(Inspect, SaysWhatOpenWouldFind) {
  open();
  put_many(0, kRecords);
  put_many(0, 5);  // supersede five
  ASSERT_TRUE(close().ok());
  const Snapshot before = snapshot();
  const Inspection found = inspect(true);
  EXPECT_EQ(found.live.records, kRecords);
  EXPECT_EQ(found.live.bytes, kRecords * 11 * kPageBytes);
  EXPECT_EQ(found.dead_bytes, 5 * 11 * kPageBytes);
  EXPECT_EQ(found.limit_bytes, options.limit_bytes);
  EXPECT_EQ(found.totals.records, kRecords + 5);
  EXPECT_EQ(found.totals.first_bytes, (kRecords + 5) * 11 * kPageBytes);
  EXPECT_EQ(found.totals.reappended_bytes, 0u);
  EXPECT_NE(found.created_unix_s, 0u);
  EXPECT_EQ(found.totals.since_unix_s, found.created_unix_s);
  ASSERT_EQ(found.namespaces.size(), 1u);
  EXPECT_EQ(found.namespaces[0].tally.records, kRecords);
  EXPECT_EQ(found.ages.back().records, 0u);  // unknown
  EXPECT_EQ(found.hits[0].records, kRecords);
  EXPECT_EQ(std::string(found.regions.at(0).state), "sealed");
  EXPECT_EQ(std::string(found.regions.at(2).state), "open");
  EXPECT_EQ(snapshot(), before) << "inspect wrote something";
  open();
  EXPECT_EQ(index.size(), kRecords);
}

TEST_F(Inspect, TotalsAndHitsSurviveRestarts) {
  open();
  put_many(0, 10);
  const Status closed = log->close([this](const RegionLog::EntrySink& sink) {
    for (const auto& [id, extent] : index) sink(key_of(id), extent, static_cast<std::uint16_t>(id));
  });
  ASSERT_TRUE(closed.ok());
  log.reset();
  Inspection found = inspect();
  EXPECT_EQ(found.hits[0].records, 1u);
  EXPECT_EQ(found.hits[1].records, 1u);  // 1
  EXPECT_EQ(found.hits[2].records, 2u);  // 2, 3
  EXPECT_EQ(found.hits[3].records, 4u);  // 4..7
  EXPECT_EQ(found.hits[4].records, 2u);  // 8, 9
  const std::uint64_t since = found.totals.since_unix_s;
  open();
  for (const RecoveredRecord& record : recovered) EXPECT_EQ(record.hits, id_of(record.key));
  PageBuffer again = make_image(0, 40 * kKiB);
  std::promise<void> done;
  ASSERT_TRUE(log->append(again.data(), again.bytes(), 0, [&](const Status&, Extent) { done.set_value(); }, true).ok());
  done.get_future().wait();
  ASSERT_TRUE(close().ok());
  found = inspect();
  EXPECT_EQ(found.totals.records, 11u);
  EXPECT_EQ(found.totals.first_bytes, 10 * 11 * kPageBytes);
  EXPECT_EQ(found.totals.reappended_bytes, 11 * kPageBytes);
  EXPECT_EQ(found.totals.since_unix_s, since);
}

// Version 1 had zeros where times, hits and totals are now.
TEST_F(Inspect, AStoreOfBeforeTheNewFieldsIsReadWhole) {
  open();
  put_many(0, kRecords);
  ASSERT_TRUE(close().ok());
  const auto reset = [this](const char* name, std::uint64_t at, auto page, auto change) {
    std::vector<char> bytes = bytes_of(name);
    std::memcpy(static_cast<void*>(&page), bytes.data() + at, sizeof page);
    change(page);
    seal_page(page);
    std::memcpy(bytes.data() + at, &page, sizeof page);
    write_file(name, bytes);
  };
  reset("superblock", 0, Superblock{}, [](Superblock& page) { page.created_unix_s = 0; });
  reset("index.ckpt", 0, CheckpointHeader{}, [](CheckpointHeader& page) { page.totals = {}, page.limit_bytes = 0; });
  for (const std::uint64_t region : {0, 1, 2}) {
    reset("data.000", region * options.region_bytes, RegionHeader{}, [](RegionHeader& page) { page.opened_unix_s = 0; });
  }
  const Inspection found = inspect();
  EXPECT_EQ(found.live.records, kRecords);
  EXPECT_EQ(found.ages.back().records, kRecords) << "unknown";
  EXPECT_EQ(found.created_unix_s + found.limit_bytes + found.totals.since_unix_s, 0u);
  EXPECT_EQ(clear({.older_than_s = 0})->regions_of_unknown_age, 3u);
  open();
  EXPECT_EQ(log->stats().recovered_from_checkpoint, kRecords);
  EXPECT_NE(log->stats().lifetime.since_unix_s, 0u);
  expect_readable(0, kRecords);
}

TEST_F(Inspect, RefusesWhatItMayNotTouch) {
  EXPECT_EQ(refusal().code(), Code::kNotFound);
  EXPECT_FALSE(std::filesystem::exists(options.directory)) << "inspect made the directory";
  open();
  put_many(0, 3);
  for (const Access access : {Access::kLook, Access::kChange}) {
    const Status in_use = refusal(access);
    EXPECT_EQ(in_use.code(), Code::kLocked);
    EXPECT_NE(in_use.message().find(std::to_string(::getpid())), std::string::npos) << in_use.to_string();
  }
  kill();
  {
    const auto looking = files();
    EXPECT_TRUE(refusal(Access::kLook).ok());
    EXPECT_EQ(refusal(Access::kChange).code(), Code::kLocked);
  }
  const std::string directory = options.directory;
  std::filesystem::create_symlink(directory, root.path() / "link");
  options.directory = (root.path() / "link").string() + "/";
  EXPECT_NE(refusal().message().find("symbolic link"), std::string::npos) << refusal().to_string();
  options.directory = directory;
  flip_byte("superblock", 8);
  EXPECT_EQ(refusal().code(), Code::kFormatVersion);
  flip_byte("superblock", 8);
  flip_byte("superblock", 50);
  EXPECT_EQ(refusal().code(), Code::kCorruption);
}

TEST_F(Inspect, VerifyNamesEachBadRecordAndItsCheck) {
  open();
  put_many(0, kRecords);
  ASSERT_TRUE(close().ok());
  EXPECT_TRUE(verify().bad.empty());
  EXPECT_EQ(verify().verified.records, kRecords);
  const auto at = [this](std::uint32_t id, std::uint64_t offset) {
    return index[id].region * options.region_bytes + index[id].page * kPageBytes + offset;
  };
  flip_byte("data.000", at(4, kPageBytes + 20'000));
  flip_byte("data.000", at(30, 20));
  // A whole record, but another's place: copy record 51 over 50.
  const std::vector<char> data = bytes_of("data.000");
  const auto from = data.begin() + static_cast<std::ptrdiff_t>(at(51, 0));
  write_bytes("data.000", at(50, 0), {from, from + 11 * 4096});
  const Snapshot before = snapshot();
  const VerifyReport report = verify();
  EXPECT_EQ(snapshot(), before) << "verify wrote something";
  ASSERT_EQ(report.bad.size(), 3u);
  EXPECT_EQ(report.bad[0].key, key_of(4));
  EXPECT_STREQ(report.bad[0].check, "payload");
  EXPECT_EQ(report.bad[0].page, index[4].page);
  EXPECT_EQ(report.bad[1].key, key_of(30));
  EXPECT_STREQ(report.bad[1].check, "header");
  EXPECT_EQ(report.bad[2].key, key_of(50));
  EXPECT_STREQ(report.bad[2].check, "key");
  EXPECT_EQ(report.verified.records, kRecords - 3);
}

TEST_F(Inspect, VerifyStopsWhenAsked) {
  open();
  put_many(0, kRecords);
  ASSERT_TRUE(close().ok());
  engine->add(io::Fault::hold()
                  .on(io::Op::kRead)
                  .in_range(index[40].region * options.region_bytes + index[40].page * kPageBytes,
                            index[40].region * options.region_bytes + index[40].page * kPageBytes + 1));
  bool asked = false;
  const auto report = files()->verify([&](const Tally&, const Tally&) {
    if (!asked) {
      engine->clear();
      engine->release();
    }
    asked = true;
    return false;
  });
  ASSERT_TRUE(report.ok());
  EXPECT_TRUE(asked);
  EXPECT_TRUE(report->stopped);
}

TEST_F(Inspect, ClearAll) {
  open();
  put_many(0, kRecords);
  ASSERT_TRUE(close().ok());
  const std::uint64_t records = inspect().totals.records;
  const auto report = clear({});
  ASSERT_TRUE(report.ok()) << report.status().to_string();
  EXPECT_EQ(report->cleared.records, kRecords);
  EXPECT_GE(report->freed_bytes, 3 * options.region_bytes);
  EXPECT_EQ(inspect().totals.records, records);
  open();
  EXPECT_TRUE(recovered.empty());
  put_many(0, 30);
  kill_and_open();
  expect_readable(0, 30);
  expect_no_lies();
}

TEST_F(Inspect, ClearByAgeDropsWholeRegions) {
  open();
  put_many(0, kRecords);
  ASSERT_TRUE(close().ok());
  auto report = clear({.older_than_s = 3600});
  ASSERT_TRUE(report.ok());
  EXPECT_EQ(report->cleared.records, 0u);
  // Make region 0 two hours old, and region 1 of unknown age, as a store of before would be.
  std::vector<char> data = bytes_of("data.000");
  for (const std::uint32_t region : {0u, 1u}) {
    RegionHeader header;
    std::memcpy(static_cast<void*>(&header), data.data() + region * options.region_bytes, sizeof header);
    header.opened_unix_s = region == 0 ? header.opened_unix_s - 7200 : 0;
    seal_page(header);
    std::memcpy(data.data() + region * options.region_bytes, &header, sizeof header);
  }
  write_file("data.000", data);
  report = clear({.older_than_s = 3600});
  ASSERT_TRUE(report.ok());
  EXPECT_EQ(report->cleared.records, 23u);
  EXPECT_EQ(report->regions_dropped, 1u);
  EXPECT_EQ(report->regions_of_unknown_age, 1u);
  std::filesystem::remove(file("index.ckpt"));
  open();
  EXPECT_EQ(index.size(), kRecords - 23);
  expect_no_lies();
  put_many(100, 130);
  kill_and_open();
  expect_readable(23, kRecords);
  expect_readable(100, 130);
}

TEST_F(Inspect, SequencesOfDroppedRegionsAreNotUsedAgain) {
  open();
  put_many(0, kRecords);
  ASSERT_TRUE(close().ok());
  std::set<std::uint64_t> used;
  for (const RegionReport& region : inspect().regions) {
    if (region.records != 0) {
      used.insert(region.sequence);
    } else {  // as if its header had been lost: nothing else shows a higher sequence
      write_bytes("data.000", region.region * options.region_bytes, std::vector<char>(kPageBytes));
    }
  }
  const auto report = clear({.older_than_s = 0});
  ASSERT_TRUE(report.ok()) << report.status().to_string();
  EXPECT_EQ(report->cleared.records, kRecords);
  std::filesystem::remove(file("index.ckpt"));
  open();
  EXPECT_TRUE(recovered.empty());
  index.clear();
  put_many(0, kRecords);
  ASSERT_TRUE(close().ok());
  for (const RegionReport& region : inspect().regions) {
    EXPECT_TRUE(region.records == 0 || !used.contains(region.sequence)) << region.region;
  }
  EXPECT_EQ(inspect().live.records, kRecords);
}

/// Bool: whether a checkpoint of all records is there.
class ClearNamespace : public Inspect, public testing::WithParamInterface<bool> {
 protected:
  static std::size_t nines() {
    std::size_t count = 0;
    for (std::uint32_t id = 0; id < kRecords; ++id) count += is_nine(id) ? 1 : 0;
    return count;
  }
};
INSTANTIATE_TEST_SUITE_P(Checkpoint, ClearNamespace, testing::Bool());

TEST_P(ClearNamespace, IsGoneWhateverIsLostAfterwards) {
  make_mixed_store(GetParam());
  const auto report = clear({.ns = namespace_of(9)});
  ASSERT_TRUE(report.ok()) << report.status().to_string();
  EXPECT_EQ(report->cleared.records, nines());
  EXPECT_EQ(report->regions_dropped, 1u);
  const Snapshot cleared = snapshot();
  const std::pair<std::size_t, std::size_t> expected(0, kRecords - nines());
  EXPECT_EQ(open_and_count(), expected);
  restore(cleared);
  std::filesystem::remove(file("index.ckpt"));
  EXPECT_EQ(open_and_count(), expected) << "without the checkpoint";
  restore(cleared);
  std::filesystem::remove(file("index.ckpt"));
  for (const std::uint64_t region : {0, 1, 2}) flip_byte("data.000", (region + 1) * options.region_bytes - 1);
  EXPECT_EQ(open_and_count(), expected) << "without footers";
  EXPECT_EQ(verify().bad.size(), 0u);
}

// A death before any of its writes: what the next open finds is whole, and clearing again finishes.
TEST_P(ClearNamespace, HalfDoneIsMoreOrLessNeverWrong) {
  make_mixed_store(GetParam());
  const Snapshot whole = snapshot();
  const std::size_t others = kRecords - nines();
  std::uint64_t deaths = 0;
  for (bool died = true; died; ++deaths) {
    ASSERT_LT(deaths, 200u);
    for (const bool checkpoint_lost : {false, true}) {
      restore(whole);
      DyingEngine dying(*engine, deaths);
      const auto report = files(Access::kChange, dying)->clear({.ns = namespace_of(9)});
      died = dying.died();
      EXPECT_EQ(report.ok(), !died) << deaths;
      if (checkpoint_lost) std::filesystem::remove(file("index.ckpt"));
      const Snapshot half = snapshot();
      const auto [left, kept] = open_and_count();
      EXPECT_LE(left, nines());
      EXPECT_EQ(kept, others) << "death " << deaths;
      EXPECT_TRUE(died || left == 0);
      restore(half);
      ASSERT_TRUE(clear({.ns = namespace_of(9)}).ok());
      EXPECT_EQ(open_and_count(), std::pair(std::size_t{0}, others)) << "death " << deaths;
      std::filesystem::remove(file("index.ckpt"));
      EXPECT_EQ(open_and_count(), std::pair(std::size_t{0}, others)) << "death " << deaths;
    }
  }
  EXPECT_GT(deaths, 15u);
}

}  // namespace
}  // namespace lmcn::nvme
