// Scripts of store operations: made by chance, printed, and made smaller while they fail.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace lmcn::model {

enum class Action : std::uint8_t {
  kPut,  // reserve, fill, commit
  kReserve,
  kFill,
  kCommit,
  kAbort,
  kLookup,
  kAcquire,  // the lease stays until kRelease
  kRelease,
  kBegin,
  kAsk,
  kPrefetch,
  kAskPrefix,
  kTake,  // acquire() of a request's hits
  kEnd,
  kErase,
  kClear,
  kTouch,
  kFlush,
  kReopen,  // close() and open
  kKill,    // open what the disk holds, without close()
  kCheck,   // every chunk there is, against the model
  kFault,   // the faulty disk only
};

/// `id` and the `count` ids after it; `place` picks one of the leases or requests that are held, or a kind of fault.
struct Step {
  Action action;
  std::uint32_t id = 0;
  std::uint32_t count = 1;
  std::uint32_t place = 0;
};
using Script = std::vector<Step>;

inline constexpr std::uint32_t kIds = 192;

Script random_script(std::uint64_t seed, std::size_t length);

/// One step a line, as C++ that makes it again.
std::string to_text(const Script& script);

/// A part of `script` that still fails and of which no step can be left out (delta debugging), found with at most `runs` runs.
/// `fails`: what a run of a script says; nullopt when it held. A failure that does not show at each run is tried `tries` times.
Script shrink(Script script, const std::function<std::optional<std::string>(const Script&)>& fails, int runs, int tries);

}  // namespace lmcn::model
