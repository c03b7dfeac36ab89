#include <sys/eventfd.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <iterator>
#include <numeric>
#include <set>
#include <unordered_map>

#include "memory/numa.hpp"
#include "nvme/striped_log.hpp"
#include "store/request.hpp"
#include "store/store_core.hpp"

namespace lmcn {
namespace {

constexpr std::uint64_t kMetadataPart = 16;  // of a day's writes
constexpr std::uint64_t kMinHostBytes = 4ULL << 20;
constexpr std::uint64_t kDefaultMaxPayloadBytes = 64ULL << 20;

Status bad(const std::string& field, const std::string& value, const std::string& right) {
  return Status(Code::kInvalidArgument, field + "=" + value + ": " + right);
}

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

Status check_nvme_options(const StoreOptions& o) {
  if (o.directories.empty() && o.nvme_bytes != 0) {
    return bad("nvme_bytes", std::to_string(o.nvme_bytes), "needs directories, the place on NVMe");
  }
  if (!o.directories.empty() && o.nvme_bytes == 0) {
    return bad("nvme_bytes", "0", "directory " + o.directories[0] + " needs a size: the most bytes it may take");
  }
  if (!o.directory_bytes.empty() &&
      (o.directory_bytes.size() != o.directories.size() ||
       std::accumulate(o.directory_bytes.begin(), o.directory_bytes.end(), std::uint64_t{0}) != o.nvme_bytes)) {
    return bad("directory_bytes", std::to_string(o.directory_bytes.size()) + " sizes",
               "must be one size for each of " + std::to_string(o.directories.size()) +
                   " directories, together nvme_bytes=" + std::to_string(o.nvme_bytes));
  }
  if (o.write_deadline.count() <= 0) {
    return bad("write_deadline", std::to_string(o.write_deadline.count()) + " ms", "must be positive");
  }
  if (o.verify != "off" && o.verify != "nvme" && o.verify != "all") return bad("verify", o.verify, "must be off, nvme or all");
  return parse_admission_mode(o.admission).status();
}

Status check_options(const StoreOptions& o) {
  if (o.host_bytes < kMinHostBytes) {
    return bad("host_bytes", std::to_string(o.host_bytes), "the host arena must be at least 4194304 bytes (4 MiB)");
  }
  if (o.rank_count < 1 || o.rank_count > kMaxRanks) {
    return bad("rank_count", std::to_string(o.rank_count), "must be 1.." + std::to_string(kMaxRanks));
  }
  if (image_bytes(o.max_payload_bytes) > o.host_bytes) {
    return bad("max_payload_bytes", std::to_string(o.max_payload_bytes),
               "one chunk must fit into the host arena of " + std::to_string(o.host_bytes) + " bytes");
  }
  LMCN_RETURN_IF_ERROR(check_nvme_options(o));
  if (o.promotion_deadline.count() <= 0) {
    return bad("promotion_deadline", std::to_string(o.promotion_deadline.count()) + " ms", "must be positive");
  }
  if (o.nvme_io_timeout.count() <= 0) {
    return bad("nvme_io_timeout", std::to_string(o.nvme_io_timeout.count()) + " ms", "must be positive");
  }
  LMCN_RETURN_IF_ERROR(check_numa_nodes(o.numa_nodes));
  if (o.request_ttl.count() <= 0) return bad("request_ttl", std::to_string(o.request_ttl.count()) + " ms", "must be positive");
  return io::parse_engine_kind(o.io_engine).status();
}

}  // namespace

Result<std::unique_ptr<TieredStore>> TieredStore::open(const StoreOptions& options) {
  StoreOptions filled = options;
  if (filled.max_payload_bytes == 0) {
    filled.max_payload_bytes = std::min(kDefaultMaxPayloadBytes, filled.host_bytes / 2);
    filled.max_payload_bytes -= filled.max_payload_bytes % kPageBytes;
  }
  LMCN_RETURN_IF_ERROR(check_options(filled));
  auto core = std::make_unique<StoreCore>(filled);
  LMCN_RETURN_IF_ERROR(core->start());
  return std::unique_ptr<TieredStore>(std::move(core));
}

Status StoreCore::start() {
  auto made_policy = make_eviction_policy(options.cache_policy, index);
  if (!made_policy.ok()) return made_policy.status();
  policy = std::move(made_policy).value();

  // NVMe before the arena: its errors are the likelier ones, and nothing has been allocated yet.
  verify_all = options.verify == "all";
  if (!options.directories.empty()) LMCN_RETURN_IF_ERROR(open_nvme());

  auto made_arena = HostArena::create({.bytes = options.host_bytes,
                                       .populate_threads = options.populate_threads,
                                       .require_hugetlb = options.hugetlb,
                                       .numa_nodes = options.numa_nodes});
  if (!made_arena.ok()) return made_arena.status();
  arena = std::move(made_arena).value();
  allocator = std::make_unique<SlotAllocator>(arena->bytes());
  promotion_budget_bytes = options.promotion_budget_bytes != 0 ? options.promotion_budget_bytes : arena->bytes() / 2;
  request_pin_limit_bytes = arena->bytes() / 4 * 3;

  completion_event = ::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (completion_event < 0) return Status::from_errno(errno, "eventfd");
  keeper = std::jthread([this](std::stop_token stop) { keeper_loop(stop); });
  if (log || verify_all) promoter = std::jthread([this](std::stop_token stop) { promoter_loop(stop); });
  return Status();
}

Status StoreCore::open_nvme() {
  auto kind = io::parse_engine_kind(options.io_engine);
  if (!kind.ok()) return kind.status();
  std::vector<nvme::LogOptions> paths(options.directories.size());
  std::vector<io::IoEngine*> path_engines;
  for (std::size_t i = 0; i < paths.size(); ++i) {
    auto made_engine = io::make_engine({.kind = *kind}, &engine_note);
    if (!made_engine.ok()) return made_engine.status();
    engines.push_back(wrap_engine ? wrap_engine(std::move(made_engine).value()) : std::move(made_engine).value());
    path_engines.push_back(engines.back().get());
    paths[i].directory = options.directories[i];
    paths[i].limit_bytes = options.directory_bytes.empty() ? options.nvme_bytes / paths.size() : options.directory_bytes[i];
    paths[i].region_bytes = options.region_bytes;
    paths[i].max_record_bytes = image_bytes(options.max_payload_bytes);
    paths[i].lock_wait = options.lock_wait;
    paths[i].free_space_floor_bytes = options.nvme_free_floor_bytes;
    paths[i].io_timeout = options.nvme_io_timeout;
    paths[i].allow_network_file_system = options.allow_network_file_system;
    paths[i].verify_payload = options.verify != "off";
  }
  auto opened = nvme::open_paths(paths, path_engines, *this);
  if (!opened.ok()) {
    if (path_is_wrong(opened.status())) {
      return bad("directories", options.directories[0],
                 "must be a directory that this user can write (" + opened.status().message() + ")");
    }
    if (opened.status().code() != Code::kLocked || options.fail_when_locked) return opened.status();
    open_warning = "running without NVMe: " + opened.status().message();
    engines.clear();
    return Status();
  }
  log = std::move(opened).value();
  for (const std::string& line : log->notes()) engine_note += "; " + line;
  daily_bytes = options.nvme_daily_bytes != 0 ? options.nvme_daily_bytes : file_system_bytes(options.directories);
  // Headers, footers and checkpoints are written too.
  admission =
      std::make_unique<Admission>(parse_admission_mode(options.admission).value(), daily_bytes - daily_bytes / kMetadataPart);
  forgotten_paths = log->lost_paths();
  log->adopt([this](const nvme::RecoveredRecord& record) {
    const EntryId id = index.insert(record.key);
    Entry& entry = index.entry(id);
    if (entry.extent.valid()) {
      log->forget(entry.extent);
    } else {
      ++counters.recovered_chunks;
    }
    entry.extent = record.extent;
    entry.hits = record.hits;
    return id;
  });
  return Status();
}

Status StoreCore::serve(const std::string& engine_id, std::uint64_t rank_bytes) {
  if (rank_bytes == 0 || rank_bytes * parts() > options.max_payload_bytes) {
    return bad(
        "rank_bytes", std::to_string(rank_bytes),
        "times " + std::to_string(parts()) + " part(s) must be 1..max_payload_bytes=" + std::to_string(options.max_payload_bytes));
  }
  if (inherited()) return inherited_status();
  {
    std::lock_guard lock(mu);
    if (closed) return Status(Code::kUnavailable, "the store is closed");
    if (rendezvous) return bad("engine_id", engine_id, "this store already serves " + rendezvous->path());
  }
  auto listening = RendezvousOwner::listen(engine_id, arena->memfd(),
                                           ArenaHandle{.arena_bytes = arena->bytes(),
                                                       .rank_bytes = rank_bytes,
                                                       .rank_count = options.rank_count,
                                                       .owner_pid = static_cast<std::uint32_t>(::getpid()),
                                                       .replicated = options.replicated},
                                           [this](std::uint32_t rank) { on_rank_gone(rank); });
  if (!listening.ok()) return listening.status();
  std::lock_guard lock(mu);
  rendezvous = std::move(listening).value();
  return Status();
}

// The worker's process has ended and can write no more: its unfinished fills failed, its unfinished loads are over.
void StoreCore::on_rank_gone(std::uint32_t rank) {
  std::lock_guard lock(mu);
  for (SlotId id = 0; id < slots.size(); ++id) {
    SlotRecord& record = slots[id];
    if (!record.in_use) continue;
    if (record.worker_fill && rank < parts() && rank_state(image(id), rank, record.slot.generation) == RankState::kEmpty) {
      publish_rank(image(id), rank, record.slot.generation, RankState::kFailed);
    }
    // Workers can write the count: one beyond what was issued must not keep us here.
    for (std::uint32_t done = loads_done(image(id), rank); done < record.loads_issued; ++done) count_load_done(image(id), rank);
  }
  sweep_quarantine();
}

void StoreCore::job_not_started(std::uint32_t rank, std::span<const SlotRef> refs, bool load) {
  if (rank >= options.rank_count || inherited()) return;
  std::unordered_map<std::uint64_t, std::uint32_t> generation_at;
  for (const SlotRef& ref : refs) generation_at.emplace(ref.offset, ref.generation);
  std::lock_guard lock(mu);
  for (SlotId id = 0; id < slots.size(); ++id) {
    const SlotRecord& record = slots[id];
    if (!record.in_use) continue;
    const auto named = generation_at.find(record.slot.offset);
    if (named == generation_at.end() || named->second != record.slot.generation) continue;
    if (load) {
      if (loads_done(image(id), rank) != record.loads_issued) count_load_done(image(id), rank);
    } else if (rank < parts() && rank_state(image(id), rank, record.slot.generation) == RankState::kEmpty) {
      publish_rank(image(id), rank, record.slot.generation, RankState::kFailed);
    }
  }
  sweep_quarantine();
}

Status StoreCore::close(std::chrono::milliseconds deadline) {
  if (inherited()) return {};
  Status result;
  if (log && keeper.joinable()) result = flush(deadline);
  {
    std::lock_guard lock(mu);
    if (closed) return Status();
    closed = true;
    changed();
    keeper.request_stop();
    promoter.request_stop();
  }
  keeper_cv.notify_all();
  promote_cv.notify_all();
  promoted_cv.notify_all();
  if (keeper.joinable()) keeper.join();
  if (promoter.joinable()) promoter.join();
  std::unique_ptr<RendezvousOwner> no_longer_served;
  {
    std::lock_guard lock(mu);
    no_longer_served = std::move(rendezvous);
  }
  no_longer_served.reset();  // without mu: its thread may be in on_rank_gone()
  if (log) {
    log->settle();
    std::vector<nvme::RecoveredRecord> entries;
    {
      std::lock_guard lock(mu);
      index.for_each([&](EntryId, Entry& entry) {
        if (entry.extent.valid()) entries.push_back({entry.key, entry.extent, entry.hits});
      });
    }
    const Status log_closed = log->close([&](const nvme::RegionLog::EntrySink& sink) {
      for (const auto& [key, extent, hits] : entries) sink(key, extent, hits);
    });
    if (result.ok()) result = log_closed;
  }
  return result;
}

StoreCore::~StoreCore() {
  static_cast<void>(close(std::chrono::seconds(2)));  // what is lost then shows in nvme_dirty_bytes of the last stats
  log.reset();                                        // waits for I/O under way, whose callbacks come here
  engines.clear();
  if (completion_event >= 0) ::close(completion_event);
}

void StoreCore::operator delete(StoreCore* store, std::destroying_delete_t) noexcept {
  if (store->inherited()) return;
  store->~StoreCore();
  ::operator delete(store);
}

Status StoreCore::inherited_status() {
  return {Code::kUnavailable, "the store belongs to the parent process, a forked child cannot use it"};
}

}  // namespace lmcn
