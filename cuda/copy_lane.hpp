// One direction of the CUDA copier: a thread with its own non-blocking stream. Copies are enqueued here and not in submit(),
// because a copy to or from pageable memory (an arena not registered with CUDA) may hold its caller until the bytes have moved.
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

class CopyLane {
 public:
  /// All outlive the lane. start() must have succeeded before push().
  CopyLane(const CopyGeometry& geometry, JobBoard& board, EventPool& events, int device)
      : geometry_(geometry), board_(board), events_(events), device_(device) {}
  ~CopyLane();  // ends all jobs pushed

  /// Starts the thread and waits until its stream exists and `check`, called on it with the device current, is ok.
  Status start(const std::function<Status()>& check);
  void push(std::unique_ptr<CudaJob> job);
  /// Of these, jobs in the queue end without any copy, before the jobs in flight; the one being issued ends where it is.
  void cancel(std::span<const std::uint64_t> ids);
  /// PagedCopier::wait_layers(). REQUIRES: layers within bounds; the device current when `stream` is a default stream.
  Status wait_layers(std::uint64_t id, std::uint32_t layers, std::chrono::milliseconds timeout, cudaStream_t stream);

 private:
  Status set_up();
  void run();
  /// Reports the cancelled jobs of the queue. REQUIRES: mutex_ held by `lock`; gives it up meanwhile.
  void end_cancelled(std::unique_lock<std::mutex>& lock);
  /// Hands the job's copies to the stream. Not ok: the job fails as a whole.
  Status issue(CudaJob& job);
  Status issue_by_item(CudaJob& job);
  Status issue_by_layer(CudaJob& job);
  /// What keeps item `index` from being copied has been said to the job's outcome.
  bool may_copy(CudaJob& job, std::size_t index);
  Status copy_planes(CudaJob& job, const CopyItem& item, std::size_t from, std::size_t to);
  void note_failure(CudaJob& job, const Status& why);
  Status copy_group(const RunGroup& group, std::byte* rank_part, CopyDirection direction);
  /// Reports the job if its copies have ended.
  bool end_if_done(std::unique_ptr<CudaJob>& job);
  void fail(std::unique_ptr<CudaJob> job, const Status& why);
  void report(std::unique_ptr<CudaJob> job, bool copies_ended, double seconds);

  const CopyGeometry& geometry_;
  JobBoard& board_;
  EventPool& events_;
  const int device_;
  cudaStream_t stream_ = nullptr;
  std::int64_t max_pitch_bytes_ = 0;

  std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable progress_;  // of jobs layer by layer
  std::deque<std::unique_ptr<CudaJob>> queue_;
  std::unordered_map<std::uint64_t, std::shared_ptr<LayerProgress>> layered_;  // jobs layer by layer that have not ended
  CudaJob* issuing_ = nullptr;                                                 // under mutex_
  bool cancel_due_ = false;                                                    // a job of the queue may be cancelled
  bool stop_ = false;
  std::deque<std::unique_ptr<CudaJob>> in_flight_;  // the lane's thread only; ends in this order
  std::thread thread_;
};

}  // namespace lmcn
