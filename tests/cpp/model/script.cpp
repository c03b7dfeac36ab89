#include "model/script.hpp"

#include <algorithm>
#include <array>
#include <random>
#include <sstream>

namespace lmcn::model {
namespace {

struct Weight {
  Action action;
  const char* name;
  unsigned weight;
};
constexpr std::array kWeights = {
    Weight{Action::kPut, "kPut", 260},          Weight{Action::kReserve, "kReserve", 40},
    Weight{Action::kFill, "kFill", 50},         Weight{Action::kCommit, "kCommit", 40},
    Weight{Action::kAbort, "kAbort", 15},       Weight{Action::kLookup, "kLookup", 50},
    Weight{Action::kAcquire, "kAcquire", 70},   Weight{Action::kRelease, "kRelease", 60},
    Weight{Action::kBegin, "kBegin", 30},       Weight{Action::kAsk, "kAsk", 80},
    Weight{Action::kPrefetch, "kPrefetch", 30}, Weight{Action::kAskPrefix, "kAskPrefix", 30},
    Weight{Action::kTake, "kTake", 40},         Weight{Action::kEnd, "kEnd", 25},
    Weight{Action::kErase, "kErase", 35},       Weight{Action::kClear, "kClear", 8},
    Weight{Action::kTouch, "kTouch", 20},       Weight{Action::kFlush, "kFlush", 40},
    Weight{Action::kReopen, "kReopen", 15},     Weight{Action::kKill, "kKill", 15},
    Weight{Action::kCheck, "kCheck", 20},       Weight{Action::kFault, "kFault", 25},
};

constexpr std::uint64_t kHotIds = 12;

}  // namespace

Script random_script(std::uint64_t seed, std::size_t length) {
  std::mt19937_64 random(seed);
  std::vector<unsigned> weights;
  for (const Weight& w : kWeights) weights.push_back(w.weight);
  std::discrete_distribution<std::size_t> action(weights.begin(), weights.end());
  Script script;
  while (script.size() < length) {
    // Few chunks, so that what one step does another undoes, or many, so that they do not all fit.
    const std::uint64_t among = random() % 4 < (seed % 2 == 0 ? 1 : 4) ? kIds : kHotIds;
    script.push_back({kWeights[action(random)].action, static_cast<std::uint32_t>(random() % among),
                      static_cast<std::uint32_t>(1 + random() % 4), static_cast<std::uint32_t>(random() % 8)});
  }
  script.push_back({Action::kCheck});
  return script;
}

std::string to_text(const Script& script) {
  std::ostringstream out;
  for (const Step& step : script) {
    const auto* const known =
        std::find_if(kWeights.begin(), kWeights.end(), [&](const Weight& w) { return w.action == step.action; });
    out << "    {Action::" << known->name << ", " << step.id << ", " << step.count << ", " << step.place << "},\n";
  }
  return out.str();
}

Script shrink(Script script, const std::function<std::optional<std::string>(const Script&)>& fails, int runs, int tries) {
  const auto still_fails = [&](const Script& candidate) {
    for (int i = 0; i < tries && runs > 0; ++i, --runs) {
      if (fails(candidate)) return true;
    }
    return false;
  };
  for (std::size_t piece = std::max<std::size_t>(script.size() / 2, 1); runs > 0;) {
    bool smaller = false;
    for (std::size_t at = 0; at < script.size() && runs > 0;) {
      Script without = script;
      const std::size_t end = std::min(at + piece, script.size());
      without.erase(without.begin() + static_cast<std::ptrdiff_t>(at), without.begin() + static_cast<std::ptrdiff_t>(end));
      if (!without.empty() && still_fails(without)) {
        script = std::move(without);
        smaller = true;
      } else {
        at += piece;
      }
    }
    if (piece == 1 && !smaller) break;
    if (!smaller || piece > script.size()) piece = std::max<std::size_t>(std::min(piece, script.size()) / 2, 1);
  }
  return script;
}

}  // namespace lmcn::model
