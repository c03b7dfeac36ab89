#include "copy_lane.hpp"

#include <algorithm>
#include <chrono>
#include <future>
#include <string>

#include "base/seq_points.hpp"
#include "cuda_error.hpp"
#include "host_registration.hpp"
#include "per_process.hpp"

namespace lmcn {
namespace {

// Jobs handed to the stream and not ended: enough that the copy engine never waits for this thread.
constexpr std::size_t kMaxInFlightJobs = 8;
// How often a completion event is asked for while one is pending.
constexpr std::chrono::microseconds kPollInterval{100};

}  // namespace

EventPool::~EventPool() {
  // At teardown there is nobody to tell, and the driver may be gone already.
  for (cudaEvent_t event : all_) static_cast<void>(cudaEventDestroy(event));
}

Status EventPool::make(cudaEvent_t& event, unsigned flags) {
  LMCN_RETURN_IF_ERROR(cuda_check(cudaEventCreateWithFlags(&event, flags), "cudaEventCreateWithFlags"));
  std::lock_guard lock(mutex_);
  all_.push_back(event);
  return {};
}

Status EventPool::take_marks(std::size_t count, std::vector<cudaEvent_t>& marks) {
  {
    std::lock_guard lock(mutex_);
    while (marks.size() < count && !free_marks_.empty()) {
      marks.push_back(free_marks_.back());
      free_marks_.pop_back();
    }
  }
  while (marks.size() < count) {
    cudaEvent_t event = nullptr;
    LMCN_RETURN_IF_ERROR(make(event, cudaEventDisableTiming));
    marks.push_back(event);
  }
  return {};
}

void EventPool::give_back_marks(const std::vector<cudaEvent_t>& marks) {
  std::lock_guard lock(mutex_);
  free_marks_.insert(free_marks_.end(), marks.begin(), marks.end());
}

Status EventPool::create() {
  JobEvents made;
  LMCN_RETURN_IF_ERROR(make(made.ready, cudaEventDisableTiming));
  LMCN_RETURN_IF_ERROR(make(made.begin, cudaEventDefault));
  LMCN_RETURN_IF_ERROR(make(made.end, cudaEventDefault));
  give_back(made);
  return {};
}

bool EventPool::take(JobEvents& events) {
  std::lock_guard lock(mutex_);
  if (free_.empty()) return false;
  events = free_.back();
  free_.pop_back();
  return true;
}

void EventPool::give_back(const JobEvents& events) {
  if (events.ready == nullptr) return;
  std::lock_guard lock(mutex_);
  free_.push_back(events);
}

void CopyLane::stop() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_.notify_one();
  if (thread_.joinable()) thread_.join();
}

Status CopyLane::start(LanePaths paths, LaterPaths later) {
  paths_ = std::move(paths);
  later_ = std::move(later);
  path_ = paths_.chosen->kind();
  std::promise<Status> ready;
  std::future<Status> result = ready.get_future();
  thread_ = std::thread([this, &ready] {
    Status status = set_up();
    const bool ok = status.ok();
    ready.set_value(std::move(status));
    if (ok) run();
    // What a copy may still use is given back to nobody.
    if (lost_.code() == Code::kUnavailable) keep_for_ever(std::make_shared<LanePaths>(std::move(paths_)));
    paths_ = {};  // on this thread: giving back their memory asks for events
    later_ = nullptr;
    if (stream_ != nullptr) static_cast<void>(cudaStreamDestroy(stream_));  // teardown: nobody is left to tell
  });
  return result.get();
}

Status CopyLane::set_up() {
  LMCN_RETURN_IF_ERROR(begin_cuda_thread(device_, Code::kUnavailable));
  int lowest = 0, highest = 0;
  LMCN_RETURN_IF_ERROR(
      cuda_check(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "cudaDeviceGetStreamPriorityRange", Code::kUnavailable));
  LMCN_RETURN_IF_ERROR(cuda_check(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, lowest),
                                  "cudaStreamCreateWithPriority", Code::kUnavailable));
  for (std::size_t i = 0; i < kMaxInFlightJobs; ++i) LMCN_RETURN_IF_ERROR(events_.create());
  return {};
}

void CopyLane::push(std::unique_ptr<CudaJob> job) {
  if (job->job.layer_by_layer) job->progress = std::make_shared<LayerProgress>();
  {
    std::lock_guard lock(mutex_);
    if (job->progress) layered_.insert_or_assign(job->job.id, job->progress);
    queue_.push_back(std::move(job));
  }
  work_.notify_one();
}

Status CopyLane::wait_layers(std::uint64_t id, std::uint32_t layers, std::chrono::milliseconds timeout, cudaStream_t stream) {
  std::unique_lock lock(mutex_);
  if (const auto found = layered_.find(id); found != layered_.end()) {
    const std::shared_ptr<LayerProgress> progress = found->second;
    const auto known = [&] { return progress->ended || !progress->failure.ok() || progress->marks.size() >= layers; };
    if (!progress_.wait_for(lock, std::min(timeout, kLongestWait), known)) return layers_deadline(id, layers, timeout);
    if (!progress->failure.ok()) return progress->failure;
    if (!progress->ended) {
      // Under the lock: the mark cannot be recorded anew for another job meanwhile.
      return layers == 0 ? Status()
                         : cuda_check(cudaStreamWaitEvent(stream, progress->marks[layers - 1], 0), "cudaStreamWaitEvent");
    }
  }
  lock.unlock();
  return board_.ended(id);
}

void CopyLane::cancel(std::span<const std::uint64_t> ids) {
  const auto named = [&](std::uint64_t id) { return std::ranges::find(ids, id) != ids.end(); };
  {
    std::lock_guard lock(mutex_);
    for (const auto& job : queue_) {
      if (named(job->job.id)) job->cancelled = cancel_due_ = true;
    }
    if (issuing_ != nullptr && named(issuing_->job.id)) issuing_->cancelled = true;
  }
  work_.notify_one();
}

void CopyLane::end_cancelled(std::unique_lock<std::mutex>& lock) {
  cancel_due_ = false;
  std::vector<std::unique_ptr<CudaJob>> ended;
  for (auto& job : queue_) {
    if (job->cancelled) ended.push_back(std::move(job));
  }
  std::erase(queue_, nullptr);
  lock.unlock();
  for (auto& job : ended) fail(std::move(job), JobOutcome::cancelled());
  lock.lock();
}

void CopyLane::run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    const auto can_issue = [&] { return !queue_.empty() && in_flight_.size() < kMaxInFlightJobs; };
    if (cancel_due_) end_cancelled(lock);
    if (in_flight_.empty()) {
      work_.wait(lock, [&] { return stop_ || !queue_.empty(); });
      if (queue_.empty()) return;
    }
    if (can_issue()) {
      std::unique_ptr<CudaJob> job = std::move(queue_.front());
      queue_.pop_front();
      issuing_ = job.get();
      lock.unlock();
      // Where the device counts as lost, nothing is handed to it.
      const Status status = lost_.code() == Code::kUnavailable ? lost_ : issue(*job);
      lock.lock();
      issuing_ = nullptr;
      lock.unlock();
      if (!status.ok()) {
        fail(std::move(job), status);
      } else if (!job->issued) {
        report(std::move(job), true, 0);
      } else {
        in_flight_.push_back(std::move(job));
      }
      lock.lock();
      continue;
    }
    lock.unlock();
    const bool ended = end_if_done(in_flight_.front());
    if (ended) in_flight_.pop_front();
    lock.lock();
    if (!ended) work_.wait_for(lock, kPollInterval, [&] { return can_issue() || cancel_due_; });
  }
}

Status CopyLane::issue(CudaJob& job) {
  LMCN_RETURN_IF_ERROR(job.ready);
  if (LanePaths other; later_ != nullptr && later_(other)) {
    later_ = nullptr;
    if (other.chosen != nullptr) paths_ = std::move(other);
    path_ = paths_.chosen->kind();
  }
  LMCN_RETURN_IF_ERROR(cuda_check(cudaStreamWaitEvent(stream_, job.events.ready, 0), "cudaStreamWaitEvent"));
  LMCN_RETURN_IF_ERROR(cuda_check(cudaEventRecord(job.events.begin, stream_), "cudaEventRecord"));
  LMCN_RETURN_IF_ERROR(job.progress ? issue_by_layer(job) : issue_planes(job, 0, geometry_.planes().size()));
  return cuda_check(cudaEventRecord(job.events.end, stream_), "cudaEventRecord");
}

bool CopyLane::may_copy(CudaJob& job, std::size_t index) {
  if (job.outcome.failed(index)) return false;
  const Status status = job.cancelled ? JobOutcome::cancelled() : JobOutcome::check_slot(geometry_, job.job.items[index]);
  if (status.ok()) return true;
  job.outcome.fail_item(index, status);
  note_failure(job, status);
  return false;
}

void CopyLane::note_failure(CudaJob& job, const Status& why) {
  if (!job.progress) return;
  {
    std::lock_guard lock(mutex_);
    if (job.progress->failure.ok()) job.progress->failure = JobOutcome::job_failed(job.job, why);
  }
  progress_.notify_all();
}

Status CopyLane::issue_by_layer(CudaJob& job) {
  LMCN_RETURN_IF_ERROR(events_.take_marks(geometry_.layers(), job.marks));
  for (std::size_t layer = 0; layer < geometry_.layers(); ++layer) {
    LMCN_RETURN_IF_ERROR(issue_planes(job, geometry_.first_plane(layer), geometry_.first_plane(layer + 1)));
    LMCN_RETURN_IF_ERROR(cuda_check(cudaEventRecord(job.marks[layer], stream_), "cudaEventRecord"));
    {
      std::lock_guard lock(mutex_);
      job.progress->marks.push_back(job.marks[layer]);
    }
    progress_.notify_all();
  }
  return {};
}

Status CopyLane::issue_planes(CudaJob& job, std::size_t plane_begin, std::size_t plane_end) {
  std::vector<std::uint32_t> items;
  std::vector<std::byte*> parts;
  CopyPath* path = nullptr;
  const auto flush = [&]() -> Status {
    if (items.empty()) return {};
    job.issued = true;  // even a call that fails may have started something
    Status status = path->enqueue({job.job, items, parts, plane_begin, plane_end}, stream_);
    items.clear();
    parts.clear();
    return status;
  };
  for (std::size_t i = 0; i < job.job.items.size(); ++i) {
    if (!may_copy(job, i)) continue;
    LMCN_SEQ_POINT("copier.before_unit");
    CopyPath* takes = paths_.chosen.get();
    std::byte* part = geometry_.rank_part(job.job.items[i]);
    if (takes->needs_mapped()) {
      std::byte* const mapped = paths_.registration->device_address(part, geometry_.rank_bytes());
      if (mapped == nullptr) {
        takes = paths_.any_memory.get();
        ++items_in_other_memory_;
      } else {
        part = mapped;
      }
    }
    if (takes != path) LMCN_RETURN_IF_ERROR(flush());
    path = takes;
    items.push_back(static_cast<std::uint32_t>(i));
    parts.push_back(part);
    if (items.size() == path->max_items()) LMCN_RETURN_IF_ERROR(flush());
  }
  return flush();
}

bool CopyLane::end_if_done(std::unique_ptr<CudaJob>& job) {
  const cudaError_t error = cudaEventQuery(job->events.end);
  if (error == cudaErrorNotReady) return false;
  float milliseconds = 0;
  Status status = cuda_check(error, "cudaEventQuery");
  if (status.ok()) {
    status = cuda_check(cudaEventElapsedTime(&milliseconds, job->events.begin, job->events.end), "cudaEventElapsedTime");
  }
  if (status.ok()) {
    report(std::move(job), true, static_cast<double>(milliseconds) / 1e3);
  } else {
    fail(std::move(job), status);
  }
  return true;
}

void CopyLane::fail(std::unique_ptr<CudaJob> job, const Status& why) {
  job->outcome.fail_all(why);
  note_failure(*job, why);
  if (why.code() != Code::kAborted) {
    std::lock_guard lock(mutex_);
    ++failed_jobs_;
    last_failure_ = why;
  }
  // Slots and pages may be handed out anew once the job is reported: not before the copies that were issued have ended.
  const Status ended = job->issued ? settle() : Status();
  if (ended.code() == Code::kUnavailable && job->job.direction == CopyDirection::kScatter) {
    board_.strand(job->job.id, ended);
    return;
  }
  report(std::move(job), ended.ok(), 0);
}

Status CopyLane::settle() {
  if (lost_.code() == Code::kUnavailable) return lost_;
  if (Status ended = drain(stream_, lost_after_); !ended.ok()) return lost_ = std::move(ended);
  for (CopyPath* path : {paths_.chosen.get(), paths_.any_memory.get()}) {
    if (path != nullptr) path->drained(stream_);
  }
  return {};
}

std::string CopyLane::failures() const {
  std::lock_guard lock(mutex_);
  if (failed_jobs_ == 0) return "";
  return "; " + std::to_string(failed_jobs_) + " jobs failed by CUDA errors, the last by " + last_failure_.message();
}

void CopyLane::report(std::unique_ptr<CudaJob> job, bool copies_ended, double seconds) {
  if (copies_ended) job->outcome.write_words();
  // Events go back only when nothing refers to them any more.
  if (copies_ended) events_.give_back(job->events);
  board_.end(std::move(job->outcome).done(seconds), job->progress != nullptr);
  if (!job->progress) return;
  {
    std::lock_guard lock(mutex_);
    job->progress->ended = true;
    // Since it was reported, its id may have been given to another job.
    if (const auto found = layered_.find(job->job.id); found != layered_.end() && found->second == job->progress)
      layered_.erase(found);
  }
  progress_.notify_all();
  if (copies_ended) events_.give_back_marks(job->marks);
}

}  // namespace lmcn
