// Opening the log: at once, or, when another process owns a directory, by a thread that waits for it (the server that this one
// replaces still drains). Until then the store is one of host memory.
//
// Invariants
//  T1  Before the locks of all directories are held nothing in them is read or written but LOCK (striped_log.hpp).
//  T2  While `log` is null nobody follows an extent: entries get theirs in slices, with others at work in between. A key that has
//      come to host memory meanwhile keeps both.
//  T3  `log` is published once, with mu held, when every recovered record is in the index, and never taken back: from then on all
//      is as if it had been there from the start. The slots, counters and limits are the same ones.
//  T4  A clear() before that wins: no record of before it can be looked up, and the keeper clears the log first of all.
//  T5  close() ends the wait, and the reading of an index, before it does anything else. A log that is open but not attached is
//  dropped as it was found.
#include <sys/stat.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <cerrno>
#include <iterator>
#include <set>

#include "base/seq_points.hpp"
#include "nvme/striped_log.hpp"
#include "store/store_core.hpp"

namespace lmcn {
namespace {

constexpr std::uint64_t kMetadataPart = 16;             // of a day's writes
constexpr std::chrono::milliseconds kStartWait{1'000};  // an owner that is dying has gone by then, mostly
constexpr std::chrono::milliseconds kRetry{100};        // flock() has no timed form
constexpr std::chrono::milliseconds kErrorRetry{1'000};
constexpr std::chrono::microseconds kSlicePause{50};  // a mutex alone would not let the others in

/// Of the file systems that the directories are on, each once.
std::uint64_t file_system_bytes(const std::vector<std::string>& directories) {
  std::set<dev_t> seen;
  std::uint64_t sum = 0;
  for (const std::string& directory : directories) {
    struct stat found{};
    struct statvfs sizes{};
    if (::stat(directory.c_str(), &found) != 0 || ::statvfs(directory.c_str(), &sizes) != 0) continue;  // a path that was left out
    if (seen.insert(found.st_dev).second) sum += std::uint64_t{sizes.f_blocks} * sizes.f_frsize;
  }
  return sum;
}

bool path_is_wrong(const Status& status) {
  const int wrong[] = {EACCES, EPERM, EROFS, ENOENT, ENOTDIR, ENAMETOOLONG, ELOOP};
  return status.code() == Code::kIoError && std::find(std::begin(wrong), std::end(wrong), status.sys_errno()) != std::end(wrong);
}

/// Whatever it is asked for again. Other failures (no descriptor, no memory, a device that is away) may pass.
bool stays(Code code) {
  switch (code) {
    case Code::kInvalidArgument:
    case Code::kCorruption:
    case Code::kFormatVersion:
    case Code::kUnsupported:
    case Code::kInternal:
      return true;
    default:
      return false;
  }
}

std::string waiting_for(const Status& locked) {
  return "running without NVMe until its owner lets go: " + locked.message();
}

Result<std::unique_ptr<nvme::RegionLog>> open_log(StoreCore& store, nvme::LogClient& client) {
  std::vector<io::IoEngine*> engines;
  for (const auto& engine : store.engines) engines.push_back(engine.get());
  return nvme::open_paths(store.log_options, engines, client);
}

}  // namespace

Status StoreCore::open_nvme() {
  auto kind = io::parse_engine_kind(options.io_engine);
  if (!kind.ok()) return kind.status();
  log_options.resize(options.directories.size());
  for (std::size_t i = 0; i < log_options.size(); ++i) {
    auto made_engine = io::make_engine({.kind = *kind}, &engine_note);
    if (!made_engine.ok()) return made_engine.status();
    engines.push_back(wrap_engine ? wrap_engine(std::move(made_engine).value()) : std::move(made_engine).value());
    nvme::LogOptions& path = log_options[i];
    path.directory = options.directories[i];
    path.limit_bytes = options.directory_bytes.empty() ? options.nvme_bytes / log_options.size() : options.directory_bytes[i];
    path.region_bytes = options.region_bytes;
    path.max_record_bytes = image_bytes(options.max_payload_bytes);
    path.lock_wait = options.fail_when_locked ? options.lock_wait : std::min(options.lock_wait, kStartWait);
    path.free_space_floor_bytes = options.nvme_free_floor_bytes;
    path.io_timeout = options.nvme_io_timeout;
    path.allow_network_file_system = options.allow_network_file_system;
    path.verify_payload = options.verify != "off";
  }
  auto opened = open_log(*this, *this);
  if (opened.ok()) {
    attach(std::move(opened).value());
    return Status();
  }
  if (path_is_wrong(opened.status())) {
    return {Code::kInvalidArgument, "directories=" + options.directories[0] + ": must be a directory that this user can write (" +
                                        opened.status().message() + ")"};
  }
  if (opened.status().code() != Code::kLocked || options.fail_when_locked) return opened.status();
  open_warning = waiting_for(opened.status());
  taking_over = true;
  return Status();
}

// T2, T3, T4.
void StoreCore::attach(std::unique_ptr<nvme::RegionLog> opened) {
  const std::uint64_t day = options.nvme_daily_bytes != 0 ? options.nvme_daily_bytes : file_system_bytes(options.directories);
  std::string notes;
  for (const std::string& line : opened->notes()) notes += "; " + line;
  LMCN_SEQ_POINT("store.before_attach");
  {
    std::unique_lock lock(mu);
    attaching = opened.get();
    std::uint32_t in_slice = 0;
    opened->adopt([&](const nvme::RecoveredRecord& record) {
      if (taking_over && in_slice++ == attach_slice) {
        in_slice = 1;
        lock.unlock();
        LMCN_SEQ_POINT("store.attach_slice");
        std::this_thread::sleep_for(kSlicePause);
        lock.lock();
      }
      if (clear_epoch != 0) return kNoEntry;
      const EntryId id = index.insert(record.key);
      Entry& entry = index.entry(id);
      if (entry.extent.valid()) {
        attaching->forget(entry.extent);
      } else {
        ++counters.recovered_chunks;
      }
      entry.extent = record.extent;
      entry.hits = record.hits;
      return id;
    });
    engine_note += notes;
    daily_bytes = day;
    // Headers, footers and checkpoints are written too.
    admission = std::make_unique<Admission>(parse_admission_mode(options.admission).value(), day - day / kMetadataPart);
    forgotten_paths = opened->lost_paths();
    clear_pending = clear_epoch != 0;
    if (taking_over) next_to_offer = 0;
    taking_over = false;
    open_warning.clear();
    attaching = nullptr;
    log.publish(std::move(opened));
    changed();
  }
  keeper_cv.notify_one();
  promote_cv.notify_one();
}

void StoreCore::take_over_loop(std::stop_token stop) {
  std::mutex waiting;
  std::condition_variable_any wake;
  std::unique_lock wait(waiting);
  for (nvme::LogOptions& path : log_options) {
    path.lock_wait = std::chrono::milliseconds(0);
    path.go_on = [this, stop] {
      {
        std::lock_guard lock(mu);
        open_warning = "running without NVMe until its index is read";
      }
      LMCN_SEQ_POINT("store.reading_index");
      return stop.stop_requested() ? Status(Code::kAborted, "the store is closing") : Status();
    };
  }
  std::chrono::milliseconds pause = kRetry;
  while (!wake.wait_for(wait, stop, pause, [&] { return stop.stop_requested(); }) && !stop.stop_requested()) {
    LMCN_SEQ_POINT("store.before_take_over");
    auto opened = open_log(*this, *this);
    if (stop.stop_requested()) return;
    if (opened.ok()) return attach(std::move(opened).value());
    std::lock_guard lock(mu);
    pause = kErrorRetry;
    if (opened.status().code() == Code::kLocked) {
      pause = kRetry;
      open_warning = waiting_for(opened.status());
      continue;
    }
    open_warning = "running without NVMe: " + opened.status().message();
    if (!stays(opened.status().code())) {
      open_warning += " (tried again every " + std::to_string(kErrorRetry.count()) + " ms)";
      continue;
    }
    taking_over = false;
    return;
  }
}

void StoreCore::end_take_over() {
  std::lock_guard one_at_a_time(end_take_over_mutex);
  taker.request_stop();
  if (taker.joinable()) taker.join();
}

}  // namespace lmcn
