#include "nvme/region_log.hpp"

#include <fcntl.h>
#include <sys/random.h>

#include <algorithm>
#include <cerrno>

#include "base/seq_points.hpp"
#include "nvme/log.hpp"

namespace lmcn::nvme {
namespace {

constexpr std::chrono::milliseconds kQuarantineCheck{100};
constexpr std::uint64_t kFailedReadsToQuarantine = 8;  // in a row: a device that is gone, not a bad sector
constexpr std::chrono::seconds kMostBetweenChecks{5};  // more: this process was stopped, or had no CPU
constexpr int kPatience = 4;                           // a single I/O may take so many io_timeouts while others are answered

// The device or the file system will not take more; any other failure is of one write.
bool ends_writing(int error) {
  switch (error) {
    case EIO:
    case ENOSPC:
    case EDQUOT:
    case EROFS:
    case ENODEV:
    case ENXIO:
    case EBADF:
      return true;
    default:
      return false;
  }
}

Status new_superblock(const LogOptions& options, const Geometry& geometry, Superblock& superblock) {
  superblock = {};
  if (::getrandom(superblock.uuid.data(), superblock.uuid.size(), 0) != static_cast<ssize_t>(superblock.uuid.size())) {
    return Status::from_errno(errno, "getrandom for the store " + options.directory);
  }
  superblock.region_bytes = geometry.region_bytes;
  superblock.epoch = 1;
  superblock.sequence_floor = 1;
  superblock.created_unix_s = unix_seconds_now();
  return {};
}

}  // namespace

/// One request: runs `then` on its completion and deletes itself.
class Log::IoOp final : public io::CompletionSink {
 public:
  IoOp(Log& log, InFlight::Ticket ticket, Completion then) : log_(log), ticket_(ticket), then_(std::move(then)) {}
  void on_io(const io::IoResult& result) noexcept override {
    Log& log = log_;
    const InFlight::Ticket ticket = ticket_;
    {
      const std::unique_ptr<IoOp> self(this);
      then_(result);
    }
    log.in_flight_.leave(ticket);
  }

 private:
  Log& log_;
  const InFlight::Ticket ticket_;
  Completion then_;
};

Result<std::unique_ptr<RegionLog>> RegionLog::open(const LogOptions& options, io::IoEngine& engine, LogClient& client) {
  Result<std::unique_ptr<Directory>> opened =
      Directory::open(options.directory, options.lock_wait, options.allow_network_file_system);
  if (!opened.ok()) return opened.status();
  return open_in(std::move(opened).value(), options, engine, client);
}

Result<std::unique_ptr<RegionLog>> RegionLog::open_in(std::unique_ptr<Directory> directory, const LogOptions& options,
                                                      io::IoEngine& engine, LogClient& client) {
  if (options.go_on) LMCN_RETURN_IF_ERROR(options.go_on());
  Result<std::optional<Superblock>> found = load_superblock(*directory, engine);
  if (!found.ok()) return found.status();

  const Result<std::uint64_t> file_system_bytes = directory->file_system_bytes();
  if (!file_system_bytes.ok()) return file_system_bytes.status();
  std::string note;
  const Result<Geometry> geometry =
      choose_geometry(options, found->has_value() ? (*found)->region_bytes : 0, *file_system_bytes, &note);
  if (!geometry.ok()) return geometry.status();

  for (const char* leftover : {"superblock.tmp", "index.ckpt.tmp"}) LMCN_RETURN_IF_ERROR(directory->remove(leftover));
  Superblock superblock;
  if (found->has_value()) {
    superblock = **found;
  } else {
    if (directory->open_file("data.000", O_RDONLY).status().code() != Code::kNotFound) {
      return Status(Code::kCorruption, directory->path() + " holds data.000 but no superblock; nothing was changed: remove " +
                                           directory->path() + " to start anew");
    }
    LMCN_RETURN_IF_ERROR(new_superblock(options, *geometry, superblock));
    LMCN_RETURN_IF_ERROR(store_superblock(*directory, engine, superblock));
  }
  Result<DataFile> data = DataFile::open(*directory, geometry->region_bytes);
  if (!data.ok()) return data.status();
  auto log = std::make_unique<Log>(options, engine, client, std::move(directory), superblock, *geometry, std::move(data).value());
  if (!note.empty()) log->note(std::move(note));
  LMCN_RETURN_IF_ERROR(log->recover());
  return std::unique_ptr<RegionLog>(std::move(log));
}

Log::Log(const LogOptions& options, io::IoEngine& engine, LogClient& client, std::unique_ptr<Directory> directory,
         Superblock superblock, Geometry geometry, DataFile data)
    : options_(options),
      engine_(engine),
      client_(client),
      directory_(std::move(directory)),
      superblock_(superblock),
      uuid_(superblock.uuid),
      geometry_(geometry),
      data_(std::move(data)) {
  if (!data_.direct()) note("buffered I/O: the file system of " + data_.path() + " refuses O_DIRECT");
  if (const Status registered = engine_.register_fd(data_.fd()); !registered.ok())
    note("file not registered: " + registered.message());
}

Log::~Log() {
  closed_.store(true, std::memory_order_release);
  in_flight_.wait_zero();
  engine_.unregister_fd(data_.fd());
}

void Log::submit(io::Op op, std::byte* data, std::uint64_t bytes, std::uint64_t offset, Completion then) {
  const InFlight::Ticket ticket = in_flight_.enter(InFlight::lane_of(op));
  io::IoRequest request;
  request.op = op;
  request.fd = data_.fd();
  request.data = data;
  request.bytes = bytes;
  request.offset = offset;
  request.sink = new IoOp(*this, ticket, std::move(then));
  if (op == io::Op::kWrite) written_.add(bytes);
  engine_.submit(std::span(&request, 1));
}

Status Log::count_sync(const io::IoResult& result) {
  Status status = result.status(what("fdatasync of "));
  if (status.ok()) {
    counters_.syncs.fetch_add(1, std::memory_order_relaxed);
  } else {
    counters_.write_errors.fetch_add(1, std::memory_order_relaxed);
    quarantine(status);
  }
  return status;
}

// A device that never answers must not keep the one thread that serves the other paths: once it is quarantined, nobody waits.
Status Log::sync_now() {
  struct Wait {
    std::mutex mutex;
    std::condition_variable ended;
    std::optional<Status> result;
  };
  const auto wait = std::make_shared<Wait>();
  dirty_.store(false, std::memory_order_relaxed);
  submit(io::Op::kSync, nullptr, 0, 0, [this, wait](const io::IoResult& result) {
    Status status = count_sync(result);
    std::lock_guard lock(wait->mutex);
    wait->result = std::move(status);
    wait->ended.notify_all();
  });
  std::unique_lock lock(wait->mutex);
  while (!wait->ended.wait_for(lock, kQuarantineCheck, [&] { return wait->result.has_value(); })) {
    if (quarantined()) return {Code::kUnavailable, directory_->path() + " is quarantined: " + quarantine_reason()};
  }
  return *wait->result;
}

Status Log::usable() const {
  if (closed_.load(std::memory_order_acquire)) return {Code::kUnavailable, "the store in " + directory_->path() + " is closed"};
  if (quarantined()) return {Code::kUnavailable, directory_->path() + " is quarantined: " + quarantine_reason()};
  return {};
}

void Log::quarantine(const Status& reason) {
  std::lock_guard lock(mutex_);
  if (quarantined()) return;
  quarantine_reason_ = reason.message();
  quarantined_.store(true, std::memory_order_release);
}

std::string Log::quarantine_reason() const {
  std::lock_guard lock(mutex_);
  return quarantine_reason_;
}

void Log::check_deadlines() {
  const auto now = std::chrono::steady_clock::now();
  const bool late = last_check_ != decltype(last_check_){} && now - last_check_ > kMostBetweenChecks;
  last_check_ = now;
  if (late) in_flight_.excuse(now);
  if (quarantined() || in_flight_.silence(now, kPatience * options_.io_timeout) < options_.io_timeout) return;
  const std::int64_t ms = options_.io_timeout.count();
  const std::string time = ms % 1000 == 0 ? std::to_string(ms / 1000) + " s" : std::to_string(ms) + " ms";
  quarantine({Code::kDeadlineExceeded, "no answer for " + time + " from " + data_.path()});
}

void Log::count_write_failure(const Status& status) {
  counters_.write_errors.fetch_add(1, std::memory_order_relaxed);
  if (ends_writing(status.sys_errno())) quarantine(status);
}

void Log::read(Extent extent, std::byte* image, const ChunkKey& key, const NamespaceId* ns, ReadDone done) {
  if (Status status = usable(); !status.ok()) return done(status);
  const std::uint64_t last_page = std::uint64_t{extent.page} + extent.pages;
  if (extent.region >= region_count_ || extent.page == 0 || extent.pages < kMinRecordPages || last_page > geometry_.region_pages) {
    return done(Status(Code::kInvalidArgument, "read: no record can be at region " + std::to_string(extent.region) + ", page " +
                                                   std::to_string(extent.page) + ", " + std::to_string(extent.pages) + " pages"));
  }
  if (reinterpret_cast<std::uintptr_t>(image) % kPageBytes != 0) {
    return done(Status(Code::kInvalidArgument, "read: the image must be 4096-aligned"));
  }
  const std::uint64_t sequence = words_[extent.region].sequence.load(std::memory_order_acquire);
  if (sequence == 0) {
    counters_.stale_reads.fetch_add(1, std::memory_order_relaxed);
    return done(Status(Code::kCorruption, "region " + std::to_string(extent.region) + " holds no records any more"));
  }
  reads_.fetch_add(1, std::memory_order_relaxed);
  submit(io::Op::kRead, image, extent.pages * kPageBytes, offset_of(extent.region, extent.page),
         [this, extent, sequence, image, key, ns = ns != nullptr ? std::optional(*ns) : std::nullopt,
          begin = std::chrono::steady_clock::now(), done = std::move(done)](const io::IoResult& result) {
           read_latency_.add(std::chrono::steady_clock::now() - begin);
           LMCN_SEQ_POINT("nvme.read_completed");
           reads_.fetch_sub(1, std::memory_order_relaxed);
           done(finish_read(extent, sequence, image, key, ns ? &*ns : nullptr, result));
         });
}

Status Log::finish_read(Extent extent, std::uint64_t sequence, const std::byte* image, const ChunkKey& key, const NamespaceId* ns,
                        const io::IoResult& result) {
  Status status = result.status(what("read of a record from "));
  if (!status.ok()) {
    if (status.code() == Code::kAborted) return status;  // the engine stopped before it began
    counters_.read_errors.fetch_add(1, std::memory_order_relaxed);
    if (counters_.failed_reads_in_a_row.fetch_add(1, std::memory_order_relaxed) + 1 >= kFailedReadsToQuarantine) quarantine(status);
    return status;
  }
  counters_.failed_reads_in_a_row.store(0, std::memory_order_relaxed);
  counters_.read_bytes.fetch_add(result.actual, std::memory_order_relaxed);
  if (words_[extent.region].sequence.load(std::memory_order_acquire) != sequence) {
    counters_.stale_reads.fetch_add(1, std::memory_order_relaxed);
    return {Code::kCorruption, "region " + std::to_string(extent.region) + " was reused during the read"};
  }
  const SlotHeader& header = *slot_header(image);
  // A whole header, but of another life of the region or of another record: the extent is old, the device is not at fault.
  status = check_header(image, result.actual);
  const bool another = header.key != key || (ns != nullptr && header.ns != *ns);
  if (status.ok() && (header.region_sequence != sequence || another)) {
    (header.region_sequence != sequence ? counters_.stale_reads : counters_.misplaced_reads)
        .fetch_add(1, std::memory_order_relaxed);
    return {Code::kCorruption, "another record lies at page " + std::to_string(extent.page) + " of region " +
                                   std::to_string(extent.region) + " (key " + header.key.to_hex() + ", region sequence " +
                                   std::to_string(header.region_sequence) + "), expected key " + key.to_hex() + ", sequence " +
                                   std::to_string(sequence)};
  }
  if (status.ok() && options_.verify_payload) {
    const LatencyTimer timer(verify_latency_);
    status = verify_slot(image, result.actual, key, header.ns);
    counters_.verified_bytes.fetch_add(result.actual, std::memory_order_relaxed);
  }
  if (status.ok() && image_bytes(header.payload_bytes) != result.actual) {
    status = Status(Code::kCorruption, "record of " + std::to_string(image_bytes(header.payload_bytes)) +
                                           " bytes in an extent of " + std::to_string(result.actual));
  }
  if (!status.ok()) counters_.corrupt_reads.fetch_add(1, std::memory_order_relaxed);
  return status;
}

std::optional<RecordPlace> Log::place(Extent extent) const {
  if (!usable().ok() || extent.region >= region_count_) return std::nullopt;
  const std::uint64_t sequence = words_[extent.region].sequence.load(std::memory_order_acquire);
  if (sequence == 0) return std::nullopt;
  return RecordPlace{0, 0, offset_of(extent.region, extent.page), extent.pages * kPageBytes, sequence};
}

void Log::forget(Extent extent) {
  if (extent.region >= region_count_) return;
  std::atomic<std::uint64_t>& live = words_[extent.region].live_bytes;
  const std::uint64_t bytes = extent.pages * kPageBytes;
  std::uint64_t before = live.load(std::memory_order_relaxed);
  // Saturates: after clear() or a reclaim the region's bytes are uncounted already.
  while (!live.compare_exchange_weak(before, before > bytes ? before - bytes : 0, std::memory_order_relaxed)) {
  }
}

Status Log::clear() {
  LMCN_RETURN_IF_ERROR(usable());
  Superblock raised = superblock_;
  ++raised.epoch;
  raised.sequence_floor = std::max(next_region_sequence_, next_record_sequence_);
  const Status stored = store_superblock(*directory_, engine_, raised, &in_flight_);
  if (!stored.ok()) {
    counters_.write_errors.fetch_add(1, std::memory_order_relaxed);
    quarantine(stored);
  }
  LMCN_SEQ_POINT("nvme.epoch_raised");
  std::lock_guard lock(mutex_);
  if (stored.ok()) superblock_ = raised;
  for (std::uint32_t i = 0; i < region_count_; ++i) {
    Region& r = regions_[i];
    words_[i].sequence.store(0, std::memory_order_release);
    words_[i].live_bytes.store(0, std::memory_order_relaxed);
    r.cookies.clear();
    if (r.state != RegionState::kAbsent) r.state = RegionState::kRetired;
  }
  open_ = kNoRegion;
  return stored;
}

Status Log::close(const EntrySource& entries) {
  if (closed_.load(std::memory_order_acquire)) return {};
  Status status = usable();
  in_flight_.wait_zero();
  if (status.ok()) status = checkpoint(entries);
  closed_.store(true, std::memory_order_release);
  in_flight_.wait_zero();  // reads that began before closed_ was set
  directory_->unlock();
  return status;
}

void LogStats::add(const LogStats& other) noexcept {
  limit_bytes += other.limit_bytes;
  allocated_bytes += other.allocated_bytes;
  live_record_bytes += other.live_record_bytes;
  regions += other.regions;
  clean_regions += other.clean_regions;
  appended_records += other.appended_records;
  appended_bytes += other.appended_bytes;
  write_errors += other.write_errors;
  read_errors += other.read_errors;
  reclaimed_regions += other.reclaimed_regions;
  recovered_records += other.recovered_records;
  recovered_from_checkpoint += other.recovered_from_checkpoint;
  recovered_from_footers += other.recovered_from_footers;
  recovered_from_walk += other.recovered_from_walk;
  corrupt_reads += other.corrupt_reads;
  stale_reads += other.stale_reads;
  misplaced_reads += other.misplaced_reads;
  syncs += other.syncs;
  refused_allocations += other.refused_allocations;
  direct_io = direct_io && other.direct_io;
  quarantined = quarantined || other.quarantined;
  reappended_bytes += other.reappended_bytes;
  read_bytes += other.read_bytes;
  verified_bytes += other.verified_bytes;
  read_latency.add(other.read_latency);
  write_latency.add(other.write_latency);
  verify_latency.add(other.verify_latency);
  lifetime.records += other.lifetime.records;
  lifetime.first_bytes += other.lifetime.first_bytes;
  lifetime.reappended_bytes += other.lifetime.reappended_bytes;
  lifetime.since_unix_s = std::max(lifetime.since_unix_s, other.lifetime.since_unix_s);
}

LifetimeTotals Log::lifetime() const {
  LifetimeTotals totals = totals_before_;
  const std::uint64_t again = counters_.reappended_bytes.load(std::memory_order_relaxed);
  const std::uint64_t all = counters_.appended_bytes.load(std::memory_order_relaxed);
  totals.records += counters_.appended_records.load(std::memory_order_relaxed);
  totals.first_bytes += all - std::min(all, again);
  totals.reappended_bytes += again;
  return totals;
}

LogStats Log::stats() const {
  LogStats s;
  s.limit_bytes = options_.limit_bytes;
  s.appended_records = counters_.appended_records.load(std::memory_order_relaxed);
  s.appended_bytes = counters_.appended_bytes.load(std::memory_order_relaxed);
  s.reappended_bytes = counters_.reappended_bytes.load(std::memory_order_relaxed);
  s.lifetime = lifetime();
  s.write_errors = counters_.write_errors.load(std::memory_order_relaxed);
  s.read_errors = counters_.read_errors.load(std::memory_order_relaxed);
  s.reclaimed_regions = counters_.reclaimed_regions.load(std::memory_order_relaxed);
  s.corrupt_reads = counters_.corrupt_reads.load(std::memory_order_relaxed);
  s.stale_reads = counters_.stale_reads.load(std::memory_order_relaxed);
  s.misplaced_reads = counters_.misplaced_reads.load(std::memory_order_relaxed);
  s.syncs = counters_.syncs.load(std::memory_order_relaxed);
  s.refused_allocations = counters_.refused_allocations.load(std::memory_order_relaxed);
  s.recovered_from_checkpoint = recovered_from_checkpoint_;
  s.recovered_from_footers = recovered_from_footers_;
  s.recovered_from_walk = recovered_from_walk_;
  s.recovered_records = recovered_from_checkpoint_ + recovered_from_footers_ + recovered_from_walk_;
  s.read_bytes = counters_.read_bytes.load(std::memory_order_relaxed);
  s.verified_bytes = counters_.verified_bytes.load(std::memory_order_relaxed);
  s.read_latency = read_latency_.snapshot();
  s.write_latency = write_latency_.snapshot();
  s.verify_latency = verify_latency_.snapshot();
  s.direct_io = data_.direct();
  s.quarantined = quarantined();
  std::lock_guard lock(mutex_);
  s.allocated_bytes = allocated_ * geometry_.region_bytes + checkpoint_bytes_ + kPageBytes;
  s.regions = allocated_;
  for (std::uint32_t i = 0; i < region_count_; ++i) {
    s.live_record_bytes += words_[i].live_bytes.load(std::memory_order_relaxed);
    if (regions_[i].state == RegionState::kClean) ++s.clean_regions;
  }
  return s;
}

std::vector<std::string> Log::notes() const {
  std::lock_guard lock(mutex_);
  return notes_;
}

}  // namespace lmcn::nvme
