// A store that nobody has open: what is in it, whether it is whole, and taking things out of it. It is read by the code that open()
// uses (recovery.hpp), so that what is shown is what the next open would find.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "index/chunk_index.hpp"
#include "nvme/data_file.hpp"
#include "nvme/directory.hpp"
#include "nvme/recovery.hpp"

namespace lmcn::nvme {

enum class Access : std::uint8_t {
  kLook,    // shared with others that look; writes nothing at all
  kChange,  // alone
};

struct RegionReport {
  std::uint32_t region = 0;
  const char* state = "";  // "sealed", "open", "clean", "cleared" (of an earlier epoch), "unused", "unreadable"
  std::uint64_t sequence = 0;
  std::uint64_t epoch = 0;
  std::uint64_t opened_unix_s = 0;  // 0: unknown
  std::uint64_t records = 0;        // that a lookup would find
  std::uint64_t live_bytes = 0;     // of these
  std::uint64_t dead_bytes = 0;     // of superseded, forgotten and failed ones
};

struct Tally {
  std::uint64_t records = 0;
  std::uint64_t bytes = 0;
};

struct NamespaceReport {
  NamespaceId ns;
  Tally tally;
};

/// Upper ends of the age classes, in seconds; the last two are "older" and "unknown".
inline constexpr std::array<std::uint64_t, 7> kAgeClasses_s{60, 600, 3600, 6 * 3600, 86400, 7 * 86400, 30 * 86400};

struct Inspection {
  std::string path;
  Uuid uuid{};
  std::uint32_t format_version = 0;
  std::uint64_t region_bytes = 0;
  std::uint64_t epoch = 0;
  std::uint64_t created_unix_s = 0;   // 0: unknown
  std::uint64_t limit_bytes = 0;      // in force when the checkpoint was written; 0: unknown
  std::uint64_t allocated_bytes = 0;  // blocks that all its files take
  std::uint64_t checkpoint_bytes = 0;
  std::string checkpoint_note;  // why the checkpoint is not used; empty: it is, or there is none
  LifetimeTotals totals;
  std::uint64_t now_unix_s = 0;  // that ages were taken from
  std::vector<RegionReport> regions;
  Tally live;
  std::uint64_t dead_bytes = 0;
  std::array<Tally, 17> hits{};  // class i: [2^(i-1), 2^i) hits, class 0: none
  std::array<Tally, kAgeClasses_s.size() + 2> ages{};
  std::vector<NamespaceReport> namespaces;  // when asked for; most bytes first
  std::uint64_t unreadable_headers = 0;     // of records, met when looking for namespaces
  std::uint64_t read_errors = 0;
};

struct BadRecord {
  ChunkKey key;  // as the index has it
  std::uint32_t region = 0;
  std::uint32_t page = 0;
  std::uint32_t pages = 0;
  const char* check = "";  // "read", "header", "region sequence", "record sequence", "key", "length", "payload"
  std::string detail;
};

struct VerifyReport {
  Tally total;
  Tally verified;
  std::vector<BadRecord> bad;  // by region, then page
  std::vector<NamespaceReport> namespaces;
  std::vector<std::string> notes;  // regions that could not be read, an unusable checkpoint: losses, not lies
  bool stopped = false;            // by `progress`
};

/// What goes: everything, or what is older, or one namespace.
struct ClearRequest {
  std::optional<std::uint64_t> older_than_s{};
  std::optional<NamespaceId> ns{};
};

struct ClearReport {
  Tally cleared;  // that a lookup would have found
  std::uint64_t regions_dropped = 0;
  std::uint64_t regions_of_unknown_age = 0;  // kept
  std::uint64_t unreadable_headers = 0;      // records whose namespace could not be read: kept, and misses anyway
  std::uint64_t unreadable_regions = 0;      // a part was asked for, and these may have more of it: kept
  std::uint64_t read_errors = 0;             // as above: reads that failed
  std::uint64_t freed_bytes = 0;             // blocks given back to the file system
};

class StoreFiles {
 public:
  /// kLocked names the owner's pid. kNotFound, kInvalidArgument (symbolic link, another's, not private), kFormatVersion,
  /// kCorruption (superblock): nothing was changed. `engine` must outlive the result.
  static Result<std::unique_ptr<StoreFiles>> open(const std::string& path, Access access, io::IoEngine& engine);

  /// Reads headers, checkpoint, footers; with `namespaces` also one page per record.
  Result<Inspection> inspect(bool namespaces);
  /// Reads every record that a lookup would find, whole, several at once, and checks all that read() checks. `progress`, if any, is
  /// called on this thread about ten times a second and at the end; false stops. Memory: 256 MiB or one record.
  using Progress = std::function<bool(const Tally& done, const Tally& total)>;
  Result<VerifyReport> verify(const Progress& progress);
  /// REQUIRES: kChange. docs/format.md, "Clearing", has the order of steps and what holds between them.
  Result<ClearReport> clear(const ClearRequest& request);

 private:
  struct Region {
    RegionReport report;
    RegionContents contents;  // of `found` ones
    bool found = false;
  };
  /// A record that a lookup would find.
  struct Live {
    ChunkKey key;
    Extent extent;
    std::uint16_t hits;
  };
  struct Contents {
    std::vector<Region> regions;  // by number
    std::vector<FoundRegion> found;
    CheckpointFile checkpoint;
    std::vector<Live> live;           // by region, then page
    std::uint64_t next_sequence = 1;  // above all regions' and records' sequences seen
    std::uint64_t read_errors = 0;
    std::uint32_t unreadable_regions = 0;
    std::vector<std::string> notes;
  };

  StoreFiles(io::IoEngine& engine, std::unique_ptr<Directory> directory, Superblock superblock)
      : engine_(engine), directory_(std::move(directory)), superblock_(superblock) {}

  // --- inspect.cpp
  /// `all_may_fail`: not an error when no region's header can be read.
  Result<Contents> read_contents(StoreReader& reader, bool all_may_fail = false);
  StoreReader reader() { return {engine_, data_.get(), directory_->path_of("data.000"), superblock_}; }
  Result<std::uint64_t> allocated_bytes() const;
  struct RecordHeader {
    std::uint32_t region, page;
    bool holds;  // of this life of its region
    NamespaceId ns;
  };
  /// The header pages at `places`.
  void read_record_headers(StoreReader& reader, const std::vector<Region>& regions,
                           const std::vector<std::pair<std::uint32_t, std::uint32_t>>& places,
                           const std::function<void(const RecordHeader&)>& sink);

  // --- inspect_verify.cpp
  void verify_one(const Live& record, std::uint64_t region_sequence, std::byte* image, std::vector<BadRecord>& bad,
                  std::uint64_t& record_sequence, NamespaceId& ns);

  // --- inspect_clear.cpp
  struct Victims;
  Status clear_all(const Contents& contents);
  Status clear_some(const Contents& contents, Victims& victims);
  Status replace_checkpoint(const Contents& contents, const Victims& victims);
  Status write_page(const std::byte* page, std::uint64_t bytes, std::uint64_t offset);
  Status sync_data();

  io::IoEngine& engine_;
  std::unique_ptr<Directory> directory_;
  Superblock superblock_;
  Fd data_;  // invalid: there is no data.000
  Access access_ = Access::kLook;
};

}  // namespace lmcn::nvme
