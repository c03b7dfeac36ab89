#include "power_cut.hpp"

#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <map>
#include <set>
#include <stdexcept>
#include <system_error>

#include "disk.hpp"
#include "nvme/log.hpp"
#include "simulated_device.hpp"

namespace lmcn::crash {
namespace {

using nvme::PageBuffer;
using nvme::RegionLog;

constexpr std::uint64_t kRegionBytes = 1 << 20;
constexpr std::uint64_t kMaxPayloadBytes = 131'072;
constexpr std::uint64_t kImagesPerWorld = 40;
constexpr std::uint32_t kNoId = 0xFFFFFFFFu;

std::uint64_t payload_bytes_of(std::uint32_t id) {
  constexpr std::array<std::uint64_t, 8> kBytes = {1, 4095, 4096, 9'000, 12'288, 30'000, 65'536, kMaxPayloadBytes};
  return kBytes[(id * 2654435761u >> 16) % kBytes.size()];
}

/// What the caller of the log knows of one record.
struct Record {
  Extent extent{};
  std::uint64_t sequence = 0;  // of its region
  std::uint64_t append = 0;    // its number
  std::uint64_t clears = 0;    // that had begun when it was appended
  bool durable = false;        // acknowledged before an fdatasync that has ended
  bool lost = false;           // absent after an earlier power cut
};

struct Counts {
  std::uint64_t images = 0, worlds = 0, went_on = 0, appended = 0, clears = 0, checkpoints = 0, reclaims = 0;
  std::uint64_t recovered = 0, readable = 0, unreadable = 0, durable = 0, durable_there = 0;
  std::uint64_t from_checkpoint = 0, from_footers = 0, from_walk = 0;
  // Lost in an earlier power cut, and found again: a walk that ends on leftovers of before it may take them for its own. Never
  // wrong, as a record says all that it is.
  std::uint64_t came_back = 0;
};

class Lie : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

nvme::LogOptions log_options(const std::filesystem::path& directory, std::uint64_t limit_bytes) {
  nvme::LogOptions options;
  options.directory = directory;
  options.limit_bytes = limit_bytes;
  options.region_bytes = kRegionBytes;
  options.max_record_bytes = image_bytes(kMaxPayloadBytes);
  options.lock_wait = std::chrono::milliseconds(0);
  options.free_space_floor_bytes = 0;
  options.sync_interval = std::chrono::milliseconds(0);  // at each maintain(): the clock has no part in this
  return options;
}

void must_be_ok(const Status& status, const char* what) {
  if (!status.ok()) throw Lie(std::string(what) + ": " + status.to_string());
}

/// Reads one record; true: whole, and its bytes are that id's.
bool read_record(RegionLog& log, Extent extent, std::uint32_t id, PageBuffer& buffer, const std::function<void()>& wait) {
  Status status;
  bool done = false;
  const NamespaceId ns = crash_namespace();
  log.read(extent, buffer.data(), key_of(id), &ns, [&](const Status& s) {
    status = s;
    done = true;
  });
  wait();
  if (!done) throw Lie("a read never ended");
  if (!status.ok()) return false;
  const std::uint64_t bytes = slot_header(buffer.data())->payload_bytes;
  if (bytes != payload_bytes_of(id) || !holds({buffer.data() + kPageBytes, bytes}, id)) {
    throw Lie("id " + std::to_string(id) + " was read with wrong bytes and called good");
  }
  return true;
}

/// An image, opened.
class Image : public nvme::LogClient {
 public:
  Image(const std::filesystem::path& directory, std::uint64_t limit_bytes, Random& random) : device_(directory, random) {
    device_.set_mode(SimulatedDevice::Mode::kAllAtOnce);
    sequences_ = region_sequences(directory);
    named = named_records(directory);
    auto opened = RegionLog::open(log_options(directory, limit_bytes), device_, *this);
    must_be_ok(opened.status(), "the image could not be opened");
    log_ = std::move(opened).value();
    log_->adopt([this](const nvme::RecoveredRecord& record) {
      const std::uint32_t id = id_of(record.key, kNoId);
      if (id == kNoId) throw Lie("a key was recovered that nobody ever wrote");
      found[id] = record.extent;  // the last one counts
      return id;
    });
  }
  /// I4: whatever became of the payload, the header holds.
  bool read(std::uint32_t id, Extent extent) {
    if (read_record(*log_, extent, id, buffer_, [] {})) return true;
    const Status header = check_header(buffer_.data(), extent.pages * kPageBytes);
    if (!header.ok())
      throw Lie("id " + std::to_string(id) + " was recovered from a header that does not hold: " + header.to_string());
    return false;
  }
  /// Of the region's header as the image had it before it was opened.
  std::uint64_t sequence(std::uint32_t region) const { return region < sequences_.size() ? sequences_[region] : 0; }
  nvme::LogStats stats() const { return log_->stats(); }
  bool evacuated(std::uint32_t, std::span<const std::uint32_t>) override { return true; }
  void on_reclaim(std::uint32_t, std::span<const std::uint32_t>) override { throw Lie("open() took a region with records"); }

  std::map<std::uint32_t, Extent> found;
  std::vector<NamedRecord> named;  // before it was opened

 private:
  SimulatedDevice device_;
  PageBuffer buffer_{image_bytes(kMaxPayloadBytes) / kPageBytes};
  std::vector<std::uint64_t> sequences_;
  std::unique_ptr<RegionLog> log_;
};

/// A log that is written to by seeded chance, and cut off at any moment. One thread; the same seed does the same.
class World : public nvme::LogClient {
 public:
  World(std::uint64_t seed, std::filesystem::path directory, Counts& counts)
      : random_(seed), directory_(std::move(directory)), counts_(counts), limit_bytes_((6 + random_.below(3)) << 20) {}
  ~World() override { shut_down(); }

  void run(std::uint64_t images) {
    const std::uint64_t until = counts_.images + images;
    open();
    while (counts_.images < until) {
      one_operation();
      if (lie_) throw *lie_;
      if (go_on_from_) go_on();
    }
    shut_down();
  }

  bool evacuated(std::uint32_t, std::span<const std::uint32_t>) override { return true; }
  void on_reclaim(std::uint32_t region, std::span<const std::uint32_t> cookies) override {
    ++counts_.reclaims;
    for (const std::uint32_t id : cookies) {
      if (const auto found = index_.find(id); found != index_.end() && found->second.region == region) index_.erase(found);
    }
  }

 private:
  std::filesystem::path store() const { return directory_ / ("store" + std::to_string(generation_)); }

  void open() {
    device_ = std::make_unique<SimulatedDevice>(store(), random_);
    device_->on_sync_begins = [this] { return acknowledged_.size(); };
    device_->on_sync_ended = [this](std::uint64_t acknowledged) {
      for (; durable_ < acknowledged; ++durable_) {
        const auto [id, number] = acknowledged_[durable_];
        if (records_.at(id).append == number) records_.at(id).durable = true;
      }
    };
    device_->set_mode(SimulatedDevice::Mode::kAllAtOnce);
    auto opened = RegionLog::open(log_options(store(), limit_bytes_), *device_, *this);
    must_be_ok(opened.status(), "open");
    log_ = std::move(opened).value();
    index_.clear();
    log_->adopt([this](const nvme::RecoveredRecord& record) {
      const std::uint32_t id = id_of(record.key, kNoId);
      if (const auto known = index_.find(id); known != index_.end()) log_->forget(known->second);
      index_[id] = record.extent;
      return id;
    });
    device_->settle_data();  // open() has synced
    device_->settle_small_files();
    device_->set_mode(SimulatedDevice::Mode::kQueue);
    device_->on_event = [this] { maybe_cut(1, 150); };
  }

  void shut_down() {
    if (!device_) return;
    device_->on_event = nullptr;
    device_->drain();
    log_.reset();
    device_.reset();
  }

  void one_operation() {
    const std::uint64_t dice = random_.below(1000);
    if (dice < 500) {
      append();
    } else if (dice < 850) {
      for (std::uint64_t n = random_.below(12); n > 0 && device_->step(); --n) {
      }
    } else if (dice < 930) {
      must_be_ok(log_->maintain(), "maintain");
    } else if (dice < 960) {
      read();
    } else if (dice < 980) {
      forget();
    } else if (dice < 997) {
      checkpoint();
    } else {
      clear();
    }
    maybe_cut(1, 60);
  }

  void append() {
    const bool again = !forgotten_.empty() && random_.one_in(8);
    const std::uint32_t id = again ? *forgotten_.begin() : next_id_++;
    if (again) forgotten_.erase(id);
    const std::uint64_t payload_bytes = payload_bytes_of(id);
    auto image = std::make_shared<PageBuffer>(image_bytes(payload_bytes) / kPageBytes);
    begin_slot(image->data(), key_of(id), crash_namespace(), payload_bytes, 1, 1);
    fill({image->data() + kPageBytes, payload_bytes}, id);
    records_[id] = Record{.append = ++appends_, .clears = clears_begun_};
    const auto done = [this, id, image, number = appends_, clears = clears_begun_](const Status& status, Extent extent) {
      if (!status.ok() || clears != clears_begun_) return;  // cleared meanwhile
      Record& record = records_.at(id);
      record.extent = extent;
      record.sequence = slot_header(image->data())->region_sequence;
      index_[id] = extent;
      acknowledged_.emplace_back(id, number);
      ++counts_.appended;
    };
    Status status = log_->append(image->data(), image->bytes(), id, done);
    for (int tries = 0; status.code() == Code::kResourceExhausted && tries < 200; ++tries) {
      device_->step();
      must_be_ok(log_->maintain(), "maintain");
      status = log_->append(image->data(), image->bytes(), id, done);
    }
    must_be_ok(status, "append");
  }

  void read() {
    if (index_.empty()) return;
    auto chosen = index_.lower_bound(static_cast<std::uint32_t>(random_.below(next_id_)));
    if (chosen == index_.end()) chosen = index_.begin();
    const auto [id, extent] = *chosen;
    const std::uint64_t sequence = records_.at(id).sequence;
    const bool readable = read_record(*log_, extent, id, buffer_, [this] { device_->drain(); });
    const auto now = index_.find(id);
    const bool still = now != index_.end() && now->second == extent && records_.at(id).sequence == sequence;
    if (!readable && still && sequence != 0) throw Lie("an acknowledged record could not be read: id " + std::to_string(id));
  }

  void forget() {
    if (index_.empty()) return;
    auto chosen = index_.lower_bound(static_cast<std::uint32_t>(random_.below(next_id_)));
    if (chosen == index_.end()) chosen = index_.begin();
    log_->forget(chosen->second);
    forgotten_.insert(chosen->first);
    records_.at(chosen->first).sequence = 0;  // nothing is expected of it any more
    index_.erase(chosen);
  }

  void checkpoint() {
    const std::map<std::uint32_t, Extent> entries = index_;
    for (std::uint64_t n = random_.below(4); n > 0 && device_->step(); --n) {
    }
    device_->set_mode(SimulatedDevice::Mode::kCall);
    const Status written = log_->checkpoint([&](const RegionLog::EntrySink& sink) {
      for (const auto& [id, extent] : entries) sink(key_of(id), extent);
    });
    device_->set_mode(SimulatedDevice::Mode::kQueue);
    device_->settle_small_files();
    must_be_ok(written, "checkpoint");
    ++counts_.checkpoints;
  }

  void clear() {
    ++clears_begun_;
    device_->set_mode(SimulatedDevice::Mode::kCall);
    const Status cleared = log_->clear();
    device_->set_mode(SimulatedDevice::Mode::kQueue);
    device_->settle_small_files();
    must_be_ok(cleared, "clear");
    clears_acknowledged_ = clears_begun_;
    index_.clear();
    ++counts_.clears;
  }

  // At a moment of its own choice: the power goes, in a copy.
  void maybe_cut(std::uint64_t chance, std::uint64_t of) {
    if (lie_ || go_on_from_ || random_.below(of) >= chance) return;
    const std::filesystem::path to = directory_ / ("image" + std::to_string(counts_.images));
    device_->cut_power(to, random_);
    try {
      judge(to);
    } catch (const Lie& lie) {
      lie_ = lie;  // this may be a completion, through which nothing can be thrown
      return;
    }
    ++counts_.images;
    if (random_.one_in(12)) {
      go_on_from_ = to;
    } else {
      std::filesystem::remove_all(to);
    }
  }

  void judge(const std::filesystem::path& directory) {
    Random random(random_());
    Image image(directory, limit_bytes_, random);
    std::set<std::uint32_t> readable;
    for (const auto& [id, extent] : image.found) {
      const auto known = records_.find(id);
      if (known == records_.end()) throw Lie("id " + std::to_string(id) + " was recovered and never written");
      if (known->second.clears < clears_acknowledged_) {
        throw Lie("id " + std::to_string(id) + " is back, " + std::to_string(clears_acknowledged_) + " clears after " +
                  std::to_string(known->second.clears));
      }
      counts_.came_back += known->second.lost ? 1 : 0;
      if (image.read(id, extent)) readable.insert(id);
    }
    judge_named(image, readable);
    for (const auto& [id, record] : records_) {
      if (!record.durable || record.sequence == 0 || record.clears != clears_begun_) continue;
      if (image.sequence(record.extent.region) != record.sequence) continue;  // reused, or its header is torn: reuse had begun
      ++counts_.durable;
      if (!readable.contains(id)) {
        throw Lie("id " + std::to_string(id) + " at region " + std::to_string(record.extent.region) + ", page " +
                  std::to_string(record.extent.page) + " was synced and is gone");
      }
      ++counts_.durable_there;
    }
    const nvme::LogStats stats = image.stats();
    if (stats.allocated_bytes > stats.limit_bytes) throw Lie("more bytes allocated than the limit");
    counts_.recovered += image.found.size();
    counts_.readable += readable.size();
    counts_.unreadable += image.found.size() - readable.size();
    counts_.from_checkpoint += stats.recovered_from_checkpoint;
    counts_.from_footers += stats.recovered_from_footers;
    counts_.from_walk += stats.recovered_from_walk;
  }

  /// L2 and I4: footers and checkpoints name only records that no power cut can take.
  void judge_named(Image& image, const std::set<std::uint32_t>& readable) {
    for (const NamedRecord& named : image.named) {
      const std::uint32_t id = id_of(named.key, kNoId);
      if (torn_.contains({named.sequence, named.extent.page})) continue;
      const auto found = image.found.find(id);
      const bool same = found != image.found.end() && found->second == named.extent;
      if (same ? readable.contains(id) : image.read(id, named.extent)) continue;
      throw Lie("id " + std::to_string(id) + " at region " + std::to_string(named.extent.region) + ", page " +
                std::to_string(named.extent.page) + " is named by a footer or a checkpoint, and not whole");
    }
  }

  /// The machine came up again with that image: the store lives on.
  void go_on() {
    const std::filesystem::path from = *go_on_from_;
    go_on_from_.reset();
    shut_down();
    std::filesystem::remove_all(store());
    ++generation_;
    std::filesystem::rename(from, store());
    ++counts_.went_on;
    acknowledged_.clear();
    durable_ = 0;
    const std::vector<std::uint64_t> sequences = region_sequences(store());
    open();
    clears_begun_ = clears_acknowledged_;
    for (auto& [id, record] : records_) {
      record.durable = false, record.sequence = 0;
      record.lost = !forgotten_.contains(id) && !index_.contains(id);
    }
    // A clear that was cut off has happened or not; what is found now is of before or after it, and stays.
    device_->on_event = nullptr;
    for (const auto& [id, extent] : index_) {
      forgotten_.erase(id);
      Record& record = records_.at(id);
      const bool readable = read_record(*log_, extent, id, buffer_, [this] { device_->drain(); });
      record = {extent, readable ? sequences.at(extent.region) : 0, record.append, clears_begun_, readable, false};
      if (!readable) torn_.emplace(sequences.at(extent.region), extent.page);
    }
    device_->on_event = [this] { maybe_cut(1, 150); };
  }

  Random random_;
  const std::filesystem::path directory_;
  Counts& counts_;
  const std::uint64_t limit_bytes_;
  std::uint64_t generation_ = 0;
  std::unique_ptr<SimulatedDevice> device_;
  std::unique_ptr<RegionLog> log_;
  PageBuffer buffer_{image_bytes(kMaxPayloadBytes) / kPageBytes};
  std::uint32_t next_id_ = 0;
  std::map<std::uint32_t, Record> records_;  // every id that was ever appended: its last record
  std::map<std::uint32_t, Extent> index_;    // the caller's
  std::set<std::uint32_t> forgotten_;
  std::set<std::pair<std::uint64_t, std::uint32_t>> torn_;  // region sequence, page: recovered with a payload that is not whole
  std::uint64_t appends_ = 0;
  std::vector<std::pair<std::uint32_t, std::uint64_t>> acknowledged_;  // id and number of append, in that order
  std::uint64_t durable_ = 0;                                          // of acknowledged_, the leading ones that are
  std::uint64_t clears_begun_ = 0, clears_acknowledged_ = 0;
  std::optional<std::filesystem::path> go_on_from_;
  std::optional<Lie> lie_;
};

void print(const Options& options, const Counts& c, double seconds, bool held) {
  const auto n = [](std::uint64_t value) { return static_cast<unsigned long long>(value); };
  const char* const form =
      options.json
          ? "{\"test\": \"power-cut\", \"held\": %s, \"seed\": %llu, \"images\": %llu, \"worlds\": %llu, \"went_on\": %llu, "
            "\"images_per_s\": %.0f, \"synced\": %llu, \"synced_there\": %llu, \"recovered\": %llu, \"readable\": %llu, "
            "\"unreadable\": %llu, \"from_checkpoint\": %llu, \"from_footers\": %llu, \"from_walk\": %llu, \"came_back\": %llu, "
            "\"appended\": %llu, \"checkpoints\": %llu, \"clears\": %llu, \"reclaims\": %llu}\n"
          : "power-cut: held %s, seed %llu, %llu images of %llu worlds (%llu were lived on in), %.0f images a second;\n"
            "  synced records %llu, there %llu; recovered %llu: readable %llu, misses %llu (from checkpoints %llu, footers %llu, "
            "walks %llu), back from before an earlier cut %llu;\n  appended %llu, checkpoints %llu, clears %llu, regions reused "
            "%llu\n";
  std::printf(form, held ? "true" : "false", n(options.seed), n(c.images), n(c.worlds), n(c.went_on),
              static_cast<double>(c.images) / seconds, n(c.durable), n(c.durable_there), n(c.recovered), n(c.readable),
              n(c.unreadable), n(c.from_checkpoint), n(c.from_footers), n(c.from_walk), n(c.came_back), n(c.appended),
              n(c.checkpoints), n(c.clears), n(c.reclaims));
  std::fflush(stdout);
}

}  // namespace

int run_power_cuts(const Options& options) {
  const auto begin = std::chrono::steady_clock::now();
  const auto seconds = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(); };
  std::string directory = (options.directory / "lmcn_power_XXXXXX").string();
  if (::mkdtemp(directory.data()) == nullptr) throw std::system_error(errno, std::generic_category(), "mkdtemp " + directory);
  Counts counts;
  while (counts.images < options.rounds) {
    const std::uint64_t seed = options.seed + counts.worlds;
    const std::filesystem::path place = std::filesystem::path(directory) / std::to_string(seed);
    std::filesystem::create_directory(place);
    try {
      World(seed, place, counts).run(std::min(kImagesPerWorld, options.rounds - counts.images));
    } catch (const Lie& lie) {
      print(options, counts, seconds(), false);
      std::fprintf(stderr, "crash_test power-cut --seed %llu --rounds %llu: %s\nThe image is kept in %s\n",
                   static_cast<unsigned long long>(seed), static_cast<unsigned long long>(kImagesPerWorld), lie.what(),
                   place.c_str());
      return 1;
    }
    std::filesystem::remove_all(place);
    if (++counts.worlds % 25 == 0) {
      std::fprintf(stderr, "power-cut: %llu of %llu images, %.0f a second\n", static_cast<unsigned long long>(counts.images),
                   static_cast<unsigned long long>(options.rounds), static_cast<double>(counts.images) / seconds());
    }
  }
  std::filesystem::remove_all(directory);
  print(options, counts, seconds(), true);
  return 0;
}

}  // namespace lmcn::crash
