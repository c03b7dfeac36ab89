// What all copiers of a process share, and a forked child of it does not.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "base/fork_guard.hpp"

namespace lmcn {

/// This process's T, made when first asked for and never destroyed. A forked child gets one of its own: a mutex in its parent's may
/// be held for ever by a thread that the child has not.
template <class T>
T& per_process() {
  struct Held {
    std::uint64_t forks;
    Held* parents;  // reachable still, for leak checkers
    T value;
  };
  static std::atomic<Held*> newest{nullptr};
  Held* held = newest.load(std::memory_order_acquire);
  while (held == nullptr || held->forks != fork_guard::forks()) {
    auto* const fresh = new Held{fork_guard::forks(), held, {}};
    if (newest.compare_exchange_strong(held, fresh, std::memory_order_acq_rel)) return fresh->value;
    delete fresh;
  }
  return held->value;
}

/// What a device that counts as lost may still use. Thread-safe.
struct KeptForEver {
  std::mutex mutex;
  std::vector<std::shared_ptr<const void>> all;
};
inline void keep_for_ever(std::shared_ptr<const void> what) {
  KeptForEver& kept = per_process<KeptForEver>();
  std::lock_guard lock(kept.mutex);
  kept.all.push_back(std::move(what));
}
/// For tests, whose devices come back.
inline void release_kept() {
  KeptForEver& kept = per_process<KeptForEver>();
  std::lock_guard lock(kept.mutex);
  for (auto& one : kept.all) one.reset();  // paths before the registration that they know
  kept.all.clear();
}

}  // namespace lmcn
