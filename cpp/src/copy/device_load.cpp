// DeviceLoader: a thread per lane of the staging memory takes items from a queue of jobs; one more thread keeps the deadlines.
//
// Life of an item:  queued -> reading -> moving -> ended
//                        \________\___________________/   (cancelled, late, failed)
//
// Invariants (all shared state is under mutex_; bytes move outside it)
//  D1  Only the lane that took an item touches pages for it, and only in `moving`, which it enters from `reading` after its bytes
//      were verified. Cancelling and deadlines end items in `queued` and `reading` only: after that the lane drops its bytes.
//  D2  A lane's staging memory is its own until its read has returned, however long the item has been ended by then.
//  D3  Staging memory that may still be written once its read has returned is not used again: neither that of a lane which has lost
//      the device (DeviceStageLane::broken) nor that of a read by GDS that got lost (GdsResult::lost); after the latter it outlives
//      the loader. Such a lane ends. The others go on; when none is left, what is open and what is submitted fails.
//  D5  The first lane whose read got lost goes on in spare memory, which GDS never reads into: there it is found out whether the
//      file or GDS was at fault. GDS is given up at the latest when more than half of the lanes' memory is lost.
//  D4  A job is reported once, when its last item has ended.
//  D6  An item whose copy to pages may still run (DeviceStageLane::stranded) never ends, and so neither does its job: whoever is
//  told
//      of its end gives its pages to others. What such a lane used outlives the loader.
#include "lmcn/device_load.hpp"

#include <algorithm>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "base/seq_points.hpp"
#include "copy/copy_geometry.hpp"
#include "copy/device_load_files.hpp"
#include "copy/device_load_queue.hpp"
#include "copy/device_load_record.hpp"
#include "copy/device_load_stage.hpp"
#include "copy/job_board.hpp"
#include "memory/slot_image.hpp"

namespace lmcn {
namespace {

using Clock = std::chrono::steady_clock;

constexpr unsigned kMaxLanes = 64;  // more I/Os in flight are known to hang in some versions of nvidia-fs

using JobPtr = std::shared_ptr<LoadJob>;

/// How reading an item ended.
struct ReadOutcome {
  Status status;
  bool lost = false;                               // GdsResult::lost, of `file`
  std::shared_ptr<const LoadFile> file = nullptr;  // where it got lost
};

class Loader final : public DeviceLoader {
 public:
  /// `spare`: the stage has memory for one lane more than are started.
  Loader(std::shared_ptr<const CopyGeometry> geometry, const DeviceLoaderOptions& options, const RankSegments& segments,
         std::unique_ptr<DeviceStage> stage, unsigned lanes, bool spare, std::shared_ptr<GdsReader> gds)
      : geometry_(std::move(geometry)),
        options_(options),
        segments_(segments),
        image_bytes_(lmcn::image_bytes(geometry_->rank_bytes() * options.rank_count)),
        stage_(std::move(stage)),
        lane_count_(lanes),
        with_gds_(gds != nullptr),
        spare_free_(spare),
        gds_gone_(!with_gds_),
        files_(std::make_shared<LoadFiles>(std::move(gds))) {}

  Status start() {
    for (unsigned i = 0; i < lane_count_; ++i) {
      lanes_.emplace_back([this, i] { run(i); });
    }
    timekeeper_ = std::thread([this] { keep_time(); });
    std::unique_lock lock(mutex_);
    progress_.wait(lock, [&] { return attached_ == lane_count_; });
    return attach_failure_;
  }

  ~Loader() override {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
      std::vector<JobPtr> jobs;
      for (const auto& [id, job] : jobs_) jobs.push_back(job);
      for (const JobPtr& job : jobs) end_open(*job, {Code::kAborted, "the loader is going away"});
    }
    LMCN_SEQ_POINT("device_load.stopping");
    work_.notify_all();
    time_.notify_all();
    for (std::thread& lane : lanes_) lane.join();
    if (timekeeper_.joinable()) timekeeper_.join();
    if (!lost_.empty() || keep_stage_) {
      lost_.push_back(std::move(files_));
      lost_.push_back(std::move(stage_));
      lost_.push_back(geometry_);
      keep_lost(std::move(lost_));
      return;
    }
    static_cast<void>(stage_->on_device([&] {
      files_.reset();
      return Status();
    }));
  }

  Status submit(DeviceLoadJob load) override {
    auto job = std::make_shared<LoadJob>();
    job->load = std::move(load);
    LMCN_RETURN_IF_ERROR(take_items(*job));
    Result<std::shared_ptr<const StreamMark>> mark = stage_->mark(job->load.stream);
    if (!mark.ok()) return mark.status();
    job->mark = std::move(mark).value();
    {
      std::lock_guard lock(mutex_);
      LMCN_RETURN_IF_ERROR(stranded_);
      if (!jobs_.emplace(job->load.id, job).second) {
        return {Code::kInvalidArgument,
                "job id is " + std::to_string(job->load.id) + ", must differ from those of unfinished jobs"};
      }
      if (job->open_items == 0) {
        end_job(*job);
        return {};
      }
      if (working_ == 0) {
        end_open(*job, no_lane_);
        return {};
      }
      queue_.push(job);
    }
    work_.notify_all();
    if (job->load.deadline != Clock::time_point::max()) time_.notify_all();
    return {};
  }

  std::vector<DeviceLoadDone> poll() override {
    std::lock_guard lock(mutex_);
    return std::exchange(done_, {});
  }

  Status wait(std::span<const std::uint64_t> ids, std::chrono::milliseconds timeout) override {
    std::unique_lock lock(mutex_);
    const auto under_way = [&](std::uint64_t id) { return jobs_.contains(id); };
    const auto stranded = [&](std::uint64_t id) { return stranded_jobs_.contains(id); };
    const auto known = [&] { return std::ranges::none_of(ids, under_way) || std::ranges::any_of(ids, stranded); };
    if (progress_.wait_for(lock, std::min(timeout, kLongestWait), known)) {
      return std::ranges::any_of(ids, stranded) ? stranded_ : Status();
    }
    return {Code::kDeadlineExceeded, std::to_string(std::ranges::count_if(ids, under_way)) + " of " + std::to_string(ids.size()) +
                                         " jobs under way after " + std::to_string(timeout.count()) + " ms"};
  }

  void cancel(std::span<const std::uint64_t> ids) override {
    std::lock_guard lock(mutex_);
    for (const std::uint64_t id : ids) {
      if (const auto found = jobs_.find(id); found != jobs_.end()) {
        const JobPtr job = found->second;
        end_open(*job, {Code::kAborted, "cancelled"});
      }
    }
  }

  Status lost() const override {
    std::lock_guard lock(mutex_);
    return stranded_;
  }

  std::string name() const override {
    std::lock_guard lock(mutex_);
    if (!with_gds_) return "host";
    std::string name = "none";
    for (const auto& [path, read] : read_by_) {
      if (read.name == "host" || name == "none" || name == "gds") name = read.name;
      if (name == "host") break;
    }
    return name;
  }

  std::vector<DeviceLoadPath> paths() const override {
    std::lock_guard lock(mutex_);
    std::vector<DeviceLoadPath> paths;
    for (const auto& [path, read] : read_by_) paths.push_back(read);
    return paths;
  }

  bool gds_given_up() const override {
    std::lock_guard lock(mutex_);
    return with_gds_ && gds_gone_;
  }

  std::vector<std::string> notes() override {
    std::lock_guard lock(mutex_);
    return std::exchange(notes_, {});
  }

 private:
  /// Checks the items and fills in what follows from them.
  Status take_items(LoadJob& job) const {
    job.copy.id = job.load.id;
    job.copy.direction = CopyDirection::kScatter;
    job.copy.block_ids = job.load.block_ids;
    for (std::size_t i = 0; i < job.load.items.size(); ++i) {
      const DeviceLoadItem& item = job.load.items[i];
      if (item.offset % kPageBytes != 0 || item.image_bytes != image_bytes_) {
        return {Code::kInvalidArgument, "job " + std::to_string(job.load.id) + " item " + std::to_string(i) + ": offset is " +
                                            std::to_string(item.offset) + ", image_bytes is " + std::to_string(item.image_bytes) +
                                            ", must be a multiple of 4096 and " + std::to_string(image_bytes_) +
                                            " (of this layout and " + std::to_string(options_.rank_count) + " ranks)"};
      }
      job.copy.items.push_back({.first_token = item.first_token,
                                .tokens = item.tokens,
                                .block_begin = item.block_begin,
                                .token_in_block = item.token_in_block});
    }
    LMCN_RETURN_IF_ERROR(geometry_->check_job(job.copy));
    job.states.assign(job.load.items.size(), ItemState::kQueued);
    job.open_items = job.load.items.size();
    return {};
  }

  // ---- under mutex_

  void end_item(LoadJob& job, std::size_t item, Status status) {
    job.states[item] = ItemState::kEnded;
    if (status.ok()) {
      job.bytes += geometry_->item_bytes(job.copy.items[item]);
    } else {
      job.failed.push_back({static_cast<std::uint32_t>(item), std::move(status)});
    }
    if (--job.open_items == 0) end_job(job);
  }

  /// Ends what has not begun to move.
  void end_open(LoadJob& job, const Status& why) {
    for (std::size_t i = 0; i < job.states.size(); ++i) {
      if (job.states[i] == ItemState::kQueued || job.states[i] == ItemState::kReading) end_item(job, i, why);
    }
  }

  void end_job(LoadJob& job) {
    std::ranges::sort(job.failed, {}, &DeviceLoadFailure::item);
    DeviceLoadDone done;
    done.id = job.load.id;
    done.ok = job.failed.empty();
    done.bytes = job.bytes;
    if (job.started != Clock::time_point{}) done.seconds = std::chrono::duration<double>(Clock::now() - job.started).count();
    done.failed = std::move(job.failed);
    done_.push_back(std::move(done));
    jobs_.erase(job.load.id);
    progress_.notify_all();
  }

  unsigned reads_per_file() const { return std::max(1u, working_ / std::max(1u, options_.files)); }

  /// A lane gives up for `why`.
  void lane_ended(const std::string& what, const Status& why) {
    if (--working_ > 0) return leave_all_to_spare(why);
    no_lane_ = {Code::kUnavailable, what + ": " + why.message()};
    queue_.drop_waiting();
    std::vector<JobPtr> jobs;
    for (const auto& [id, job] : jobs_) jobs.push_back(job);
    for (const JobPtr& job : jobs) end_open(*job, no_lane_);
  }
  /// Where the lane on spare memory is the last one.
  void leave_all_to_spare(const Status& why) {
    if (!on_spare_ || working_ > 1 || std::exchange(gds_gone_, true)) return;
    notes_.push_back("no lane is left for GPUDirect Storage; reading through host memory from now on: " + why.message());
    work_.notify_all();
  }
  void lane_broke(const DeviceStageLane& lane, const Status& why) {
    keep_stage_ = keep_stage_ || !lane.stranded().ok();
    lane_ended("every lane has lost the device", why);
  }

  /// D6. Of the others, what has not begun to move ends.
  void strand(const LoadJob& job, const Status& why) {
    if (stranded_.ok()) stranded_ = why;
    stranded_jobs_.insert(job.load.id);
    progress_.notify_all();
    queue_.drop_waiting();
    std::vector<JobPtr> jobs;
    for (const auto& [id, open] : jobs_) jobs.push_back(open);
    for (const JobPtr& open : jobs) end_open(*open, why);
  }

  /// The memory of a lane is not used any more: its read of `item` got lost. The item is read once more.
  void lane_lost(QueuedItem item, ReadOutcome outcome) {
    lost_.push_back(outcome.file);
    ++lost_lanes_;
    if (2 * lost_lanes_ > lane_count_) give_up_gds(outcome.file->path(), outcome.status);
    if (item.job->states[item.index] != ItemState::kReading) return;
    item.job->states[item.index] = ItemState::kQueued;
    item.gds_failure = std::move(outcome.status);
    queue_.push_again(std::move(item));
    work_.notify_all();
  }

  void give_up_gds(const std::string& path, const Status& failure) {
    if (std::exchange(gds_gone_, true)) return;
    std::string note = "GPUDirect Storage failed on " + path + "; reading through host memory from now on";
    if (lost_lanes_ > 0) {
      note += " (reads may still write " + std::to_string(lost_lanes_) + " of " + std::to_string(lane_count_) +
              " parts of the staging memory, which are out of use)";
    }
    notes_.push_back(note + ": " + failure.message());
    work_.notify_all();
  }

  // ---- a lane's thread

  void run(unsigned index) {
    const std::unique_ptr<DeviceStageLane> own = stage_->make_lane(index);
    const Status attached = own->attach();
    const auto page = std::make_unique<HeaderPage>();
    std::unique_lock lock(mutex_);
    if (!attached.ok() && attach_failure_.ok()) attach_failure_ = attached;
    ++attached_;
    if (attached.ok()) ++working_;
    progress_.notify_all();
    if (!attached.ok()) return;
    const Status lost = serve(*own, *page, false, lock);
    if (lost.ok()) return;
    // The item waits to be read again, so working_ still counts this lane.
    if (!std::exchange(spare_free_, false)) return lane_ended("no staging memory is left that no read may still write", lost);
    lock.unlock();
    const std::unique_ptr<DeviceStageLane> spare = stage_->make_lane(lane_count_);
    const Status ready = spare->attach();
    lock.lock();
    if (!ready.ok()) return lane_broke(*spare, ready);
    on_spare_ = true;
    leave_all_to_spare(lost);
    static_cast<void>(serve(*spare, *page, true, lock));
  }

  /// Items, until the loader goes away or the lane is broken (ok), or a read into its memory got lost (why).
  Status serve(DeviceStageLane& lane, HeaderPage& page, bool on_spare, std::unique_lock<std::mutex>& lock) {
    for (;;) {
      QueuedItem next;
      work_.wait(lock, [&] { return stop_ || queue_.take(on_spare && !gds_gone_, reads_per_file(), next); });
      if (stop_) return {};
      const JobPtr& job = next.job;
      const std::size_t item = next.index;
      if (job->started == Clock::time_point{}) job->started = Clock::now();
      job->states[item] = ItemState::kReading;
      const bool gds = !gds_gone_ && !on_spare && next.gds_failure.ok();
      lock.unlock();
      LMCN_SEQ_POINT("device_load.before_read");
      ReadOutcome outcome = read_and_verify(lane, page, next, gds);
      LMCN_SEQ_POINT("device_load.verified");
      lock.lock();
      queue_.ended(next);
      work_.notify_all();
      if (outcome.lost) {
        const Status why = outcome.status;
        lane_lost(std::move(next), std::move(outcome));
        return why;
      }
      Status status = std::move(outcome.status);
      const bool wanted = job->states[item] == ItemState::kReading;
      if (lane.broken()) {
        if (wanted) end_item(*job, item, status);
        lane_broke(lane, status);
        return {};
      }
      if (!wanted) continue;
      if (!status.ok()) {
        end_item(*job, item, std::move(status));
        continue;
      }
      job->states[item] = ItemState::kMoving;
      lock.unlock();
      LMCN_SEQ_POINT("device_load.moving");
      status = lane.scatter(job->copy, static_cast<std::uint32_t>(item), segments_.rank_part, job->mark.get());
      if (!status.ok()) status = Status(Code::kIoError, "scatter: " + status.message());
      lock.lock();
      if (const Status stranded = lane.stranded(); !stranded.ok()) {
        strand(*job, {stranded.code(), status.message() + "; " + stranded.message()});
      } else {
        end_item(*job, item, status);
      }
      if (lane.broken()) {
        lane_broke(lane, status);
        return {};
      }
    }
  }

  ReadOutcome read_and_verify(DeviceStageLane& lane, HeaderPage& page, const QueuedItem& next, bool gds) {
    const DeviceLoadItem& item = next.item();
    Result<std::shared_ptr<const LoadFile>> found = files_->get(item.path);
    if (!found.ok()) return {.status = found.status()};
    const LoadFile& file = **found;
    const std::uint64_t offset = item.offset + kPageBytes + segments_.begin;
    Status status = file.read(item.offset, page.bytes, kPageBytes);
    if (status.ok()) status = check_record(page.bytes, item, options_.rank_count, geometry_->rank_bytes() * options_.rank_count);
    if (!status.ok()) return {.status = std::move(status)};
    Status gds_failure = next.gds_failure;
    if (gds) {
      GdsResult result = file.gds_read(offset, lane.memory(), segments_.padded_bytes);
      if (result.lost) return {std::move(result.status), true, std::move(found).value()};
      gds_failure = std::move(result.status);
    }
    if (!gds || !gds_failure.ok()) status = read_through_host(lane, file, offset);
    if (!status.ok()) return {.status = std::move(status)};
    have_read(file, gds && gds_failure.ok(), gds_failure);
    const SlotHeader& header = *slot_header(page.bytes);
    return {.status = lane.verify({segments_.bytes, segments_.segment_bytes, segments_.first,
                                   std::span(header.segment).subspan(segments_.first, segments_.count)})};
  }

  Status read_through_host(DeviceStageLane& lane, const LoadFile& file, std::uint64_t offset) {
    Result<std::byte*> host = lane.host_memory();
    if (!host.ok()) return host.status();
    LMCN_RETURN_IF_ERROR(file.read(offset, *host, segments_.padded_bytes));
    return lane.upload(segments_.padded_bytes);
  }

  /// Only now, when O_DIRECT has read what GDS did not, is it known that GDS failed, and not the device or the file.
  void have_read(const LoadFile& file, bool by_gds, const Status& gds_failure) {
    std::lock_guard lock(mutex_);
    if (!gds_failure.ok()) give_up_gds(file.path(), gds_failure);
    DeviceLoadPath& path = read_by_[file.path()];
    path.path = file.path();
    if (by_gds) {
      path.name = file.gds_state().compat ? "gds-compat" : "gds";
      path.reason = file.gds_state().reason;
    } else if (path.name != "host") {
      path.name = "host";
      if (with_gds_) path.reason = gds_failure.ok() ? "GPUDirect Storage was given up" : gds_failure.message();
    }
  }

  // ---- the timekeeper's thread

  void keep_time() {
    std::unique_lock lock(mutex_);
    while (!stop_) {
      const Clock::time_point now = Clock::now();
      Clock::time_point next = Clock::time_point::max();
      std::vector<JobPtr> late;
      for (const auto& [id, job] : jobs_) {
        if (job->load.deadline <= now) {
          if (job->has_open()) late.push_back(job);
        } else {
          next = std::min(next, job->load.deadline);
        }
      }
      for (const JobPtr& job : late) end_open(*job, {Code::kDeadlineExceeded, "not read and verified by the job's deadline"});
      if (!late.empty()) continue;
      if (next == Clock::time_point::max()) {
        time_.wait(lock);
      } else {
        time_.wait_until(lock, next);
      }
    }
  }

  const std::shared_ptr<const CopyGeometry> geometry_;
  const DeviceLoaderOptions options_;
  const RankSegments segments_;
  const std::uint64_t image_bytes_;
  std::unique_ptr<DeviceStage> stage_;
  const unsigned lane_count_;
  const bool with_gds_;

  mutable std::mutex mutex_;
  std::condition_variable work_, time_, progress_;
  LoadQueue queue_;
  std::unordered_map<std::uint64_t, JobPtr> jobs_;  // that have not ended
  std::vector<DeviceLoadDone> done_;
  std::vector<std::string> notes_;
  std::map<std::string, DeviceLoadPath> read_by_;
  bool spare_free_;
  bool on_spare_ = false;  // a lane is
  bool gds_gone_;
  bool stop_ = false;
  unsigned attached_ = 0, working_ = 0, lost_lanes_ = 0;  // lanes
  std::vector<std::shared_ptr<const void>> lost_;         // what reads that got lost may still use
  bool keep_stage_ = false;                               // a lane is stranded
  std::unordered_set<std::uint64_t> stranded_jobs_;       // of jobs_
  Status stranded_;                                       // why the first of them is
  Status attach_failure_;
  Status no_lane_;  // why working_ is 0

  std::shared_ptr<LoadFiles> files_;  // after stage_: what was registered goes with the last file, and before the memory
  std::vector<std::thread> lanes_;
  std::thread timekeeper_;
};

}  // namespace

Result<std::unique_ptr<DeviceLoader>> make_device_loader(const PagedKvLayout& paged, const SlotLayout& slot,
                                                         const DeviceLoaderOptions& options) {
  if (options.rank_count < 1 || options.rank_count > kMaxRanks || options.rank >= options.rank_count) {
    return Status(Code::kInvalidArgument, "rank is " + std::to_string(options.rank) + " of " + std::to_string(options.rank_count) +
                                              ", must be one of 1.." + std::to_string(kMaxRanks) + " ranks");
  }
  if (options.in_flight < 1 || options.in_flight > kMaxLanes) {
    return Status(Code::kInvalidArgument,
                  "in_flight is " + std::to_string(options.in_flight) + ", must be in 1.." + std::to_string(kMaxLanes));
  }
  LMCN_RETURN_IF_ERROR(paged.validate());
  const auto rank_bytes = static_cast<std::uint64_t>(slot.rank_bytes);
  if (slot.rank_bytes < 1 || rank_bytes > kMaxPayloadBytes / options.rank_count) {
    return Status(Code::kInvalidArgument, "rank_bytes is " + std::to_string(slot.rank_bytes) + ", must be in 1.." +
                                              std::to_string(kMaxPayloadBytes / options.rank_count));
  }
  const RankSegments segments(rank_bytes, options.rank, options.rank_count);
  if (options.buffer_bytes < segments.padded_bytes) {
    return Status(Code::kInvalidArgument, "buffer_bytes is " + std::to_string(options.buffer_bytes) + ", one record takes " +
                                              std::to_string(segments.padded_bytes));
  }
  const auto parts = static_cast<unsigned>(std::min<std::uint64_t>(kMaxLanes + 1, options.buffer_bytes / segments.padded_bytes));
  const bool spare = options.plugin != nullptr && parts > 1;
  const unsigned lanes = std::min(options.in_flight, spare ? parts - 1 : parts);
  const StageOptions staging{segments.padded_bytes, lanes + (spare ? 1 : 0), options.lost_after};
  // No job of a loader names a place in an arena: every item passes check_job() as if of one slot at its start.
  static std::byte no_arena;
  Result<CopyGeometry> made =
      CopyGeometry::make(paged, slot, &no_arena, image_bytes(rank_bytes * options.rank_count), options.rank);
  if (!made.ok()) return made.status();
  auto geometry = std::make_shared<const CopyGeometry>(std::move(made).value());
  if (options.plugin != nullptr) LMCN_RETURN_IF_ERROR(check_lost());
  Result<std::unique_ptr<DeviceStage>> stage = make_stage(geometry.get(), &paged, staging, options.device);
  if (stage.status().code() == Code::kResourceExhausted) {
    return Status(Code::kResourceExhausted,
                  std::to_string(staging.lane_bytes * staging.lanes) + " bytes of staging memory: " + stage.status().message());
  }
  if (!stage.ok()) return stage.status();
  std::shared_ptr<GdsReader> gds;
  if (options.plugin != nullptr) {
    if (options.device < 0 && !options.allow_compat) {
      return Status(Code::kUnavailable, "GPUDirect Storage reads into device memory only, and there is no CUDA device");
    }
    Result<std::shared_ptr<GdsReader>> reader = GdsReader::make(*options.plugin, staging.lanes, options.allow_compat);
    if (!reader.ok()) return reader.status();
    gds = std::move(reader).value();
    if (options.device >= 0) {
      LMCN_RETURN_IF_ERROR((*stage)->on_device([&] { return gds->register_memory((*stage)->base(), (*stage)->bytes()); }));
    }
  }
  auto loader =
      std::make_unique<Loader>(std::move(geometry), options, segments, std::move(stage).value(), lanes, spare, std::move(gds));
  LMCN_RETURN_IF_ERROR(loader->start());
  return std::unique_ptr<DeviceLoader>(std::move(loader));
}

}  // namespace lmcn
