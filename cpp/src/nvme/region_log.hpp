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
#include "lmcn/status.hpp"

namespace lmcn::nvme {

struct LogOptions {
  std::string directory;                   // made 0700 when absent; private to one store
  std::uint64_t limit_bytes = 0;           // hard: data file + checkpoint + superblock; >= 4 regions
  std::uint64_t region_bytes = 0;          // 0: 256 MiB, lowered so that >= 8 regions fit (never below 16 MiB or 2 x max record)
  std::uint64_t max_record_bytes = 0;      // largest slot image that will be appended
  std::chrono::milliseconds lock_wait{10'000};
  bool allow_shrink_below_contents = true; // a lower limit than last time drops the oldest regions
  std::uint64_t free_space_floor_bytes = 256ull << 20;  // of the file system, never taken
};

struct RecoveredRecord {
  ChunkKey key;
  Extent extent;
};

/// The store's side of reclaim: called on the log's caller thread (append/maintain), no log lock held.
class LogClient {
 public:
  virtual ~LogClient() = default;
  /// `cookies`: as given to append() (or assigned by adopt()) for the records of a region about to be reused, in append order.
  /// The client forgets those whose extent still is in `region`; chunks worth keeping it appends again later, from host memory.
  virtual void on_reclaim(std::uint32_t region, std::span<const std::uint32_t> cookies) = 0;
};

struct LogStats {
  std::uint64_t limit_bytes = 0, allocated_bytes = 0, live_record_bytes = 0, regions = 0, clean_regions = 0;
  std::uint64_t appended_records = 0, appended_bytes = 0, write_errors = 0, read_errors = 0, reclaimed_regions = 0;
  std::uint64_t recovered_records = 0, recovered_from_checkpoint = 0, recovered_from_footers = 0, recovered_from_walk = 0;
  bool quarantined = false;  // after EIO/ENOSPC/read-only: no more I/O, all lookups of this tier are misses
};

/// Single writer (append, seal, maintain, checkpoint: one thread at a time, the store's keeper); readers on any thread.
class RegionLog {
 public:
  using WriteDone = std::function<void(const Status&, Extent)>;  // on an I/O thread
  using ReadDone = std::function<void(const Status&)>;           // on an I/O thread

  /// kLocked (message has the owner's pid), kFormatVersion, kInvalidArgument (path, limit), kIoError.
  static Result<std::unique_ptr<RegionLog>> open(const LogOptions& options, io::IoEngine& engine, LogClient& client);
  virtual ~RegionLog() = default;  // waits for I/O under way; does not checkpoint (close() does)

  /// Once after open(), before anything else: each recovered record, oldest first (a key may come twice: the last one counts,
  /// the caller forget()s the earlier extent); returns the cookie that the log keeps for it.
  virtual void adopt(const std::function<std::uint32_t(const RecoveredRecord&)>& f) = 0;

  /// Appends one slot image (header page + payload, 4 KiB multiple, in memory that stays unchanged until done). The log calls
  /// seal_slot() with its sequences, then writes header and payload as one contiguous I/O. kResourceExhausted: no clean region
  /// yet (the caller drops or retries later); kUnavailable: quarantined.
  virtual Status append(std::byte* image, std::uint64_t image_bytes, std::uint32_t cookie, WriteDone done) = 0;

  /// Reads a record whole into `image` (>= extent.pages*4096 bytes). `done` gets kCorruption unless the region kept its
  /// sequence and verify_slot() holds for key and ns; the payload must not be used otherwise.
  virtual void read(Extent extent, std::byte* image, const ChunkKey& key, const NamespaceId& ns, ReadDone done) = 0;

  /// Forget a record (its bytes die with the region); keeps live_record_bytes true.
  virtual void forget(Extent extent) = 0;

  /// Periodic duties: fdatasync every 5 s when dirty, keeps clean regions ahead, calls on_reclaim. Bounded work per call.
  virtual Status maintain() = 0;
  /// Writes a checkpoint (tmp, fsync, rename, fsync of the directory) of all readable records given by `entries`.
  virtual Status checkpoint(const std::function<void(const std::function<void(const ChunkKey&, Extent)>&)>& entries) = 0;
  /// Drops everything: raises the epoch durably first (old records can then never be recovered), then forgets.
  virtual Status clear() = 0;
  /// Drains, seals nothing, checkpoints, unlocks.
  virtual Status close(const std::function<void(const std::function<void(const ChunkKey&, Extent)>&)>& entries) = 0;

  virtual LogStats stats() const = 0;
};

}  // namespace lmcn::nvme
