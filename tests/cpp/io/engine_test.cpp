// What every engine promises.
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <numeric>

#include "io_support.hpp"

namespace lmcn::io {
namespace {

INSTANTIATE_TEST_SUITE_P(Engines, EngineTest, ::testing::Values(kUring, kThreads, kFaultyUring, kFaultyThreads), case_name);

TEST_P(EngineTest, RoundTrips) {
  constexpr std::uint64_t kSizes[] = {kPage, 2 * kPage, 64 << 10, 1 << 20, (2 << 20) + kPage, 9 << 20};
  constexpr std::uint64_t kOffsets[] = {0, kPage, (1 << 20) - kPage, 33 << 20};
  const Memory arena(12 << 20), back(12 << 20);
  // Three ways for memory: registered whole, straddling two registered pieces (the cut is at 6 MiB), not registered.
  for (const Memory* memory : {&arena, &back}) {
    for (const std::uint64_t half : {0, 6 << 20}) {
      const Status status = engine_->register_buffer({memory->data() + half, 6 << 20});
      ASSERT_TRUE(status.ok()) << status.to_string();
    }
  }
  const Memory loose(12 << 20), loose_back(12 << 20);
  arena.fill(1);
  loose.fill(2);
  std::uint64_t pages = 0;  // each case writes from another place, so that none is answered by what an earlier one wrote
  for (const bool registered_file : {false, true}) {
    if (registered_file) {
      ASSERT_TRUE(engine_->register_fd(fd()).ok());
    }
    for (const auto& [from, to] : {std::pair{&arena, &back}, std::pair{&loose, &loose_back}}) {
      for (const std::uint64_t bytes : kSizes) {
        for (const std::uint64_t offset : kOffsets) {
          SCOPED_TRACE(testing::Message() << bytes << " bytes at " << offset << ", file registered " << registered_file);
          std::byte* const data = from->data() + ++pages * kPage;
          ASSERT_TRUE(run(write_of(fd(), data, bytes, offset)).status("write").ok());
          ASSERT_TRUE(run(read_of(fd(), to->data() + kPage, bytes, offset)).status("read").ok());
          ASSERT_TRUE(same(data, to->data() + kPage, bytes));
        }
      }
    }
  }
  EXPECT_TRUE(run(sync_of(fd())).status("fdatasync").ok());
  engine_->unregister_fd(fd());
}

TEST_P(EngineTest, ManySubmitters) {
  constexpr unsigned kSubmitters = 8, kEach = 60;
  constexpr std::uint64_t kBytes = 64 << 10;
  const Memory data(kSubmitters * kEach * kBytes), back(data.bytes());
  data.fill(1);
  std::vector<unsigned> seen(kSubmitters * kEach);
  const auto everyone = [&](Op op, const Memory& memory) {
    Recorder recorder;
    std::latch go(kSubmitters);
    std::vector<std::thread> submitters;
    for (unsigned s = 0; s < kSubmitters; ++s) {
      submitters.emplace_back([&, s] {
        go.arrive_and_wait();
        for (unsigned i = 0; i < kEach; ++i) {
          const std::uint64_t tag = i * kSubmitters + s;
          submit({op, fd(), memory.data() + tag * kBytes, kBytes, tag * kBytes, tag, &recorder});
        }
      });
    }
    for (std::thread& submitter : submitters) submitter.join();  // ends while its requests are under way
    std::fill(seen.begin(), seen.end(), 0u);
    for (const IoResult& result : recorder.wait(kSubmitters * kEach)) {
      EXPECT_TRUE(result.status("I/O").ok()) << result.status("I/O").to_string();
      ++seen.at(result.tag);
    }
    EXPECT_EQ(seen, std::vector<unsigned>(seen.size(), 1u));
  };
  everyone(Op::kWrite, data);
  everyone(Op::kRead, back);
  EXPECT_TRUE(same(data.data(), back.data(), data.bytes()));
}

TEST_P(EngineTest, ReadsStartBeforeWritesAndInOrder) {
  start_serial();
  const Memory memory(kPage);
  ASSERT_TRUE(run(write_of(fd(), memory.data(), kPage, 0)).status("write").ok());
  Gate gate;
  Recorder recorder;
  submit(read_of(fd(), memory.data(), kPage, 0, 0, &gate));
  gate.wait_entered();
  submit(write_of(fd(), memory.data(), kPage, 0, 1, &recorder));
  const IoRequest batch[] = {sync_of(fd(), 2, &recorder), read_of(fd(), memory.data(), kPage, 0, 3, &recorder),
                             write_of(fd(), memory.data(), kPage, kPage, 4, &recorder),
                             read_of(fd(), memory.data(), kPage, 0, 5, &recorder)};
  engine_->submit(batch);
  submit(read_of(fd(), memory.data(), kPage, 0, 6, &recorder));
  gate.open();
  EXPECT_EQ(tags(recorder.wait(6)), (std::vector<std::uint64_t>{3, 5, 6, 1, 2, 4}));
}

TEST_P(EngineTest, EndOfFileIsAnError) {
  for (const std::uint64_t file_bytes : {std::uint64_t{5000}, 2 * kPage, std::uint64_t{0}}) {
    SCOPED_TRACE(file_bytes);
    ASSERT_EQ(::ftruncate(fd(), static_cast<off_t>(file_bytes)), 0);
    const Memory memory(4 * kPage);
    const IoResult result = run(read_of(fd(), memory.data(), 4 * kPage, 0));
    EXPECT_EQ(result.error, 0);
    EXPECT_EQ(result.actual, file_bytes);
    const Status status = result.status("pread data");
    EXPECT_EQ(status.code(), Code::kIoError);
    EXPECT_NE(status.message().find(std::to_string(file_bytes) + " of 16384"), std::string::npos) << status.message();
  }
}

TEST_P(EngineTest, ErrorsComeBackAsErrno) {
  const Memory memory(2 * kPage);
  const File read_only(dir_ / "data", O_RDONLY | O_DIRECT);
  EXPECT_EQ(run(read_of(-1, memory.data(), kPage, 0)).error, EBADF);
  EXPECT_EQ(run(sync_of(-1)).error, EBADF);
  EXPECT_EQ(run(write_of(read_only.fd(), memory.data(), kPage, 0)).error, EBADF);
  EXPECT_EQ(run(write_of(fd(), memory.data() + 1, kPage, 0)).error, EINVAL);
  const File full("/dev/full", O_WRONLY);
  const IoResult result = run(write_of(full.fd(), memory.data(), kPage, 0));
  EXPECT_EQ(result.error, ENOSPC);
  EXPECT_EQ(result.status("write").sys_errno(), ENOSPC);
}

// A real short write: the kernel cuts the write at the file size limit, and the rest fails.
TEST_P(EngineTest, ShortWriteIsContinuedUntilItsError) {
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{3 * kPage, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  const Memory memory(8 * kPage), back(3 * kPage);
  memory.fill(3);
  const IoResult result = run(write_of(fd(), memory.data(), 8 * kPage, 0));
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(result.error, EFBIG);
  EXPECT_EQ(result.actual, 3 * kPage);
  ASSERT_TRUE(run(read_of(fd(), back.data(), 3 * kPage, 0)).status("read").ok());
  EXPECT_TRUE(same(memory.data(), back.data(), 3 * kPage));
}

TEST_P(EngineTest, SinksMaySubmit) {
  struct Chain : CompletionSink {
    IoEngine* engine;
    IoRequest request;
    std::atomic<unsigned> left{500};
    std::latch end{1};
    bool good = true;
    void on_io(const IoResult& result) noexcept override {
      good = good && result.status("read").ok();
      if (--left == 0) return end.count_down();
      engine->submit({&request, 1});
    }
  } chain;
  const Memory memory(kPage);
  ASSERT_TRUE(run(write_of(fd(), memory.data(), kPage, 0)).status("write").ok());
  chain.engine = engine_.get();
  chain.request = read_of(fd(), memory.data(), kPage, 0, 0, &chain);
  submit(chain.request);
  chain.end.wait();
  EXPECT_TRUE(chain.good);
}

TEST_P(EngineTest, DestructionCompletesEverythingOnce) {
  constexpr std::uint64_t kQueued = 300;
  start_serial();
  const Memory memory(kPage);
  ASSERT_TRUE(run(write_of(fd(), memory.data(), kPage, 0)).status("write").ok());
  Gate gate;
  Recorder recorder;
  submit(read_of(fd(), memory.data(), kPage, 0, 0, &gate));
  gate.wait_entered();
  for (std::uint64_t tag = 0; tag < kQueued; ++tag) {
    submit(tag % 3 == 0 ? write_of(fd(), memory.data(), kPage, kPage, tag, &recorder)
                        : read_of(fd(), memory.data(), kPage, 0, tag, &recorder));
  }
  std::latch destroying(1);
  pid_t tid = 0;
  std::thread destroyer([&] {
    tid = static_cast<pid_t>(::syscall(SYS_gettid));
    destroying.count_down();
    engine_.reset();
  });
  destroying.wait();
  wait_until_asleep(tid);  // in its destructor, waiting for the engine thread that is in the gate
  gate.open();
  destroyer.join();
  std::vector<IoResult> results = recorder.results();
  ASSERT_EQ(results.size(), kQueued);
  std::vector<unsigned> seen(kQueued);
  for (const IoResult& result : results) {
    ++seen.at(result.tag);
    EXPECT_EQ(result.error, ECANCELED);
    EXPECT_EQ(result.actual, 0u);
  }
  EXPECT_EQ(seen, std::vector<unsigned>(kQueued, 1u));
}

TEST_P(EngineTest, DestructionWaitsForWhatRuns) {
  constexpr std::uint64_t kRequests = 16, kBytes = 1 << 20;
  const Memory memory(kRequests * kBytes);
  memory.fill(5);
  Recorder recorder;
  std::vector<IoRequest> requests;
  for (std::uint64_t tag = 0; tag < kRequests; ++tag) {
    requests.push_back(write_of(fd(), memory.data() + tag * kBytes, kBytes, tag * kBytes, tag, &recorder));
  }
  engine_->submit(requests);
  engine_.reset();
  const std::vector<IoResult> results = recorder.results();
  ASSERT_EQ(results.size(), kRequests);
  const Memory back(kBytes);
  for (const IoResult& result : results) {
    if (result.error == ECANCELED) continue;
    EXPECT_TRUE(result.status("write").ok());
    ASSERT_EQ(::pread(fd(), back.data(), kBytes, static_cast<off_t>(result.tag * kBytes)), static_cast<ssize_t>(kBytes));
    EXPECT_TRUE(same(back.data(), memory.data() + result.tag * kBytes, kBytes));
  }
}

TEST_P(EngineTest, UnregisteredDescriptorMayBeClosedAndItsNumberUsedAgain) {
  const Memory one(kPage), two(kPage), back(kPage);
  one.fill(1);
  two.fill(2);
  File first(dir_ / "first");
  const int number = first.fd();
  ASSERT_TRUE(engine_->register_fd(number).ok());
  ASSERT_TRUE(run(write_of(number, one.data(), kPage, 0)).status("write").ok());
  engine_->unregister_fd(number);
  first.close();
  const File second(dir_ / "second");
  ASSERT_EQ(second.fd(), number) << "the kernel gives the lowest free number";
  ASSERT_TRUE(run(write_of(number, two.data(), kPage, 0)).status("write").ok());
  const File first_again(dir_ / "first");
  ASSERT_TRUE(run(read_of(first_again.fd(), back.data(), kPage, 0)).status("read").ok());
  EXPECT_TRUE(same(back.data(), one.data(), kPage));
  ASSERT_TRUE(run(read_of(number, back.data(), kPage, 0)).status("read").ok());
  EXPECT_TRUE(same(back.data(), two.data(), kPage));
}

TEST_P(EngineTest, RegistrationWhileRequestsRun) {
  constexpr std::uint64_t kRequests = 200, kBytes = 64 << 10;
  const Memory memory(kRequests * kBytes);
  Recorder recorder;
  std::thread submitter([&] {
    for (std::uint64_t tag = 0; tag < kRequests; ++tag) {
      submit(write_of(fd(), memory.data() + tag * kBytes, kBytes, tag * kBytes, tag, &recorder));
    }
  });
  for (unsigned i = 0; i < 20; ++i) {
    EXPECT_TRUE(engine_->register_fd(fd()).ok());
    EXPECT_TRUE(engine_->register_buffer({memory.data() + i * 10 * kBytes, 10 * kBytes}).ok());
    engine_->unregister_fd(fd());
  }
  submitter.join();
  for (const IoResult& result : recorder.wait(kRequests)) EXPECT_TRUE(result.status("write").ok());
}

TEST_P(EngineTest, EmptySubmitAndEmptyRead) {
  engine_->submit({});
  const Memory memory(kPage);
  EXPECT_TRUE(run(read_of(fd(), memory.data(), 0, 0)).status("read").ok());
}

}  // namespace
}  // namespace lmcn::io
