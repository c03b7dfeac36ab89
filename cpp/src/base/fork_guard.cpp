#include "base/fork_guard.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

namespace lmcn::fork_guard {
namespace {

std::atomic<std::uint64_t> fork_count{0};

// The mutex is taken before each fork() and let go on both sides by the thread that forks, so in the child nobody else holds it
// and the table is whole.
struct Table {
  std::mutex mutex;
  std::vector<int> fds;
};

Table& table() {
  static auto* const instance = new Table;  // never destroyed: threads may outlive main()
  return *instance;
}

void before_fork() {
  table().mutex.lock();
}

void in_parent() {
  table().mutex.unlock();
}

// Of the child's only thread; nothing here but what a signal handler may call (the table's memory is only read, then marked empty).
void in_child() {
  fork_count.fetch_add(1, std::memory_order_relaxed);
  std::vector<int>& fds = table().fds;
  const int null = fds.empty() ? -1 : ::open("/dev/null", O_RDWR | O_CLOEXEC);
  for (const int fd : fds) {
    if (null < 0 || ::dup3(null, fd, O_CLOEXEC) < 0) ::close(fd);
  }
  if (null >= 0) ::close(null);
  fds.clear();
  table().mutex.unlock();
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
  table().mutex.lock();
}

Hold::~Hold() {
  table().mutex.unlock();
}

void add(const Hold&, int fd) {
  table().fds.push_back(fd);
}

void remove(const Hold&, int fd) noexcept {
  std::erase(table().fds, fd);
}

}  // namespace lmcn::fork_guard

namespace lmcn {

// In one step for fork(): a closed number may be somebody else's at once, an unregistered one would be inherited.
void ProcessFd::reset() noexcept {
  if (fd_ < 0) return;
  const fork_guard::Hold hold;
  fork_guard::remove(hold, fd_);
  ::close(std::exchange(fd_, -1));
}

}  // namespace lmcn
