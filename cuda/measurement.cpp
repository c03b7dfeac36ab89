#include "measurement.hpp"

#include <atomic>
#include <cstdlib>
#include <map>
#include <thread>
#include <utility>
#include <vector>

#include "base/seq_points.hpp"
#include "calibration_cache.hpp"
#include "cuda_error.hpp"
#include "per_process.hpp"

namespace lmcn {
namespace {

// For repeating what was measured once.
constexpr std::chrono::milliseconds kBudget{40};
constexpr std::chrono::milliseconds kForgetWait = std::chrono::minutes(1);
constexpr std::chrono::milliseconds kExitWait{200};

struct All {
  std::mutex mutex;
  std::map<std::string, std::shared_ptr<Measurement>> by_layout;
  std::atomic<bool> stop{false};
  std::mutex running_mutex;
  std::condition_variable one_ended;
  unsigned running = 0;  // threads; under running_mutex
};

/// A thread that measures; made before it starts.
class Running {
 public:
  explicit Running(All& all) : all_(all) {
    std::lock_guard lock(all_.running_mutex);
    ++all_.running;
  }
  ~Running() {
    std::lock_guard lock(all_.running_mutex);
    --all_.running;
    all_.one_ended.notify_all();
  }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;
  const std::atomic<bool>& stop() const { return all_.stop; }

 private:
  All& all_;
};

void stop_at_exit() {
  static_cast<void>(Measurement::stop_all(kExitWait));
}
}  // namespace

void Measurement::end(Calibration calibration, std::string notes) {
  {
    std::lock_guard lock(mutex_);
    calibration_ = std::move(calibration);
    notes_ = std::move(notes);
    ended_ = true;
  }
  changed_.notify_all();
}

bool Measurement::ended() const {
  std::lock_guard lock(mutex_);
  return ended_;
}

bool Measurement::stop_all(std::chrono::milliseconds timeout) {
  All& here = per_process<All>();
  here.stop.store(true, std::memory_order_release);
  std::unique_lock lock(here.running_mutex);
  return here.one_ended.wait_for(lock, timeout, [&] { return here.running == 0; });
}

bool Measurement::wait(std::chrono::milliseconds timeout) const {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, timeout, [&] { return ended_; });
}

std::shared_ptr<const Measurement> Measurement::of(const PagedKvLayout& paged, const SlotLayout& slot, const CopyGeometry& geometry,
                                                   int device) {
  All& here = per_process<All>();
  std::lock_guard lock(here.mutex);
  std::shared_ptr<Measurement>& entry = here.by_layout[std::to_string(device) + ' ' + layout_text(geometry, slot.chunk_tokens)];
  if (entry != nullptr) return entry;
  entry = std::shared_ptr<Measurement>(new Measurement);
  const Result<CalibrationKey> key = CalibrationKey::of(geometry, slot.chunk_tokens, device);
  const Result<CalibrationCache> cache = CalibrationCache::open();
  const Status no_cache = !key.ok() ? key.status() : cache.status();
  if (no_cache.ok()) {
    if (std::optional<Calibration> known = cache->load(*key)) {
      entry->end(*std::move(known), "; measured earlier: " + cache->path_of(*key));
      return entry;
    }
  }
  // Registered once CUDA has been used, so that it is called before CUDA's own.
  static const bool registered = std::atexit(stop_at_exit) == 0;
  static_cast<void>(registered);
  // Detached: nothing of it is anybody's but the entry, and a process waits for it at its end no longer than kExitWait.
  std::thread([running = std::make_unique<Running>(here), mine = entry, paged, slot, key, cache, no_cache, device,
               candidates = candidates_of(geometry)] {
    LMCN_SEQ_POINT("measurement.begin");
    Calibration measured;
    if (const Status begun = begin_cuda_thread(device, Code::kUnavailable); begun.ok()) {
      measured = measure_paths(paged, slot, device, candidates, {.budget = kBudget, .stop = &running->stop()});
    } else {
      measured.notes.push_back("nothing measured: " + begun.message());
    }
    std::string notes;
    for (const std::string& note : measured.notes) notes += "; " + note;
    Status kept = no_cache;
    // What failed today, for want of memory perhaps, is tried again by the next process.
    const bool complete = measured.notes.empty() && measured.rates.size() == candidates.size();
    if (kept.ok() && complete) kept = cache->store(*key, measured);
    if (!kept.ok()) notes += "; not kept: " + kept.message();
    mine->end(std::move(measured), std::move(notes));
  }).detach();
  return entry;
}

void Measurement::forget_all() {
  All& here = per_process<All>();
  std::lock_guard lock(here.mutex);
  for (const auto& [layout, entry] : here.by_layout) static_cast<void>(entry->wait(kForgetWait));
  here.by_layout.clear();
  here.stop.store(false, std::memory_order_release);
}

}  // namespace lmcn
