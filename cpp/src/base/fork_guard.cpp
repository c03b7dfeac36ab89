#include "base/fork_guard.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <vector>

namespace lmcn::fork_guard {
namespace {

std::atomic<std::uint64_t> fork_count{0};

// The longest that fork() waits for descriptors that are being opened or closed: a device that does not answer holds them for as
// long as it likes.
constexpr std::chrono::milliseconds kForkWait{100};

// The mutex guards what follows it and is held for moments only, never over a system call that may wait for a device; and over
// fork(), so in the child nobody else holds it and the table is whole.
struct Table {
  std::mutex mutex;
  std::condition_variable changed;
  unsigned holds = 0;
  unsigned forking = 0;  // threads in fork(); new holds wait for them
  std::vector<int> fds;
};

Table& table() {
  static auto* const instance = new Table;  // never destroyed: threads may outlive main()
  return *instance;
}

void before_fork() {
  Table& all = table();
  std::unique_lock lock(all.mutex);
  ++all.forking;
  const auto until = std::chrono::steady_clock::now() + kForkWait;
  static_cast<void>(all.changed.wait_until(lock, until, [&] { return all.holds == 0; }));
  lock.release();  // in_parent() and in_child() let go
}

void in_parent() {
  Table& all = table();
  --all.forking;
  all.mutex.unlock();
  all.changed.notify_all();
}

// Of the child's only thread; nothing here but what a signal handler may call (the table's memory is only read, then marked empty).
void in_child() {
  fork_count.fetch_add(1, std::memory_order_relaxed);
  Table& all = table();
  int null = all.fds.empty() ? -1 : ::open("/dev/null", O_RDWR | O_CLOEXEC);
  bool keep_null = false;
  for (const int fd : all.fds) {
    if (null < 0) {  // perhaps no number is free: give this one up first
      ::close(fd);
      null = ::open("/dev/null", O_RDWR | O_CLOEXEC);
      keep_null = null == fd;
      if (null < 0 || keep_null) continue;
    }
    if (::dup3(null, fd, O_CLOEXEC) < 0) ::close(fd);
  }
  if (null >= 0 && !keep_null) ::close(null);
  all.fds.clear();
  // Those who held, forked or waited are threads of the parent.
  all.holds = 0;
  all.forking = 0;
  ::new (&all.changed) std::condition_variable;
  all.mutex.unlock();
}

void install() {
  static const int installed = ::pthread_atfork(before_fork, in_parent, in_child);
  static_cast<void>(installed);  // fails for lack of memory only
}

}  // namespace

std::uint64_t forks() noexcept {
  install();
  return fork_count.load(std::memory_order_relaxed);
}

Hold::Hold() {
  install();
  Table& all = table();
  std::unique_lock lock(all.mutex);
  all.changed.wait(lock, [&] { return all.forking == 0; });
  ++all.holds;
}

Hold::~Hold() {
  Table& all = table();
  const std::lock_guard lock(all.mutex);
  if (--all.holds == 0 && all.forking != 0) all.changed.notify_all();
}

void add(const Hold&, int fd) {
  const std::lock_guard lock(table().mutex);
  table().fds.push_back(fd);
}

void remove(const Hold&, int fd) noexcept {
  const std::lock_guard lock(table().mutex);
  std::erase(table().fds, fd);
}

}  // namespace lmcn::fork_guard

namespace lmcn {

// In one step for fork(): a closed number may be somebody else's at once, an unregistered one would be inherited. A close() that
// waits for its device has given the number up already, so the child of a fork() that did not wait for it has no copy.
void ProcessFd::reset() noexcept {
  if (fd_ < 0) return;
  const fork_guard::Hold hold;
  fork_guard::remove(hold, fd_);
  ::close(std::exchange(fd_, -1));
}

}  // namespace lmcn
