// What only io_uring has: registered memory, a thread that sleeps in the kernel, and a ring that can fail.
#include "io/uring_engine.hpp"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <string>
#include <string_view>
#include <thread>

#include "io/uring_ring.hpp"
#include "io_support.hpp"

namespace lmcn::io {
namespace {

class UringEngineTest : public EngineTest {
 protected:
  UringEngine& uring() { return dynamic_cast<UringEngine&>(*engine_); }
};
INSTANTIATE_TEST_SUITE_P(Engines, UringEngineTest, ::testing::Values(kUring), case_name);

struct Pipe {
  Pipe() { EXPECT_EQ(::pipe(ends), 0); }
  ~Pipe() {
    ::close(ends[0]);
    ::close(ends[1]);
  }
  void feed(std::size_t bytes) {
    const std::string text(bytes, 'x');
    EXPECT_EQ(::write(ends[1], text.data(), bytes), static_cast<ssize_t>(bytes));
  }
  int ends[2];
};

TEST_P(UringEngineTest, RegisteredMemoryUsesFixedOperations) {
  const Memory arena(4 * kPage), loose(kPage);
  ASSERT_TRUE(engine_->register_buffer({arena.data(), 2 * kPage}).ok());
  ASSERT_TRUE(engine_->register_buffer({arena.data() + 2 * kPage, 2 * kPage}).ok());
  const auto fixed_by = [&](const IoRequest& request) {
    const std::uint64_t fixed = uring().fixed_submissions(), plain = uring().plain_submissions();
    EXPECT_TRUE(run(request).status("I/O").ok());
    EXPECT_EQ(uring().fixed_submissions() + uring().plain_submissions(), fixed + plain + 1);
    return uring().fixed_submissions() == fixed + 1;
  };
  EXPECT_TRUE(fixed_by(write_of(fd(), arena.data(), 2 * kPage, 0)));
  EXPECT_TRUE(fixed_by(read_of(fd(), arena.data() + 3 * kPage, kPage, 0)));
  EXPECT_FALSE(fixed_by(write_of(fd(), arena.data() + kPage, 2 * kPage, 0))) << "straddles two pieces";
  EXPECT_FALSE(fixed_by(read_of(fd(), loose.data(), kPage, 0)));
  EXPECT_EQ(engine_->register_buffer({arena.data() + kPage, kPage}).code(), Code::kInvalidArgument);
}

TEST_P(UringEngineTest, ALargeBufferIsRegisteredInPieces) {
  constexpr std::size_t kLimit = 1ull << 30, kBytes = kLimit + kPage, kReal = 4 << 20;
  // One small memory file mapped over and over: more than the limit of address space, little memory.
  const int memory = ::memfd_create("lmcn_io_test", MFD_CLOEXEC);
  ASSERT_EQ(::ftruncate(memory, kReal), 0);
  void* area = ::mmap(nullptr, kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(area, MAP_FAILED);
  auto* data = static_cast<std::byte*>(area);
  for (std::size_t at = 0; at < kBytes; at += kReal) {
    ASSERT_NE(::mmap(data + at, std::min(kReal, kBytes - at), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memory, 0),
              MAP_FAILED);
  }
  const Status status = engine_->register_buffer({data, kBytes});
  EXPECT_TRUE(status.ok()) << status.to_string();
  EXPECT_TRUE(run(write_of(fd(), data + kLimit, kPage, 0)).status("write").ok());
  EXPECT_TRUE(run(write_of(fd(), data + kLimit - kPage, kPage, 0)).status("write").ok());
  EXPECT_EQ(uring().fixed_submissions(), 2u);
  EXPECT_TRUE(run(write_of(fd(), data + kLimit - kPage, 2 * kPage, 0)).status("write").ok());
  EXPECT_EQ(uring().fixed_submissions(), 2u);
  engine_.reset();
  ::munmap(area, kBytes);
  ::close(memory);
}

TEST_P(UringEngineTest, SubmissionsAreSeenWhileTheThreadSleepsInTheRing) {
  Pipe pipe;
  Recorder recorder;
  const Memory memory(2 * kPage);
  submit(read_of(pipe.ends[0], memory.data(), 64, 0, 1, &recorder));
  for (unsigned i = 0; i < 50; ++i) {  // each finds the thread asleep: the only request under way does not end
    ASSERT_TRUE(run(write_of(fd(), memory.data() + kPage, kPage, 0)).status("write").ok());
  }
  EXPECT_TRUE(recorder.results().empty());
  pipe.feed(64);
  EXPECT_TRUE(recorder.wait(1)[0].status("read").ok());
}

TEST_P(UringEngineTest, QueueDepthBoundsWhatIsAtTheDevice) {
  start({.queue_depth = 2});
  Pipe one, two;
  Recorder recorder;
  const Memory memory(3 * kPage);
  ASSERT_TRUE(run(write_of(fd(), memory.data(), kPage, 0)).status("write").ok());
  submit(read_of(one.ends[0], memory.data(), 64, 0, 1, &recorder));
  submit(read_of(two.ends[0], memory.data() + kPage, 64, 0, 2, &recorder));
  submit(read_of(fd(), memory.data() + 2 * kPage, kPage, 0, 3, &recorder));
  // Runs on the ring thread after the three were seen, and again after anything they could have done at once was reaped.
  for (unsigned i = 0; i < 20; ++i) {
    EXPECT_TRUE(engine_->register_fd(fd()).ok());
    engine_->unregister_fd(fd());
  }
  EXPECT_TRUE(recorder.results().empty());
  one.feed(64);
  EXPECT_EQ(tags(recorder.wait(2)), (std::vector<std::uint64_t>{1, 3}));
  two.feed(64);
  recorder.wait(3);
}

TEST_P(UringEngineTest, ShortAnswersAreContinued) {
  Pipe pipe;
  Recorder recorder;
  const Memory memory(3 * kPage);
  submit(read_of(pipe.ends[0], memory.data(), 3 * kPage, 0, 1, &recorder));
  for (unsigned i = 0; i < 3; ++i) pipe.feed(kPage);
  const IoResult result = recorder.wait(1)[0];
  EXPECT_TRUE(result.status("read").ok()) << result.status("read").to_string();
}

TEST_P(UringEngineTest, DestructionLeavesNoRegisteredFileOpen) {
  File locked(dir_ / "locked");
  ASSERT_TRUE(engine_->register_fd(locked.fd()).ok());
  struct flock lock{};
  lock.l_type = F_WRLCK;
  ASSERT_EQ(::fcntl(locked.fd(), F_OFD_SETLK, &lock), 0);  // lives as long as the open file
  locked.close();
  const File again(dir_ / "locked");
  lock = {};
  lock.l_type = F_WRLCK;
  ASSERT_EQ(::fcntl(again.fd(), F_OFD_SETLK, &lock), -1) << "the engine holds it";
  engine_.reset();
  EXPECT_EQ(::fcntl(again.fd(), F_OFD_SETLK, &lock), 0) << std::strerror(errno);
}

/// From now on `call` returns EPERM in every thread of this process.
void forbid(long call) {
  sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<std::uint32_t>(call), 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog filter{static_cast<unsigned short>(std::size(program)), program};
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
      ::syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &filter) != 0) {
    std::perror("seccomp");
    std::_Exit(99);
  }
}

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::_Exit(1);
}

class DeathTest : public ::testing::Test {
 protected:
  void SetUp() override { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
  static void skip_without_io_uring() {
    if (const auto probe = make_engine({.kind = EngineKind::kIoUring}); !probe.ok()) {
      GTEST_SKIP() << "NOT TESTED: " << probe.status().to_string();
    }
  }
};

TEST_F(DeathTest, AutoFallsBackToThreadsWhereIoUringIsForbidden) {
  EXPECT_EXIT(
      {
        ::unsetenv("LMCN_IO_ENGINE");
        forbid(SYS_io_uring_setup);
        std::string why;
        const Result<std::unique_ptr<IoEngine>> made = make_engine({}, &why);
        std::fprintf(stderr, "%s\n", why.c_str());
        require(made.ok() && made.value()->name() == "threads", "threads");
        const Result<std::unique_ptr<IoEngine>> asked = make_engine({.kind = EngineKind::kIoUring});
        require(!asked.ok() && asked.status().code() == Code::kUnavailable && asked.status().sys_errno() == EPERM, "unavailable");
        std::_Exit(0);
      },
      ::testing::ExitedWithCode(0), "threads \\(4\\): no io_uring here: io_uring_setup.*Operation not permitted");
}

TEST_F(DeathTest, AutoFallsBackWhereTheRingCannotBeEntered) {
  skip_without_io_uring();
  if (IsSkipped()) return;
  EXPECT_EXIT(
      {
        ::unsetenv("LMCN_IO_ENGINE");
        forbid(SYS_io_uring_enter);
        std::string why;
        const Result<std::unique_ptr<IoEngine>> made = make_engine({}, &why);
        std::fprintf(stderr, "%s\n", why.c_str());
        require(made.ok() && made.value()->name() == "threads", "threads");
        std::_Exit(0);
      },
      ::testing::ExitedWithCode(0), "no io_uring here: io_uring_enter.*Operation not permitted");
}

TEST_F(DeathTest, WhenTheRingFailsEveryRequestStillCompletesOnce) {
  skip_without_io_uring();
  if (IsSkipped()) return;
  const EngineOptions options{.kind = EngineKind::kIoUring};
  EXPECT_EXIT(
      {
        Recorder recorder;
        const Memory memory(kPage);
        Pipe pipe;
        {
          auto made = make_engine(options);
          require(made.ok(), "io_uring");
          IoEngine& engine = *made.value();
          require(run_sync(engine, read_of(-1, memory.data(), kPage, 0)).error == EBADF, "works before");
          const IoRequest in_kernel = read_of(pipe.ends[0], memory.data(), 64, 0, 1, &recorder);
          engine.submit({&in_kernel, 1});
          // Sent to the kernel together with this one or before it, and never answered.
          require(run_sync(engine, read_of(-1, memory.data(), kPage, 0)).error == EBADF, "works still");
          forbid(SYS_io_uring_enter);
          for (std::uint64_t tag = 2; tag < 100; ++tag) {
            const IoRequest request = read_of(pipe.ends[0], memory.data(), 64, 0, tag, &recorder);
            engine.submit({&request, 1});
          }
          recorder.wait(99);
          require(run_sync(engine, read_of(pipe.ends[0], memory.data(), 64, 0)).error == EPERM, "errno of the ring");
          require(engine.register_fd(pipe.ends[0]).code() == Code::kUnavailable, "register is refused");
        }
        const std::vector<IoResult> results = recorder.results();
        require(results.size() == 99, "each once");
        for (const IoResult& result : results) require(result.error == EPERM, "EPERM");
        std::_Exit(0);
      },
      ::testing::ExitedWithCode(0), "");
}

// The ring exists before the kernel is asked what it can do; children forked in between must not have it. fork() waits for that,
// but no longer than 100 ms (fork_guard.hpp): what waited so long, because the opener had no CPU, proves nothing.
TEST(UringFork, NoChildHasARingForkedAtWhateverMoment) {
  constexpr std::chrono::milliseconds kForkWait{100};
  if (UringRing probe; !probe.open(4).ok()) GTEST_SKIP() << "no io_uring here";
  std::atomic<bool> stop{false};
  std::jthread opener([&] {
    while (!stop) {
      UringRing ring;
      EXPECT_TRUE(ring.open(4).ok());
    }
  });
  int judged = 0;
  for (int i = 0; i < 200; ++i) {
    const auto before = std::chrono::steady_clock::now();
    const pid_t child = ::fork();
    if (child == 0) {
      int rings = 0;
      for (int fd = 0; fd < 1024; ++fd) {
        char target[64] = {};
        char link[32];  // no allocation: another thread may have held its locks at the fork
        std::snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        if (::readlink(link, target, sizeof target - 1) > 0 && std::string_view(target) == "anon_inode:[io_uring]") ++rings;
      }
      ::_exit(rings);
    }
    const bool in_time = std::chrono::steady_clock::now() - before < kForkWait;
    int status = -1;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    if (!in_time) continue;
    EXPECT_EQ(status, 0) << i;
    ++judged;
  }
  stop = true;
  EXPECT_GT(judged, 0);
}

}  // namespace
}  // namespace lmcn::io
