#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <semaphore>

#include "log_fixture.hpp"

namespace lmcn::nvme {
namespace {

using Recovery = LogFixture;

TEST_F(Recovery, NewDirectoryIsEmpty) {
  open();
  EXPECT_TRUE(recovered.empty());
  EXPECT_GE(log->stats().clean_regions, 1u);
}

TEST_F(Recovery, AfterClose) {
  open();
  put_many(0, 60);
  reopen();
  EXPECT_EQ(log->stats().recovered_from_checkpoint, 60u);
  expect_no_lies();
  expect_readable(0, 60);
}

TEST_F(Recovery, AfterKill) {
  open();
  put_many(0, 60);  // 23 records a region
  kill_and_open();
  EXPECT_EQ(log->stats().recovered_from_footers, 46u);
  EXPECT_EQ(log->stats().recovered_from_walk, 14u);
  expect_no_lies();
  expect_readable(0, 60);
}

TEST_F(Recovery, CheckpointThenFooterThenWalk) {
  open();
  put_many(0, 30);
  ASSERT_TRUE(checkpoint().ok());
  put_many(30, 60);
  kill_and_open();
  const LogStats s = log->stats();
  EXPECT_GE(s.recovered_from_checkpoint, 29u);
  EXPECT_EQ(s.recovered_from_checkpoint + s.recovered_from_footers + s.recovered_from_walk, 60u);
  EXPECT_EQ(s.recovered_from_walk, 14u);
  expect_no_lies();
  expect_readable(0, 60);
}

// The caller's index may be older than the checkpoint's view of the log: what was acknowledged since must not be lost.
TEST_F(Recovery, CheckpointOfAnIndexThatWasCollectedEarlier) {
  open();
  put_many(0, 3);
  const auto before = index;
  ASSERT_TRUE(put(3).ok());  // delivered after the writer's last call began
  const Status written = log->checkpoint([&](const RegionLog::EntrySink& sink) {
    for (const auto& [id, extent] : before) sink(key_of(id), extent);
  });
  ASSERT_TRUE(written.ok()) << written.to_string();
  kill_and_open();
  expect_readable(0, 4);
}

TEST_F(Recovery, CheckpointForgetsWhatTheCallerForgot) {
  open();
  put_many(0, 30);
  index.erase(5);
  reopen();
  EXPECT_EQ(get(5).code(), Code::kNotFound);
  EXPECT_EQ(recovered.size(), 29u);
}

TEST_F(Recovery, OldestFirstAndTheLastOneCounts) {
  open();
  put_many(0, 30);
  put_many(0, 30, 20 * kKiB);  // again, with other bytes
  kill_and_open();
  EXPECT_EQ(recovered.size(), 60u);
  expect_readable(0, 30);
  for (std::uint32_t id = 0; id < 30; ++id) EXPECT_EQ(index[id].pages, 6u) << id;
}

TEST_F(Recovery, TheOpenRegionGoesOn) {
  open();
  for (std::uint32_t id = 0; id < 20; ++id) {
    put_many(id, id + 1);
    id % 2 == 0 ? kill_and_open() : reopen();
  }
  expect_readable(0, 20);
  EXPECT_EQ(index[19].region, 0u);
}

TEST_F(Recovery, AcrossReuseOfRegions) {
  open();
  put_many(0, 100);
  ASSERT_TRUE(checkpoint().ok());  // soon out of date for reused regions
  put_many(100, 400);
  const auto before = index;
  kill_and_open();
  EXPECT_EQ(index, before);
  expect_no_lies();
}

TEST_F(Recovery, ClearForgetsForGood) {
  open();
  put_many(0, 60);
  ASSERT_TRUE(checkpoint().ok());
  const Extent old = index[0];
  ASSERT_TRUE(log->clear().ok());
  EXPECT_EQ(read(old, 0).code(), Code::kCorruption);
  EXPECT_EQ(log->stats().live_record_bytes, 0u);
  kill_and_open();
  EXPECT_TRUE(recovered.empty());
}

TEST_F(Recovery, WritesAfterClearAreKept) {
  open();
  put_many(0, 60);
  ASSERT_TRUE(log->clear().ok());
  index.clear();
  put_many(60, 70);
  kill_and_open();
  EXPECT_EQ(recovered.size(), 10u);
  expect_readable(60, 70);
  reopen();
  EXPECT_EQ(recovered.size(), 10u);
}

TEST_F(Recovery, WriteUnderWayDuringClearIsAborted) {
  open();
  engine->add(io::Fault::hold().on(io::Op::kWrite).in_range(kPageBytes, 64 * kMiB));
  std::future<Put> under_way = start_put(0);
  ASSERT_TRUE(engine->wait_withheld(1));
  ASSERT_TRUE(log->clear().ok());
  engine->clear();
  engine->release();
  EXPECT_EQ(under_way.get().status.code(), Code::kAborted);
  kill_and_open();
  EXPECT_TRUE(recovered.empty());
}

// A record whose write was under way when the process died: not acknowledged; before or after it nothing is lost.
TEST_F(Recovery, HeaderOnDiskPayloadNot) {
  open();
  put_many(0, 3);
  engine->add(io::Fault::torn_after(kPageBytes).on(io::Op::kWrite).only(1));
  ASSERT_TRUE(put(3).ok());
  put_many(4, 6);
  kill_and_open();
  EXPECT_EQ(recovered.size(), 6u);
  EXPECT_EQ(get(3).code(), Code::kCorruption);
  expect_readable(0, 3);
  expect_readable(4, 6);
}

/// A child process appends until it is killed; it reports each acknowledged record through a pipe.
class SigKill : public LogFixture, public testing::WithParamInterface<std::tuple<io::EngineKind, int>> {
 protected:
  static constexpr std::uint32_t kRecords = 1000;
  static constexpr std::ptrdiff_t kAtOnce = 8;

  static std::uint64_t payload_of(std::uint32_t id) { return (id % 7 + 1) * 9000; }

  [[noreturn]] void append_until_killed(int pipe) {
    const auto child_engine = real_engine(std::get<0>(GetParam()));
    auto child_log = std::move(RegionLog::open(options, *child_engine, *this)).value();
    child_log->adopt([](const RecoveredRecord&) { return 0u; });
    std::counting_semaphore<kAtOnce> room(kAtOnce);
    std::vector<PageBuffer> all;
    for (std::uint32_t id = 0; id < kRecords; ++id) all.push_back(make_image(id, payload_of(id)));
    for (std::uint32_t id = 0; id < kRecords;) {
      room.acquire();
      const Status status = child_log->append(all[id].data(), all[id].bytes(), id, [&room, pipe, id](const Status& s, Extent) {
        if (s.ok() && ::write(pipe, &id, sizeof id) != sizeof id) ::_exit(1);
        room.release();
      });
      if (status.ok()) {
        ++id;
      } else {
        room.release();
        if (status.code() != Code::kResourceExhausted || !child_log->maintain().ok()) ::_exit(2);
      }
    }
    for (;;) ::pause();
  }
};
INSTANTIATE_TEST_SUITE_P(Moments, SigKill,
                         testing::Combine(testing::Values(io::EngineKind::kThreads, io::EngineKind::kIoUring),
                                          testing::Values(1, 37, 150, 400)));

TEST_P(SigKill, AcknowledgedRecordsAreRecovered) {
  options.limit_bytes = 64 * kMiB;
  options.lock_wait = std::chrono::seconds(10);
  engine.reset();  // no threads at fork
  int pipe[2];
  ASSERT_EQ(::pipe(pipe), 0);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    ::close(pipe[0]);
    append_until_killed(pipe[1]);
  }
  ::close(pipe[1]);
  std::set<std::uint32_t> acknowledged;
  std::uint32_t id = 0;
  while (::read(pipe[0], &id, sizeof id) == sizeof id) {
    acknowledged.insert(id);
    if (acknowledged.size() == static_cast<std::size_t>(std::get<1>(GetParam()))) ::kill(child, SIGKILL);
  }
  ::close(pipe[0]);
  int how = 0;
  ASSERT_EQ(::waitpid(child, &how, 0), child);
  ASSERT_TRUE(WIFSIGNALED(how)) << "the child ended by itself with " << WEXITSTATUS(how);

  use_engine(std::get<0>(GetParam()));
  ids = kRecords;
  open();
  for (const std::uint32_t acked : acknowledged) EXPECT_EQ(get(acked).to_string(), "ok") << acked;
  for (const auto& [key, extent] : index) {
    const Status status = read(extent, key);
    EXPECT_TRUE(status.ok() || status.code() == Code::kCorruption) << status.to_string();
  }
  put_many(kRecords, kRecords + 50);
  kill_and_open();
  for (const std::uint32_t acked : acknowledged) EXPECT_EQ(get(acked).to_string(), "ok") << acked;
  expect_readable(kRecords, kRecords + 50);
}

}  // namespace
}  // namespace lmcn::nvme
