// What every DeviceLoader does, whatever reads its files.
#include "load_fixture.hpp"

namespace lmcn::load_test {
namespace {

class Load : public LoadFixture {};

TEST_F(Load, RecordsReachTheirPagesForEachRank) {
  std::vector<DeviceLoadItem> items;
  for (std::uint32_t id = 0; id < 20; ++id) items.push_back(write(id));
  for (std::uint32_t rank = 0; rank < loading.rank_count; ++rank) {
    loading.rank = rank;
    make_loader();
    DeviceLoadJob job{.id = rank};
    for (const DeviceLoadItem& item : items) add(job, item);
    forget_loads();
    for (std::uint32_t id = 0; id < 20; ++id) expect_loaded(job, id, id);
    const DeviceLoadDone done = load(job);
    EXPECT_TRUE(done.ok) << (done.failed.empty() ? "" : done.failed[0].status.to_string());
    EXPECT_EQ(done.bytes, 20u * kLayers * kPlanes * kChunkTokens * kTokenBytes);
    expect_pages();
    EXPECT_TRUE(loader->notes().empty());
    EXPECT_EQ(loader->name(), name_under_test());
  }
}

TEST_F(Load, JobsAtOnceThroughAStagingMemoryOfTwoRecords) {
  loading.buffer_bytes = 2 * (static_cast<std::uint64_t>(slot.rank_bytes) + 2 * kMinSegmentBytes);
  make_loader();
  std::vector<DeviceLoadItem> items;
  for (std::uint32_t id = 0; id < 16; ++id) items.push_back(write(id));
  std::vector<DeviceLoadJob> jobs(8);
  for (std::uint32_t id = 0; id < 16; ++id) {
    jobs[id / 2].id = id / 2;
    add(jobs[id / 2], items[id]);
    expect_loaded(jobs[id / 2], id % 2, id);
  }
  std::vector<std::uint64_t> under_way;
  for (const DeviceLoadJob& job : jobs) {
    ASSERT_TRUE(loader->submit(job).ok());
    under_way.push_back(job.id);
  }
  ASSERT_TRUE(loader->wait(under_way, 60s).ok());
  const std::vector<DeviceLoadDone> done = loader->poll();
  ASSERT_EQ(done.size(), 8u);
  for (const DeviceLoadDone& one : done) EXPECT_TRUE(one.ok) << one.id;
  expect_pages();
}

TEST_F(Load, APayloadThatIsShorterThanItsPaddedImageShows) {
  make_loader();
  const std::uint64_t shorter = payload_bytes() - loading.rank_count;
  ASSERT_EQ(image_bytes(shorter), image_bytes(payload_bytes()));
  DeviceLoadJob job{.id = 1};
  add(job, write(1, shorter));
  add(job, write(2));
  expect_loaded(job, 1, 2);
  expect_failed(load(job), 0, Code::kCorruption,
                "payload of " + std::to_string(shorter) + " bytes for 3 ranks, expected " + std::to_string(payload_bytes()));
  expect_pages();
}

TEST_F(Load, APartOfAChunkFromTheMiddleOfABlock) {
  make_loader();
  DeviceLoadItem item = write(1);
  item.first_token = 5;
  item.tokens = 21;
  item.token_in_block = 3;
  DeviceLoadJob job{.id = 1};
  add(job, item);
  expect_loaded(job, 0, 1);
  EXPECT_TRUE(load(job).ok);
  expect_pages();
}

TEST_F(Load, ACorruptPayloadFailsItsItemAndTouchesNoPage) {
  make_loader();
  const std::vector<DeviceLoadItem> items{write(0), write(1), write(2)};
  idle();
  flip_byte("data.000", items[1].offset + kPageBytes + static_cast<std::uint64_t>(slot.rank_bytes) + 70'001);
  DeviceLoadJob job{.id = 1};
  for (const DeviceLoadItem& item : items) add(job, item);
  expect_loaded(job, 0, 0);
  expect_loaded(job, 2, 2);
  expect_failed(load(job), 1, Code::kCorruption, "checksum of segment");
  expect_pages();
  EXPECT_EQ(loader->name(), name_under_test());
}

TEST_F(Load, EveryByteOfTheRanksPartIsCheckedAndTheOthersAreNotRead) {
  make_loader();
  const DeviceLoadItem item = write(0);
  idle();
  const auto part = static_cast<std::uint64_t>(slot.rank_bytes);
  ASSERT_EQ(part % kMinSegmentBytes, 0u);
  for (const std::uint64_t at : {part, 2 * part - 1, part + part / 2}) {
    flip_byte("data.000", item.offset + kPageBytes + at);
    DeviceLoadJob job{.id = 1};
    add(job, item);
    expect_failed(load(job), 0, Code::kCorruption, "checksum of segment");
    flip_byte("data.000", item.offset + kPageBytes + at);
  }
  expect_pages();
  for (const std::uint64_t at : {std::uint64_t{0}, part - 1, 2 * part, 3 * part - 1}) {
    flip_byte("data.000", item.offset + kPageBytes + at);
  }
  DeviceLoadJob job{.id = 2};
  add(job, item);
  expect_loaded(job, 0, 0);
  EXPECT_TRUE(load(job).ok);
  expect_pages();
}

TEST_F(Load, ACorruptHeaderIsAMiss) {
  make_loader();
  const DeviceLoadItem item = write(0);
  idle();
  for (const std::size_t at : {offsetof(SlotHeader, magic), offsetof(SlotHeader, key), offsetof(SlotHeader, segment) + 8,
                               offsetof(SlotHeader, region_sequence)}) {
    flip_byte("data.000", item.offset + at);
    DeviceLoadJob job{.id = 1};
    add(job, item);
    expect_failed(load(job), 0, Code::kCorruption, "slot header");
    flip_byte("data.000", item.offset + at);
  }
  expect_pages();
}

TEST_F(Load, AnotherKeyNamespaceOrSequenceIsAMiss) {
  make_loader();
  const DeviceLoadItem item = write(0), other = write(1);
  DeviceLoadItem wrong_key = item, wrong_namespace = item, wrong_sequence = item, misplaced = item;
  wrong_key.key.bytes[31] ^= 1;
  wrong_namespace.ns.bytes[0] ^= 1;
  wrong_sequence.region_sequence += 1;
  misplaced.offset = other.offset;
  for (const DeviceLoadItem& wrong : {wrong_key, wrong_namespace, wrong_sequence, misplaced}) {
    DeviceLoadJob job{.id = 1};
    add(job, wrong);
    expect_failed(load(job), 0, Code::kCorruption, "another record lies at byte");
  }
  expect_pages();
}

TEST_F(Load, ARecordOfARegionThatWasReusedIsAMiss) {
  make_loader();
  const DeviceLoadItem old = write(0);
  std::uint32_t id = 1;
  while (id < 200 && write(id).offset != old.offset) ++id;
  ASSERT_FALSE(reclaims.empty());
  DeviceLoadJob job{.id = 1};
  add(job, old);
  const DeviceLoadDone done = load(job);
  ASSERT_EQ(done.failed.size(), 1u);
  EXPECT_EQ(done.failed[0].status.code(), Code::kCorruption) << done.failed[0].status.to_string();
  expect_pages();
}

TEST_F(Load, AFileThatEndsInTheRecordIsAnErrorOfThatItemOnly) {
  make_loader();
  const DeviceLoadItem whole = write(0);
  DeviceLoadItem cut = whole;
  cut.path = (root.path() / "cut").string();
  idle();
  std::filesystem::copy_file(whole.path, cut.path);
  for (const std::uint64_t end : {cut.offset + kPageBytes + payload_bytes() / 2, cut.offset + kPageBytes, cut.offset}) {
    std::filesystem::resize_file(cut.path, end);
    DeviceLoadJob job{.id = 1};
    add(job, whole);
    add(job, cut);
    expect_loaded(job, 0, 0);
    expect_failed(load(job), 1, Code::kIoError, "it ends at byte");
    expect_pages();
  }
  EXPECT_EQ(loader->name(), name_under_test()) << "the file was at fault, not what read it";
}

TEST_F(Load, ADeletedFileIsNotFoundAndANewOneAtItsPathIsRead) {
  make_loader();
  DeviceLoadItem item = write(0);
  idle();
  const std::string origin = item.path;
  item.path = (root.path() / "copy").string();
  const auto one = [&](std::uint64_t id) {
    DeviceLoadJob job{.id = id};
    add(job, item);
    return job;
  };
  expect_failed(load(one(1)), 0, Code::kNotFound, item.path);
  std::filesystem::copy_file(origin, item.path);
  DeviceLoadJob job = one(2);
  expect_loaded(job, 0, 0);
  EXPECT_TRUE(load(job).ok);
  std::filesystem::remove(item.path);
  expect_failed(load(one(3)), 0, Code::kNotFound, item.path);
  write_bytes("data.000", item.offset + kPageBytes + static_cast<std::uint64_t>(slot.rank_bytes), {1, 2, 3, 4, 5});
  std::filesystem::copy_file(origin, item.path);  // another file, whose record is damaged: an old descriptor would not see it
  expect_failed(load(one(4)), 0, Code::kCorruption, "checksum of segment");
  expect_pages();
}

TEST_F(Load, WhatCannotBeIsRefusedBeforeAnythingIsRead) {
  make_loader();
  const DeviceLoadItem good = write(0);
  const auto refused = [&](const DeviceLoadItem& item, const std::string& words) {
    DeviceLoadJob job{.id = 1};
    add(job, item);
    const Status status = loader->submit(job);
    EXPECT_EQ(status.code(), Code::kInvalidArgument);
    EXPECT_NE(status.message().find(words), std::string::npos) << status.message();
  };
  DeviceLoadItem item = good;
  item.offset += 1;
  refused(item, "offset is " + std::to_string(item.offset));
  item = good;
  item.image_bytes += kPageBytes;
  refused(item, "image_bytes is " + std::to_string(item.image_bytes));
  item = good;
  item.tokens = kChunkTokens + 1;
  refused(item, "a chunk has 64");
  DeviceLoadJob job{.id = 1};
  add(job, good);
  job.block_ids[0] = kBlocks;
  EXPECT_EQ(loader->submit(job).code(), Code::kInvalidArgument);
  DeviceLoadJob empty{.id = 2};
  EXPECT_TRUE(load(empty).ok);
  expect_pages();

  const auto made = [&](DeviceLoaderOptions wrong) { return make_device_loader(layout, slot, wrong).status().message(); };
  DeviceLoaderOptions wrong = loading;
  wrong.buffer_bytes = 4096;
  EXPECT_NE(made(wrong).find("buffer_bytes is 4096"), std::string::npos);
  wrong = loading;
  wrong.rank = 3;
  EXPECT_NE(made(wrong).find("rank is 3 of 3"), std::string::npos);
  wrong = loading;
  wrong.in_flight = 0;
  EXPECT_NE(made(wrong).find("in_flight is 0"), std::string::npos);
}

// ---- races

class LoadRace : public LoadFixture {
 protected:
  void SetUp() override {
    make_loader();
    add(job_, write(0));
    add(job_, write(1));
  }
  void expect_all_failed(const DeviceLoadDone& done, Code code) {
    EXPECT_EQ(done.failed.size(), job_.items.size());
    for (const DeviceLoadFailure& one : done.failed) EXPECT_EQ(one.status.code(), code) << one.status.to_string();
  }
  /// The loader's threads have ended; their late bytes would be in pages by now.
  void let_go(const char* point) {
    SeqPoints::release(point);
    loader.reset();
    expect_pages();
  }
  DeviceLoadJob job_{.id = 9};
  SeqPointScope scope_;
};

TEST_F(LoadRace, ACancelledJobEndsAtOnceAndItsReadsAreDropped) {
  for (const char* point : {"device_load.before_read", "device_load.verified"}) {
    if (!loader) make_loader();
    SeqPoints::hold(point);
    ASSERT_TRUE(loader->submit(job_).ok());
    ASSERT_TRUE(SeqPoints::wait_until_reached(point, 60s, 2));
    const std::uint64_t id[] = {9};
    loader->cancel(id);
    expect_all_failed(result(9), Code::kAborted);
    let_go(point);
  }
}

TEST_F(LoadRace, AJobEndsAtItsDeadlineThoughNoReadDoes) {
  SeqPoints::hold("device_load.before_read");
  job_.deadline = std::chrono::steady_clock::now() + 5ms;
  ASSERT_TRUE(loader->submit(job_).ok());
  expect_all_failed(result(9), Code::kDeadlineExceeded);
  let_go("device_load.before_read");
}

TEST_F(LoadRace, ADeadlineOfThePastTouchesNothing) {
  job_.deadline = std::chrono::steady_clock::now() - 1s;
  SeqPoints::hold("device_load.before_read");
  expect_all_failed(load(job_), Code::kDeadlineExceeded);
  let_go("device_load.before_read");
}

TEST_F(LoadRace, WhatIsOnItsWayToPagesIsWaitedFor) {
  SeqPoints::hold("device_load.moving");
  job_.deadline = std::chrono::steady_clock::now() + 1h;
  ASSERT_TRUE(loader->submit(job_).ok());
  ASSERT_TRUE(SeqPoints::wait_until_reached("device_load.moving", 60s, 2));
  const std::uint64_t id[] = {9};
  loader->cancel(id);
  EXPECT_EQ(loader->wait(id, 0ms).code(), Code::kDeadlineExceeded);
  EXPECT_EQ(loader->submit(job_).code(), Code::kInvalidArgument) << "its id is in use";
  expect_loaded(job_, 0, 0);
  expect_loaded(job_, 1, 1);
  SeqPoints::release("device_load.moving");
  EXPECT_TRUE(result(9).ok);
  expect_pages();
}

TEST_F(LoadRace, ALoaderThatGoesAwayTouchesNoMorePages) {
  SeqPoints::hold("device_load.verified");
  SeqPoints::hold("device_load.stopping");
  ASSERT_TRUE(loader->submit(job_).ok());
  ASSERT_TRUE(SeqPoints::wait_until_reached("device_load.verified", 60s, 2));
  std::thread destroys([&] { loader.reset(); });
  const bool stopping = SeqPoints::wait_until_reached("device_load.stopping", 60s);
  SeqPoints::release("device_load.verified");
  SeqPoints::release("device_load.stopping");
  destroys.join();
  EXPECT_TRUE(stopping);
  expect_pages();
}

}  // namespace
}  // namespace lmcn::load_test
