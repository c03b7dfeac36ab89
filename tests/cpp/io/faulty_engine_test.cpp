// Every fault is seen, is counted, and does to the file and to memory what it says.
#include "io_support.hpp"

namespace lmcn::io {
namespace {

class FaultyEngineTest : public EngineTest {
 protected:
  static constexpr std::uint64_t kBytes = 4 * kPage;

  void SetUp() override {
    EngineTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    old_.fill(1);
    new_.fill(2);
    ASSERT_TRUE(run(write_of(fd(), old_.data(), kBytes, 0)).status("write").ok());
  }
  IoResult write(std::uint64_t offset = 0) { return run(write_of(fd(), new_.data(), kBytes, offset)); }
  IoResult read(std::uint64_t offset = 0) { return run(read_of(fd(), back_.data(), kBytes, offset)); }
  /// The file has `from_new` bytes of the new content, then the old one.
  void expect_file(std::uint64_t from_new) {
    ASSERT_EQ(::pread(fd(), back_.data(), kBytes, 0), static_cast<ssize_t>(kBytes));
    EXPECT_TRUE(same(back_.data(), new_.data(), from_new));
    EXPECT_TRUE(same(back_.data() + from_new, old_.data() + from_new, kBytes - from_new));
  }

  Memory old_{kBytes}, new_{kBytes}, back_{kBytes};
};
INSTANTIATE_TEST_SUITE_P(Engines, FaultyEngineTest, ::testing::Values(kFaultyUring, kFaultyThreads), case_name);

TEST_P(FaultyEngineTest, NamesItsInnerEngine) {
  EXPECT_EQ(engine_->name(), std::string("faulty(") + (GetParam().kind == EngineKind::kThreads ? "threads)" : "io_uring)"));
}

TEST_P(FaultyEngineTest, ShortRead) {
  faulty_->add(Fault::short_by(100).on(Op::kRead));
  back_.fill(7);
  const Memory before(kBytes);
  before.fill(7);
  const IoResult result = read();
  EXPECT_EQ(result.error, 0);
  EXPECT_EQ(result.actual, kBytes - 100);
  EXPECT_EQ(result.status("read").code(), Code::kIoError);
  EXPECT_TRUE(same(back_.data(), old_.data(), kBytes - 100));
  EXPECT_TRUE(same(back_.data() + kBytes - 100, before.data() + kBytes - 100, 100));
  EXPECT_EQ(faulty_->counts().shortened, 1u);
}

TEST_P(FaultyEngineTest, ShortWrite) {
  faulty_->add(Fault::short_by(kPage + 100));
  const IoResult result = write();
  EXPECT_EQ(result.error, 0);
  EXPECT_EQ(result.actual, kBytes - kPage - 100);
  EXPECT_FALSE(result.status("write").ok());
  expect_file(kBytes - kPage - 100);
}

TEST_P(FaultyEngineTest, Errors) {
  faulty_->add(Fault::fail_with(EIO).on(Op::kRead));
  faulty_->add(Fault::fail_with(ENOSPC).on(Op::kWrite));
  faulty_->add(Fault::fail_with(EROFS).on(Op::kSync));
  EXPECT_EQ(read().error, EIO);
  const IoResult result = write();
  EXPECT_EQ(result.error, ENOSPC);
  EXPECT_EQ(result.expected, kBytes);
  EXPECT_EQ(result.actual, 0u);
  EXPECT_EQ(run(sync_of(fd())).error, EROFS);
  expect_file(0);
  EXPECT_EQ(faulty_->counts().failed, 3u);
  faulty_->clear();
  EXPECT_TRUE(write().status("write").ok());
  expect_file(kBytes);
}

TEST_P(FaultyEngineTest, FlippedBit) {
  faulty_->add(Fault::flip_bit(5000, 0x40));
  EXPECT_TRUE(read().status("read").ok());
  EXPECT_EQ(back_.data()[5000], old_.data()[5000] ^ std::byte{0x40});
  back_.data()[5000] = old_.data()[5000];
  EXPECT_TRUE(same(back_.data(), old_.data(), kBytes));
  EXPECT_TRUE(write().status("write").ok());  // reads only
  expect_file(kBytes);
  EXPECT_EQ(faulty_->counts().flipped, 1u);
}

TEST_P(FaultyEngineTest, TornWrite) {
  for (const std::uint64_t kept : {std::uint64_t{0}, kPage, kPage + 100, kBytes - 1}) {
    SCOPED_TRACE(kept);
    ASSERT_TRUE(run(write_of(fd(), old_.data(), kBytes, 0)).status("write").ok());
    const FaultyEngine::FaultId id = faulty_->add(Fault::torn_after(kept));
    EXPECT_TRUE(write().status("write").ok());
    faulty_->remove(id);
    expect_file(kept);
  }
  EXPECT_EQ(faulty_->counts().torn, 4u);
}

TEST_P(FaultyEngineTest, HeldRequestsWaitBeforeTheDevice) {
  faulty_->add(Fault::hold().on(Op::kWrite));
  Recorder recorder;
  submit(write_of(fd(), new_.data(), kBytes, 0, 1, &recorder));
  submit(write_of(fd(), new_.data(), kBytes, kBytes, 2, &recorder));
  ASSERT_TRUE(faulty_->wait_withheld(2));
  EXPECT_TRUE(read().status("read").ok());
  expect_file(0);
  EXPECT_TRUE(recorder.results().empty());
  EXPECT_EQ(faulty_->release(1), 1u);
  EXPECT_TRUE(recorder.wait(1)[0].status("write").ok());
  expect_file(kBytes);
  EXPECT_EQ(faulty_->withheld(), 1u);
  EXPECT_EQ(faulty_->release(5, EIO), 1u);
  EXPECT_EQ(recorder.wait(2)[1].error, EIO);
  EXPECT_EQ(recorder.results()[1].tag, 2u);
}

TEST_P(FaultyEngineTest, DroppedCompletionsAreDoneButNotTold) {
  faulty_->add(Fault::drop());
  Recorder recorder;
  submit(write_of(fd(), new_.data(), kBytes, 0, 1, &recorder));
  ASSERT_TRUE(faulty_->wait_withheld(1));
  expect_file(kBytes);
  EXPECT_TRUE(recorder.results().empty());
  EXPECT_EQ(faulty_->release(), 1u);
  const IoResult result = recorder.wait(1)[0];
  EXPECT_TRUE(result.status("write").ok());
  EXPECT_EQ(result.actual, kBytes);
}

TEST_P(FaultyEngineTest, Conditions) {
  const File other(dir_ / "other");
  ASSERT_EQ(::ftruncate(other.fd(), 1 << 20), 0);
  ASSERT_EQ(::ftruncate(fd(), 1 << 20), 0);
  faulty_->add(Fault::fail_with(EIO).of_fd(other.fd()));
  EXPECT_EQ(run(read_of(other.fd(), back_.data(), kPage, 0)).error, EIO);
  EXPECT_EQ(read().error, 0);
  faulty_->clear();

  faulty_->add(Fault::fail_with(EIO).in_range(kBytes, kBytes + 1));
  EXPECT_EQ(read(0).error, 0);
  EXPECT_EQ(read(kPage).error, EIO);
  EXPECT_EQ(read(kBytes).error, EIO);
  EXPECT_EQ(read(kBytes + kPage).error, 0);
  EXPECT_EQ(run(sync_of(fd())).error, 0);
  faulty_->clear();

  faulty_->add(Fault::fail_with(EIO).on(Op::kRead).only(2));
  faulty_->add(Fault::fail_with(ENOSPC).on(Op::kRead).each(3));
  std::vector<int> errors;
  for (unsigned i = 0; i < 6; ++i) {
    errors.push_back(read().error);
    EXPECT_TRUE(run(sync_of(fd())).status("sync").ok());  // counts for neither
  }
  EXPECT_EQ(errors, (std::vector<int>{0, EIO, ENOSPC, 0, 0, ENOSPC}));
}

TEST_P(FaultyEngineTest, DestructionEndsWhatIsWithheld) {
  faulty_->add(Fault::hold().on(Op::kRead));
  faulty_->add(Fault::drop().on(Op::kWrite));
  Recorder recorder;
  submit(read_of(fd(), back_.data(), kBytes, 0, 1, &recorder));
  submit(write_of(fd(), new_.data(), kBytes, 0, 2, &recorder));
  ASSERT_TRUE(faulty_->wait_withheld(2));
  engine_.reset();
  std::vector<IoResult> results = recorder.results();
  ASSERT_EQ(results.size(), 2u);
  if (results[0].tag == 2) std::swap(results[0], results[1]);
  EXPECT_EQ(results[0].tag, 1u);
  EXPECT_EQ(results[0].error, ECANCELED);
  EXPECT_EQ(results[1].tag, 2u);
  EXPECT_TRUE(results[1].status("write").ok());
}

TEST_P(FaultyEngineTest, ScriptChangesWhileRequestsRun) {
  constexpr unsigned kRequests = 400;
  Recorder recorder;
  std::thread scripter([&] {
    for (unsigned i = 0; i < 200; ++i) {
      const FaultyEngine::FaultId id = faulty_->add(Fault::fail_with(EIO).each(2));
      faulty_->release();
      faulty_->remove(id);
    }
  });
  const Memory memory(kRequests * kPage);
  for (unsigned i = 0; i < kRequests; ++i) submit(read_of(fd(), memory.data() + i * kPage, kPage, 0, i, &recorder));
  std::size_t failed = 0;
  for (const IoResult& result : recorder.wait(kRequests)) failed += result.error == EIO;
  scripter.join();
  EXPECT_EQ(faulty_->counts().failed, failed);
}

}  // namespace
}  // namespace lmcn::io
