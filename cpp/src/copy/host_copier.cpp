// Host implementation: worker threads that take units (an item, or a range of an item's planes) from a queue of jobs. The units of
// a job layer by layer are (layer, item), all items of a layer before the next layer.
//
// Invariant: a unit is taken by one thread, once, in order of submission; the thread that ends a job's last unit writes the rank
// words and reports the job. All shared state is under mutex_; bytes move and words are written outside it. The units of a
// cancelled job go ahead of all others, and copy nothing.
#include <algorithm>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/seq_points.hpp"
#include "copy/byte_copy.hpp"
#include "copy/copy_geometry.hpp"
#include "copy/job_board.hpp"
#include "copy/job_outcome.hpp"
#include "lmcn/paged_copy.hpp"

namespace lmcn {
namespace {

using Clock = std::chrono::steady_clock;

constexpr unsigned kMaxThreads = 256;
// An item at least this large is worth sharing among threads.
constexpr std::uint64_t kMinSharedItemBytes = 1 << 20;

struct HostJob {
  HostJob(const CopyGeometry& geometry, CopyJob accepted) : job(std::move(accepted)), outcome(geometry, job) {}
  CopyJob job;  // outcome points into it
  JobOutcome outcome;
  bool non_temporal = false;
  std::size_t slices = 1;       // per item; of a job layer by layer: its layers
  std::size_t units = 0;        // items * slices
  std::size_t next_unit = 0;    // under mutex_
  std::size_t ended_units = 0;  // under mutex_
  bool cancelled = false;       // under mutex_
  bool ended = false;           // under mutex_; reported to the board
  // Of a job layer by layer, under mutex_.
  std::vector<std::size_t> units_left;  // per layer
  std::uint32_t layers_done = 0;        // leading ones
  Status failure;                       // the first
  Clock::time_point started{};          // when the first unit was taken
};

class HostCopier final : public PagedCopier {
 public:
  HostCopier(CopyGeometry geometry, const CopierOptions& options) : geometry_(std::move(geometry)), options_(options) {
    threads_.reserve(options.threads);
    for (unsigned i = 0; i < options.threads; ++i) threads_.emplace_back([this] { run(); });
  }

  ~HostCopier() override {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    work_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  Status submit(CopyJob job) override {
    LMCN_RETURN_IF_ERROR(geometry_.check_job(job));
    auto accepted = std::make_shared<HostJob>(geometry_, std::move(job));
    const std::uint64_t bytes = geometry_.job_bytes(accepted->job);
    accepted->non_temporal = options_.non_temporal_bytes >= 0 && bytes >= static_cast<std::uint64_t>(options_.non_temporal_bytes);
    const std::size_t items = accepted->job.items.size();
    const bool layered = accepted->job.layer_by_layer;
    accepted->slices = layered ? geometry_.layers() : slices_for(items, bytes);
    accepted->units = items * accepted->slices;
    if (layered) accepted->units_left.assign(geometry_.layers(), items);
    LMCN_RETURN_IF_ERROR(board_.begin(accepted->job.id));
    if (accepted->units == 0) {
      board_.end(std::move(accepted->outcome).done(0), layered);
      return {};
    }
    {
      std::lock_guard lock(mutex_);
      jobs_.insert_or_assign(accepted->job.id, accepted);
      queue_.push_back(std::move(accepted));
    }
    work_.notify_all();
    return {};
  }

  Status wait_layers(std::uint64_t id, std::uint32_t layers, std::chrono::milliseconds timeout, std::uint64_t) override {
    LMCN_RETURN_IF_ERROR(geometry_.check_layers(layers));
    std::unique_lock lock(mutex_);
    if (const auto found = jobs_.find(id); found != jobs_.end() && found->second->job.layer_by_layer) {
      const std::shared_ptr<HostJob> job = found->second;
      const auto known = [&] { return job->ended || !job->failure.ok() || job->layers_done >= layers; };
      if (!progress_.wait_for(lock, std::min(timeout, kLongestWait), known)) return layers_deadline(id, layers, timeout);
      if (!job->failure.ok()) return job->failure;
      if (job->layers_done >= layers) return {};
    }
    lock.unlock();
    return board_.ended(id);
  }

  void cancel(std::span<const std::uint64_t> ids) override {
    std::lock_guard lock(mutex_);
    for (const std::uint64_t id : ids) {
      const auto found = jobs_.find(id);
      if (found == jobs_.end()) continue;
      found->second->cancelled = true;
      // Its units copy nothing, so they go ahead of those that do: it ends as soon as a thread is free.
      const auto queued = std::ranges::find(queue_, found->second);
      if (queued != queue_.end()) std::rotate(queue_.begin(), queued, queued + 1);
    }
  }

  std::vector<CopyDone> poll() override { return board_.poll(); }
  Status wait(std::span<const std::uint64_t> ids, std::chrono::milliseconds timeout) override { return board_.wait(ids, timeout); }
  std::string name() const override { return "host"; }

 private:
  std::size_t slices_for(std::size_t items, std::uint64_t bytes) const {
    if (items == 0 || items >= threads_.size() || bytes / items < kMinSharedItemBytes) return 1;
    return std::min(threads_.size(), geometry_.planes().size());
  }

  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      work_.wait(lock, [&] { return stop_ || !queue_.empty(); });
      if (queue_.empty()) return;
      const std::shared_ptr<HostJob> job = queue_.front();
      const std::size_t unit = job->next_unit++;
      if (unit == 0) job->started = Clock::now();
      if (job->next_unit == job->units) queue_.pop_front();
      Status status = JobOutcome::cancelled();
      if (!job->cancelled) {
        lock.unlock();
        status = copy_unit(*job, unit);
        lock.lock();
      }
      if (!status.ok()) job->outcome.fail_item(item_of(*job, unit), status);
      if (job->job.layer_by_layer) note_layer(*job, unit, status);
      if (++job->ended_units < job->units) continue;
      lock.unlock();
      finish(*job);
      lock.lock();
      job->ended = true;
      // Since it was reported, its id may have been given to another job.
      if (const auto found = jobs_.find(job->job.id); found != jobs_.end() && found->second == job) jobs_.erase(found);
      if (job->job.layer_by_layer) progress_.notify_all();
    }
  }

  static std::size_t item_of(const HostJob& job, std::size_t unit) {
    return job.job.layer_by_layer ? unit % job.job.items.size() : unit / job.slices;
  }

  std::pair<std::size_t, std::size_t> planes_of(const HostJob& job, std::size_t unit) const {
    if (job.job.layer_by_layer) {
      const std::size_t layer = unit / job.job.items.size();
      return {geometry_.first_plane(layer), geometry_.first_plane(layer + 1)};
    }
    const std::size_t slice = unit % job.slices, planes = geometry_.planes().size();
    return {planes * slice / job.slices, planes * (slice + 1) / job.slices};
  }

  // mutex_ held; `unit` has ended.
  void note_layer(HostJob& job, std::size_t unit, const Status& status) {
    const bool failed = !status.ok() && job.failure.ok();
    if (failed) job.failure = JobOutcome::job_failed(job.job, status);
    const std::uint32_t before = job.layers_done;
    --job.units_left[unit / job.job.items.size()];
    while (job.layers_done < job.units_left.size() && job.units_left[job.layers_done] == 0) ++job.layers_done;
    if (failed || job.layers_done != before) progress_.notify_all();
  }

  Status copy_unit(const HostJob& job, std::size_t unit) const {
    const CopyItem& item = job.job.items[item_of(job, unit)];
    LMCN_RETURN_IF_ERROR(JobOutcome::check_slot(geometry_, item));
    LMCN_SEQ_POINT("copier.before_unit");
    const auto [from, to] = planes_of(job, unit);
    std::byte* const part = geometry_.rank_part(item);
    const bool non_temporal = job.non_temporal && job.job.direction == CopyDirection::kGather;
    const auto copy = [&](const RunGroup& group) { copy_group(group, part, job.job.direction, non_temporal); };
    geometry_.for_each_run(job.job, item, from, to, copy);
    if (non_temporal) fence_non_temporal();
    return {};
  }

  void finish(HostJob& job) {
    job.outcome.write_words();
    const double seconds = std::chrono::duration<double>(Clock::now() - job.started).count();
    board_.end(std::move(job.outcome).done(seconds), job.job.layer_by_layer);
  }

  const CopyGeometry geometry_;
  const CopierOptions options_;
  JobBoard board_;

  std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable progress_;                                  // of jobs layer by layer
  std::deque<std::shared_ptr<HostJob>> queue_;                        // with units to take
  std::unordered_map<std::uint64_t, std::shared_ptr<HostJob>> jobs_;  // that have not ended
  bool stop_ = false;
  std::vector<std::thread> threads_;  // last: they use all of the above
};

}  // namespace

Result<std::unique_ptr<PagedCopier>> make_host_copier(const PagedKvLayout& paged, const SlotLayout& slot, std::byte* arena_base,
                                                      std::uint64_t arena_bytes, const CopierOptions& options) {
  if (options.threads < 1 || options.threads > kMaxThreads) {
    return Status(Code::kInvalidArgument,
                  "threads is " + std::to_string(options.threads) + ", must be in 1.." + std::to_string(kMaxThreads));
  }
  Result<CopyGeometry> geometry = CopyGeometry::make(paged, slot, arena_base, arena_bytes, options.rank, options.replicated);
  if (!geometry.ok()) return geometry.status();
  return std::unique_ptr<PagedCopier>(std::make_unique<HostCopier>(std::move(geometry).value(), options));
}

}  // namespace lmcn
