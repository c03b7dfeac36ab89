// What goes to NVMe. A drive wears out by what is written to it, so writes have a daily budget, and most chunks are never asked for
// again: when writes are dear, only those that were asked for twice are written.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "lmcn/key.hpp"
#include "lmcn/status.hpp"

namespace lmcn {

enum class AdmissionMode : std::uint8_t {
  kAuto,         // everything while writes are cheap, else second touch
  kAlways,       // everything that the budget allows
  kSecondTouch,  // only what was stored or used before
};

/// kInvalidArgument names the value. "auto", "always", "second_touch".
Result<AdmissionMode> parse_admission_mode(const std::string& name);

enum class Admitted : std::uint8_t {
  kYes,
  kFirstTouch,  // not seen before; a later offer of the same chunk will be
  kOverBudget,  // the day's budget is spent, in whatever mode
};

/// The store's lock covers it.
class Admission {
 public:
  /// budget_bytes: of 24 hours. A hard limit.
  Admission(AdmissionMode mode, std::uint64_t budget_bytes) : mode_(mode), budget_bytes_(budget_bytes) {}

  struct Offer {
    std::uint64_t bytes = 0;
    bool touched = false;         // it was used since it was stored
    bool low = false;             // only when touched or seen before, in whatever mode
    bool device_behind = false;   // writes wait longer than they should
    std::uint64_t day_bytes = 0;  // written within the last 24 hours, and accepted but not yet written
  };
  Admitted decide(const ChunkKey& key, const Offer& offer);

  std::uint64_t budget_bytes() const noexcept { return budget_bytes_; }

 private:
  bool seen_before(const ChunkKey& key);

  AdmissionMode mode_;
  std::uint64_t budget_bytes_;
  std::vector<std::uint64_t> seen_;  // fingerprints of refused keys, each at a place that its key decides; made when needed
};

}  // namespace lmcn
