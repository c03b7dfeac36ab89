// What is fuzzed sees the same time and the same process id in every run, so that a run can be repeated. The linker puts these in
// the places of nvme::unix_seconds_now() and getpid().
#include <unistd.h>

#include <cstdint>

extern "C" std::uint64_t __wrap__ZN4lmcn4nvme16unix_seconds_nowEv() {
  return 1'800'000'000;
}

extern "C" pid_t __wrap_getpid() {
  return 12345;
}
