// TieredStore: the index, the host arena, the NVMe log and all I/O between them. Lives in the process that decides:
// vLLM's scheduler, SGLang's rank, your server.
//
// Threads: every method may be called from any thread. Lookups, reserve, commit and leases touch memory only and never wait
// for I/O; the methods that can wait take a deadline. Two-phase publish: a chunk can be looked up only after commit() found
// the (generation, ok) word of every rank that fills a part of its slot. Leases are RAII: while one lives its slots are neither
// evicted nor reused. Leases and requests must be destroyed before the store.
//
// fork(): the store stays with the parent. In a child it can only be destroyed (nothing happens then) or closed (likewise); all
// else is refused or a miss. The child keeps neither the directory's lock nor the socket, but it does keep the arena's memory
// while it lives. A child that execs keeps nothing.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "lmcn/chunk_hasher.hpp"
#include "lmcn/key.hpp"
#include "lmcn/metrics.hpp"
#include "lmcn/record_place.hpp"
#include "lmcn/status.hpp"

namespace lmcn {

struct StoreOptions {
  std::uint64_t host_bytes = 0;         // host arena, hard limit; >= 4 MiB
  std::uint32_t rank_count = 1;         // ranks that fill and read each slot; 1..64
  std::uint64_t max_payload_bytes = 0;  // largest chunk, all parts; sizes the NVMe regions. 0: 64 MiB
  /// All ranks hold the same KV (MLA under tensor parallelism). A chunk then has one part instead of one per rank: rank 0 fills it,
  /// its word alone publishes, and every rank reads it. A slot that is read is busy until the words of all ranks say that they are
  /// through, as ever.
  bool replicated = false;
  /// NVMe: one directory, private to this store, or up to 7, one per drive. Chunks are striped over them; one that fails costs its
  /// chunks only. Empty: host memory only.
  std::vector<std::string> directories;
  std::uint64_t nvme_bytes = 0;  // hard limit of all directories together, divided evenly; required with directories
  /// Hard limit of each directory, in their order, instead of an even share. They must add up to nvme_bytes.
  std::vector<std::uint64_t> directory_bytes;
  /// Of each directory's file system: never taken. Where less is free, regions are reused instead of added.
  std::uint64_t nvme_free_floor_bytes = 256ULL << 20;
  /// Hard limit of what is written to NVMe within 24 hours, over restarts. 0: as much as the directories' file systems hold (one
  /// drive write per day). UINT64_MAX: no limit.
  std::uint64_t nvme_daily_bytes = 0;
  /// What is written to NVMe. "auto": everything; once three quarters of the day's limit are written, or while writes wait longer
  /// than a second, only what was stored or used before. "always": everything. "second_touch": only what was stored or used before.
  std::string admission = "auto";
  /// What is checked before bytes are handed out. "nvme": everything that comes from NVMe. "all": chunks in host memory too
  /// (lookups of them answer kRetry first). "off": from NVMe only identity, lengths and header, not the payload; for measuring.
  std::string verify = "nvme";
  /// A chunk that waited so long for its write is given up: the device cannot keep up.
  std::chrono::milliseconds write_deadline{10'000};
  std::uint64_t region_bytes = 0;  // 0: chosen from nvme_bytes (256 MiB when there is room)
  std::string io_engine = "auto";  // auto | io_uring | threads
  /// Which chunk leaves host memory first: "LRU" least recently used, "S3FIFO" used once before used again
  /// (index/s3fifo_policy.hpp), "LFU" least frequently (counts age), "FIFO" stored first, "MRU" most recently used. Any case of
  /// letters.
  std::string cache_policy = "LRU";
  /// What happens when another process owns a directory. true: kLocked after lock_wait. false: after a second, or lock_wait where
  /// that is less, the store opens with host memory alone (nvme_warning() says why, stats().nvme_waiting is 1), waits on for the
  /// directories, and takes them over, with all that is stored there, when they are let go.
  bool fail_when_locked = false;
  std::chrono::milliseconds lock_wait{10'000};
  /// A device that answers nothing for so long is quarantined: what is on NVMe is a miss from then on. Memory that its I/O may
  /// still write to stays pinned until it answers.
  std::chrono::milliseconds nvme_io_timeout{30'000};
  /// false: NFS, SMB, Ceph, AFS, Lustre, GPFS, 9p, BeeGFS, OCFS2 and GFS2 are refused (kInvalidArgument), as neither their locks
  /// nor their syncs are sure. FUSE is not: local ones exist.
  bool allow_network_file_system = false;
  unsigned populate_threads = 2;
  /// NUMA nodes the arena's pages come from. Empty: the kernel's choice. One: that node while it has memory, else another
  /// (MPOL_PREFERRED: with MPOL_BIND a full node would kill the process). Several: they take turns (MPOL_INTERLEAVE).
  /// kInvalidArgument names a node that does not exist or is not allowed here.
  std::vector<int> numa_nodes;
  /// The arena must be of reserved huge pages (hugetlb): kResourceExhausted says how many to reserve in /proc/sys/vm/nr_hugepages.
  /// false: they are used when they are there, else ordinary memory, made huge in the background.
  bool hugetlb = false;
  std::chrono::milliseconds promotion_deadline{10'000};  // default of RequestOptions
  std::uint64_t promotion_budget_bytes = 0;              // per request; 0: half of host_bytes
  std::chrono::milliseconds request_ttl{30'000};         // a request that is not looked up for so long loses its pins
};

/// Where a slot lies and what the worker must check: goes to workers as is.
struct SlotRef {
  std::uint64_t offset = 0;  // of the slot image in the arena
  std::uint32_t generation = 0;
};

enum class Presence : std::uint8_t {
  kMiss = 0,
  kHit = 1,      // in host memory, verified, pinned for this request
  kPending = 2,  // being stored by someone; look again later
  kRetry = 3,    // being promoted from NVMe for this request; look again later
};

enum class Tier : std::uint8_t { kNone = 0, kHost = 1, kNvme = 2 };

/// A chunk came into a tier and can be had from it, or left it.
struct TierChange {
  ChunkKey key;
  Tier tier = Tier::kNone;
  bool stored = false;  // false: it left
};

/// What becomes of a request's chunks where not all can be had. Low: they leave host memory before others, oldest first, until
/// another request uses them, and are written to NVMe only once they were used or stored again. High: they are written to NVMe as
/// if they had been used, also while writes are dear; the day's limit holds for them too. Promotions wait behind those of a
/// higher priority.
enum class Priority : std::uint8_t { kLow = 0, kNormal = 1, kHigh = 2 };

struct PrefixHit {
  std::uint32_t hit = 0;   // leading keys present in any tier
  std::uint32_t host = 0;  // of those, in host memory
  std::uint32_t nvme = 0;  // of those, only on NVMe
};

struct PrefixPresence {
  std::uint32_t hits = 0;          // leading keys that are kHit
  Presence next = Presence::kHit;  // of the first key that is not; kHit when all are
};

struct SourceCount {
  std::uint32_t host = 0, nvme = 0;
};

class TieredStore;
class RequestImpl;
struct StoreCore;

/// Right to fill slots. Dropping it without commit() aborts: nothing becomes visible, slots whose worker job has not ended are
/// quarantined until its word says so. Move-only; not thread-safe itself.
class WriteLease {
 public:
  WriteLease() = default;
  WriteLease(WriteLease&&) noexcept;
  WriteLease& operator=(WriteLease&&) noexcept;
  ~WriteLease();

  /// Positions (in the keys given to reserve()) of the chunks to fill, ascending, and their slots.
  const std::vector<std::uint32_t>& positions() const noexcept { return positions_; }
  const std::vector<SlotRef>& slots() const noexcept { return slots_; }
  /// In-process filling: payload address of slot i. The caller then calls mark_filled(i) for the ranks it plays.
  std::byte* payload(std::size_t i) noexcept;
  std::uint64_t payload_bytes() const noexcept { return payload_bytes_; }
  void mark_filled(std::size_t i, std::uint32_t rank = 0) noexcept;
  /// Of all its chunks. Before commit().
  void set_priority(Priority priority) noexcept { priority_ = priority; }

  /// Publishes every slot whose filling ranks all said ok; the others are dropped (quarantined while a rank's job is still under
  /// way). Returns how many were published. The lease is empty afterwards.
  std::uint32_t commit();
  void abort() noexcept;
  bool empty() const noexcept { return slots_.empty(); }

 private:
  friend struct StoreCore;
  TieredStore* store_ = nullptr;
  std::vector<std::uint32_t> positions_;
  std::vector<SlotRef> slots_;
  std::vector<std::uint32_t> slot_ids_;
  std::uint64_t payload_bytes_ = 0;
  Priority priority_ = Priority::kNormal;
};

/// Right to read slots. Move-only; not thread-safe itself.
class ReadLease {
 public:
  ReadLease() = default;
  ReadLease(ReadLease&&) noexcept;
  ReadLease& operator=(ReadLease&&) noexcept;
  ~ReadLease();
  const std::vector<SlotRef>& slots() const noexcept { return slots_; }
  std::span<const std::byte> payload(std::size_t i) const noexcept;
  void release() noexcept;
  bool empty() const noexcept { return slots_.empty(); }

 private:
  friend class RequestImpl;
  friend struct StoreCore;
  TieredStore* store_ = nullptr;
  std::vector<SlotRef> slots_;
  std::vector<std::uint32_t> slot_ids_;
};

struct RequestOptions {
  std::uint64_t promotion_budget_bytes = 0;         // 0: the store's
  std::chrono::milliseconds promotion_deadline{0};  // 0: the store's
  bool promote = true;                              // false: what is on NVMe alone is a miss, and nobody's refusal
  Priority priority = Priority::kNormal;
};

/// One engine request's view: key-by-key lookups with a memo, promotions within a budget, pins. Pins are dropped by end(), the
/// destructor, or after request_ttl without a lookup. One thread at a time.
class Request {
 public:
  virtual ~Request() = default;

  /// By the engine's own key (KeyDeriver with this request's namespace); memoised: a repeated scan of an unchanged prefix
  /// costs a comparison a key. Promotion from NVMe starts on the first lookup; kHit only when read, verified and pinned.
  /// A key refused once (budget, deadline, failed read) stays kMiss for this request unless it is stored anew.
  virtual Presence lookup(std::span<const std::byte> engine_key) = 0;
  virtual Presence lookup(const ChunkKey& key) = 0;
  /// The leading keys that are hits now, each looked up and pinned as by lookup(key), with the memo: 16,000 memoised hits cost
  /// about 0.1 ms. Stops at the first that is no hit; that one has been looked up too, so its promotion has started.
  virtual PrefixPresence lookup_prefix(std::span<const ChunkKey> keys) = 0;
  /// The same for who reads records itself (TieredStore::locate): a key on NVMe alone is a hit as well, not pinned and no miss; one
  /// lock for all. REQUIRES: RequestOptions::promote is false.
  virtual PrefixPresence lookup_tiers(std::span<const ChunkKey> keys) = 0;
  /// Starts promotion of all leading keys within the budget; returns the length of that prefix (what may become a hit).
  virtual std::uint32_t prefetch(std::span<const ChunkKey> keys) = 0;
  /// Tier that the last kHit of `key` came from in this request (kNvme after a promotion).
  virtual Tier source(std::span<const std::byte> engine_key) = 0;
  virtual Tier source(const ChunkKey& key) = 0;
  /// How many of `keys` have which tier as their source(); keys that never were a hit count nowhere.
  virtual SourceCount count_sources(std::span<const ChunkKey> keys) = 0;
  /// Lease of keys that are all hits now. `for_worker`: the slots count as busy until every rank's scatter has ended, even
  /// when the lease is dropped before. kNotFound names the first key that is not in host memory.
  virtual Result<ReadLease> acquire(std::span<const ChunkKey> keys, bool for_worker) = 0;
  virtual Result<ReadLease> acquire_engine_keys(std::span<const std::span<const std::byte>> keys, bool for_worker) = 0;
  virtual void end() = 0;
};

class TieredStore {
 public:
  /// Returns in < 50 ms whatever the sizes, unless a directory is locked (fail_when_locked) or its index must be rebuilt.
  static Result<std::unique_ptr<TieredStore>> open(const StoreOptions& options);
  virtual ~TieredStore() = default;  // close()

  /// Lets worker processes attach to the arena under `engine_id`. `rank_bytes`: one rank's part of a slot.
  virtual Status serve(const std::string& engine_id, std::uint64_t rank_bytes) = 0;

  /// Leading keys present. Touches nothing, pins nothing. 1000 keys <= 100 us.
  virtual PrefixHit lookup(std::span<const ChunkKey> keys) const = 0;

  /// Slots for those of `keys` that are absent from host memory and not being stored; leading ones when not all fit.
  /// kResourceExhausted when none fits although some are absent; an empty lease when all are present.
  /// `for_worker`: worker processes fill the slots (a dropped lease leaves them quarantined until every filling rank's word is
  /// there); otherwise the holder of the lease does, through payload() and mark_filled().
  virtual Result<WriteLease> reserve(const NamespaceId& ns, std::span<const ChunkKey> keys, std::uint64_t payload_bytes,
                                     bool for_worker = false) = 0;

  virtual std::unique_ptr<Request> begin_request(const NamespaceId& ns, const RequestOptions& options = {}) = 0;

  /// Promotes what is only on NVMe and waits until `deadline`. Leading part that could be had; kNotFound when not even the first.
  virtual Result<ReadLease> acquire(const NamespaceId& ns, std::span<const ChunkKey> keys, std::chrono::milliseconds deadline) = 0;

  /// For a worker that reports that it could not start a job on these slots (it never attached, or the job was refused), and so
  /// will never write its words: writes them for it, else the slots would stay quarantined for ever. Slots of another generation
  /// are passed over. `load`: the job was a scatter.
  virtual void job_not_started(std::uint32_t rank, std::span<const SlotRef> slots, bool load) = 0;

  virtual void touch(std::span<const ChunkKey> keys) = 0;
  /// Those of `keys` that are on NVMe, ascending by position, whatever is in host memory too. Counts as a hit on NVMe and a use of
  /// each: reclaim then keeps it rather than others. Memory only.
  virtual std::vector<RecordPlace> locate(std::span<const ChunkKey> keys) = 0;
  /// For who read the record of `key` at `place` and found that it does not hold: forgotten, as one that this store read and found
  /// bad, unless another has taken its place since. Memory only.
  virtual void record_failed(const ChunkKey& key, const RecordPlace& place) = 0;
  /// Counts bytes that somebody else wrote to the drive of directory `path` into the day's limit. Memory only. REQUIRES:
  /// `path` is one of the directories; without NVMe nothing is counted.
  virtual void count_writes(std::uint32_t path, std::uint64_t bytes) = 0;
  /// Drops one chunk from every tier. false: absent. A crash before the next checkpoint may bring its NVMe record back, and so does
  /// taking over directories that another process owned at the time.
  virtual bool erase(const ChunkKey& key) = 0;
  /// Drops everything, at once in memory; on NVMe by the keeper thread within milliseconds. Slots under leases or with worker
  /// jobs under way are quarantined, not reused, until those end. While another process owns the directories: what lies there
  /// then is dropped when they are taken over.
  virtual void clear() = 0;

  /// Waits until all committed chunks are on NVMe (or dropped) and synced. kDeadlineExceeded with what is left. Ok at once while
  /// there is no NVMe.
  virtual Status flush(std::chrono::milliseconds deadline) = 0;
  /// Flushes for at most `deadline`, then waits for I/O under way (also of a device that does not answer), writes a checkpoint,
  /// unlocks. Idempotent.
  virtual Status close(std::chrono::milliseconds deadline) = 0;

  /// Readable after promotions ended since the last drain (eventfd, non-blocking; read it to re-arm).
  virtual int event_fd() const noexcept = 0;

  virtual std::byte* arena_base() noexcept = 0;
  virtual std::uint64_t arena_bytes() const noexcept = 0;
  virtual bool nvme_ready() const noexcept = 0;
  /// Empty, or one line: why NVMe is not used (locked by pid N, quarantined after EIO, ...).
  virtual std::string nvme_warning() const = 0;
  virtual std::string io_engine_note() const = 0;
  /// From now on take_changes() has something to give. What was there before, also what was found on NVMe at open, is not told.
  virtual void watch_changes() = 0;
  /// Changes since the last call, in order; at most a million are kept (StoreStats::lost_changes). clear() drops what is pending
  /// and is not told itself.
  virtual std::vector<TierChange> take_changes() = 0;
  virtual StoreStats stats() const = 0;
  virtual StoreLatencies latencies() const = 0;
};

}  // namespace lmcn
