#include "store_under_test.hpp"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <set>
#include <tuple>

#include "io/transfer.hpp"
#include "nvme/directory.hpp"
#include "split_mix.hpp"

namespace lmcn::fuzz {
namespace {

using nvme::RecoveredRecord;
using nvme::RegionLog;

constexpr std::uint32_t kNewId = 5000;  // of the record that is appended to an opened store

class NoClient final : public nvme::LogClient {
 public:
  bool evacuated(std::uint32_t, std::span<const std::uint32_t>) override { return true; }
  void on_reclaim(std::uint32_t, std::span<const std::uint32_t>) override {}
};

std::uint64_t mixed(std::uint64_t value) {
  return SplitMix(value)();
}

void fill_payload(std::byte* payload, std::uint64_t bytes, std::uint32_t id) {
  for (std::uint64_t i = 0; i < bytes; i += 8) {
    const std::uint64_t word = mixed(id * 1'000'003ull + i);
    std::memcpy(payload + i, &word, std::min<std::uint64_t>(8, bytes - i));
  }
}

nvme::PageBuffer make_image(std::uint32_t id, std::uint64_t payload_bytes) {
  nvme::PageBuffer image(image_bytes(payload_bytes) / kPageBytes);
  begin_slot(image.data(), key_of(id), store_namespace(), payload_bytes, 1, 1);
  fill_payload(image.data() + kPageBytes, payload_bytes, id);
  return image;
}

bool payload_is_of(const std::byte* image, std::uint32_t id) {
  const std::uint64_t bytes = slot_header(image)->payload_bytes;
  Bytes expected(bytes);
  fill_payload(expected.data(), bytes, id);
  return std::memcmp(image + kPageBytes, expected.data(), bytes) == 0;
}

// One for the process, in memory.
class Scratch {
 public:
  Scratch() { path_ = make_directory(); }
  ~Scratch() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::string path() const { return path_; }
  std::string file(const char* name) const { return path_ + "/" + name; }

  void clear() const {
    for (const auto& entry : std::filesystem::directory_iterator(path_)) std::filesystem::remove(entry.path());
  }
  void put(const char* name, const Bytes& bytes) const {
    const int fd = ::open(file(name).c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    require(fd >= 0, std::string("open ") + name);
    require(::pwrite(fd, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()), std::string("write ") + name);
    require(::ftruncate(fd, static_cast<off_t>(bytes.size())) == 0, std::string("ftruncate ") + name);
    ::close(fd);
  }
  Bytes get(const char* name) const {
    const int fd = ::open(file(name).c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) return {};
    struct stat found{};
    require(::fstat(fd, &found) == 0, "fstat");
    Bytes bytes(static_cast<std::size_t>(found.st_size));
    require(::pread(fd, bytes.data(), bytes.size(), 0) == found.st_size, std::string("read ") + name);
    ::close(fd);
    return bytes;
  }
  std::set<std::string> names() const {
    std::set<std::string> found;
    for (const auto& entry : std::filesystem::directory_iterator(path_)) found.insert(entry.path().filename().string());
    return found;
  }

 private:
  std::string path_;
};

Scratch& scratch() {
  static Scratch directory;
  return directory;
}

void place(const StoreFiles& files) {
  const Scratch& directory = scratch();
  if (!files.has_data) directory.clear();
  directory.put("superblock", files.superblock);
  if (files.has_checkpoint) {
    directory.put("index.ckpt", files.checkpoint);
  } else {
    std::filesystem::remove(directory.file("index.ckpt"));
  }
  if (files.has_data) directory.put("data.000", files.data);
}

nvme::LogOptions options_for(std::uint64_t region_bytes) {
  nvme::LogOptions options;
  options.directory = scratch().path();
  // Room for more regions than the store has: what is appended finds one.
  options.limit_bytes = std::max<std::uint64_t>(1 << 20, 6 * region_bytes + (1 << 20));
  options.max_record_bytes = 5 * kPageBytes;
  options.lock_wait = std::chrono::milliseconds(0);
  options.free_space_floor_bytes = 0;
  options.sync_interval = std::chrono::milliseconds(0);
  return options;
}

struct Opened {
  Status status;
  std::unique_ptr<RegionLog> log;
  std::vector<RecoveredRecord> recovered;
};

Opened open_log(const nvme::LogOptions& options, io::IoEngine& engine, NoClient& client) {
  Opened opened;
  auto log = RegionLog::open(options, engine, client);
  if (!log.ok()) {
    opened.status = log.status();
    return opened;
  }
  opened.log = std::move(log).value();
  opened.log->adopt([&](const RecoveredRecord& record) {
    opened.recovered.push_back(record);
    return static_cast<std::uint32_t>(opened.recovered.size());
  });
  return opened;
}

Result<Extent> append(RegionLog& log, nvme::PageBuffer& image, std::uint32_t id) {
  Status result(Code::kInternal, "done did not run");
  Extent at{};
  const Status taken = log.append(image.data(), image.bytes(), id, [&](const Status& status, Extent extent) {
    result = status;
    at = extent;
  });
  if (!taken.ok()) return taken;
  if (!result.ok()) return result;
  return at;
}

Status read(RegionLog& log, Extent extent, const ChunkKey& key, nvme::PageBuffer& image) {
  Status result(Code::kInternal, "done did not run");
  const NamespaceId ns = store_namespace();
  log.read(extent, image.data(), key, &ns, [&](const Status& status) { result = status; });
  return result;
}

RegionLog::EntrySource entries_of(const std::vector<RecoveredRecord>& records) {
  return [&records](const RegionLog::EntrySink& sink) {
    for (const RecoveredRecord& record : records) sink(record.key, record.extent);
  };
}

std::string text(Extent extent) {
  return "region " + std::to_string(extent.region) + ", page " + std::to_string(extent.page) + ", " + std::to_string(extent.pages) +
         " pages";
}

void check_structure(const std::vector<RecoveredRecord>& recovered, std::uint32_t region_pages, std::uint32_t max_regions) {
  std::vector<std::tuple<std::uint32_t, std::uint32_t, std::uint32_t>> places;
  for (const RecoveredRecord& record : recovered) {
    const Extent e = record.extent;
    require(e.region < max_regions, "record in no region: " + text(e));
    require(e.page >= 1 && e.pages >= nvme::kMinRecordPages && std::uint64_t{e.page} + e.pages <= region_pages,
            "record outside its region: " + text(e));
    places.emplace_back(e.region, e.page, e.pages);
  }
  std::sort(places.begin(), places.end());
  for (std::size_t i = 1; i < places.size(); ++i) {
    const auto& [region, page, pages] = places[i - 1];
    require(std::get<0>(places[i]) != region || std::get<1>(places[i]) >= page + pages,
            "records overlap: " + text({region, page, pages}));
  }
}

bool was_written(const MadeStore& store, const RecoveredRecord& record) {
  return std::any_of(store.written.begin(), store.written.end(),
                     [&](const MadeStore::Written& w) { return key_of(w.id) == record.key && w.extent == record.extent; });
}

void check_records(const MadeStore& store, RegionLog& log, const std::vector<RecoveredRecord>& recovered, const Expect& expect) {
  // Of very many, some are read.
  const std::size_t read_each = 1 + recovered.size() / 64;
  for (std::size_t i = 0; i < recovered.size(); ++i) {
    const RecoveredRecord& record = recovered[i];
    const bool true_record = was_written(store, record);
    if (expect.only_what_was_written) require(true_record, "a record that was never written: " + text(record.extent));
    if (i % read_each != 0) continue;
    nvme::PageBuffer image(record.extent.pages);
    const Status status = read(log, record.extent, record.key, image);
    // kFormatVersion: of a slot header that says so.
    require(status.ok() || status.code() == Code::kCorruption || status.code() == Code::kFormatVersion,
            "read of " + text(record.extent) + ": " + status.to_string());
    if (true_record && expect.payloads_as_written) {
      require(status.ok(), "what was written does not read: " + text(record.extent) + ": " + status.to_string());
    }
    if (!status.ok()) continue;
    const auto id = store.ids.find(record.key);
    // Where a checksum was made to fit, a key may be any: it is then the key of these bytes.
    if (id == store.ids.end() && !expect.only_what_was_written) continue;
    require(id != store.ids.end() && payload_is_of(image.data(), id->second), "a read of wrong bytes: " + text(record.extent));
  }
}

MadeStore make_store(std::uint32_t region_pages, std::uint64_t payload_bytes) {
  scratch().clear();
  MadeStore store;
  store.region_pages = region_pages;
  const std::uint64_t region_bytes = region_pages * kPageBytes;
  store.options = options_for(region_bytes);
  for (std::size_t i = 0; i < store.uuid.size(); ++i) store.uuid[i] = static_cast<std::uint8_t>(0xA0 + i);
  InlineEngine engine;
  {
    // The store's identity is ours, so that inputs fit in every run.
    auto directory = nvme::Directory::open(store.options.directory, store.options.lock_wait);
    require(directory.ok(), directory.status().to_string());
    nvme::Superblock superblock{};
    superblock.uuid = store.uuid;
    superblock.region_bytes = region_bytes;
    superblock.epoch = 3;
    superblock.sequence_floor = 100;
    const Status stored = store_superblock(**directory, engine, superblock);
    require(stored.ok(), stored.to_string());
  }
  NoClient client;
  Opened opened = open_log(store.options, engine, client);
  require(opened.status.ok(), opened.status.to_string());
  std::vector<RecoveredRecord> index;
  std::uint32_t id = 0;
  const auto put = [&] {
    nvme::PageBuffer image = make_image(id, payload_bytes + (id % 3 == 0 ? 1 : 0));
    const auto extent = append(*opened.log, image, id);
    if (extent.ok()) {
      store.written.push_back({id, *extent});
      index.push_back({key_of(id), *extent});
    }
    store.ids[key_of(id)] = id;
    ++id;
    return extent;
  };
  const auto region_of_last = [&] { return store.written.empty() ? 0 : store.written.back().extent.region; };
  while (region_of_last() < 1) require(put().ok(), "append");
  require(put().ok(), "append");
  require(opened.log->checkpoint(entries_of(index)).ok(), "checkpoint");
  while (region_of_last() < 2) require(put().ok(), "append");
  engine.fail_next_record(ENOMEM);  // an error that costs one record
  require(!put().ok(), "a failed write was acknowledged");
  require(put().ok() && put().ok(), "append");
  require(opened.log->maintain().ok(), "maintain");
  opened.log.reset();
  store.files = {scratch().get("superblock"), scratch().get("index.ckpt"), scratch().get("data.000"), true, true};
  for (std::uint32_t i = 0; i < store.regions(); ++i) {
    nvme::RegionHeader header;
    std::memcpy(static_cast<void*>(&header), store.files.data.data() + i * region_bytes, sizeof header);
    store.region_sequences.push_back(header.magic == nvme::kRegionMagic ? header.sequence : 0);
  }
  require(store.regions() >= 4, "the made store has fewer than 4 regions");
  return store;
}

}  // namespace

void require(bool holds, const std::string& what) {
  if (!holds) throw DoesNotHold(what);
}

std::string make_directory() {
  const char* const given = ::getenv("TMPDIR");
  const std::string parent = given != nullptr ? given : ::access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
  std::string name = parent + "/lmcn_fuzz_XXXXXX";
  require(::mkdtemp(name.data()) != nullptr, "mkdtemp " + name);
  return name;
}

ChunkKey key_of(std::uint32_t id) {
  ChunkKey key;
  for (std::size_t i = 0; i < 32; i += 8) {
    const std::uint64_t word = mixed(id * 31ull + i);
    std::memcpy(&key.bytes[i], &word, 8);
  }
  return key;
}

NamespaceId store_namespace() {
  NamespaceId ns;
  ns.bytes.fill(7);
  return ns;
}

void InlineEngine::submit(std::span<const io::IoRequest> requests) {
  for (const io::IoRequest& request : requests) {
    io::Transfer transfer(request);
    if (next_error_ != 0 && request.op == io::Op::kWrite && request.bytes > kPageBytes) {
      transfer.fail(std::exchange(next_error_, 0));
    } else {
      ssize_t answer = 0;
      do {
        switch (request.op) {
          case io::Op::kRead:
            answer = ::pread(request.fd, transfer.data(), transfer.bytes(), static_cast<off_t>(transfer.offset()));
            break;
          case io::Op::kWrite:
            answer = ::pwrite(request.fd, transfer.data(), transfer.bytes(), static_cast<off_t>(transfer.offset()));
            break;
          case io::Op::kSync:
            answer = ::fdatasync(request.fd);
            break;
        }
      } while (!transfer.advance(answer < 0 ? -errno : answer));
    }
    request.sink->on_io(transfer.result());
  }
}

const MadeStore& small_store() {
  static const MadeStore store = make_store(16, 2 * kPageBytes);
  return store;
}

const MadeStore& large_store() {
  static const MadeStore store = make_store(256, kPageBytes - 1);
  return store;
}

Outcome open_and_check(const MadeStore& store, const StoreFiles& files, const Expect& expect) {
  place(files);
  std::set<std::string> names = scratch().names();
  names.erase("LOCK");
  InlineEngine engine;
  NoClient client;
  Opened opened = open_log(store.options, engine, client);
  if (!opened.status.ok()) {
    require(expect.refusal_allowed, "refused: " + opened.status.to_string());
    const Code code = opened.status.code();
    require(code == Code::kCorruption || code == Code::kFormatVersion || code == Code::kInvalidArgument,
            "refused for another reason: " + opened.status.to_string());
    std::set<std::string> now = scratch().names();
    now.erase("LOCK");
    require(now == names && scratch().get("superblock") == files.superblock &&
                (!files.has_checkpoint || scratch().get("index.ckpt") == files.checkpoint) &&
                (!files.has_data || scratch().get("data.000") == files.data),
            "a refused directory was changed: " + opened.status.to_string());
    return {.refusal = code, .recovered = {}};
  }
  const nvme::LogStats found_stats = opened.log->stats();
  Outcome outcome{.refusal = Code::kOk, .recovered = opened.recovered, .from_checkpoint = found_stats.recovered_from_checkpoint};
  std::uint64_t region_bytes = 0;
  std::memcpy(&region_bytes, files.superblock.data() + offsetof(nvme::Superblock, region_bytes), sizeof region_bytes);
  const auto region_pages = static_cast<std::uint32_t>(region_bytes / kPageBytes);
  const auto max_regions = static_cast<std::uint32_t>(store.options.limit_bytes / region_bytes);
  check_structure(opened.recovered, region_pages, max_regions);
  check_records(store, *opened.log, opened.recovered, expect);
  require(opened.log->stats().allocated_bytes <= store.options.limit_bytes, "more space than the limit");

  if (!expect.goes_on) return outcome;

  // The store goes on: what is written now is there now and after another start.
  nvme::PageBuffer image = make_image(kNewId, kPageBytes);
  const auto added = append(*opened.log, image, kNewId);
  require(added.ok() || added.status().code() == Code::kResourceExhausted, "append: " + added.status().to_string());
  std::vector<RecoveredRecord> index = opened.recovered;
  if (added.ok()) {
    nvme::PageBuffer back(added->pages);
    const Status status = read(*opened.log, *added, key_of(kNewId), back);
    require(status.ok() && payload_is_of(back.data(), kNewId), "the new record does not read: " + status.to_string());
    index.push_back({key_of(kNewId), *added});
    check_structure(index, region_pages, max_regions);
  }
  require(opened.log->maintain().ok(), "maintain");
  const Status saved = opened.log->checkpoint(entries_of(index));
  require(saved.ok() || saved.code() == Code::kResourceExhausted, "checkpoint: " + saved.to_string());
  opened.log.reset();

  Opened again = open_log(store.options, engine, client);
  require(again.status.ok(), "opened once, then refused: " + again.status.to_string());
  check_structure(again.recovered, region_pages, max_regions);
  if (!expect.only_what_was_written) return outcome;
  const auto found = [&](const RecoveredRecord& wanted) {
    return std::any_of(again.recovered.begin(), again.recovered.end(),
                       [&](const RecoveredRecord& record) { return record.key == wanted.key && record.extent == wanted.extent; });
  };
  for (const RecoveredRecord& record : index) require(found(record), "lost by the next start: " + text(record.extent));
  return outcome;
}

Bytes Input::take_bytes(std::size_t count) {
  count = std::min(count, left_.size());
  Bytes bytes(count);
  if (count != 0) std::memcpy(bytes.data(), left_.data(), count);
  left_ = left_.subspan(count);
  return bytes;
}

void repair_slot_root(std::byte* page) {
  nvme::StreamChecksum checksum;
  checksum.update(page, offsetof(SlotHeader, root));
  checksum.update(page + offsetof(SlotHeader, segment), offsetof(SlotHeader, rank) - offsetof(SlotHeader, segment));
  const std::uint64_t root = checksum.digest();
  std::memcpy(page + offsetof(SlotHeader, root), &root, sizeof root);
}

void repair_footer(std::span<std::byte> region) {
  nvme::FooterTrailer trailer;
  std::byte* const at = region.data() + region.size() - sizeof trailer;
  std::memcpy(&trailer, at, sizeof trailer);
  const std::uint64_t footer_bytes = std::uint64_t{nvme::footer_pages(trailer.record_count)} * kPageBytes;
  if (footer_bytes > region.size()) return;
  std::vector<nvme::FooterEntry> entries(trailer.record_count);
  if (!entries.empty()) {
    std::memcpy(static_cast<void*>(entries.data()), region.data() + region.size() - footer_bytes,
                entries.size() * sizeof(nvme::FooterEntry));
  }
  trailer.checksum = nvme::footer_checksum(entries.data(), entries.size(), trailer);
  std::memcpy(at, &trailer, sizeof trailer);
}

void repair_page(std::span<std::byte> data, std::uint32_t region_pages, std::uint32_t page) {
  std::byte* const at = data.data() + page * kPageBytes;
  std::uint64_t magic = 0;
  std::memcpy(&magic, at, sizeof magic);
  if (magic == nvme::kRegionMagic || magic == nvme::kSkipMagic || magic == nvme::kSuperblockMagic) {
    const std::uint64_t checksum = nvme::checksum_bytes(at, nvme::kPageChecksumOffset);
    std::memcpy(at + nvme::kPageChecksumOffset, &checksum, sizeof checksum);
  } else if (magic == kSlotMagic) {
    repair_slot_root(at);
  } else if (page % region_pages == region_pages - 1) {
    const std::uint64_t region_bytes = region_pages * kPageBytes;
    repair_footer(data.subspan(page / region_pages * region_bytes, region_bytes));
  }
}

void repair_checkpoint(Bytes& file) {
  if (file.size() < kPageBytes) return;
  const std::uint64_t body = nvme::checksum_bytes(file.data() + kPageBytes, file.size() - kPageBytes);
  std::memcpy(file.data() + offsetof(nvme::CheckpointHeader, body_checksum), &body, sizeof body);
  const std::uint64_t whole = nvme::checksum_bytes(file.data(), nvme::kPageChecksumOffset);
  std::memcpy(file.data() + nvme::kPageChecksumOffset, &whole, sizeof whole);
}

}  // namespace lmcn::fuzz
