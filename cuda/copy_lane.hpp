// One direction of the CUDA copier: a thread with its own stream, non-blocking and of the lowest priority. Copies are enqueued here
// and not in submit(), because a copy to or from pageable memory (what of the arena is not registered with CUDA yet) may hold its
// caller until the bytes have moved.
//
// Order: a job's copies wait, on the device, for the event that submit() recorded on the engine's stream. Completion is an event
// that this thread polls; no thread synchronises with the device, except after an error, to learn whether copies still run.
// The rank words are written by this thread, so publishing does not depend on anyone calling poll().
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "copy/copy_geometry.hpp"
#include "copy/job_board.hpp"
#include "copy/job_outcome.hpp"
#include "copy_path.hpp"

namespace lmcn {

/// The events of one job. Owned by an EventPool.
struct JobEvents {
  cudaEvent_t ready = nullptr;                 // on the engine's stream: what the copies wait for
  cudaEvent_t begin = nullptr, end = nullptr;  // on the lane's stream, with timing
};

/// Thread-safe. Events are created for the device current on the calling thread and live as long as the pool.
class EventPool {
 public:
  ~EventPool();
  Status create();
  /// false: none left.
  bool take(JobEvents& events);
  void give_back(const JobEvents& events);

  /// `count` events without timing, made as needed.
  Status take_marks(std::size_t count, std::vector<cudaEvent_t>& marks);
  void give_back_marks(const std::vector<cudaEvent_t>& marks);

 private:
  std::mutex mutex_;
  Status make(cudaEvent_t& event, unsigned flags);

  std::vector<JobEvents> free_;
  std::vector<cudaEvent_t> free_marks_;
  std::vector<cudaEvent_t> all_;
};

/// How far a job layer by layer has been handed to the stream. Under the lane's mutex_.
struct LayerProgress {
  std::vector<cudaEvent_t> marks;  // recorded behind the leading layers
  Status failure;
  bool ended = false;  // reported to the board; the marks belong to others by now
};

struct CudaJob {
  CudaJob(const CopyGeometry& geometry, CopyJob accepted) : job(std::move(accepted)), outcome(geometry, job) {}
  CopyJob job;  // outcome points into it
  JobOutcome outcome;
  JobEvents events;
  Status ready;         // of recording events.ready
  bool issued = false;  // at least one copy was handed to the stream
  std::atomic<bool> cancelled{false};
  std::vector<cudaEvent_t> marks;           // of a job layer by layer; owned by the EventPool
  std::shared_ptr<LayerProgress> progress;  // null: not layer by layer
};

/// What a lane copies with.
struct LanePaths {
  std::unique_ptr<CopyPath> chosen;
  std::unique_ptr<CopyPath> any_memory;            // for slots in memory that `chosen` cannot use; null: it can use any
  const HostRegistration* registration = nullptr;  // outlives the lane; null: `chosen` needs none
};

/// Before each job, on the lane's thread with its device current, until it answers true: other paths from now on, where it set
/// some. What the lane begins with must keep nothing of what was enqueued.
using LaterPaths = std::function<bool(LanePaths& paths)>;

class CopyLane {
 public:
  /// All outlive the lane. start() must have succeeded before push().
  CopyLane(const CopyGeometry& geometry, JobBoard& board, EventPool& events, int device, std::chrono::milliseconds lost_after)
      : geometry_(geometry), board_(board), events_(events), device_(device), lost_after_(lost_after) {}
  ~CopyLane() { stop(); }

  /// Starts the thread and waits until its stream exists. `later` may be null. kUnavailable.
  Status start(LanePaths paths, LaterPaths later);
  /// Ends all jobs pushed.
  void stop();
  void push(std::unique_ptr<CudaJob> job);
  /// Of these, jobs in the queue end without any copy, before the jobs in flight; the one being issued ends where it is.
  void cancel(std::span<const std::uint64_t> ids);
  /// PagedCopier::wait_layers(). REQUIRES: layers within bounds; the device current when `stream` is a default stream.
  Status wait_layers(std::uint64_t id, std::uint32_t layers, std::chrono::milliseconds timeout, cudaStream_t stream);
  PathKind path() const noexcept { return path_; }
  /// Whether the end of a copy could not be established. kIoError: the device was lost before it. kUnavailable: it may still run.
  /// REQUIRES: stop().
  const Status& lost() const noexcept { return lost_; }
  /// "; 2 jobs failed by CUDA errors, the last by cudaEventRecord: ..."; "": none. Thread-safe.
  std::string failures() const;
  /// Items that were copied by LanePaths::any_memory. Thread-safe.
  std::uint64_t items_in_other_memory() const noexcept { return items_in_other_memory_; }

 private:
  Status set_up();
  void run();
  /// Reports the cancelled jobs of the queue. REQUIRES: mutex_ held by `lock`; gives it up meanwhile.
  void end_cancelled(std::unique_lock<std::mutex>& lock);
  /// Hands the job's copies to the stream. Not ok: the job fails as a whole.
  Status issue(CudaJob& job);
  Status issue_by_layer(CudaJob& job);
  /// Those of the job's items that may be copied, as many together as their path takes.
  Status issue_planes(CudaJob& job, std::size_t plane_begin, std::size_t plane_end);
  /// What keeps item `index` from being copied has been said to the job's outcome.
  bool may_copy(CudaJob& job, std::size_t index);
  void note_failure(CudaJob& job, const Status& why);
  /// Reports the job if its copies have ended.
  bool end_if_done(std::unique_ptr<CudaJob>& job);
  /// Reports it once its copies have ended, or the device is lost; a load whose copies may then still run is stranded.
  void fail(std::unique_ptr<CudaJob> job, const Status& why);
  /// Waits until all that was issued has ended.
  Status settle();
  void report(std::unique_ptr<CudaJob> job, bool copies_ended, double seconds);

  const CopyGeometry& geometry_;
  JobBoard& board_;
  EventPool& events_;
  const int device_;
  const std::chrono::milliseconds lost_after_;
  cudaStream_t stream_ = nullptr;
  LanePaths paths_;
  LaterPaths later_;
  std::atomic<PathKind> path_{PathKind::kMemcpy};
  Status lost_;  // the lane's thread only
  std::atomic<std::uint64_t> items_in_other_memory_{0};

  mutable std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable progress_;  // of jobs layer by layer
  std::deque<std::unique_ptr<CudaJob>> queue_;
  std::unordered_map<std::uint64_t, std::shared_ptr<LayerProgress>> layered_;  // jobs layer by layer that have not ended
  CudaJob* issuing_ = nullptr;                                                 // under mutex_
  bool cancel_due_ = false;                                                    // a job of the queue may be cancelled
  bool stop_ = false;
  std::uint64_t failed_jobs_ = 0;                   // by errors of CUDA; under mutex_
  Status last_failure_;                             // under mutex_
  std::deque<std::unique_ptr<CudaJob>> in_flight_;  // the lane's thread only; ends in this order
  std::thread thread_;
};

}  // namespace lmcn
