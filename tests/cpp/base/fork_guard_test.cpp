#include "base/fork_guard.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <future>
#include <string>
#include <thread>
#include <vector>

#include "child_process.hpp"

namespace lmcn {
namespace {

class ForkGuard : public testing::Test {
 protected:
  ForkGuard() {
    char name[] = "/tmp/lmcn_fork_XXXXXX";
    const int fd = ::mkstemp(name);
    EXPECT_GE(fd, 0);
    ::close(fd);
    path = name;
  }
  ~ForkGuard() override { std::filesystem::remove(path); }

  ProcessFd open() const {
    return ProcessFd::opened([this] { return ::open(path.c_str(), O_RDWR | O_CLOEXEC); });
  }
  bool is_our_file(int fd) const {
    struct stat wanted{}, found{};
    return ::stat(path.c_str(), &wanted) == 0 && ::fstat(fd, &found) == 0 && wanted.st_ino == found.st_ino &&
           wanted.st_dev == found.st_dev;
  }
  bool any_is_our_file() const {
    for (int fd = 0; fd < 256; ++fd) {
      if (is_our_file(fd)) return true;
    }
    return false;
  }
  /// Exit status of `body` in a forked child.
  static int in_child(const std::function<int()>& body) { return exit_status(run_in_child(body)); }

  std::string path;
};

TEST_F(ForkGuard, AChildHasTheNumberAndNotTheFile) {
  ProcessFd fd = open();
  ASSERT_TRUE(is_our_file(fd.get()));
  const int in_child_status = in_child([&] {
    if (any_is_our_file()) return 1;
    const int next = ::open("/dev/null", O_RDONLY);  // the number is taken: nobody else gets it
    if (next == fd.get()) return 2;
    if ((::fcntl(fd.get(), F_GETFD) & FD_CLOEXEC) == 0) return 3;
    if (::write(fd.get(), "x", 1) != 1 || std::filesystem::file_size(path) != 0) return 4;
    const int number = fd.get();
    fd.reset();
    return ::fcntl(number, F_GETFD) < 0 ? 0 : 5;
  });
  EXPECT_EQ(in_child_status, 0);
  EXPECT_TRUE(is_our_file(fd.get())) << "the parent's must stay";
}

TEST_F(ForkGuard, ALockEndsWithItsHolderThoughAChildLives) {
  std::array<int, 2> child_waits{};
  ASSERT_EQ(::pipe2(child_waits.data(), O_CLOEXEC), 0);
  std::array<int, 2> child_tells{};
  ASSERT_EQ(::pipe2(child_tells.data(), O_CLOEXEC), 0);
  const pid_t holder = ::fork();
  if (holder == 0) {
    ::alarm(60);
    const ProcessFd lock = open();
    if (::flock(lock.get(), LOCK_EX | LOCK_NB) != 0) ::_exit(1);
    if (::fork() == 0) {
      ::close(child_waits[1]);
      const pid_t self = ::getpid();  // told by itself: before it runs it has let go of nothing
      const ssize_t told = ::write(child_tells[1], &self, sizeof self);
      char byte = 0;
      const ssize_t n = ::read(child_waits[0], &byte, 1);  // until the test closes its end
      ::_exit(told == sizeof self && n == 0 ? 0 : 1);
    }
    for (;;) ::pause();
  }
  pid_t child = -1;
  ASSERT_EQ(::read(child_tells[0], &child, sizeof child), static_cast<ssize_t>(sizeof child));
  const ProcessFd next = open();
  EXPECT_NE(::flock(next.get(), LOCK_EX | LOCK_NB), 0) << "its holder lives";
  ASSERT_EQ(::kill(holder, SIGKILL), 0);
  ASSERT_EQ(::waitpid(holder, nullptr, 0), holder);
  EXPECT_EQ(::kill(child, 0), 0) << "the child must still live";
  EXPECT_EQ(::flock(next.get(), LOCK_EX | LOCK_NB), 0);
  ::close(child_waits[1]);
  for (const int fd : {child_waits[0], child_tells[0], child_tells[1]}) ::close(fd);
}

TEST_F(ForkGuard, AChildHasGuardedDescriptorsOfItsOwn) {
  const ProcessFd parents = open();
  const int status = in_child([&] {
    const std::uint64_t forks = fork_guard::forks();
    const ProcessFd own = open();
    if (!is_our_file(own.get())) return 1;
    const int grandchild = in_child([&] { return any_is_our_file() || fork_guard::forks() != forks + 1 ? 1 : 0; });
    return grandchild == 0 && is_our_file(own.get()) ? 0 : 2;
  });
  EXPECT_EQ(status, 0);
}

TEST_F(ForkGuard, ForksAreCountedInTheChildOnly) {
  const std::uint64_t before = fork_guard::forks();
  EXPECT_EQ(in_child([&] { return fork_guard::forks() == before + 1 ? 0 : 1; }), 0);
  EXPECT_EQ(fork_guard::forks(), before);
}

TEST_F(ForkGuard, MovedAndClosedDescriptorsAreForgotten) {
  ProcessFd first = open();
  ProcessFd second = std::move(first);
  EXPECT_FALSE(first.valid());
  const int number = second.get();
  second.reset();
  const int unguarded = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  ASSERT_EQ(unguarded, number) << "the lowest free number";
  EXPECT_EQ(in_child([&] { return is_our_file(unguarded) ? 0 : 1; }), 0) << "a number that is another's now";
  ::close(unguarded);
}

// Children forked at any moment while other threads open and close.
TEST_F(ForkGuard, NoMomentLetsADescriptorThrough) {
  std::atomic<bool> stop{false};
  std::vector<std::jthread> openers;
  for (int i = 0; i < 3; ++i) {
    openers.emplace_back([&] {
      while (!stop.load()) {
        ProcessFd fd = open();
        ProcessFd moved = std::move(fd);
      }
    });
  }
  for (int i = 0; i < 100; ++i) EXPECT_EQ(in_child([&] { return any_is_our_file() ? 1 : 0; }), 0) << i;
  stop = true;
}

// As an openat() on a device that does not answer.
TEST_F(ForkGuard, AnOpenThatHangsHoldsUpNeitherForkNorOtherOpens) {
  const std::string fifo = path + ".fifo";
  ASSERT_EQ(::mkfifo(fifo.c_str(), 0600), 0);
  const ProcessFd other = open();
  std::atomic<bool> opening{false};
  std::thread hung([&] {
    const ProcessFd fd = ProcessFd::opened([&] {
      opening = true;
      return ::open(fifo.c_str(), O_WRONLY | O_CLOEXEC);  // until somebody reads
    });
  });
  while (!opening) std::this_thread::yield();
  std::future<int> work = std::async(std::launch::async, [&] {
    {
      const ProcessFd another = open();
    }
    return in_child([&] {
      if (any_is_our_file()) return 1;
      ProcessFd own = open();
      if (!is_our_file(own.get())) return 2;
      own.reset();
      return in_child([&] { return 0; });  // and so may the child's child be made
    });
  });
  EXPECT_EQ(work.wait_for(std::chrono::seconds(30)), std::future_status::ready);
  const int reader = ::open(fifo.c_str(), O_RDONLY | O_CLOEXEC);
  hung.join();
  ::close(reader);
  EXPECT_EQ(work.get(), 0);
  std::filesystem::remove(fifo);
}

// A connection with unsent bytes and SO_LINGER: close() waits for the peer.
TEST_F(ForkGuard, ACloseThatHangsHoldsUpNoForkAndIsNotInherited) {
  const int listener = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t bytes = sizeof address;
  auto* const any = reinterpret_cast<sockaddr*>(&address);
  ASSERT_EQ(::bind(listener, any, bytes), 0);
  ASSERT_EQ(::listen(listener, 1), 0);
  ASSERT_EQ(::getsockname(listener, any, &bytes), 0);
  ProcessFd connection = ProcessFd::opened([] { return ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0); });
  ASSERT_EQ(::connect(connection.get(), any, bytes), 0);
  const int peer = ::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
  const linger wait{1, 600};
  ASSERT_EQ(::setsockopt(connection.get(), SOL_SOCKET, SO_LINGER, &wait, sizeof wait), 0);
  const std::vector<char> noise(1 << 16);
  while (::send(connection.get(), noise.data(), noise.size(), MSG_DONTWAIT) > 0) {
  }
  const int number = connection.get();
  std::atomic<bool> closed{false};
  std::thread closer([&] {
    connection.reset();
    closed = true;
  });
  while (::fcntl(number, F_GETFD) >= 0) std::this_thread::yield();
  std::future<int> work =
      std::async(std::launch::async, [&] { return in_child([&] { return ::fcntl(number, F_GETFD) < 0 ? 0 : 1; }); });
  EXPECT_EQ(work.wait_for(std::chrono::seconds(30)), std::future_status::ready);
  EXPECT_FALSE(closed) << "the close must still wait";
  ::close(peer);
  closer.join();
  EXPECT_EQ(work.get(), 0);
  ::close(listener);
}

TEST_F(ForkGuard, AChildOfAProcessWithoutFreeNumbersHasThemTakenToo) {
  const int status = in_child([&] {  // in a process of its own: it uses up the numbers
    const ProcessFd first = open();
    const ProcessFd second = open();
    const rlimit few{64, 64};
    if (::setrlimit(RLIMIT_NOFILE, &few) != 0) return 1;
    while (::dup(STDERR_FILENO) >= 0) {
    }
    if (errno != EMFILE) return 2;
    return in_child([&] {
      struct stat null{};
      if (::stat("/dev/null", &null) != 0) return 3;
      for (const ProcessFd* each : {&first, &second}) {
        struct stat found{};
        if (::fstat(each->get(), &found) != 0 || found.st_rdev != null.st_rdev) return 4;
        if ((::fcntl(each->get(), F_GETFD) & FD_CLOEXEC) == 0) return 5;
      }
      return 0;
    });
  });
  EXPECT_EQ(status, 0);
}

}  // namespace
}  // namespace lmcn
