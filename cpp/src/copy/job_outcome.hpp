// The fate of one job's items and what each slot's rank word is told of it. Not thread-safe: its copier serialises the calls.
//
// Invariants:
//  - A slot's payload is touched only while its header carries the item's generation (check before), and the rank word is written
//    only while it still does: the words of a slot that was handed out anew belong to its new life.
//  - A slot named by several items of a job gets one word, after the last of them: kOk only when all of them succeeded.
//  - The words are written after every byte of the job has reached its place, or, when that cannot be known, not at all: the
//    slot then stays quarantined.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "copy/copy_geometry.hpp"
#include "lmcn/paged_copy.hpp"

namespace lmcn {

/// kDeadlineExceeded of PagedCopier::wait_layers().
Status layers_deadline(std::uint64_t id, std::uint32_t layers, std::chrono::milliseconds timeout);

class JobOutcome {
 public:
  /// REQUIRES: `job` passed geometry.check_job(); both outlive this.
  JobOutcome(const CopyGeometry& geometry, const CopyJob& job);

  /// Does the slot belong to this item, and has it room for this rank? Thread-safe. kAborted, kCorruption, kInvalidArgument.
  static Status check_slot(const CopyGeometry& geometry, const CopyItem& item);

  /// Of the items that a cancelled job did not start.
  static Status cancelled() { return {Code::kAborted, "cancelled"}; }

  /// What wait_layers() answers of a job that failed.
  static Status job_failed(const CopyJob& job, const Status& why);

  void fail_item(std::size_t index, const Status& why);
  void fail_all(const Status& why);
  bool failed(std::size_t index) const { return failed_[index]; }

  /// Checks every slot once more, then publishes (gather) or counts the load (scatter) per slot. REQUIRES: the copies have ended.
  void write_words();
  CopyDone done(double seconds) &&;

 private:
  const CopyGeometry* geometry_;
  const CopyJob* job_;
  std::vector<bool> failed_;
  std::string message_;  // of the first failure
};

}  // namespace lmcn
