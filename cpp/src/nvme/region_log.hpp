// The NVMe tier: an append-only log of large regions in one O_DIRECT data file per path. docs/format.md has every byte.
//
// Invariants
//  I1  A record becomes readable (its extent is given out) only after its write completed in full.
//  I2  A region is reused only after on_reclaim() returned for its records; its sequence is raised first, so a reader that was
//      under way sees another sequence after its read (still_valid) and reports a miss. verify_slot() would also fail.
//  I3  Bytes on the device never exceed limit_bytes, counted from what is allocated at open; regions are allocated one by one
//      (fallocate) up to the limit and then overwritten in place.
//  I4  After a crash at any point open() yields only records whose header root checksum holds for their region's sequence;
//      their payloads are verified when read.
//  I5  One process owns the directory (flock on LOCK, pid inside).
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "index/chunk_index.hpp"
#include "io/io_engine.hpp"
#include "lmcn/metrics.hpp"
#include "lmcn/record_place.hpp"
#include "lmcn/status.hpp"
#include "nvme/format.hpp"

namespace lmcn::nvme {

class Directory;

struct LogOptions {
  std::string directory;               // made 0700 when absent; private to one store
  std::uint64_t limit_bytes = 0;       // hard: data file + checkpoint + superblock; >= 4 regions
  std::uint64_t region_bytes = 0;      // 0: 256 MiB, lowered so that >= 8 regions fit (never below 16 MiB or 2 x max record)
  std::uint64_t max_record_bytes = 0;  // largest slot image that will be appended
  std::chrono::milliseconds lock_wait{10'000};
  bool allow_shrink_below_contents = true;               // a lower limit than last time drops the oldest regions
  std::uint64_t free_space_floor_bytes = 256ull << 20;   // of the file system, never taken
  std::chrono::milliseconds sync_interval{5'000};        // longest time that acknowledged records stay without fdatasync
  std::chrono::milliseconds evacuation_patience{1'000};  // see LogClient::evacuated()
  bool verify_payload = true;  // false: reads check header, key, namespace, lengths and sequences, not the payload's checksums
  std::chrono::milliseconds io_timeout{30'000};  // a device silent for so long is quarantined; see check_deadlines()
  bool allow_network_file_system = false;        // else kInvalidArgument on a network_file_system()
  /// May be empty. While opening, on that thread: asked once the locks are held, then between the parts of reading the index. Not
  /// ok: opening ends with that.
  std::function<Status()> go_on = {};
};

struct RecoveredRecord {
  ChunkKey key;
  Extent extent;
  std::uint16_t hits = 0;  // since it was written, as of the last checkpoint
};

/// The store's side of reclaim: called on the log's caller thread (append/maintain), no log lock held. It must not call the log
/// back, except what only reads or takes no lock: forget(), stats(), last_day_bytes(), stuck(), lost_paths(), quarantined().
class LogClient {
 public:
  virtual ~LogClient() = default;
  /// Before on_reclaim(), each time the log looks for space: whether the client has got hold of all it wants of these records. They
  /// can be read until it says true, or until evacuation_patience has passed.
  virtual bool evacuated(std::uint32_t region, std::span<const std::uint32_t> cookies) = 0;
  /// `cookies`: as given to append() (or assigned by adopt()) for the records of a region about to be reused, in append order.
  /// The client forgets those whose extent still is in `region` (in its own index: their bytes are uncounted already); chunks
  /// worth keeping it appends again later, from host memory.
  virtual void on_reclaim(std::uint32_t region, std::span<const std::uint32_t> cookies) = 0;
};

struct LogStats {
  std::uint64_t limit_bytes = 0, allocated_bytes = 0, live_record_bytes = 0, regions = 0, clean_regions = 0;
  std::uint64_t appended_records = 0, appended_bytes = 0, reappended_bytes = 0, write_errors = 0, read_errors = 0,
                reclaimed_regions = 0;
  std::uint64_t recovered_records = 0, recovered_from_checkpoint = 0, recovered_from_footers = 0, recovered_from_walk = 0;
  std::uint64_t corrupt_reads = 0;        // bytes that did not verify; not in read_errors
  std::uint64_t stale_reads = 0;          // another record is there now (the region was reused); neither corrupt nor an error
  std::uint64_t misplaced_reads = 0;      // a whole record of this life of the region, but of another key or namespace
  std::uint64_t syncs = 0;                // fdatasyncs of the data file that succeeded
  std::uint64_t refused_allocations = 0;  // ENOSPC or the free-space floor: regions are reused instead
  std::uint64_t read_bytes = 0;           // of records that the device gave
  std::uint64_t verified_bytes = 0;       // of those, whose checksums were computed
  LatencyHistogram read_latency, write_latency, verify_latency;  // a record each; reads and writes: until the device answered
  LifetimeTotals lifetime;                                       // this process's and those before it, as far as checkpoints told
  bool direct_io = false;                                        // O_DIRECT, else buffered
  bool quarantined = false;  // after EIO/ENOSPC/read-only: no more I/O, all lookups of this tier are misses

  /// Adds another path's. direct_io holds if it does for both, quarantined if it does for one.
  void add(const LogStats& other) noexcept;
};

/// Single writer (append, maintain, checkpoint, clear, close: one thread at a time, the store's keeper). read(), forget(), stats()
/// on any thread, also from callbacks. Callbacks run with no lock of the log held.
class RegionLog {
 public:
  using WriteDone = std::function<void(const Status&, Extent)>;  // on an I/O thread
  using ReadDone = std::function<void(const Status&)>;           // on an I/O thread, or on the caller's when nothing could be read
  /// Takes one entry; `hits` since it was written.
  struct EntrySink {
    std::function<void(const ChunkKey&, Extent, std::uint16_t)> take;
    void operator()(const ChunkKey& key, Extent extent, std::uint16_t hits = 0) const { take(key, extent, hits); }
  };
  using EntrySource = std::function<void(const EntrySink&)>;

  /// kLocked (message has the owner's pid), kFormatVersion, kInvalidArgument (path, limit), kIoError.
  static Result<std::unique_ptr<RegionLog>> open(const LogOptions& options, io::IoEngine& engine, LogClient& client);
  /// The same in a directory whose lock is held already: options.directory, opened.
  static Result<std::unique_ptr<RegionLog>> open_in(std::unique_ptr<Directory> directory, const LogOptions& options,
                                                    io::IoEngine& engine, LogClient& client);
  virtual ~RegionLog() = default;  // waits for I/O under way; does not checkpoint (close() does)

  /// Once after open(), before anything else: each recovered record, oldest first (a key may come twice: the last one counts,
  /// the caller forget()s the earlier extent); returns the cookie that the log keeps for it.
  virtual void adopt(const std::function<std::uint32_t(const RecoveredRecord&)>& f) = 0;

  /// Appends one slot image (header page + payload, 4 KiB multiple, in memory that stays unchanged until done). The log calls
  /// seal_slot() with its sequences, then writes header and payload as one contiguous I/O. kResourceExhausted: no clean region
  /// yet (the caller drops or retries later); kUnavailable: quarantined or closed; kInvalidArgument: not a slot image of that
  /// length. `done` runs exactly once if append() is ok, else never; within a region not before all earlier writes ended, so
  /// that a walk after a crash comes to every acknowledged record. kAborted: clear() came in between. `again`: the chunk is
  /// written again because its region was reclaimed; counted apart.
  virtual Status append(std::byte* image, std::uint64_t image_bytes, std::uint32_t cookie, WriteDone done, bool again = false) = 0;

  /// Reads a record whole into `image` (>= extent.pages*4096 bytes). `done` gets kCorruption unless the region kept its
  /// sequence and verify_slot() holds for key and ns; the payload must not be used otherwise. kInvalidArgument: an extent that
  /// no record can have; kIoError; kUnavailable: quarantined (also by several reads in a row that failed) or closed.
  /// `ns` null: whichever namespace the record has; the key is a hash over it anyway.
  virtual void read(Extent extent, std::byte* image, const ChunkKey& key, const NamespaceId* ns, ReadDone done) = 0;

  /// Where the record is for a reader that has its own descriptor, as of now; none: its region holds none any more, or its path is
  /// not in use. Takes no lock.
  virtual std::optional<RecordPlace> place(Extent extent) const = 0;

  /// Forget a record (its bytes die with the region); keeps live_record_bytes true. Takes no lock.
  virtual void forget(Extent extent) = 0;

  /// Periodic duties: fdatasync every sync_interval when dirty, keeps clean regions ahead, calls on_reclaim. Bounded work per
  /// call, started here and finished by I/O threads. Ok when quarantined: nothing is left to do.
  virtual Status maintain() = 0;
  /// To be called before the caller takes the index for checkpoint() or close(): of what was acknowledged until then, only what
  /// that index still has is found again. Takes no time.
  virtual void settle() = 0;
  /// Makes everything acknowledged durable, then writes a checkpoint (tmp, fsync, rename, fsync of the directory) of all readable
  /// records given by `entries`: the caller's index as it was at any time since the last append() or maintain() returned.
  /// kResourceExhausted: it would not fit into limit_bytes (open() then reads footers). Waits for the device.
  virtual Status checkpoint(const EntrySource& entries) = 0;
  /// Drops everything: raises the epoch durably first (old records can then never be recovered), then forgets. On failure the
  /// log is quarantined: this process reads none of it any more, but a later one may recover old records. kUnavailable: a path is
  /// quarantined or left out, and what lies there comes back with it.
  virtual Status clear() = 0;
  /// Drains, seals nothing, checkpoints, unlocks. Idempotent. kUnavailable: quarantined, nothing written.
  virtual Status close(const EntrySource& entries) = 0;

  virtual LogStats stats() const = 0;
  /// Bytes written within the last 24 hours and the part of an hour before, also by earlier processes.
  virtual std::uint64_t last_day_bytes() const = 0;
  /// Adds what somebody else wrote to the drive of path `path`. Any thread.
  virtual void count_writes(std::uint32_t path, std::uint64_t bytes) = 0;
  /// One atomic load; the reason ("EIO writing /x/data.000 at 4096") is for logs.
  virtual bool quarantined() const noexcept = 0;
  /// Callers' I/O that a quarantined path still owes an answer. Atomic loads only.
  struct Stuck {
    std::uint64_t writes = 0, reads = 0;
  };
  virtual Stuck stuck() const noexcept = 0;
  /// Bit i: path i (striped_log.hpp) is quarantined or was left out: what it holds is as good as gone. Atomic loads only.
  virtual std::uint32_t lost_paths() const noexcept = 0;
  virtual std::string quarantine_reason() const = 0;
  /// Quarantines when the device has owed an answer for io_timeout ("no answer for 30 s from PATH"), or one I/O for four
  /// times as long whatever else it answers. To be called every second or
  /// so, on a thread that waits for no I/O. What is under way stays so: its callbacks run when the device answers at last, and
  /// checkpoint(), clear(), close() and the destructor wait for it. Time during which nobody called is not held against the device.
  virtual void check_deadlines() = 0;
  /// Lines for the log about how the store was opened: buffered I/O, region size kept from before, regions dropped.
  virtual std::vector<std::string> notes() const = 0;
};

}  // namespace lmcn::nvme
