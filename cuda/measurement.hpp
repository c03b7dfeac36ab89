// A calibration that runs beside everything else: begun when an engine registers its memory, on a thread of its own, once for all
// copiers of the process with the same layout and device.
#pragma once

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>

#include "calibration.hpp"
#include "copy/copy_geometry.hpp"
#include "lmcn/kv_layout.hpp"

namespace lmcn {

/// Thread-safe.
class Measurement {
 public:
  /// The one of this process, begun if there is none: it has ended already where an earlier process kept its result.
  /// `geometry`: of `paged` and `slot`, anywhere. REQUIRES: the device is current on this thread.
  static std::shared_ptr<const Measurement> of(const PagedKvLayout& paged, const SlotLayout& slot, const CopyGeometry& geometry,
                                               int device);
  /// What is under way ends without asking anything more of CUDA, and so does what is begun later. false: not within `timeout`. At
  /// exit this is done with 200 ms: CUDA must not be used while it is unloaded.
  static bool stop_all(std::chrono::milliseconds timeout);
  /// As in a process that has measured nothing, once what is under way has ended. For tests.
  static void forget_all();

  bool ended() const;
  /// Whether it has ended within `timeout`.
  bool wait(std::chrono::milliseconds timeout) const;
  /// REQUIRES: ended().
  const Calibration& calibration() const { return calibration_; }
  /// What could not be measured or kept, and why; where the result comes from. "; TEXT" each. REQUIRES: ended().
  const std::string& notes() const { return notes_; }

 private:
  Measurement() = default;
  void end(Calibration calibration, std::string notes);

  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  bool ended_ = false;
  Calibration calibration_;  // with notes_: written before ended_, not after
  std::string notes_;
};

}  // namespace lmcn
