// What clearing leaves behind: nothing that comes back, after a death, a lost checkpoint or a torn record; and the day's bytes.
#include "inspect_fixture.hpp"

namespace lmcn::nvme {
namespace {

class Clear : public Inspect {
 protected:
  std::uint64_t place(Extent extent, std::uint64_t offset = 0) const {
    return extent.region * options.region_bytes + extent.page * kPageBytes + offset;
  }
  /// Record 0; in a second life 1, 2 (torn) and 3. Nothing shows record 3.
  void make_torn_store() {
    open();
    put_in(0, namespace_of(7));
    kill();
    open();
    for (std::uint32_t id = 1; id <= 3; ++id) put_in(id, namespace_of(9));
    torn = index[2];
    kill();
    flip_byte("data.000", place(torn, 20));
  }
  Extent torn;
};

TEST_F(Clear, KeepsTheDaysBytes) {
  open();
  put_many(0, kRecords);
  ASSERT_TRUE(close().ok());
  open();
  const std::uint64_t before = log->last_day_bytes();
  EXPECT_GE(before, kRecords * 11 * kPageBytes);
  kill();
  ASSERT_TRUE(clear({}).ok());
  open();
  EXPECT_GE(log->last_day_bytes(), before);
}

TEST_F(Clear, DyingKeepsTheTotals) {
  open();
  put_many(0, kRecords);
  ASSERT_TRUE(close().ok());
  const std::uint64_t records = inspect().totals.records;
  const Snapshot whole = snapshot();
  std::uint64_t deaths = 0;
  for (bool died = true; died; ++deaths) {
    ASSERT_LT(deaths, 50u);
    restore(whole);
    DyingEngine dying(*engine, deaths);
    (void)files(Access::kChange, dying)->clear({});
    died = dying.died();
    EXPECT_EQ(inspect().totals.records, records) << "death " << deaths;
  }
  EXPECT_GT(deaths, 3u);
}

TEST_F(Clear, WhatATornRecordHidDoesNotComeBack) {
  make_torn_store();
  ASSERT_TRUE(clear({.ns = namespace_of(9)}).ok());
  open();
  EXPECT_EQ(index.size(), 1u);
  put_in(4, namespace_of(7));
  ASSERT_EQ(index[4], torn) << "the place that record 3 would be reached from";
  kill();
  open();
  EXPECT_TRUE(index.contains(4));
  EXPECT_FALSE(index.contains(3));
}

TEST_F(Clear, WhatATornRecordHidDoesNotComeBackWhenNothingWasFound) {
  open();
  put_in(0, namespace_of(7));
  kill();
  open();
  for (std::uint32_t id = 2; id <= 3; ++id) put_in(id, namespace_of(9));
  torn = index[2];
  kill();
  flip_byte("data.000", place(torn, 20));
  const auto report = clear({.ns = namespace_of(9)});
  ASSERT_TRUE(report.ok());
  EXPECT_EQ(report->cleared.records, 0u);
  open();
  put_in(4, namespace_of(7));
  ASSERT_EQ(index[4], torn);
  kill();
  open();
  EXPECT_FALSE(index.contains(3));
}

TEST_F(Clear, AWalkBehindACheckpointTakesNoLeftovers) {
  make_torn_store();
  open();
  EXPECT_FALSE(index.contains(3));
  put_in(4, namespace_of(7));
  ASSERT_EQ(index[4], torn);
  idle();
  ASSERT_TRUE(checkpoint().ok());
  kill();
  open();
  EXPECT_GE(log->stats().recovered_from_checkpoint, 3u);
  EXPECT_TRUE(index.contains(4));
  EXPECT_FALSE(index.contains(3));
}

// Once the checkpoint is replaced, what goes whole is gone.
TEST_F(Clear, HalfDoneIsDoneOnceTheCheckpointIsReplaced) {
  open();
  put_many(0, kRecords);
  ASSERT_TRUE(close().ok());
  const Snapshot whole = snapshot();
  std::uint64_t replaced = 0;
  std::uint64_t deaths = 0;
  for (bool died = true; died; ++deaths) {
    ASSERT_LT(deaths, 50u);
    restore(whole);
    DyingEngine dying(*engine, deaths);
    (void)files(Access::kChange, dying)->clear({.older_than_s = 0});
    died = dying.died();
    const bool done = bytes_of("index.ckpt") != whole.at("index.ckpt");
    replaced += done && died ? 1 : 0;
    open();
    EXPECT_EQ(index.size(), done ? 0 : kRecords) << "death " << deaths;
    put_many(0, 3);
    kill_and_open();
    expect_readable(0, 3);
    kill();
  }
  EXPECT_GT(replaced, 2u);
}

// A retry finds also what the first one took out of the footers and had no time to destroy.
TEST_F(Clear, ARetryFinishes) {
  make_mixed_store(true);
  const Snapshot whole = snapshot();
  std::uint64_t deaths = 0;
  for (bool died = true; died; ++deaths) {
    ASSERT_LT(deaths, 200u);
    restore(whole);
    DyingEngine dying(*engine, deaths);
    (void)files(Access::kChange, dying)->clear({.ns = namespace_of(9)});
    died = dying.died();
    ASSERT_TRUE(clear({.ns = namespace_of(9)}).ok());
    std::filesystem::remove(file("index.ckpt"));
    for (const std::uint64_t region : {0, 1, 2}) flip_byte("data.000", (region + 1) * options.region_bytes - 1);
    EXPECT_EQ(open_and_count().first, 0u) << "death " << deaths << ", footers lost";
  }
  EXPECT_GT(deaths, 15u);
}

TEST_F(Clear, APartSaysWhatItCouldNotRead) {
  make_mixed_store(false);
  engine->add(io::Fault::fail_with(EIO).on(io::Op::kRead).in_range(options.region_bytes, options.region_bytes + 1));
  for (const ClearRequest& request : {ClearRequest{.ns = namespace_of(9)}, ClearRequest{.older_than_s = 0}}) {
    const auto report = clear(request);
    ASSERT_TRUE(report.ok()) << report.status().to_string();
    EXPECT_EQ(report->unreadable_regions, 1u);
    EXPECT_GE(report->read_errors, 1u);
  }
}

TEST_F(Clear, ARegionThatWasNotReadWholeDoesNotGoWhole) {
  make_mixed_store(false);
  // Region 1 has nothing but namespace 9; its footer cannot be read, and its walk ends at record 30.
  const std::uint64_t footer = 2 * options.region_bytes - kPageBytes;
  engine->add(io::Fault::fail_with(EIO).on(io::Op::kRead).in_range(footer, footer + 1));
  engine->add(io::Fault::fail_with(EIO).on(io::Op::kRead).in_range(place(index[30]), place(index[30]) + 1));
  const auto report = clear({.ns = namespace_of(9)});
  engine->clear();
  ASSERT_TRUE(report.ok()) << report.status().to_string();
  EXPECT_GE(report->read_errors, 2u);
  EXPECT_EQ(report->regions_dropped, 0u);
}

TEST_F(Clear, AllNeedsTheSuperblockOnly) {
  open();
  put_many(0, 3);
  ASSERT_TRUE(close().ok());
  ASSERT_EQ(::truncate(file("data.000").c_str(), static_cast<off_t>(options.region_bytes)), 0);
  const auto clear_unreadable = [&](const ClearRequest& request) {
    const auto opened = files(Access::kChange);  // the superblock is read
    engine->add(io::Fault::fail_with(EIO).on(io::Op::kRead).in_range(0, 1));
    auto report = opened->clear(request);
    engine->clear();
    return report;
  };
  EXPECT_EQ(clear_unreadable({.older_than_s = 0}).status().code(), Code::kIoError);
  const auto report = clear_unreadable({});
  ASSERT_TRUE(report.ok()) << report.status().to_string();
  open();
  EXPECT_TRUE(index.empty());
}

}  // namespace
}  // namespace lmcn::nvme
