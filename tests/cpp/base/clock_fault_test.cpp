// The wall clock may jump (NTP, suspend, an administrator): nothing here may notice. See also tests/python/test_wall_clock.py.
#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>

namespace lmcn {
namespace {

TEST(Clocks, TimedWaitsAreOnTheMonotonicClock) {
  static_assert(std::chrono::steady_clock::is_steady);
#if defined(__GLIBCXX__)
  // Else libstdc++ turns a steady_clock deadline into one of the wall clock (glibc before 2.30).
  static_assert(_GLIBCXX_USE_PTHREAD_COND_CLOCKWAIT);
#endif
}

}  // namespace
}  // namespace lmcn
