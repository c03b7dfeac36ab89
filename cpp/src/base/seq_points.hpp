// Races as numbered scripts: a test stops a thread at a named point of the code under test, does the other half of the race,
// and lets it go. Built only with LMCN_SEQ_POINTS (set with LMCN_TESTS); otherwise LMCN_SEQ_POINT is nothing.
//
//   void Copier::publish() {                         std::jthread worker([&] { copier.publish(); });
//     ...                                            SeqPointScope scope;  // after the threads: reset before they are joined
//     LMCN_SEQ_POINT("copier.before_publish");       // 1. the worker is about to publish
//     ...                                            ASSERT_TRUE(SeqPoints::wait_until_reached("copier.before_publish", 10s));
//   }                                                store.clear();                                // 2. all is dropped
//   // before the thread starts:                     SeqPoints::release("copier.before_publish");  // 3. it publishes too late
//   SeqPoints::hold("copier.before_publish");
#pragma once

#ifdef LMCN_SEQ_POINTS

#include <chrono>
#include <cstdint>
#include <string_view>

namespace lmcn {

/// Process-wide and thread-safe. A point nobody holds costs one relaxed load. Names are free text, "room.where" by habit;
/// release() and wait_until_reached() of a name that was not held since the last reset() throw std::logic_error (a typo).
class SeqPoints {
 public:
  /// Threads that come to `name` from now on wait there. Counts arrivals anew. REQUIRES: not held now (std::logic_error).
  static void hold(std::string_view name);

  /// Waits until `arrivals` threads have come to `name` since hold(). false: `timeout` passed. Holds after release() too.
  [[nodiscard]] static bool wait_until_reached(std::string_view name, std::chrono::milliseconds timeout,
                                               std::uint32_t arrivals = 1);

  /// Lets go all that wait at `name`, and all that come later (still counted) until the next hold().
  static void release(std::string_view name);

  /// Lets go those that wait at `name` now; the point stays held, and arrivals are counted anew. REQUIRES: held (std::logic_error).
  /// (release() then hold() would leave a gap in which a thread can pass.)
  static void step(std::string_view name);

  /// Releases and forgets every point.
  static void reset();

  /// What LMCN_SEQ_POINT calls.
  static void reach(std::string_view name);
};

/// reset() at the end of the block, so that a failed ASSERT leaves no thread waiting. Declare it after the threads to be joined.
struct SeqPointScope {
  SeqPointScope() = default;
  SeqPointScope(const SeqPointScope&) = delete;
  SeqPointScope& operator=(const SeqPointScope&) = delete;
  ~SeqPointScope() { SeqPoints::reset(); }
};

}  // namespace lmcn

#define LMCN_SEQ_POINT(name) ::lmcn::SeqPoints::reach(name)

#else

#define LMCN_SEQ_POINT(name) static_cast<void>(0)

#endif
