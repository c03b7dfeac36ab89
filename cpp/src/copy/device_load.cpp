// DeviceLoader: a thread per lane of the staging memory takes items from a queue of jobs; one more thread keeps the deadlines.
//
// Life of an item:  queued -> reading -> moving -> ended
//                        \________\___________________/   (cancelled, late, failed)
//
// Invariants (all shared state is under mutex_; bytes move outside it)
//  D1  Only the lane that took an item touches pages for it, and only in `moving`, which it enters from `reading` after its bytes
//      were verified. Cancelling and deadlines end items in `queued` and `reading` only: after that the lane drops its bytes.
//  D2  A lane's staging memory is its own until its read has returned, however long the item has been ended by then.
//  D3  A lane whose staging memory may still be in use by the device (DeviceStageLane::broken) takes no more items. The others do;
//      when none is left, what is open and what is submitted fails.
//  D4  A job is reported once, when its last item has ended.
#include "lmcn/device_load.hpp"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <thread>
#include <unordered_map>
#include <utility>

#include "base/seq_points.hpp"
#include "copy/copy_geometry.hpp"
#include "copy/device_load_files.hpp"
#include "copy/device_load_stage.hpp"
#include "copy/job_board.hpp"
#include "memory/slot_image.hpp"

namespace lmcn {
namespace {

using Clock = std::chrono::steady_clock;

constexpr unsigned kMaxLanes = 64;  // more I/Os in flight are known to hang in some versions of nvidia-fs

enum class ItemState : std::uint8_t { kQueued, kReading, kMoving, kEnded };

struct LoadJob {
  DeviceLoadJob load;
  CopyJob copy;  // the same items as the copying code takes them
  std::shared_ptr<const StreamMark> mark;
  std::vector<ItemState> states;
  std::size_t next_item = 0;
  std::size_t open_items = 0;
  std::uint64_t bytes = 0;
  std::vector<DeviceLoadFailure> failed;
  Clock::time_point started{};
};
using JobPtr = std::shared_ptr<LoadJob>;

/// Which bytes of a payload one rank needs: whole segments, so that they can be verified.
struct RankSegments {
  std::uint32_t first = 0, count = 0, segment_bytes = 0;
  std::uint64_t begin = 0, bytes = 0;  // in the payload
  std::uint64_t padded_bytes = 0;      // to a multiple of 4096, as a record is
  std::uint64_t rank_part = 0;         // from `begin`

  RankSegments(std::uint64_t rank_bytes, std::uint32_t rank, std::uint32_t rank_count) {
    const std::uint64_t payload = rank_bytes * rank_count, from = rank_bytes * rank, to = from + rank_bytes;
    segment_bytes = segment_bytes_for(payload);
    first = static_cast<std::uint32_t>(from / segment_bytes);
    count = static_cast<std::uint32_t>((to + segment_bytes - 1) / segment_bytes) - first;
    begin = std::uint64_t{first} * segment_bytes;
    bytes = std::min(begin + std::uint64_t{count} * segment_bytes, payload) - begin;
    padded_bytes = (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
    rank_part = from - begin;
  }
};

struct HeaderPage {
  alignas(kPageBytes) std::byte bytes[kPageBytes];
};

Status check_record(const std::byte* page, const DeviceLoadItem& item, std::uint32_t rank_count, std::uint64_t payload_bytes) {
  LMCN_RETURN_IF_ERROR(check_header(page, item.image_bytes));
  const SlotHeader& header = *slot_header(page);
  if (header.key != item.key || header.ns != item.ns || header.region_sequence != item.region_sequence) {
    return {Code::kCorruption, "another record lies at byte " + std::to_string(item.offset) + " (key " + header.key.to_hex() +
                                   ", namespace " + header.ns.to_hex() + ", region sequence " +
                                   std::to_string(header.region_sequence) + "), expected key " + item.key.to_hex() +
                                   ", namespace " + item.ns.to_hex() + ", sequence " + std::to_string(item.region_sequence)};
  }
  if (header.rank_count != rank_count || header.payload_bytes != payload_bytes) {
    return {Code::kCorruption, "payload of " + std::to_string(header.payload_bytes) + " bytes for " +
                                   std::to_string(header.rank_count) + " ranks, expected " + std::to_string(payload_bytes) +
                                   " bytes for " + std::to_string(rank_count)};
  }
  return {};
}

class Loader final : public DeviceLoader {
 public:
  Loader(std::shared_ptr<const CopyGeometry> geometry, const DeviceLoaderOptions& options, const RankSegments& segments,
         std::unique_ptr<DeviceStage> stage, std::shared_ptr<GdsReader> gds)
      : geometry_(std::move(geometry)),
        options_(options),
        segments_(segments),
        image_bytes_(lmcn::image_bytes(geometry_->rank_bytes() * options.rank_count)),
        stage_(std::move(stage)),
        gds_name_(options.allow_compat ? "gds-compat" : "gds"),
        gds_gone_(gds == nullptr),
        files_(std::in_place, std::move(gds)) {}

  Status start(unsigned lanes) {
    for (unsigned i = 0; i < lanes; ++i) {
      lanes_.emplace_back([this, lane = std::shared_ptr(stage_->make_lane(i))] { run(*lane); });
    }
    timekeeper_ = std::thread([this] { keep_time(); });
    std::unique_lock lock(mutex_);
    progress_.wait(lock, [&] { return attached_ == lanes; });
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
      queue_.push_back(job);
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
    const auto none = [&] { return std::ranges::none_of(ids, under_way); };
    if (progress_.wait_for(lock, std::min(timeout, kLongestWait), none)) return {};
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

  std::string name() const override {
    std::lock_guard lock(mutex_);
    return gds_gone_ ? "host" : gds_name_;
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

  /// The next item that is still wanted; false: none.
  bool take(JobPtr& job, std::size_t& item) {
    while (!queue_.empty()) {
      job = queue_.front();
      while (job->next_item < job->states.size()) {
        item = job->next_item++;
        if (job->states[item] == ItemState::kQueued) return true;
      }
      queue_.pop_front();
    }
    return false;
  }

  /// A lane gives up for `why`.
  void lane_broke(const Status& why) {
    if (--working_ > 0) return;
    no_lane_ = {Code::kUnavailable, "every lane has lost the device: " + why.message()};
    queue_.clear();
    std::vector<JobPtr> jobs;
    for (const auto& [id, job] : jobs_) jobs.push_back(job);
    for (const JobPtr& job : jobs) end_open(*job, no_lane_);
  }

  // ---- a lane's thread

  void run(DeviceStageLane& lane) {
    Status attached = lane.attach();
    const auto page = std::make_unique<HeaderPage>();
    std::unique_lock lock(mutex_);
    if (!attached.ok() && attach_failure_.ok()) attach_failure_ = attached;
    ++attached_;
    if (attached.ok()) ++working_;
    progress_.notify_all();
    if (!attached.ok()) return;
    for (;;) {
      JobPtr job;
      std::size_t item = 0;
      work_.wait(lock, [&] { return stop_ || take(job, item); });
      if (stop_) return;
      if (job->started == Clock::time_point{}) job->started = Clock::now();
      job->states[item] = ItemState::kReading;
      lock.unlock();
      LMCN_SEQ_POINT("device_load.before_read");
      Status status = read_and_verify(lane, *page, job->load.items[item]);
      LMCN_SEQ_POINT("device_load.verified");
      lock.lock();
      const bool wanted = job->states[item] == ItemState::kReading;
      if (lane.broken()) {
        if (wanted) end_item(*job, item, status);
        return lane_broke(status);
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
      end_item(*job, item, status);
      if (lane.broken()) return lane_broke(status);
    }
  }

  Status read_and_verify(DeviceStageLane& lane, HeaderPage& page, const DeviceLoadItem& item) {
    Result<std::shared_ptr<const LoadFile>> file = files_->get(item.path);
    if (!file.ok()) return file.status();
    LMCN_RETURN_IF_ERROR((*file)->read(item.offset, page.bytes, kPageBytes));
    LMCN_RETURN_IF_ERROR(check_record(page.bytes, item, options_.rank_count, geometry_->rank_bytes() * options_.rank_count));
    LMCN_RETURN_IF_ERROR(read_payload(lane, **file, item.offset + kPageBytes + segments_.begin));
    const SlotHeader& header = *slot_header(page.bytes);
    return lane.verify({segments_.bytes, segments_.segment_bytes, segments_.first,
                        std::span(header.segment).subspan(segments_.first, segments_.count)});
  }

  Status read_payload(DeviceStageLane& lane, const LoadFile& file, std::uint64_t offset) {
    bool gds;
    {
      std::lock_guard lock(mutex_);
      gds = !gds_gone_;
    }
    Status failure;
    if (gds) {
      failure = file.gds_read(offset, lane.memory(), segments_.padded_bytes);
      if (failure.ok()) return {};
    }
    Result<std::byte*> host = lane.host_memory();
    if (!host.ok()) return host.status();
    LMCN_RETURN_IF_ERROR(file.read(offset, *host, segments_.padded_bytes));
    LMCN_RETURN_IF_ERROR(lane.upload(segments_.padded_bytes));
    // Only now is it known that GDS failed, and not the device or the file.
    if (gds) give_up_gds(file, failure);
    return {};
  }

  void give_up_gds(const LoadFile& file, const Status& failure) {
    std::lock_guard lock(mutex_);
    if (std::exchange(gds_gone_, true)) return;
    notes_.push_back("GPUDirect Storage failed on " + file.path() +
                     " where O_DIRECT did not; reading through host memory from now on: " + failure.message());
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
          if (has_open(*job)) late.push_back(job);
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

  static bool has_open(const LoadJob& job) {
    return std::ranges::any_of(job.states, [](ItemState s) { return s == ItemState::kQueued || s == ItemState::kReading; });
  }

  const std::shared_ptr<const CopyGeometry> geometry_;
  const DeviceLoaderOptions options_;
  const RankSegments segments_;
  const std::uint64_t image_bytes_;
  const std::unique_ptr<DeviceStage> stage_;
  const std::string gds_name_;

  mutable std::mutex mutex_;
  std::condition_variable work_, time_, progress_;
  std::deque<JobPtr> queue_;
  std::unordered_map<std::uint64_t, JobPtr> jobs_;  // that have not ended
  std::vector<DeviceLoadDone> done_;
  std::vector<std::string> notes_;
  bool gds_gone_;
  bool stop_ = false;
  unsigned attached_ = 0, working_ = 0;  // lanes
  Status attach_failure_;
  Status no_lane_;  // why working_ is 0

  std::optional<LoadFiles> files_;  // after stage_: what was registered goes with the last file, and before the memory
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
  const StageOptions staging{segments.padded_bytes, static_cast<unsigned>(std::min<std::uint64_t>(
                                                        options.in_flight, options.buffer_bytes / segments.padded_bytes))};
  // No job of a loader names a place in an arena: every item passes check_job() as if of one slot at its start.
  static std::byte no_arena;
  Result<CopyGeometry> made =
      CopyGeometry::make(paged, slot, &no_arena, image_bytes(rank_bytes * options.rank_count), options.rank);
  if (!made.ok()) return made.status();
  auto geometry = std::make_shared<const CopyGeometry>(std::move(made).value());
  Result<std::unique_ptr<DeviceStage>> stage = make_stage(geometry.get(), &paged, staging, options.device);
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
  auto loader = std::make_unique<Loader>(std::move(geometry), options, segments, std::move(stage).value(), std::move(gds));
  LMCN_RETURN_IF_ERROR(loader->start(staging.lanes));
  return std::unique_ptr<DeviceLoader>(std::move(loader));
}

}  // namespace lmcn
