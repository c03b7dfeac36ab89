#include "model/player.hpp"

#include <algorithm>
#include <stdexcept>

#include "io/faulty_engine.hpp"
#include "model/disk_engine.hpp"
#include "store/store_core.hpp"

namespace lmcn::model {
namespace {

using namespace std::chrono_literals;

constexpr auto kPatience = 60s;  // a slow machine is no failure
constexpr std::uint32_t kStride = 8;

class Wrong : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// One chunk in the model.
struct Chunk {
  bool may_hit = false;
  bool must_hit = false;       // unless the store counted a loss
  bool durable = false;        // survives a kill
  bool may_come_back = false;  // after the next open: forgotten here, but not yet on NVMe
  bool erased = false;         // and not cleared
};

struct HeldWrite {
  WriteLease lease;
  std::vector<std::uint32_t> ids;  // of its slots
  std::vector<bool> filled, dead;  // dead: erased or cleared since
};

struct HeldRead {
  ReadLease lease;
  std::vector<std::uint32_t> ids;
};

struct HeldRequest {
  std::unique_ptr<Request> request;
  std::uint32_t parity;  // of the ids it may ask for: their namespace
};

std::uint64_t payload_bytes_of(std::uint32_t id) {
  constexpr std::uint64_t kBytes[kStride] = {1, 4096, 4097, 60'000, 65'536, 65'537, 130'000, 200'000};
  return kBytes[id % kStride];
}
NamespaceId namespace_of(std::uint32_t id) {
  NamespaceId ns;
  ns.bytes.fill(static_cast<std::uint8_t>(1 + id % 2));
  return ns;
}
ChunkKey key_of(std::uint32_t id) {
  return KeyDeriver(namespace_of(id)).derive(std::as_bytes(std::span(&id, 1)));
}
std::byte byte_of(std::uint32_t id, std::uint64_t at) {
  return static_cast<std::byte>((id * 151 + at * 7 + at / 4096 * 13) & 0xFF);
}
std::string name(std::uint32_t id) {
  return "chunk " + std::to_string(id);
}

class Player {
 public:
  Player(const World& world, Played& played) : world_(world), played_(played) {
    if (world.disk == DiskKind::kMemory) {
      disk_ = std::make_shared<MemoryDisk>();
    } else {
      disk_ = std::make_shared<FileDisk>();
    }
    open();
  }
  ~Player() { let_go(); }

  void step(const Step& step) {
    const std::vector<std::uint32_t> ids = ids_of(step);
    switch (step.action) {
      case Action::kPut:
        if (reserve(ids)) fill(writes_.back()), commit(writes_.size() - 1);
        break;
      case Action::kReserve:
        reserve(ids);
        break;
      case Action::kFill:
        if (!writes_.empty()) fill(writes_[step.place % writes_.size()]);
        break;
      case Action::kCommit:
        if (!writes_.empty()) commit(step.place % writes_.size());
        break;
      case Action::kAbort:
        if (!writes_.empty()) writes_.erase(at(writes_, step.place));
        break;
      case Action::kLookup:
        lookup(ids);
        break;
      case Action::kAcquire:
        acquire(ids);
        break;
      case Action::kRelease:
        if (!reads_.empty()) release(step.place);
        break;
      case Action::kBegin:
        if (requests_.size() < 4) requests_.push_back({store_->begin_request(namespace_of(ids[0]), {}), ids[0] % 2});
        break;
      case Action::kAsk:
      case Action::kPrefetch:
      case Action::kAskPrefix:
      case Action::kTake:
        if (!requests_.empty()) ask(step.action, requests_[step.place % requests_.size()], ids);
        break;
      case Action::kEnd:
        if (!requests_.empty()) requests_.erase(at(requests_, step.place));
        break;
      case Action::kErase:
        erase(ids[0]);
        break;
      case Action::kClear:
        clear();
        break;
      case Action::kTouch:
        store_->touch(keys_of(ids));
        break;
      case Action::kFlush:
        flushed(store_->flush(kPatience));
        break;
      case Action::kReopen:
        reopen();
        break;
      case Action::kKill:
        kill();
        break;
      case Action::kCheck:
        check();
        break;
      case Action::kFault:
        if (faulty_ != nullptr) add_fault(step);
        break;
    }
  }

 private:
  static std::vector<std::uint32_t> ids_of(const Step& step) {
    std::vector<std::uint32_t> ids;
    for (std::uint32_t i = 0; i < step.count; ++i) ids.push_back((step.id + kStride * i) % kIds);  // one length, one namespace
    return ids;
  }
  static std::vector<ChunkKey> keys_of(const std::vector<std::uint32_t>& ids) {
    std::vector<ChunkKey> keys;
    for (const std::uint32_t id : ids) keys.push_back(key_of(id));
    return keys;
  }
  template <class Held>
  static typename std::vector<Held>::iterator at(std::vector<Held>& held, std::uint32_t place) {
    return held.begin() + static_cast<std::ptrdiff_t>(place % held.size());
  }
  std::filesystem::path directory() const { return world_.directory / std::to_string(generation_); }

  void open() {
    StoreOptions options;
    options.host_bytes = world_.host_bytes;
    options.max_payload_bytes = 1 << 18;
    options.populate_threads = 0;
    options.directories = {directory()};
    options.nvme_bytes = world_.nvme_bytes;
    options.region_bytes = 1 << 20;
    options.fail_when_locked = true;
    options.cache_policy = world_.seed % 3 == 1 ? "S3FIFO" : "LRU";
    options.verify = world_.seed % 2 == 0 ? "all" : "nvme";
    store_ = std::make_unique<StoreCore>(options);
    faulty_ = nullptr;
    store_->wrap_engine = [this](std::unique_ptr<io::IoEngine>) -> std::unique_ptr<io::IoEngine> {
      std::unique_ptr<io::IoEngine> engine = std::make_unique<DiskEngine>(disk_, world_.seed + generation_);
      if (world_.disk != DiskKind::kFaulty) return engine;
      auto faulty = std::make_unique<io::FaultyEngine>(std::move(engine));
      faulty_ = faulty.get();
      return faulty;
    };
    if (const Status started = store_->start(); !started.ok()) throw Wrong("open: " + started.to_string());
  }

  void let_go() {
    writes_.clear();
    reads_.clear();
    requests_.clear();
  }

  // --- writing
  bool reserve(const std::vector<std::uint32_t>& ids) {
    if (writes_.size() == 6) return false;
    Result<WriteLease> lease = store_->reserve(namespace_of(ids[0]), keys_of(ids), payload_bytes_of(ids[0]), false);
    if (!lease.ok() && lease.status().code() != Code::kResourceExhausted) throw Wrong("reserve: " + lease.status().to_string());
    if (!lease.ok() || lease->empty()) return false;
    HeldWrite held;
    for (const std::uint32_t position : lease->positions()) held.ids.push_back(ids.at(position));
    held.lease = std::move(*lease);
    held.filled.resize(held.ids.size());
    held.dead.resize(held.ids.size());
    writes_.push_back(std::move(held));
    return true;
  }
  static void fill(HeldWrite& held) {
    for (std::size_t i = 0; i < held.ids.size(); ++i) {
      std::byte* const payload = held.lease.payload(i);
      for (std::uint64_t at = 0; at < held.lease.payload_bytes(); ++at) payload[at] = byte_of(held.ids[i], at);
      held.lease.mark_filled(i);
      held.filled[i] = true;
    }
  }
  void commit(std::size_t place) {
    HeldWrite& held = writes_[place];
    std::uint32_t expected = 0;
    for (std::size_t i = 0; i < held.ids.size(); ++i) {
      if (held.dead[i] || !held.filled[i]) continue;
      ++expected;
      Chunk& chunk = chunks_[held.ids[i]];
      // One that is on NVMe already is not written again.
      chunk.durable = chunk.durable && chunk.must_hit;
      chunk.may_hit = chunk.must_hit = true;
    }
    const std::uint32_t published = held.lease.commit();
    if (published != expected) {
      throw Wrong("commit published " + std::to_string(published) + " chunks of " + std::to_string(expected));
    }
    writes_.erase(writes_.begin() + static_cast<std::ptrdiff_t>(place));
  }

  // --- reading
  void must_hold(const ReadLease& lease, const std::vector<std::uint32_t>& ids) {
    for (std::size_t i = 0; i < lease.slots().size(); ++i) {
      const std::span<const std::byte> payload = lease.payload(i);
      if (payload.size() != payload_bytes_of(ids[i])) throw Wrong(name(ids[i]) + ": length " + std::to_string(payload.size()));
      for (std::uint64_t at = 0; at < payload.size(); ++at) {
        if (payload[at] != byte_of(ids[i], at)) throw Wrong(name(ids[i]) + ": wrong byte at " + std::to_string(at));
      }
    }
  }
  void hit_is_allowed(std::uint32_t id, const char* by) {
    ++played_.hits;
    if (!chunks_[id].may_hit) throw Wrong(name(id) + ": " + by + " calls it a hit; it was never stored, or erased or cleared");
  }
  void lookup(const std::vector<std::uint32_t>& ids) {
    const PrefixHit hit = store_->lookup(keys_of(ids));
    if (hit.host + hit.nvme != hit.hit) throw Wrong("lookup: the tiers do not add up");
    for (std::uint32_t i = 0; i < hit.hit; ++i) hit_is_allowed(ids[i], "lookup");
  }
  void acquire(const std::vector<std::uint32_t>& ids) {
    // Of what this very thread is writing it would wait in vain.
    const bool in_vain = std::any_of(ids.begin(), ids.end(), [this](std::uint32_t id) { return being_written(id); });
    Result<ReadLease> lease = store_->acquire(namespace_of(ids[0]), keys_of(ids), in_vain ? 0s : kPatience);
    if (!lease.ok()) return;
    for (std::size_t i = 0; i < lease->slots().size(); ++i) hit_is_allowed(ids[i], "acquire");
    must_hold(*lease, ids);
    if (reads_.size() < 6) reads_.push_back({std::move(*lease), ids});
  }
  // What was leased stays as it was, whatever came over its key.
  void release(std::uint32_t place) {
    const auto held = at(reads_, place);
    must_hold(held->lease, held->ids);
    reads_.erase(held);
  }
  bool being_written(std::uint32_t id) const {
    for (const HeldWrite& held : writes_) {
      for (std::size_t i = 0; i < held.ids.size(); ++i) {
        if (held.ids[i] == id && !held.dead[i]) return true;
      }
    }
    return false;
  }
  void judge(std::uint32_t id, Presence presence, const char* by) {
    if (presence == Presence::kHit || presence == Presence::kRetry) hit_is_allowed(id, by);
    if (presence == Presence::kPending && !being_written(id)) throw Wrong(name(id) + ": pending, and nobody writes it");
  }
  void ask(Action action, HeldRequest& held, std::vector<std::uint32_t> ids) {
    for (std::uint32_t& id : ids) id = id / 2 * 2 + held.parity;
    const std::vector<ChunkKey> keys = keys_of(ids);
    if (action == Action::kAsk) {
      for (std::size_t i = 0; i < ids.size(); ++i) judge(ids[i], held.request->lookup(keys[i]), "a request's lookup");
    } else if (action == Action::kPrefetch) {
      held.request->prefetch(keys);
    } else if (action == Action::kAskPrefix) {
      const PrefixPresence found = held.request->lookup_prefix(keys);
      for (std::uint32_t i = 0; i < found.hits; ++i) hit_is_allowed(ids[i], "lookup_prefix");
      if (found.hits < ids.size()) judge(ids[found.hits], found.next, "lookup_prefix");
    } else {
      const Result<ReadLease> lease = held.request->acquire(keys, false);
      if (!lease.ok()) return;
      for (const std::uint32_t id : ids) hit_is_allowed(id, "a request's acquire");
      must_hold(*lease, ids);
    }
  }

  // --- forgetting
  void forget(std::uint32_t id) {
    Chunk& chunk = chunks_[id];
    chunk.may_come_back = chunk.may_come_back || chunk.may_hit;
    chunk.may_hit = chunk.must_hit = chunk.durable = chunk.erased = false;
    for (HeldWrite& held : writes_) {
      for (std::size_t i = 0; i < held.ids.size(); ++i) {
        if (held.ids[i] == id) held.dead[i] = true;
      }
    }
  }
  void erase(std::uint32_t id) {
    const bool there = chunks_[id].may_hit || being_written(id);
    if (store_->erase(key_of(id)) && !there && !faulted_) throw Wrong(name(id) + ": erased, but it was not there");
    forget(id);
    chunks_[id].erased = true;
    forgotten_by_requests(id);
  }
  // At once, whatever they remember.
  void forgotten_by_requests(std::uint32_t id) {
    for (HeldRequest& held : requests_) {
      if (held.parity == id % 2) judge(id, held.request->lookup(key_of(id)), "a request that had asked before");
    }
  }
  void clear() {
    store_->clear();
    for (std::uint32_t id = 0; id < kIds; ++id) forget(id);
    for (std::uint32_t id = 0; id < kIds; ++id) forgotten_by_requests(id);
  }

  // --- durability
  void flushed(const Status& status) {
    if (!status.ok()) {
      if (!faulted_) throw Wrong("flush: " + status.to_string());
      return;
    }
    if (faulted_) return;  // what a faulty disk has is not known
    for (Chunk& chunk : chunks_) {
      chunk.durable = chunk.must_hit;
      chunk.may_come_back = false;
    }
  }
  void settle_losses() {
    const StoreStats stats = store_->stats();
    counted_losses_ += stats.demotion_drops + stats.demotion_failures + stats.reclaimed_chunks;
    played_.reclaims += stats.reclaimed_regions;
  }
  void reopen() {
    let_go();
    if (faulty_ != nullptr) faulty_->clear();
    flushed(store_->close(kPatience));
    settle_losses();
    store_.reset();
    open();
    after_open();
    ++played_.reopens;
  }
  void kill() {
    const std::filesystem::path old = directory();
    ++generation_;
    disk_->copy(old, directory());
    let_go();
    settle_losses();
    store_.reset();
    std::filesystem::remove_all(old);
    open();
    for (Chunk& chunk : chunks_) chunk.must_hit = chunk.must_hit && chunk.durable;
    after_open();
    ++played_.kills;
  }
  void after_open() {
    for (Chunk& chunk : chunks_) chunk.may_hit = chunk.may_hit || chunk.may_come_back;
  }

  void add_fault(const Step& step) {
    using io::Fault;
    using io::Op;
    faulted_ = true;
    ++played_.faults;
    constexpr std::uint64_t kBeyondHeaders = 4096;  // a superblock that the disk lied about is refused, rightly
    const auto range = [&](const Fault& fault) { return fault.in_range(kBeyondHeaders, ~0ull).only(1 + step.count); };
    switch (step.place) {
      case 0:
        faulty_->add(range(Fault::fail_with(EIO).on(Op::kRead)));
        break;
      case 1:
      case 2:
        faulty_->add(range(Fault::flip_bit(step.id * 97 % 8192)));
        break;
      case 3:
        faulty_->add(range(Fault::short_by(step.id * 61 % 6000).on(Op::kRead)));
        break;
      case 4:
        faulty_->add(range(Fault::torn_after(step.id * 61 % 6000)));
        break;
      case 5:
        faulty_->add(range(Fault::fail_with(ETIMEDOUT).on(Op::kWrite)));
        break;
      case 6:
        faulty_->add(range(Fault::short_by(step.id * 61 % 6000).on(Op::kWrite)));
        break;
      default:
        if (step.count == 4) faulty_->add(Fault::fail_with(EIO).on(step.id % 2 == 0 ? Op::kSync : Op::kWrite).only(1));
    }
  }

  // --- everything at once
  void check() {
    let_go();
    std::uint64_t lost = 0;
    std::string first;
    for (std::uint32_t id = 0; id < kIds; ++id) {
      Chunk& chunk = chunks_[id];
      const ChunkKey key = key_of(id);
      const Result<ReadLease> lease = store_->acquire(namespace_of(id), std::span(&key, 1), kPatience);
      if (lease.ok()) {
        hit_is_allowed(id, "check");
        must_hold(*lease, {id});
        if (chunk.must_hit) ++played_.must_hits;
        continue;
      }
      ++played_.misses;
      if (chunk.must_hit) {
        ++lost;
        if (first.empty()) first = name(id) + " (" + lease.status().to_string() + ")";
      }
      chunk.may_come_back = chunk.may_come_back || chunk.may_hit;  // its record may still lie there
      chunk.may_hit = chunk.must_hit = chunk.durable = false;
    }
    lost_ += lost;
    const StoreStats stats = store_->stats();
    const std::uint64_t counted = counted_losses_ + stats.demotion_drops + stats.demotion_failures + stats.reclaimed_chunks;
    if (!faulted_ && lost_ > counted) {
      throw Wrong(std::to_string(lost_) + " chunks are gone and the store counted " + std::to_string(counted) + "; first " + first);
    }
    if (stats.requests != 0) throw Wrong("a request is left over");
    {
      std::lock_guard lock(store_->mu);
      std::uint64_t pins = 0;
      for (const SlotRecord& record : store_->slots) pins += record.pins;
      std::uint64_t expected = store_->demotions_in_flight + store_->promotions_in_flight + store_->checks_in_flight;
      for (const auto& [region, evacuation] : store_->evacuations) expected += evacuation.slots.size();
      if (pins != expected || store_->request_pinned_bytes != 0) {
        throw Wrong("nobody holds a lease, and " + std::to_string(pins) + " pins are held");
      }
    }
    if (stats.host_used_bytes > stats.host_limit_bytes) throw Wrong("the host arena's limit does not hold");
    if (stats.nvme_allocated_bytes > stats.nvme_limit_bytes) throw Wrong("the NVMe limit does not hold");
  }

  const World& world_;
  Played& played_;
  std::uint32_t generation_ = 0;
  std::shared_ptr<Disk> disk_;
  std::unique_ptr<StoreCore> store_;
  io::FaultyEngine* faulty_ = nullptr;  // the store's
  Chunk chunks_[kIds];
  std::vector<HeldWrite> writes_;
  std::vector<HeldRead> reads_;
  std::vector<HeldRequest> requests_;
  std::uint64_t lost_ = 0, counted_losses_ = 0;
  bool faulted_ = false;
};

}  // namespace

std::optional<std::string> play(const World& world, const Script& script, Played& played) {
  std::filesystem::create_directories(world.directory);
  std::optional<std::string> wrong;
  std::size_t at = 0;
  try {
    Player player(world, played);
    for (; at < script.size(); ++at) player.step(script[at]);
  } catch (const Wrong& failure) {
    wrong = "step " + std::to_string(at) + ": " + failure.what();
  }
  std::filesystem::remove_all(world.directory);
  return wrong;
}

}  // namespace lmcn::model
