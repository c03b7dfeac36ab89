// How long a store takes to open, beside a plain sequential read of the same index bytes in the same run; medians of interleaved
// rounds, with the range. The stores are written by the format (docs/format.md): all regions sealed, the data file sparse, since
// recovery reads no payload. The page cache has nothing of them.
//   bench_recovery [DIR=/tmp] [ROUNDS=5]
// Targets: 1 million entries in <= 1 s, with its checkpoint and without; 100 GB of 2 MiB chunks with its checkpoint in <= 200 ms.
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "index/chunk_index.hpp"
#include "lmcn/store.hpp"
#include "nvme/directory.hpp"
#include "nvme/region_log.hpp"

namespace {

using namespace lmcn;
using namespace lmcn::nvme;
using Clock = std::chrono::steady_clock;

constexpr std::uint64_t kRegionBytes = 256 << 20;
constexpr std::uint64_t kStoreBytes = 100'000'000'000;

void require(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "bench_recovery: %s\n", what.c_str());
  std::exit(1);
}
void require(const Status& status, const std::string& what) {
  require(status.ok(), what + ": " + status.to_string());
}

double milliseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

void write_all(int fd, const void* data, std::uint64_t bytes, std::uint64_t offset) {
  const auto* at = static_cast<const std::byte*>(data);
  while (bytes > 0) {
    const ssize_t written = ::pwrite(fd, at, bytes, static_cast<off_t>(offset));
    require(written > 0, "write failed");
    at += written;
    offset += static_cast<std::uint64_t>(written);
    bytes -= static_cast<std::uint64_t>(written);
  }
}

void read_all(int fd, void* data, std::uint64_t bytes, std::uint64_t offset) {
  auto* at = static_cast<std::byte*>(data);
  while (bytes > 0) {
    const ssize_t got = ::pread(fd, at, std::min<std::uint64_t>(bytes, 1 << 20), static_cast<off_t>(offset));
    require(got > 0, "read failed");
    at += got;
    offset += static_cast<std::uint64_t>(got);
    bytes -= static_cast<std::uint64_t>(got);
  }
}

ChunkKey key_of(std::uint64_t number) {
  ChunkKey key;
  for (std::size_t at = 0; at < key.bytes.size(); at += 8) {
    std::uint64_t word = number * 4 + at / 8 + 1;
    word = (word ^ (word >> 30)) * 0xBF58'476D'1CE4'E5B9;
    word = (word ^ (word >> 27)) * 0x94D0'49BB'1331'11EB;
    word ^= word >> 31;
    std::memcpy(key.bytes.data() + at, &word, sizeof word);
  }
  return key;
}

class StoreOnDisk {
 public:
  StoreOnDisk(const std::string& parent, io::IoEngine& engine, std::uint64_t wanted_entries, std::uint32_t pages) {
    path_ = parent + "/bench_recovery_XXXXXX";
    require(::mkdtemp(path_.data()) != nullptr, "cannot make a directory in " + parent);
    const auto directory = Directory::open(path_, std::chrono::milliseconds(0));
    require(directory.status(), path_);
    Superblock superblock{};
    superblock.magic = kSuperblockMagic;
    superblock.uuid.fill(0xB5);
    superblock.region_bytes = kRegionBytes;
    superblock.epoch = 1;
    superblock.sequence_floor = 1;
    require(store_superblock(**directory, engine, superblock), "superblock");

    constexpr std::uint32_t kRegionPages = kRegionBytes / kPageBytes;
    std::uint32_t per_region = (kRegionPages - 1) / pages;
    while (1 + per_region * pages + footer_pages(per_region) > kRegionPages) --per_region;
    const auto regions = static_cast<std::uint32_t>((wanted_entries + per_region - 1) / per_region);
    std::vector<CheckpointEntry> entries;
    std::vector<CheckpointRegion> table;
    const int fd = ::open((path_ + "/data.000").c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
    require(fd >= 0 && ::ftruncate(fd, static_cast<off_t>(regions * kRegionBytes)) == 0, "data.000");
    for (std::uint32_t region = 0; region < regions; ++region) {
      RegionHeader header{};
      header.magic = kRegionMagic;
      header.uuid = superblock.uuid;
      header.region = region;
      header.sequence = region + 1;
      header.epoch = superblock.epoch;
      seal_page(header);
      write_all(fd, &header, sizeof header, region * kRegionBytes);

      std::vector<FooterEntry> records;
      for (std::uint32_t i = 0; i < per_region && entries.size() < wanted_entries; ++i) {
        const ChunkKey key = key_of(entries.size());
        records.push_back({key, 1 + i * pages, pages});
        entries.push_back({key, region, 1 + i * pages, pages, 0, 0});
      }
      const auto count = static_cast<std::uint32_t>(records.size());
      PageBuffer footer(footer_pages(count));
      std::memcpy(footer.data(), records.data(), count * sizeof records[0]);
      FooterTrailer trailer{};
      trailer.magic = kFooterMagic;
      trailer.format = kFormatVersion;
      trailer.footer_pages = footer_pages(count);
      trailer.uuid = superblock.uuid;
      trailer.sequence = region + 1;
      trailer.last_record_sequence = entries.size();
      trailer.record_count = count;
      trailer.checksum = footer_checksum(records.data(), count, trailer);
      std::memcpy(footer.data() + footer.bytes() - sizeof trailer, &trailer, sizeof trailer);
      const std::uint64_t at = (region + 1) * kRegionBytes - footer.bytes();
      write_all(fd, footer.data(), footer.bytes(), at);
      headers_and_footers_.push_back({region * kRegionBytes, kPageBytes});
      headers_and_footers_.push_back({at, footer.bytes()});
      table.push_back({region + 1, 1 + count * pages, 1});
    }
    ::fsync(fd);
    ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    ::close(fd);

    entry_count_ = entries.size();
    CheckpointHeader header{};
    header.magic = kCheckpointMagic;
    header.uuid = superblock.uuid;
    header.epoch = superblock.epoch;
    header.next_region_sequence = regions + 1;
    header.next_record_sequence = entries.size() + 1;
    header.entry_count = entries.size();
    header.region_count = regions;
    StreamChecksum checksum;
    checksum.update(entries.data(), entries.size() * sizeof entries[0]);
    checksum.update(table.data(), table.size() * sizeof table[0]);
    header.body_checksum = checksum.digest();
    seal_page(header);
    const auto add = [this](const void* data, std::size_t bytes) {
      const auto* begin = static_cast<const std::byte*>(data);
      checkpoint_.insert(checkpoint_.end(), begin, begin + bytes);
    };
    add(&header, sizeof header);
    add(entries.data(), entries.size() * sizeof entries[0]);
    add(table.data(), table.size() * sizeof table[0]);
  }
  ~StoreOnDisk() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  StoreOnDisk(const StoreOnDisk&) = delete;

  const std::string& path() const { return path_; }
  std::uint64_t entry_count() const { return entry_count_; }

  /// As the last owner left it, or without its checkpoint; out of the page cache.
  void prepare(bool with_checkpoint) const {
    const std::string name = path_ + "/index.ckpt";
    ::unlink(name.c_str());
    if (!with_checkpoint) return;
    const int fd = ::open(name.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    write_all(fd, checkpoint_.data(), checkpoint_.size(), 0);
    ::fsync(fd);
    ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    ::close(fd);
  }

  std::uint64_t index_bytes(bool with_checkpoint) const {
    std::uint64_t bytes = 0;
    for (const auto& [offset, length] : headers_and_footers_) bytes += !with_checkpoint || length == kPageBytes ? length : 0;
    return with_checkpoint ? checkpoint_.size() + bytes : bytes;
  }

  /// One read after the other, of all that recovery needs.
  double plain_read_ms(bool with_checkpoint) const {
    PageBuffer buffer(64);
    std::vector<std::byte> whole(with_checkpoint ? checkpoint_.size() : 0);
    const int data = ::open((path_ + "/data.000").c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC);
    require(data >= 0, "data.000 with O_DIRECT");
    const auto start = Clock::now();
    for (const auto& [offset, length] : headers_and_footers_) {
      if (with_checkpoint && offset % kRegionBytes != 0) continue;
      require(length <= buffer.bytes(), "a footer is longer than expected");
      read_all(data, buffer.data(), length, offset);
    }
    if (with_checkpoint) {
      const int fd = ::open((path_ + "/index.ckpt").c_str(), O_RDONLY | O_CLOEXEC);
      read_all(fd, whole.data(), whole.size(), 0);
      ::close(fd);
    }
    const double result = milliseconds_since(start);
    ::close(data);
    return result;
  }

 private:
  std::string path_;
  std::uint64_t entry_count_ = 0;
  std::vector<std::byte> checkpoint_;
  std::vector<std::pair<std::uint64_t, std::uint64_t>> headers_and_footers_;  // offset, bytes
};

class NoReclaim final : public LogClient {
 public:
  bool evacuated(std::uint32_t, std::span<const std::uint32_t>) override { return true; }
  void on_reclaim(std::uint32_t, std::span<const std::uint32_t>) override {}
};

struct Times {
  std::vector<double> plain, log, index, store;
};

std::string text(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  char line[64];
  std::snprintf(line, sizeof line, "%7.1f (%.1f-%.1f)", values[values.size() / 2], values.front(), values.back());
  return line;
}

void measure(const StoreOnDisk& store, io::IoEngine& engine, bool with_checkpoint, Times& times) {
  store.prepare(with_checkpoint);
  times.plain.push_back(store.plain_read_ms(with_checkpoint));

  store.prepare(with_checkpoint);
  {
    LogOptions options;
    options.directory = store.path();
    options.limit_bytes = kStoreBytes + kStoreBytes / 50;
    options.max_record_bytes = 4 << 20;
    NoReclaim client;
    auto start = Clock::now();
    const auto log = RegionLog::open(options, engine, client);
    times.log.push_back(milliseconds_since(start));
    require(log.status(), "open");
    start = Clock::now();
    ChunkIndex index;
    (*log)->adopt([&](const RecoveredRecord& record) {
      const EntryId id = index.insert(record.key);
      index.entry(id).extent = record.extent;
      return id;
    });
    times.index.push_back(milliseconds_since(start));
    const LogStats stats = (*log)->stats();
    const std::uint64_t from = with_checkpoint ? stats.recovered_from_checkpoint : stats.recovered_from_footers;
    require(index.size() == store.entry_count() && from == store.entry_count(),
            "recovered " + std::to_string(index.size()) + " of " + std::to_string(store.entry_count()) + " entries, " +
                std::to_string(from) + " as they should be");
  }

  store.prepare(with_checkpoint);
  StoreOptions options;
  options.host_bytes = 64 << 20;
  options.max_payload_bytes = 4 << 20;
  options.directories = {store.path()};
  options.nvme_bytes = kStoreBytes + kStoreBytes / 50;
  const auto start = Clock::now();
  const auto opened = TieredStore::open(options);
  times.store.push_back(milliseconds_since(start));
  require(opened.status(), "TieredStore::open");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string parent = argc > 1 ? argv[1] : "/tmp";
  const unsigned rounds = static_cast<unsigned>(std::strtoul(argc > 2 ? argv[2] : "5", nullptr, 10));
  require(rounds > 0, "see the head of the source");
  auto engine = io::make_engine({});
  require(engine.status(), "I/O engine");

  struct Case {
    const char* name;
    std::uint64_t entries;
    std::uint32_t pages;
    bool with_checkpoint;
    double target_ms;
  };
  const std::vector<Case> cases = {
      {"1 M entries, checkpoint", 1'000'000, 24, true, 1000},
      {"1 M entries, footers", 1'000'000, 24, false, 1000},
      {"100 GB, checkpoint", kStoreBytes / (513 * kPageBytes), 513, true, 200},
      {"100 GB, footers", kStoreBytes / (513 * kPageBytes), 513, false, 0},
  };
  const StoreOnDisk many(parent, **engine, cases[0].entries, cases[0].pages);
  const StoreOnDisk large(parent, **engine, cases[2].entries, cases[2].pages);
  std::vector<Times> times(cases.size());
  for (unsigned round = 0; round < rounds; ++round) {
    for (std::size_t i = 0; i < cases.size(); ++i) {
      measure(i < 2 ? many : large, **engine, cases[i].with_checkpoint, times[i]);
    }
  }
  std::printf("ms, median (range) of %u; \"to index\" is what the log hands over and the index takes up; the last is all of it\n",
              rounds);
  std::printf("%-24s %9s %9s  %-22s %-22s %-22s %-24s %s\n", "store", "entries", "index MB", "plain read", "log open", "to index",
              "TieredStore::open", "target");
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const StoreOnDisk& store = i < 2 ? many : large;
    std::printf("%-24s %9llu %9.1f  %-22s %-22s %-22s %-24s ", cases[i].name, static_cast<unsigned long long>(store.entry_count()),
                static_cast<double>(store.index_bytes(cases[i].with_checkpoint)) * 1e-6, text(times[i].plain).c_str(),
                text(times[i].log).c_str(), text(times[i].index).c_str(), text(times[i].store).c_str());
    if (cases[i].target_ms > 0) {
      std::vector<double> sorted = times[i].store;
      std::sort(sorted.begin(), sorted.end());
      std::printf("%s <= %.0f", sorted[sorted.size() / 2] <= cases[i].target_ms ? "met" : "MISSED", cases[i].target_ms);
    }
    std::printf("\n");
  }
  return 0;
}
