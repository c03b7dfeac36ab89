// TieredStore's state and its parts. One lock (mu) covers index, slots, policy and queues; it is never held across I/O, system
// calls or checksums. Three threads: the keeper (writes behind, reclaims, checkpoints: the log's single writer), the promoter
// (hands reads to the I/O engine, so that no scheduler thread does) and the engine's completion thread; a fourth while another
// process owns the directories (take_over.cpp).
//
// Invariants of slots (SlotRecord)
//  S1  A place is released only when no pin holds it and no worker job on it can still be under way: the words of the ranks that
//      fill a part carry the generation (fills), and every rank's counts every scatter handed out (loads). Until then it is
//      quarantined, whoever forgot it.
//  S2  entry == kNoEntry means that no key leads to the slot any more ("orphan"): it is freed as soon as S1 allows.
//  S3  Only a slot whose filling ranks all said ok for its generation, or whose record was verified, becomes HostState::kReady.
//  S4  A payload has parts() equal parts, part r filled by rank r alone; ranks beyond fill nothing, and their words say nothing of
//      fills. Every rank reads: its own part, or with options.replicated the only one.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "attach/rendezvous.hpp"
#include "base/fork_guard.hpp"
#include "base/latency.hpp"
#include "index/chunk_index.hpp"
#include "index/eviction_policy.hpp"
#include "io/io_engine.hpp"
#include "lmcn/store.hpp"
#include "memory/host_arena.hpp"
#include "memory/slot_allocator.hpp"
#include "memory/slot_image.hpp"
#include "nvme/region_log.hpp"
#include "store/admission.hpp"

namespace lmcn {

using SlotId = std::uint32_t;
inline constexpr SlotId kNoSlot = 0xFFFFFFFFu;

using Clock = std::chrono::steady_clock;

struct SlotRecord {
  Slot slot;
  EntryId entry = kNoEntry;
  std::uint32_t pins = 0;           // leases, requests, I/O
  std::uint32_t loads_issued = 0;   // scatters handed to the workers, of each rank
  std::uint32_t loads_settled = 0;  // of those, known to have ended on every rank
  bool in_use = false;
  bool worker_fill = false;  // handed to workers to fill, outcome not yet seen
  bool quarantined = false;  // waits for worker words; listed in StoreCore::quarantine
  Priority priority = Priority::kNormal;
  // verify=all (check.cpp)
  std::uint64_t checksum = 0;  // of the payload as it was published
  bool has_checksum = false;
  std::uint32_t checks_wanted = 0, checks_done = 0;
};

inline constexpr std::uint8_t kDirty = 1;    // Entry::flags: queued for NVMe
inline constexpr std::uint8_t kWriting = 2;  // Entry::flags: append under way

class RequestImpl;

/// The log, from when it is open on: set once, with mu held; whoever reads it without mu sees it whole.
class PublishedLog {
 public:
  explicit operator bool() const noexcept { return get() != nullptr; }
  nvme::RegionLog* operator->() const noexcept { return get(); }
  nvme::RegionLog* get() const noexcept { return open_.load(std::memory_order_acquire); }
  void publish(std::unique_ptr<nvme::RegionLog> log) noexcept {
    owned_ = std::move(log);
    open_.store(owned_.get(), std::memory_order_release);
  }
  void reset() noexcept { owned_.reset(); }  // callbacks of its I/O may still ask for it

 private:
  std::unique_ptr<nvme::RegionLog> owned_;
  std::atomic<nvme::RegionLog*> open_{nullptr};
};

struct StoreCore final : public TieredStore, private nvme::LogClient {
  explicit StoreCore(const StoreOptions& o) : options(o) {}
  ~StoreCore() override;
  /// In a forked child nothing is destroyed: the threads do not exist there, mu may be held by one of them for ever, and files,
  /// socket and arena are the parent's.
  static void operator delete(StoreCore* store, std::destroying_delete_t) noexcept;
  /// Whether this is the copy in a forked child. Every public method then refuses or does nothing, without touching mu.
  bool inherited() const noexcept { return fork_guard::forks() != forks_at_open; }
  static Status inherited_status();
  /// Of a payload; ranks [0, parts()) fill them.
  std::uint32_t parts() const noexcept { return options.replicated ? 1 : options.rank_count; }

  // --- open.cpp
  Status start();
  Status serve(const std::string& engine_id, std::uint64_t rank_bytes) override;
  Status close(std::chrono::milliseconds deadline) override;
  void on_rank_gone(std::uint32_t rank);

  // --- take_over.cpp
  Status open_nvme();
  void attach(std::unique_ptr<nvme::RegionLog> opened);
  void take_over_loop(std::stop_token stop);
  void end_take_over();  // waits for the thread

  // --- tiered_store.cpp
  PrefixHit lookup(std::span<const ChunkKey> keys) const override;
  Result<WriteLease> reserve(const NamespaceId& ns, std::span<const ChunkKey> keys, std::uint64_t payload_bytes,
                             bool for_worker) override;
  std::unique_ptr<Request> begin_request(const NamespaceId& ns, const RequestOptions& request_options) override;
  Result<ReadLease> acquire(const NamespaceId& ns, std::span<const ChunkKey> keys, std::chrono::milliseconds deadline) override;
  void job_not_started(std::uint32_t rank, std::span<const SlotRef> refs, bool load) override;
  void touch(std::span<const ChunkKey> keys) override;
  std::vector<RecordPlace> locate(std::span<const ChunkKey> keys) override;
  void count_writes(std::uint32_t path, std::uint64_t bytes) override;
  void record_failed(const ChunkKey& key, const RecordPlace& place) override;
  bool erase(const ChunkKey& key) override;
  void clear() override;
  std::uint32_t end_write(WriteLease& lease, bool publish);
  void end_read(ReadLease& lease);

  // --- slots.cpp (mu held)
  std::byte* image(SlotId id) { return arena->base() + slots[id].slot.offset; }
  bool busy(SlotRecord& record) const;
  SlotId allocate_slot(std::uint64_t bytes, EntryId entry);
  bool evict_one(std::uint64_t bytes);
  bool is_low(SlotId id, std::uint32_t generation) const;
  bool evict_low(std::uint64_t class_bytes);
  void evict(EntryId id);
  void drop_host_copy(EntryId id);  // the entry lets go of its slot (freed or orphaned); entry may be erased
  void drop_extent(EntryId id);     // the entry lets go of its record; entry may be erased
  void erase_if_nowhere(EntryId id);
  void unpin(SlotId id);
  void free_or_quarantine(SlotId id);  // REQUIRES: orphan
  void sweep_quarantine();
  void changed() { version.fetch_add(1, std::memory_order_release); }

  // --- promote.cpp
  /// What the promoter's thread does: a read from NVMe, or a checksum over what lies in host memory (check.cpp).
  struct PromoterJob {
    enum class Kind : std::uint8_t { kRead, kTakeChecksum, kCompareChecksum };
    Kind kind = Kind::kRead;
    SlotId slot = kNoSlot;
    std::uint64_t offset = 0;
    std::uint32_t generation = 0;
    std::uint64_t payload_bytes = 0;  // checks only
    Extent extent;
    ChunkKey key;
    std::optional<NamespaceId> ns;  // none: whichever the record has
    Clock::time_point since = Clock::now();
    Priority priority = Priority::kNormal;
  };
  /// mu held. Slot allocated, entry kPromoting, queued; kNoSlot when nothing can be evicted.
  SlotId start_promotion(EntryId id, const std::optional<NamespaceId>& ns, Priority priority = Priority::kNormal);
  void promoter_loop(std::stop_token stop);
  void finish_promotion(const PromoterJob& promotion, const Status& status);

  // --- check.cpp
  void start_check(SlotId id, bool take);  // mu held
  void run_check(const PromoterJob& check);

  // --- reclaim.cpp
  bool evacuated(std::uint32_t region, std::span<const std::uint32_t> cookies) override;
  void on_reclaim(std::uint32_t region, std::span<const std::uint32_t> cookies) override;
  std::vector<EntryId> worth_keeping(std::uint32_t region, std::span<const std::uint32_t> cookies, std::uint64_t most_bytes) const;
  void end_evacuation(std::uint32_t region);
  void forget_lost_paths(std::unique_lock<std::mutex>& lock);
  bool on_nvme(const Entry& entry) const noexcept;  // REQUIRES: log
  static void count_hit(Entry& entry) noexcept {
    if (entry.hits != 0xFFFF) ++entry.hits;
  }  // mu held

  // --- keeper.cpp
  struct DirtyItem {
    SlotId slot;
    std::uint32_t generation;
    Clock::time_point since;
    bool again = false;  // its record was reclaimed
  };
  void mark_dirty(EntryId id, bool again = false);                   // mu held
  bool offer_to_nvme(EntryId id, bool touched, bool again = false);  // mu held; true: the keeper has work
  void offer_earlier_chunks(std::unique_lock<std::mutex>& lock);
  std::uint64_t max_demotions() const;   // mu held
  std::uint64_t live_demotions() const;  // mu held; without those that a lost path owes an answer
  void keeper_loop(std::stop_token stop);
  void tick(std::unique_lock<std::mutex>& lock);
  void clear_log(std::unique_lock<std::mutex>& lock);
  bool demote_next(std::unique_lock<std::mutex>& lock);
  void drop_corrupt(const DirtyItem& item, EntryId id);  // mu held
  void no_longer_dirty(const SlotRecord& record) {       // mu held
    dirty_bytes -= record.slot.bytes;
    --dirty_chunks;
  }
  bool put_back(std::unique_lock<std::mutex>& lock, const DirtyItem& item, EntryId id, std::uint64_t epoch, const Status& why);
  void finish_demotion(const DirtyItem& item, EntryId id, std::uint64_t epoch, const Status& status, Extent extent);
  Status flush(std::chrono::milliseconds deadline) override;
  Status write_checkpoint();
  void expire_requests();
  void register_next_piece();

  // --- stats.cpp
  int event_fd() const noexcept override { return completion_event; }
  std::byte* arena_base() noexcept override { return arena->base(); }
  std::uint64_t arena_bytes() const noexcept override { return arena->bytes(); }
  bool nvme_ready() const noexcept override;
  std::string nvme_warning() const override;
  std::string io_engine_note() const override;
  void watch_changes() override;
  std::vector<TierChange> take_changes() override;
  void note_change(const ChunkKey& key, Tier tier, bool stored) {  // mu held
    if (watching) add_change(key, tier, stored);
  }
  void add_change(const ChunkKey& key, Tier tier, bool stored);
  StoreStats stats() const override;
  StoreLatencies latencies() const override;

  const StoreOptions options;
  const std::uint64_t forks_at_open = fork_guard::forks();
  /// Set before start() by tests, to put a fault-injecting engine between log and device.
  std::function<std::unique_ptr<io::IoEngine>(std::unique_ptr<io::IoEngine>)> wrap_engine;
  std::uint64_t promotion_budget_bytes = 0;  // default per request
  std::uint64_t request_pin_limit_bytes = 0;
  bool verify_all = false;  // options.verify
  /// Of a reclaimed region's bytes, what may be written again. Bounds the write amplification to 1 / (1 - share). Before start().
  double reappend_share = 0.15;
  std::uint32_t attach_slice = 4096;  // records put into the index before others get the lock. Before start().

  // Destroyed in reverse order: threads first, then the log (its I/O writes into the arena), engine, rendezvous, arena.
  std::unique_ptr<HostArena> arena;
  std::unique_ptr<RendezvousOwner> rendezvous;
  std::vector<std::unique_ptr<io::IoEngine>> engines;  // one per path
  std::vector<nvme::LogOptions> log_options;           // likewise
  PublishedLog log;
  std::string engine_note;   // mu held once threads run
  std::string open_warning;  // likewise
  int completion_event = -1;

  mutable std::mutex mu;
  std::unique_ptr<SlotAllocator> allocator;
  ChunkIndex index;
  std::unique_ptr<EvictionPolicy> policy;
  bool taking_over = false;              // another process owns the directories
  nvme::RegionLog* attaching = nullptr;  // its records are being put into the index; null before and after
  EntryId next_to_offer = kNoEntry;      // of what was stored before the log was there (keeper.cpp)
  std::unique_ptr<Admission> admission;  // with the log
  std::uint64_t daily_bytes = 0;         // hard limit of a day's writes; the part for chunks is Admission's
  std::deque<SlotRecord> slots;          // deque: references stay valid
  std::vector<SlotId> free_slot_ids;
  std::vector<SlotId> quarantine;
  struct LowSlot {
    SlotId slot;
    std::uint32_t generation;
  };
  std::deque<LowSlot> low_slots;  // published with Priority::kLow, oldest first; may name slots that are gone
  bool watching = false;
  std::vector<TierChange> changes;
  std::vector<RequestImpl*> requests;
  std::uint64_t request_pinned_bytes = 0;

  std::deque<PromoterJob> promote_queue;
  std::uint64_t promotions_in_flight = 0;
  std::uint64_t checks_in_flight = 0;     // each pins its slot
  std::uint64_t checksums_in_flight = 0;  // of those, what was published and is offered to NVMe afterwards
  std::condition_variable promote_cv;     // work for the promoter
  std::condition_variable promoted_cv;    // a promotion ended

  std::deque<DirtyItem> dirty_queue;
  std::uint64_t dirty_bytes = 0, dirty_chunks = 0;  // queued and under way
  std::uint64_t demotions_in_flight = 0;
  bool clear_pending = false;
  struct Evacuation {
    Clock::time_point since;
    std::vector<SlotId> slots;  // pinned until the region is reclaimed
  };
  std::map<std::uint32_t, Evacuation> evacuations;  // by region
  bool maintenance_due = false;                     // before the next tick
  std::uint32_t forgotten_paths = 0;                // of log->lost_paths(): their extents are gone from the index
  bool log_changed = false;                         // since the last checkpoint
  std::uint64_t checkpoints_wanted = 0;             // tickets of flush()
  std::uint64_t checkpoints_written = 0;
  bool checkpoint_due = false;  // no append is started until it is written
  Status last_checkpoint;
  std::uint64_t registered_bytes = 0;  // of the arena, with the I/O engine; keeper only
  Clock::time_point log_full_since{};  // keeper only
  std::condition_variable keeper_cv;
  std::condition_variable flushed_cv;

  /// Grows with every change that a lookup could see: a memo of an older version is checked again.
  std::atomic<std::uint64_t> version{1};
  std::atomic<std::uint64_t> pin_epoch{0};  // raised by clear() and erase(): even pinned slots may have lost their key
  std::uint64_t clear_epoch = 0;            // mu held
  mutable std::atomic<std::uint64_t> lookups{0};
  mutable StoreStats counters;  // mu held
  struct {
    LatencyRecorder promotion, check, write_wait;
  } latency;  // what the log does not measure

  bool closed = false;
  std::mutex end_take_over_mutex;
  std::jthread promoter;
  std::jthread keeper;
  std::jthread taker;  // runs while taking_over; takes mu in slices
};

}  // namespace lmcn
