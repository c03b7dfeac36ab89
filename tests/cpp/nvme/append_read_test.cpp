#include "log_fixture.hpp"

namespace lmcn::nvme {
namespace {

class AppendRead : public LogFixture, public testing::WithParamInterface<io::EngineKind> {
 protected:
  AppendRead() { use_engine(GetParam()); }
};
INSTANTIATE_TEST_SUITE_P(Engines, AppendRead, testing::Values(io::EngineKind::kThreads, io::EngineKind::kIoUring),
                         [](const auto& info) { return info.param == io::EngineKind::kThreads ? "threads" : "io_uring"; });

TEST_P(AppendRead, RoundTrip) {
  open();
  put_many(0, 10);
  expect_readable(0, 10);
}

TEST_P(AppendRead, RecordSizes) {
  open();
  const std::vector<std::uint64_t> sizes{1, 100, 4095, 4096, 4097, 65536, 65537, 200'001, 252 * kKiB};
  for (std::uint32_t id = 0; id < sizes.size(); ++id) ASSERT_EQ(put(id, sizes[id]).to_string(), "ok") << sizes[id];
  expect_readable(0, static_cast<std::uint32_t>(sizes.size()));
  kill_and_open();
  expect_readable(0, static_cast<std::uint32_t>(sizes.size()));
}

TEST_P(AppendRead, ManyAtOnce) {
  open();
  std::vector<std::future<Put>> puts;
  for (std::uint32_t id = 0; id < 60; ++id) puts.push_back(start_put(id));
  for (std::uint32_t id = 0; id < 60; ++id) {
    const Put result = puts[id].get();
    ASSERT_TRUE(result.status.ok()) << result.status.to_string();
    index[id] = result.extent;
  }
  expect_readable(0, 60);
  EXPECT_EQ(log->stats().appended_records, 60u);
}

TEST_P(AppendRead, WrongKeyIsAMiss) {
  open();
  put_many(0, 2);
  EXPECT_EQ(read(index[0], 1).code(), Code::kCorruption);
  EXPECT_EQ(log->stats().misplaced_reads, 1u);
  EXPECT_EQ(log->stats().corrupt_reads, 0u);
  EXPECT_EQ(log->stats().read_errors, 0u);
}

TEST_P(AppendRead, ImpossibleExtentsAreRefused) {
  open();
  put_many(0, 1);
  for (const Extent extent : {Extent{}, Extent{1000, 1, 11}, Extent{0, 0, 11}, Extent{0, 1, 0}, Extent{0, 1, 1}, Extent{0, 250, 11},
                              Extent{0, 0xFFFFFFFFu, 2}, Extent{0, 1, 0xFFFFFFFFu}}) {
    PageBuffer image(1);
    Status status;
    log->read(extent, image.data(), key_of(0), &kTestNamespace, [&](const Status& s) { status = s; });
    EXPECT_EQ(status.code(), Code::kInvalidArgument) << extent.region << " " << extent.page << " " << extent.pages;
    log->forget(extent);
  }
  // Possible, but nothing was ever there.
  EXPECT_EQ(read(Extent{0, 100, 11}, 0).code(), Code::kCorruption);
  EXPECT_EQ(read(Extent{6, 1, 11}, 0).code(), Code::kCorruption);
  expect_readable(0, 1);
}

TEST_P(AppendRead, OnlySlotImagesAreTaken) {
  open();
  PageBuffer image = make_image(0, 8192);
  const auto append = [&](std::byte* data, std::uint64_t bytes) {
    return log->append(data, bytes, 0, [](const Status&, Extent) { FAIL() << "done() of a refused append"; });
  };
  EXPECT_EQ(append(image.data(), 2 * kPageBytes).code(), Code::kInvalidArgument);
  EXPECT_EQ(append(image.data(), kPageBytes).code(), Code::kInvalidArgument);
  EXPECT_EQ(append(image.data() + 64, 3 * kPageBytes).code(), Code::kInvalidArgument);
  slot_header(image.data())->magic = 0;
  EXPECT_EQ(append(image.data(), 3 * kPageBytes).code(), Code::kInvalidArgument);
  PageBuffer large = make_image(0, 256 * kKiB);
  EXPECT_EQ(append(large.data(), large.bytes()).code(), Code::kInvalidArgument);
}

TEST_P(AppendRead, LiveBytesFollowForget) {
  open();
  put_many(0, 3);
  EXPECT_EQ(log->stats().live_record_bytes, 3 * 44 * kKiB);
  log->forget(index[1]);
  EXPECT_EQ(log->stats().live_record_bytes, 2 * 44 * kKiB);
  index.erase(1);
  reopen();
  EXPECT_EQ(log->stats().live_record_bytes, 2 * 44 * kKiB);
}

TEST_P(AppendRead, MaintainSyncsWhatIsDirty) {
  open();
  put_many(0, 1);
  ASSERT_TRUE(log->maintain().ok());
  idle();
  EXPECT_GE(log->stats().syncs, 1u);
  ASSERT_TRUE(log->maintain().ok());  // regions prepared by the first call
  idle();
  const std::uint64_t syncs = log->stats().syncs;
  ASSERT_TRUE(log->maintain().ok());
  idle();
  EXPECT_EQ(log->stats().syncs, syncs) << "synced although clean";
}

TEST_P(AppendRead, NothingAfterClose) {
  open();
  put_many(0, 1);
  const Extent extent = index[0];
  ASSERT_TRUE(log->close(entries()).ok());
  EXPECT_EQ(read(extent, 0).code(), Code::kUnavailable);
  EXPECT_EQ(put(1).code(), Code::kUnavailable);
  EXPECT_TRUE(log->close(entries()).ok());
}

// L3: a walk stops at the first header that does not hold, so a record counts as written only when all before it ended.
TEST_F(LogFixture, AcknowledgedInTheOrderOfARegion) {
  open();
  put_many(0, 1);
  engine->add(io::Fault::hold().on(io::Op::kWrite).only(1));
  std::future<Put> first = start_put(1);
  ASSERT_TRUE(engine->wait_withheld(1));
  std::future<Put> second = start_put(2);
  // The second write has ended when a read of it is ok; its done() has not run.
  const Extent behind{0, index[0].page + 2 * index[0].pages, index[0].pages};
  while (!read(behind, 2).ok()) {
  }
  EXPECT_EQ(second.wait_for(std::chrono::seconds(0)), std::future_status::timeout);
  engine->release();
  EXPECT_TRUE(first.get().status.ok());
  EXPECT_EQ(second.get().extent, behind);
}

}  // namespace
}  // namespace lmcn::nvme
