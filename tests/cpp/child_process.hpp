// Forked children of tests.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <functional>

namespace lmcn {

/// Runs `body` in a forked child; its return value is the exit status. One that hangs dies of its alarm after 90 s. No gtest
/// assertions in there.
inline pid_t run_in_child(const std::function<int()>& body) {
  const pid_t pid = ::fork();
  if (pid == 0) {
    ::alarm(90);
    ::_exit(body());
  }
  return pid;
}

/// Waits for it; 128 + the signal when one ended it, -1 when there is none to wait for.
inline int exit_status(pid_t pid) {
  int status = -1;
  if (pid < 0 || ::waitpid(pid, &status, 0) != pid) return -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace lmcn
