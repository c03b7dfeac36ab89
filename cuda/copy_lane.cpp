#include "copy_lane.hpp"

#include <algorithm>
#include <chrono>
#include <future>
#include <string>

#include "cuda_error.hpp"

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

Status EventPool::create() {
  JobEvents made;
  const auto make = [&](cudaEvent_t& event, unsigned flags) -> Status {
    LMCN_RETURN_IF_ERROR(cuda_check(cudaEventCreateWithFlags(&event, flags), "cudaEventCreateWithFlags"));
    std::lock_guard lock(mutex_);
    all_.push_back(event);
    return {};
  };
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

CopyLane::~CopyLane() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_.notify_one();
  if (thread_.joinable()) thread_.join();
}

Status CopyLane::start(const std::function<Status()>& check) {
  std::promise<Status> ready;
  std::future<Status> result = ready.get_future();
  thread_ = std::thread([this, &ready, &check] {
    Status status = set_up();
    if (status.ok()) status = check();
    const bool ok = status.ok();
    ready.set_value(std::move(status));
    if (ok) run();
    if (stream_ != nullptr) static_cast<void>(cudaStreamDestroy(stream_));  // teardown: nobody is left to tell
  });
  return result.get();
}

Status CopyLane::set_up() {
  LMCN_RETURN_IF_ERROR(cuda_check(cudaSetDevice(device_), "cudaSetDevice", Code::kUnavailable));
  LMCN_RETURN_IF_ERROR(
      cuda_check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags", Code::kUnavailable));
  int max_pitch = 0;
  LMCN_RETURN_IF_ERROR(
      cuda_check(cudaDeviceGetAttribute(&max_pitch, cudaDevAttrMaxPitch, device_), "cudaDeviceGetAttribute", Code::kUnavailable));
  max_pitch_bytes_ = max_pitch;
  for (std::size_t i = 0; i < kMaxInFlightJobs; ++i) LMCN_RETURN_IF_ERROR(events_.create());
  return {};
}

void CopyLane::push(std::unique_ptr<CudaJob> job) {
  {
    std::lock_guard lock(mutex_);
    queue_.push_back(std::move(job));
  }
  work_.notify_one();
}

void CopyLane::run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    const auto can_issue = [&] { return !queue_.empty() && in_flight_.size() < kMaxInFlightJobs; };
    if (in_flight_.empty()) {
      work_.wait(lock, [&] { return stop_ || !queue_.empty(); });
      if (queue_.empty()) return;
    }
    if (can_issue()) {
      std::unique_ptr<CudaJob> job = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      if (const Status status = issue(*job); !status.ok()) {
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
    if (!ended) work_.wait_for(lock, kPollInterval, can_issue);
  }
}

Status CopyLane::issue(CudaJob& job) {
  LMCN_RETURN_IF_ERROR(job.ready);
  LMCN_RETURN_IF_ERROR(cuda_check(cudaStreamWaitEvent(stream_, job.events.ready, 0), "cudaStreamWaitEvent"));
  LMCN_RETURN_IF_ERROR(cuda_check(cudaEventRecord(job.events.begin, stream_), "cudaEventRecord"));
  for (std::size_t i = 0; i < job.job.items.size(); ++i) {
    if (const Status slot = JobOutcome::check_slot(geometry_, job.job.items[i]); !slot.ok()) {
      job.outcome.fail_item(i, slot);
      continue;
    }
    LMCN_RETURN_IF_ERROR(copy_item(job, job.job.items[i]));
  }
  return cuda_check(cudaEventRecord(job.events.end, stream_), "cudaEventRecord");
}

Status CopyLane::copy_item(CudaJob& job, const CopyItem& item) {
  Status status;
  std::byte* const part = geometry_.rank_part(item);
  geometry_.for_each_run(job.job, item, 0, geometry_.planes().size(), [&](const RunGroup& group) {
    if (!status.ok()) return;
    job.issued = true;  // even a call that fails may have started something
    status = copy_group(group, part, job.job.direction);
  });
  return status;
}

Status CopyLane::copy_group(const RunGroup& group, std::byte* rank_part, CopyDirection direction) {
  const bool gather = direction == CopyDirection::kGather;
  const cudaMemcpyKind kind = gather ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice;
  const auto bytes = static_cast<std::size_t>(group.bytes);
  const auto rows_fit = [&](const RunAxis& axis) { return axis.paged <= max_pitch_bytes_ && axis.slot <= max_pitch_bytes_; };
  RunAxis rows = group.inner, loop = group.outer;
  if (loop.count > rows.count) std::swap(rows, loop);
  const bool as_rows = rows.count > 1 && rows_fit(rows);
  const std::int64_t steps = as_rows ? 1 : rows.count;
  for (std::int64_t l = 0; l < loop.count; ++l) {
    for (std::int64_t r = 0; r < steps; ++r) {
      std::byte* const paged = group.paged + l * loop.paged + r * rows.paged;
      std::byte* const slot = rank_part + group.slot + l * loop.slot + r * rows.slot;
      std::byte* const to = gather ? slot : paged;
      const std::byte* const from = gather ? paged : slot;
      if (as_rows) {
        const auto to_pitch = static_cast<std::size_t>(gather ? rows.slot : rows.paged);
        const auto from_pitch = static_cast<std::size_t>(gather ? rows.paged : rows.slot);
        LMCN_RETURN_IF_ERROR(cuda_check(
            cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, bytes, static_cast<std::size_t>(rows.count), kind, stream_),
            "cudaMemcpy2DAsync"));
      } else {
        LMCN_RETURN_IF_ERROR(cuda_check(cudaMemcpyAsync(to, from, bytes, kind, stream_), "cudaMemcpyAsync"));
      }
    }
  }
  return {};
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
  // A slot may be handed out anew once its word says kFailed: not before the copies that were issued have ended.
  bool ended = !job->issued;
  if (!ended) {
    const cudaError_t error = cudaStreamSynchronize(stream_);
    static_cast<void>(cudaGetLastError());
    ended = error == cudaSuccess;
  }
  report(std::move(job), ended, 0);
}

void CopyLane::report(std::unique_ptr<CudaJob> job, bool copies_ended, double seconds) {
  if (copies_ended) job->outcome.write_words();
  // Events go back only when nothing refers to them any more.
  if (copies_ended) events_.give_back(job->events);
  board_.end(std::move(job->outcome).done(seconds));
}

}  // namespace lmcn
