// RegionLog's implementation: state and its parts.
//
// Life of a region:  absent -> preparing -> clean -> open -> closing -> sealing -> sealed -> preparing -> ...
//                    clear() or a failed header write: -> retired (holds space, nothing readable) -> preparing
//
// Locks: mutex_ guards regions_ and the counters beside it; it is never held across I/O, callbacks or seal_slot(). Readers and
// forget() use the atomics in RegionWord only. `state` changes on the writer thread, except closing -> sealing -> sealed,
// preparing -> clean and preparing -> retired, which the I/O threads do.
//
// Invariants beside I1..I5
//  L1  A region is prepared (header rewritten) only when `busy` is 0 and every one of its records was delivered: no write of its
//      earlier life can still reach it.
//  L2  Before a region that held records is overwritten its new header is durable (write, fdatasync); before a footer names
//      records they are durable (fdatasync, write).
//  L3  WriteDones of a region run one after another, in its order; record i's only after the writes of records 0..i ended and
//      failed ones among them were replaced by a skip header. (Where that failed too, the region takes no more records and gets
//      its footer.)
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/latency.hpp"
#include "nvme/data_file.hpp"
#include "nvme/directory.hpp"
#include "nvme/format.hpp"
#include "nvme/geometry.hpp"
#include "nvme/in_flight.hpp"
#include "nvme/recovery.hpp"
#include "nvme/region_log.hpp"
#include "nvme/write_window.hpp"

namespace lmcn::nvme {

inline constexpr std::uint32_t kNoRegion = 0xFFFFFFFFu;

enum class RegionState : std::uint8_t {
  kAbsent,     // no space allocated
  kRetired,    // space allocated, content meaningless
  kPreparing,  // its new header is being written
  kClean,      // ready for records
  kOpen,       // takes records
  kClosing,    // full; writes under way
  kSealing,    // fdatasync, then footer under way
  kSealed,
};

enum class WriteState : std::uint8_t { kPending, kWritten, kFailed };

struct Record {
  ChunkKey key;
  std::uint32_t page = 0;
  std::uint32_t pages = 0;
  std::uint32_t cookie = 0;
  bool again = false;  // see append()
  WriteState state = WriteState::kPending;
  RegionLog::WriteDone done;  // empty once delivered
  Status failure;
};

/// The readers' and forget()'s view of a region.
struct RegionWord {
  std::atomic<std::uint64_t> sequence{0};  // 0: nothing readable
  std::atomic<std::uint64_t> live_bytes{0};
};

struct Region {
  RegionState state = RegionState::kAbsent;
  bool walk_broken = false;     // a skip header could not be written: takes no more records
  bool footer_missing = false;  // sealed in memory only; maintain() tries again
  std::uint32_t busy = 0;       // header, skip and footer writes under way
  std::uint32_t next_page = 1;
  std::uint32_t settled_pages = 1;     // records below were delivered when the writer last called (see checkpoint())
  std::vector<Record> records;         // until the footer is written
  std::size_t delivered = 0;           // records [0, delivered) had their WriteDone
  bool delivering = false;             // by some I/O thread now
  std::vector<std::uint32_t> cookies;  // of readable records, in append order
  std::uint64_t last_record_sequence = 0;
};

class Log final : public RegionLog {
 public:
  Log(const LogOptions& options, io::IoEngine& engine, LogClient& client, std::unique_ptr<Directory> directory,
      Superblock superblock, Geometry geometry, DataFile data);
  ~Log() override;

  // --- recovery.cpp
  Status recover();
  void adopt(const std::function<std::uint32_t(const RecoveredRecord&)>& f) override;

  // --- append.cpp
  Status append(std::byte* image, std::uint64_t image_bytes, std::uint32_t cookie, WriteDone done, bool again) override;

  // --- region_log.cpp
  void read(Extent extent, std::byte* image, const ChunkKey& key, const NamespaceId* ns, ReadDone done) override;
  std::optional<RecordPlace> place(Extent extent) const override;
  void forget(Extent extent) override;
  Status clear() override;
  Status close(const EntrySource& entries) override;
  LogStats stats() const override;
  std::uint64_t last_day_bytes() const override { return written_.last_day_bytes(); }
  void count_writes(std::uint32_t, std::uint64_t bytes) override { written_.add(bytes); }
  LifetimeTotals lifetime() const;
  bool quarantined() const noexcept override { return quarantined_.load(std::memory_order_acquire); }
  Stuck stuck() const noexcept override {
    return quarantined() ? Stuck{appends_.load(std::memory_order_relaxed), reads_.load(std::memory_order_relaxed)} : Stuck{};
  }
  std::uint32_t lost_paths() const noexcept override { return quarantined() ? 1 : 0; }
  std::string quarantine_reason() const override;
  void check_deadlines() override;
  std::vector<std::string> notes() const override;

  // --- reclaim.cpp
  Status maintain() override;
  void settle() override;
  void prepare_ahead();

  // --- checkpoint.cpp
  Status checkpoint(const EntrySource& entries) override;

  void note(std::string line) { notes_.push_back(std::move(line)); }  // open() only
  /// Waits until no I/O is under way (tests).
  void wait_idle() { in_flight_.wait_zero(); }

 private:
  using Completion = std::function<void(const io::IoResult&)>;
  class IoOp;

  // --- region_log.cpp
  void submit(io::Op op, std::byte* data, std::uint64_t bytes, std::uint64_t offset, Completion then);
  std::uint64_t offset_of(std::uint32_t region, std::uint32_t page) const noexcept {
    return region * geometry_.region_bytes + page * kPageBytes;
  }
  /// Counts an fdatasync; a failed one quarantines (what is durable is unknown from there on).
  Status count_sync(const io::IoResult& result);
  Status sync_now();      // waits
  Status usable() const;  // kUnavailable when quarantined or closed
  void quarantine(const Status& reason);
  /// Counts a failed write or sync; quarantines when the device or file system will not take more.
  void count_write_failure(const Status& status);
  std::string what(const char* action) const { return action + data_.path(); }
  Status finish_read(Extent extent, std::uint64_t sequence, const std::byte* image, const ChunkKey& key, const NamespaceId* ns,
                     const io::IoResult& result);

  // --- append.cpp
  Status check_image(const std::byte* image, std::uint64_t image_bytes) const;
  Status make_room(std::uint32_t pages);
  bool fits(const Region& region, std::uint32_t pages) const;  // mutex_ held
  void on_written(std::uint32_t region, std::size_t index, const io::IoResult& result);
  void write_skip(std::uint32_t region, std::size_t index, Status failure);
  struct Delivery {
    WriteDone done;
    Status status;
    Extent extent;
  };
  void end_record(std::uint32_t region, std::size_t index, Status status);
  bool next_delivery(std::uint32_t region, Delivery& delivery);  // mutex_ held; false: none may be delivered yet
  bool begin_sealing(Region& region);                            // mutex_ held; true: the caller runs seal() without it
  void seal(std::uint32_t region);
  void write_footer(std::uint32_t region);
  void end_sealing(std::uint32_t region, bool footer_written);
  void settle_active();  // mutex_ held, writer thread

  // --- reclaim.cpp
  /// Starts making one region clean; false: there is none to take.
  bool prepare_one(bool may_take_sealed);
  std::uint32_t oldest_sealed() const;  // mutex_ held
  bool may_reclaim(std::uint32_t region);
  bool try_allocate(std::uint32_t region);
  void retry_footer();
  void write_header(std::uint32_t region, std::uint64_t sequence, bool must_be_durable);
  void end_preparing(std::uint32_t region, std::uint64_t sequence, const Status& status);
  void start_sync();
  /// More where they cost little: each covers the time that the fdatasync of the next header takes.
  std::uint32_t target_clean() const noexcept {
    const std::uint32_t regions = geometry_.max_regions;
    return regions >= 64 ? 4 : regions >= 32 ? 3 : regions >= 8 ? 2 : 1;
  }

  // --- recovery.cpp
  Status find_regions(StoreReader& reader, std::uint32_t count, std::vector<FoundRegion>& found);
  Status fit_into_limit(std::uint32_t count, std::vector<FoundRegion>& found);
  void recover_region(const FoundRegion& found, const RegionContents& contents);
  void settle_recovered(std::span<const FoundRegion> found);

  // --- checkpoint.cpp
  Status lose_checkpoint(Status why);
  std::uint64_t checkpoint_allowance() const;  // bytes that checkpoints may take, old and new together

  const LogOptions options_;
  io::IoEngine& engine_;
  LogClient& client_;
  std::unique_ptr<Directory> directory_;
  Superblock superblock_;  // writer thread only
  const Uuid uuid_;
  const Geometry geometry_;
  DataFile data_;
  std::vector<std::string> notes_;
  LifetimeTotals totals_before_;  // of the owners before; set by recover()

  InFlight in_flight_;
  WriteWindow written_;
  bool counts_since_checkpoint_ = false;                // recovery only
  std::atomic<std::uint64_t> appends_{0}, reads_{0};    // under way
  std::chrono::steady_clock::time_point last_check_{};  // thread of check_deadlines() only
  std::atomic<bool> quarantined_{false};
  std::atomic<bool> closed_{false};
  std::atomic<bool> dirty_{false};  // writes completed since the last fdatasync was submitted
  std::atomic<bool> syncing_{false};
  std::unique_ptr<RegionWord[]> words_;  // one per region, for life
  std::uint32_t region_count_ = 0;       // places in regions_ and words_; >= geometry_.max_regions after a shrink

  mutable std::mutex mutex_;
  std::string quarantine_reason_;
  std::vector<Region> regions_;
  std::uint32_t allocated_ = 0;         // regions that hold space
  std::vector<std::uint32_t> active_;   // regions that settle_active() must look at
  std::uint64_t checkpoint_bytes_ = 0;  // of index.ckpt now

  // Writer thread only.
  std::uint32_t open_ = kNoRegion;
  std::uint64_t next_region_sequence_ = 1;
  std::uint64_t next_record_sequence_ = 1;
  std::chrono::steady_clock::time_point next_sync_{};
  std::chrono::steady_clock::time_point next_allocation_{};
  std::string allocation_refusal_;
  std::uint64_t evacuating_ = 0;  // sequence of the region that LogClient::evacuated() is asked about
  std::chrono::steady_clock::time_point evacuation_ends_{};
  std::vector<RecoveredRecord> recovered_;  // until adopt()

  struct Counters {
    std::atomic<std::uint64_t> appended_records{0}, appended_bytes{0}, reappended_bytes{0}, write_errors{0}, read_errors{0};
    std::atomic<std::uint64_t> reclaimed_regions{0};
    std::atomic<std::uint64_t> corrupt_reads{0}, stale_reads{0}, misplaced_reads{0}, syncs{0}, refused_allocations{0},
        failed_reads_in_a_row{0};
    std::atomic<std::uint64_t> read_bytes{0}, verified_bytes{0};
  } counters_;
  LatencyRecorder read_latency_, write_latency_, verify_latency_;
  std::uint64_t recovered_from_checkpoint_ = 0, recovered_from_footers_ = 0, recovered_from_walk_ = 0;
};

}  // namespace lmcn::nvme
