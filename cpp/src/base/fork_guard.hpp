// What a forked child must not keep. flock(), a listening socket and a connection live for as long as any process has a copy of
// the descriptor, so a child (multiprocessing, a subprocess with preexec_fn, a server's helper) would keep them after we died.
//
// Descriptors owned by a ProcessFd are replaced by /dev/null in every child made by fork(): the number stays taken, so whoever
// closes it there closes nothing else (unless /dev/null cannot be opened: then the number is free). Not covered: clone() called
// directly, and vfork(), whose child must exec at once (all our descriptors are close-on-exec).
#pragma once

#include <cstdint>
#include <utility>

namespace lmcn {
namespace fork_guard {

/// How many fork()s lie between the process that loaded this library and this one: an object that remembers it knows whether it
/// was inherited. One relaxed load.
std::uint64_t forks() noexcept;

/// fork() of any thread waits while one lives, but no longer than 100 ms: then it goes on without, and its child has what was
/// opened in the hold and not yet added, or removed and not yet closed. A call that waits for a device has no descriptor in either
/// state. Any number may live at a time. Keep it to opening or closing one descriptor; do not nest.
class Hold {
 public:
  Hold();
  ~Hold();
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;
};

void add(const Hold&, int fd);
void remove(const Hold&, int fd) noexcept;  // not registered: nothing happens

}  // namespace fork_guard

/// Owns a descriptor of this process alone. Movable; one thread at a time.
class ProcessFd {
 public:
  ProcessFd() noexcept = default;
  ProcessFd(ProcessFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  ProcessFd& operator=(ProcessFd&& other) noexcept {
    if (this != &other) {
      reset();
      fd_ = std::exchange(other.fd_, -1);
    }
    return *this;
  }
  ~ProcessFd() { reset(); }

  /// Takes what `open()` returns: a new descriptor, or -1 with errno (kept). No fork() comes between opening and registering
  /// (see Hold).
  template <class Open>
  static ProcessFd opened(Open&& open) {
    ProcessFd made;
    const fork_guard::Hold hold;
    made.fd_ = open();
    if (made.fd_ >= 0) fork_guard::add(hold, made.fd_);
    return made;
  }

  int get() const noexcept { return fd_; }
  bool valid() const noexcept { return fd_ >= 0; }
  void reset() noexcept;

 private:
  int fd_ = -1;
};

}  // namespace lmcn
