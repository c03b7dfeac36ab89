// One store, four client threads, small limits, a device that misbehaves in phases: for as long as asked, no wrong byte, no growth,
// nothing left behind.
//
//   soak [--minutes M | --seconds S] [--seed N] [--directory DIR]
//
// Exits 1 with one line that says what was wrong. Bounds: measure.hpp.
#include <stdlib.h>

#include <cerrno>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "io/faulty_engine.hpp"
#include "measure.hpp"
#include "split_mix.hpp"
#include "store/store_core.hpp"

namespace lmcn::soak {
namespace {

using namespace std::chrono_literals;

constexpr std::uint64_t kHostBytes = 32ull << 20;
constexpr std::uint64_t kNvmeBytes = 64ull << 20;
constexpr std::uint64_t kRegionBytes = 4ull << 20;
constexpr std::uint64_t kMaxPayloadBytes = 512ull << 10;
constexpr std::uint32_t kChunks = 3000;  // 4 to 512 KiB each, in all about six times the NVMe limit
constexpr unsigned kClients = 4;
constexpr std::uint64_t kPastTheHeader = 4096, kFileEnd = 1ull << 40;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kJudgeMemory = false;
#else
constexpr bool kJudgeMemory = true;
#endif

struct Arguments {
  std::chrono::milliseconds duration{60'000};
  std::uint64_t seed = 1;
  std::string directory;  // empty: a temporary one
};

class Random : public SplitMix {
 public:
  using SplitMix::SplitMix;
  std::uint32_t below(std::uint32_t bound) noexcept { return static_cast<std::uint32_t>((*this)() % bound); }
};

// A chunk's length and bytes follow from its number; most are small.
std::uint64_t bytes_of(std::uint32_t chunk) {
  Random random(chunk);
  const std::uint64_t shift = random() % 8;
  return (4096 + random() % (kMaxPayloadBytes - 4095)) >> shift | 1;
}

void fill(std::byte* to, std::uint32_t chunk) {
  Random random(chunk * 7919ull + 1);
  const std::uint64_t bytes = bytes_of(chunk);
  for (std::uint64_t at = 0; at < bytes; at += 8) {
    const std::uint64_t word = random();
    std::memcpy(to + at, &word, std::min<std::uint64_t>(8, bytes - at));
  }
}

bool holds(std::span<const std::byte> found, std::uint32_t chunk) {
  if (found.size() != bytes_of(chunk)) return false;
  Random random(chunk * 7919ull + 1);
  for (std::uint64_t at = 0; at < found.size(); at += 8) {
    const std::uint64_t word = random();
    if (std::memcmp(found.data() + at, &word, std::min<std::uint64_t>(8, found.size() - at)) != 0) return false;
  }
  return true;
}

class Soak {
 public:
  explicit Soak(Arguments arguments) : arguments_(std::move(arguments)), ns_(make_namespace("soak")) {
    for (std::uint32_t chunk = 0; chunk < kChunks; ++chunk) {
      keys_.push_back(KeyDeriver(ns_).derive(std::as_bytes(std::span(&chunk, 1))));
    }
    options_.host_bytes = kHostBytes;
    options_.max_payload_bytes = kMaxPayloadBytes;
    options_.directories = {arguments_.directory + "/store"};
    options_.nvme_bytes = kNvmeBytes;
    options_.region_bytes = kRegionBytes;
    options_.nvme_io_timeout = 5s;  // a busy machine's disk takes long, and must not be taken for a silent one
    options_.promotion_deadline = 2s;
    options_.request_ttl = 500ms;
    options_.fail_when_locked = true;
  }

  int run() {
    open();
    {
      std::vector<std::jthread> threads;
      for (unsigned i = 0; i < kClients; ++i) {
        threads.emplace_back([this, i](std::stop_token stop) { client(arguments_.seed * 100 + i, stop); });
      }
      threads.emplace_back([this](std::stop_token stop) { observe(stop); });
      run_phases();
      for (std::jthread& thread : threads) thread.request_stop();
      changed_.notify_all();
    }
    check_nothing_is_left();
    report("end");
    const Growth growth = growth_of(samples_);
    std::printf(
        "medians, second and last quarter: RSS %.1f and %.1f MiB (bound +%.0f%s), descriptors %llu and %llu (bound +%llu)\n",
        mib(growth.second_quarter.resident_bytes), mib(growth.last_quarter.resident_bytes), mib(Growth::kMemoryBytes),
        kJudgeMemory ? "" : ", not judged under a sanitizer", number(growth.second_quarter.descriptors),
        number(growth.last_quarter.descriptors), number(Growth::kDescriptors));
    std::printf("reopens %llu, quarantines %llu, faults: %s\n", number(reopens_), number(quarantines_), faults_.c_str());
    if (const std::string complaint = growth.complaint(kJudgeMemory); !complaint.empty()) fail(complaint);
    if (hits_ == 0 || nvme_hits_ == 0 || quarantines_ == 0) fail("hits in each tier and quarantines were to happen, and did not");
    if (failure_.empty()) return 0;
    std::fprintf(stderr, "soak: %s (seed %llu)\n", failure_.c_str(), number(arguments_.seed));
    return 1;
  }

 private:
  static double mib(std::uint64_t bytes) { return static_cast<double>(bytes) / (1 << 20); }
  static unsigned long long number(std::uint64_t value) { return value; }

  void fail(const std::string& why) {
    const std::lock_guard lock(mutex_);
    if (failure_.empty()) failure_ = why;
    changed_.notify_all();
  }
  bool failed() {
    const std::lock_guard lock(mutex_);
    return !failure_.empty();
  }
  /// Until `until`, or a failure.
  void rest(Clock::time_point until) {
    std::unique_lock lock(mutex_);
    changed_.wait_until(lock, until, [&] { return !failure_.empty(); });
  }

  // --- the store

  void open() {
    auto core = std::make_unique<StoreCore>(options_);
    core->wrap_engine = [this](std::unique_ptr<io::IoEngine> real) {
      auto made = std::make_unique<io::FaultyEngine>(std::move(real));
      faulty_ = made.get();
      return made;
    };
    const Status started = core->start();
    if (!started.ok()) throw std::runtime_error("open: " + started.to_string());
    store_ = std::move(core);
  }

  void reopen() {
    faulty_->clear();
    faulty_->release();
    reopening_ = true;
    const std::unique_lock exclusive(in_use_);
    const bool quarantined = !store_->nvme_ready();
    const Status closed = store_->close(10s);
    if (!quarantined && !closed.ok() && closed.code() != Code::kResourceExhausted) fail("close: " + closed.to_string());
    add_up(store_->stats());
    store_.reset();
    open();
    last_counts_ = {};
    ++reopens_;
    reopening_ = false;
    reopening_.notify_all();
  }

  void add_up(const StoreStats& stats) {
    evicted_ += stats.evicted_chunks;
    reclaimed_ += stats.reclaimed_regions;
    corrupt_ += stats.corrupt_records;
    errors_ += stats.read_errors + stats.write_errors;
  }

  // --- clients

  void client(std::uint64_t seed, const std::stop_token& stop) {
    Random random(seed);
    while (!stop.stop_requested() && !failed()) {
      reopening_.wait(true);
      const std::shared_lock shared(in_use_);
      // Three quarters of the traffic is on a third of the chunks.
      const std::uint32_t first = random.below(4) != 0 ? random.below(kChunks / 3) : random.below(kChunks - 8);
      const std::uint32_t what = random.below(100);
      if (what < 45) {
        store_chunk(first, random);
      } else if (what < 80) {
        read_chunks(first, 1 + random.below(4));
      } else if (what < 95) {
        use_request(first, 1 + random.below(8), random);
      } else if (what < 98) {
        store_->touch(std::span(keys_).subspan(first, 4));
        static_cast<void>(store_->lookup(std::span(keys_).subspan(first, 8)));
      } else {
        store_->erase(keys_[first]);
        if (random.below(50) == 0) store_->clear();
      }
      ++operations_;
    }
  }

  void store_chunk(std::uint32_t chunk, Random& random) {
    auto lease = store_->reserve(ns_, std::span(&keys_[chunk], 1), bytes_of(chunk), false);
    if (!lease.ok() || lease->empty()) return;
    fill(lease->payload(0), chunk);
    if (random.below(16) == 0) return;  // given up
    lease->mark_filled(0);
    lease->commit();
  }

  void check(const ReadLease& lease, std::uint32_t first) {
    for (std::size_t i = 0; i < lease.slots().size(); ++i) {
      const std::uint32_t chunk = first + static_cast<std::uint32_t>(i);
      if (!holds(lease.payload(i), chunk)) fail("wrong bytes in chunk " + std::to_string(chunk));
    }
    hits_ += lease.slots().size();
  }

  void read_chunks(std::uint32_t first, std::uint32_t count) {
    auto lease = store_->acquire(ns_, std::span(keys_).subspan(first, count), 100ms);
    if (lease.ok()) {
      check(*lease, first);
    } else {
      ++misses_;
    }
  }

  void use_request(std::uint32_t first, std::uint32_t count, Random& random) {
    const auto keys = std::span<const ChunkKey>(keys_).subspan(first, count);
    auto request = store_->begin_request(ns_, {});
    request->prefetch(keys);
    if (random.below(4) == 0) return;  // aborted with its promotions under way
    const auto until = Clock::now() + 100ms;
    PrefixPresence found;
    do {
      found = request->lookup_prefix(keys);
      if (found.next == Presence::kRetry) std::this_thread::yield();
    } while (found.next == Presence::kRetry && Clock::now() < until);
    if (found.hits == 0) {
      ++misses_;
      return;
    }
    auto lease = request->acquire(keys.first(found.hits), false);
    if (!lease.ok()) return;  // cleared or erased meanwhile
    nvme_hits_ += request->count_sources(keys.first(found.hits)).nvme;
    check(*lease, first);
  }

  // --- the device

  struct Phase {
    const char* name;
    std::vector<io::Fault> faults;
    bool ends_in_quarantine = false;
  };

  static std::vector<Phase> phases() {
    using io::Fault;
    using io::Op;
    // Not the first page: the superblock is one, and a clear() that cannot write it ends in a quarantine.
    const auto data = [](const Fault& fault) { return fault.in_range(kPastTheHeader, kFileEnd); };
    return {
        {"calm", {}},
        {"short", {data(Fault::short_by(4096)).on(Op::kWrite).each(7), data(Fault::short_by(100)).on(Op::kRead).each(9)}},
        {"refused", {data(Fault::fail_with(EAGAIN)).on(Op::kWrite).each(5)}},
        {"lying", {Fault::flip_bit(5000, 4).on(Op::kRead).each(5), data(Fault::torn_after(6000)).on(Op::kWrite).each(5)}},
        {"bad sectors", {data(Fault::fail_with(EIO)).on(Op::kRead).each(4)}},
        {"write error", {data(Fault::fail_with(EIO)).on(Op::kWrite).each(50)}, true},
        {"full", {data(Fault::fail_with(ENOSPC)).on(Op::kWrite).each(50)}, true},
        {"silent", {data(Fault::hold()).each(20)}, true},
        {"read-only", {data(Fault::fail_with(EROFS)).on(Op::kWrite).each(20)}, true},
    };
  }

  void run_phases() {
    const auto end = Clock::now() + arguments_.duration;
    const std::vector<Phase> all = phases();
    const auto length = std::clamp<Clock::duration>(arguments_.duration / (2 * all.size()), 500ms, 10s);
    for (std::size_t i = 0; Clock::now() < end && !failed(); ++i) {
      const Phase& phase = all[i % all.size()];
      for (const io::Fault& fault : phase.faults) faulty_->add(fault);
      const auto until = Clock::now() + length;
      if (phase.ends_in_quarantine) {
        const auto patience = Clock::now() + 60s;
        while (store_->nvme_ready() && Clock::now() < patience && !failed()) rest(Clock::now() + 20ms);
        if (store_->nvme_ready()) fail(std::string("phase \"") + phase.name + "\" did not end in a quarantine");
        ++quarantines_;
        rest(std::min(until, Clock::now() + length / 2));  // host memory alone
      } else {
        rest(until);
        if (!store_->nvme_ready()) fail(std::string("phase \"") + phase.name + "\": " + store_->nvme_warning());
      }
      count_faults();
      if (phase.ends_in_quarantine || i % all.size() == 0) {
        reopen();
      } else {
        faulty_->clear();
        faulty_->release();
      }
    }
  }

  void count_faults() {
    const io::FaultCounts counts = faulty_->counts();
    const std::lock_guard lock(mutex_);
    totals_.shortened += counts.shortened - last_counts_.shortened;
    totals_.failed += counts.failed - last_counts_.failed;
    totals_.flipped += counts.flipped - last_counts_.flipped;
    totals_.torn += counts.torn - last_counts_.torn;
    totals_.held += counts.held - last_counts_.held;
    last_counts_ = counts;
  }

  // --- what is seen from outside

  void observe(const std::stop_token& stop) {
    const auto every = std::clamp<Clock::duration>(arguments_.duration / 200, 100ms, 1s);
    auto next_line = Clock::now() + 10s;
    while (!stop.stop_requested() && !failed()) {
      {
        const std::shared_lock shared(in_use_);
        const StoreStats stats = store_->stats();
        Sample sample = sample_process();
        sample.nvme_allocated_bytes = stats.nvme_allocated_bytes;
        if (stats.nvme_allocated_bytes > kNvmeBytes) {
          fail("NVMe holds " + std::to_string(stats.nvme_allocated_bytes) + " bytes, the limit is " + std::to_string(kNvmeBytes));
        }
        const std::lock_guard lock(mutex_);
        samples_.push_back(sample);
      }
      if (Clock::now() >= next_line) {
        report("");
        next_line += 10s;
      }
      std::unique_lock lock(mutex_);
      changed_.wait_for(lock, every, [&] { return stop.stop_requested() || !failure_.empty(); });
    }
  }

  void report(const char* mark) {
    const std::shared_lock shared(in_use_);
    const StoreStats stats = store_->stats();
    const Sample now = sample_process();
    std::printf(
        "%5.0f s  ops %llu  hits %llu  misses %llu  errors %llu  corrupt %llu  evicted %llu  reclaimed %llu  RSS %.1f MiB  "
        "fds %llu  NVMe %.1f MiB %s\n",
        std::chrono::duration<double>(Clock::now() - began_).count(), number(operations_), number(hits_), number(misses_),
        number(errors_ + stats.read_errors + stats.write_errors), number(corrupt_ + stats.corrupt_records),
        number(evicted_ + stats.evicted_chunks), number(reclaimed_ + stats.reclaimed_regions), mib(now.resident_bytes),
        number(now.descriptors), mib(stats.nvme_allocated_bytes), mark);
    std::fflush(stdout);
  }

  void check_nothing_is_left() {
    faulty_->clear();
    faulty_->release();
    faults_ = std::to_string(totals_.shortened) + " short, " + std::to_string(totals_.failed) + " failed, " +
              std::to_string(totals_.flipped) + " flipped, " + std::to_string(totals_.torn) + " torn, " +
              std::to_string(totals_.held) + " held";
    const Status flushed = store_->flush(30s);
    if (!flushed.ok() && store_->nvme_ready()) fail("last flush: " + flushed.to_string());
    {
      std::unique_lock lock(store_->mu);
      if (!store_->promoted_cv.wait_for(lock, 30s, [&] { return store_->promotions_in_flight == 0; })) {
        fail("promotions do not end");
      }
    }
    store_->clear();
    const StoreStats stats = store_->stats();
    const std::pair<const char*, std::uint64_t> left[] = {
        {"host_pinned_slots", stats.host_pinned_slots}, {"host_quarantined_slots", stats.host_quarantined_slots},
        {"host_used_bytes", stats.host_used_bytes},     {"requests", stats.requests},
        {"nvme_dirty_bytes", stats.nvme_dirty_bytes},   {"index_entries", stats.index_entries}};
    for (const auto& [name, value] : left) {
      if (value != 0) fail(std::string(name) + " is " + std::to_string(value) + " when all has ended");
    }
  }

  const Arguments arguments_;
  const NamespaceId ns_;
  StoreOptions options_;
  std::vector<ChunkKey> keys_;
  const Clock::time_point began_ = Clock::now();

  std::shared_mutex in_use_;            // clients share the store; a reopen has it alone
  std::atomic<bool> reopening_{false};  // keeps clients from starving it
  std::unique_ptr<StoreCore> store_;
  io::FaultyEngine* faulty_ = nullptr;  // of store_

  std::atomic<std::uint64_t> operations_{0}, hits_{0}, nvme_hits_{0}, misses_{0};
  std::atomic<std::uint64_t> evicted_{0}, reclaimed_{0}, corrupt_{0}, errors_{0};  // of stores that were closed
  std::uint64_t reopens_ = 0, quarantines_ = 0;
  io::FaultCounts last_counts_, totals_;
  std::string faults_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::string failure_;
  std::vector<Sample> samples_;
};

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (i + 1 == argc) throw std::invalid_argument(name + ": a value is missing");
    const std::string value = argv[++i];
    if (name == "--minutes") {
      arguments.duration = std::chrono::milliseconds(static_cast<std::int64_t>(std::stod(value) * 60'000));
    } else if (name == "--seconds") {
      arguments.duration = std::chrono::milliseconds(static_cast<std::int64_t>(std::stod(value) * 1'000));
    } else if (name == "--seed") {
      arguments.seed = std::stoull(value);
    } else if (name == "--directory") {
      arguments.directory = value;
    } else {
      throw std::invalid_argument(name + " is none of --minutes, --seconds, --seed, --directory");
    }
  }
  if (arguments.duration < 10s) throw std::invalid_argument("less than 10 s show nothing");
  return arguments;
}

int run(int argc, char** argv) {
  Arguments arguments = parse(argc, argv);
  std::string made;
  if (arguments.directory.empty()) {
    made = (std::filesystem::temp_directory_path() / "lmcn_soak_XXXXXX").string();
    if (::mkdtemp(made.data()) == nullptr) throw std::runtime_error("mkdtemp " + made);
    arguments.directory = made;
  }
  const int result = Soak(arguments).run();
  if (!made.empty()) std::filesystem::remove_all(made);
  return result;
}

}  // namespace
}  // namespace lmcn::soak

int main(int argc, char** argv) {
  try {
    return lmcn::soak::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "soak: %s\n", error.what());
    return 2;
  }
}
