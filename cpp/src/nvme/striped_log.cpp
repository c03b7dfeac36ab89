#include "nvme/striped_log.hpp"

#include <algorithm>
#include <filesystem>

#include "nvme/directory.hpp"

namespace lmcn::nvme {
namespace {

constexpr Extent with_path(Extent extent, std::uint32_t path) noexcept {
  extent.region |= path << kPathShift;
  return extent;
}
constexpr Extent without_path(Extent extent) noexcept {
  extent.region &= kMaxRegionsPerPath;
  return extent;
}

/// Gives the store's client region numbers that carry the path.
class PathClient final : public LogClient {
 public:
  PathClient(LogClient& client, std::uint32_t path) : client_(client), first_region_(path << kPathShift) {}
  bool evacuated(std::uint32_t region, std::span<const std::uint32_t> cookies) override {
    return client_.evacuated(region | first_region_, cookies);
  }
  void on_reclaim(std::uint32_t region, std::span<const std::uint32_t> cookies) override {
    client_.on_reclaim(region | first_region_, cookies);
  }

 private:
  LogClient& client_;
  std::uint32_t first_region_;
};

struct Path {
  std::string directory;
  std::uint64_t limit_bytes = 0;
  std::unique_ptr<PathClient> client;
  std::unique_ptr<RegionLog> log;    // null: not there at start
  std::string missing;               // why
  std::uint64_t appended_bytes = 0;  // writer thread only
};

class StripedLog final : public RegionLog {
 public:
  explicit StripedLog(std::vector<Path> paths) : paths_(std::move(paths)) {}

  void adopt(const std::function<std::uint32_t(const RecoveredRecord&)>& f) override {
    for (std::uint32_t i = 0; i < paths_.size(); ++i) {
      if (!paths_[i].log) continue;
      paths_[i].log->adopt(
          [&](const RecoveredRecord& record) { return f({record.key, with_path(record.extent, i), record.hits}); });
    }
  }

  // To the path that has had the least for its size, so that all fill, and are reclaimed, alike.
  Status append(std::byte* image, std::uint64_t bytes, std::uint32_t cookie, WriteDone done, bool again) override {
    std::vector<std::uint32_t> order;
    bool full = false;
    for (std::uint32_t i = 0; i < paths_.size(); ++i) {
      if (usable(i)) order.push_back(i);
    }
    const auto share = [this](std::uint32_t i) {
      return static_cast<double>(paths_[i].appended_bytes) / static_cast<double>(paths_[i].limit_bytes);
    };
    std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) { return share(a) < share(b); });
    if (order.empty()) return {Code::kUnavailable, "no path is left: " + quarantine_reason()};
    Status status;
    for (const std::uint32_t i : order) {
      status = paths_[i].log->append(
          image, bytes, cookie, [i, done](const Status& written, Extent extent) { done(written, with_path(extent, i)); }, again);
      // Another path may take what this one has no clean region for, or has just failed at.
      if (status.code() == Code::kResourceExhausted || status.code() == Code::kUnavailable) {
        full = full || status.code() == Code::kResourceExhausted;
        continue;
      }
      if (status.ok()) paths_[i].appended_bytes += bytes;
      return status;
    }
    // The caller tries again where one of them only had no room yet.
    if (full && status.code() != Code::kResourceExhausted) return {Code::kResourceExhausted, "no path has a clean region yet"};
    return status;
  }

  void read(Extent extent, std::byte* image, const ChunkKey& key, const NamespaceId* ns, ReadDone done) override {
    const std::uint32_t i = path_of(extent);
    if (i < paths_.size() && paths_[i].log) return paths_[i].log->read(without_path(extent), image, key, ns, std::move(done));
    done(Status(i < paths_.size() ? Code::kUnavailable : Code::kInvalidArgument,
                "read: path " + std::to_string(i) + " is not in use"));
  }

  std::optional<RecordPlace> place(Extent extent) const override {
    const std::uint32_t i = path_of(extent);
    if (i >= paths_.size() || !paths_[i].log) return std::nullopt;
    std::optional<RecordPlace> found = paths_[i].log->place(without_path(extent));
    if (found) found->path = i;
    return found;
  }

  void forget(Extent extent) override {
    const std::uint32_t i = path_of(extent);
    if (i < paths_.size() && paths_[i].log) paths_[i].log->forget(without_path(extent));
  }

  Status maintain() override {
    return each([](RegionLog& log, std::uint32_t) { return log.maintain(); });
  }
  void settle() override {
    for (const Path& path : paths_) {
      if (path.log) path.log->settle();
    }
  }
  Status checkpoint(const EntrySource& entries) override {
    return each([&](RegionLog& log, std::uint32_t i) { return log.quarantined() ? Status() : log.checkpoint(only(entries, i)); });
  }
  Status clear() override {
    const Status cleared = each([](RegionLog& log, std::uint32_t) { return log.quarantined() ? Status() : log.clear(); });
    if (!cleared.ok() || lost_paths() == 0) return cleared;
    return {Code::kUnavailable, "not cleared on all paths: " + quarantine_reason()};
  }
  Status close(const EntrySource& entries) override {
    return each([&](RegionLog& log, std::uint32_t i) { return log.close(only(entries, i)); });
  }

  LogStats stats() const override {
    LogStats sum;
    sum.direct_io = true;
    for (const Path& path : paths_) {
      if (path.log) {
        sum.add(path.log->stats());
      } else {
        sum.limit_bytes += path.limit_bytes;
      }
    }
    sum.quarantined = quarantined();
    return sum;
  }

  void check_deadlines() override {
    for (const Path& path : paths_) {
      if (path.log) path.log->check_deadlines();
    }
  }
  std::uint64_t last_day_bytes() const override {
    std::uint64_t sum = 0;
    for (const Path& path : paths_) sum += path.log ? path.log->last_day_bytes() : 0;
    return sum;
  }

  void count_writes(std::uint32_t path, std::uint64_t bytes) override {
    if (path < paths_.size() && paths_[path].log) paths_[path].log->count_writes(0, bytes);
  }

  Stuck stuck() const noexcept override {
    Stuck sum;
    for (const Path& path : paths_) {
      if (!path.log) continue;
      const Stuck one = path.log->stuck();
      sum.writes += one.writes;
      sum.reads += one.reads;
    }
    return sum;
  }
  bool quarantined() const noexcept override { return lost_paths() == (1u << paths_.size()) - 1; }
  std::uint32_t lost_paths() const noexcept override {
    std::uint32_t lost = 0;
    for (std::uint32_t i = 0; i < paths_.size(); ++i) lost |= usable(i) ? 0 : 1u << i;
    return lost;
  }
  std::string quarantine_reason() const override {
    std::string reasons;
    for (const Path& path : paths_) {
      const std::string reason = path.log ? path.log->quarantine_reason() : path.missing;
      if (!reason.empty()) reasons += (reasons.empty() ? "" : "; ") + reason;
    }
    return reasons;
  }
  std::vector<std::string> notes() const override {
    std::vector<std::string> all;
    for (const Path& path : paths_) {
      if (!path.log) {
        all.push_back(path.directory + " left out: " + path.missing);
        continue;
      }
      for (const std::string& line : path.log->notes()) all.push_back(line);
    }
    return all;
  }

 private:
  bool usable(std::uint32_t i) const noexcept { return paths_[i].log && !paths_[i].log->quarantined(); }

  /// All of them, whatever becomes of one; the first error.
  template <class F>
  Status each(F f) {
    Status first;
    for (std::uint32_t i = 0; i < paths_.size(); ++i) {
      if (!paths_[i].log) continue;
      Status status = f(*paths_[i].log, i);
      if (first.ok()) first = std::move(status);
    }
    return first;
  }

  static EntrySource only(const EntrySource& entries, std::uint32_t path) {
    return [&entries, path](const EntrySink& sink) {
      entries({[&](const ChunkKey& key, Extent extent, std::uint16_t hits) {
        if (path_of(extent) == path) sink(key, without_path(extent), hits);
      }});
    };
  }

  std::vector<Path> paths_;
};

// What only costs the path's chunks is noted there, and in `first`; any other error comes back.
Status leave_out(Path& path, const Status& why, Status& first) {
  if (why.code() != Code::kIoError) return why;
  path.missing = why.message();
  if (first.ok()) first = why;
  return {};
}

}  // namespace

Result<std::unique_ptr<RegionLog>> open_paths(std::span<const LogOptions> options, std::span<io::IoEngine* const> engines,
                                              LogClient& client) {
  if (options.size() == 1) return RegionLog::open(options[0], *engines[0], client);
  if (options.empty() || options.size() > kMaxPaths) {
    return Status(Code::kInvalidArgument,
                  std::to_string(options.size()) + " paths for one store, must be 1.." + std::to_string(kMaxPaths));
  }
  std::vector<Path> paths;
  std::vector<std::unique_ptr<Directory>> locked(options.size());
  Status first;
  for (std::uint32_t i = 0; i < options.size(); ++i) {
    for (const Path& earlier : paths) {
      std::error_code ignored;
      if (earlier.directory == options[i].directory ||
          std::filesystem::equivalent(earlier.directory, options[i].directory, ignored)) {
        return Status(Code::kInvalidArgument, "paths " + earlier.directory + " and " + options[i].directory + " are one directory");
      }
    }
    Path& path = paths.emplace_back();
    path.directory = options[i].directory;
    path.limit_bytes = options[i].limit_bytes;
    path.client = std::make_unique<PathClient>(client, i);
    Result<std::unique_ptr<Directory>> directory =
        Directory::open(options[i].directory, options[i].lock_wait, options[i].allow_network_file_system);
    if (directory.ok()) {
      locked[i] = std::move(directory).value();
    } else {
      LMCN_RETURN_IF_ERROR(leave_out(path, directory.status(), first));
    }
  }
  for (std::uint32_t i = 0; i < options.size(); ++i) {
    if (!locked[i]) continue;
    Result<std::unique_ptr<RegionLog>> opened = RegionLog::open_in(std::move(locked[i]), options[i], *engines[i], *paths[i].client);
    if (opened.ok()) {
      paths[i].log = std::move(opened).value();
    } else {
      LMCN_RETURN_IF_ERROR(leave_out(paths[i], opened.status(), first));
    }
  }
  if (std::none_of(paths.begin(), paths.end(), [](const Path& path) { return path.log != nullptr; })) return first;
  return std::unique_ptr<RegionLog>(std::make_unique<StripedLog>(std::move(paths)));
}

}  // namespace lmcn::nvme
