// A directory that is looked at and not owned: recovery without its repairs (LogOptions::read_only).
#include "lmcn/inspect.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <unordered_map>

#include "nvme/existing.hpp"

namespace lmcn {
namespace nvme {
namespace {

constexpr std::size_t kHeaderBatch = 256;

std::string hex(const Uuid& uuid) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const std::uint8_t byte : uuid) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

const char* name_of(const Region& r, std::uint64_t sequence) {
  if (r.footer_missing && r.state == RegionState::kSealed) return "unsealed";
  switch (r.state) {
    case RegionState::kOpen:
      return "open";
    case RegionState::kClean:
      return "clean";
    case RegionState::kSealed:
      return "sealed";
    default:
      return sequence == 0 ? "free" : "clean";
  }
}

std::size_t hits_class(std::uint16_t hits) {
  return hits < 4 ? hits : std::min<std::size_t>(6, static_cast<std::size_t>(std::bit_width(hits)) + 1);
}

}  // namespace

Result<ExistingStore> ExistingStore::open(const std::string& directory) {
  ExistingStore store;
  auto engine = io::make_engine({.kind = io::EngineKind::kAuto}, &store.engine_note_);
  if (!engine.ok()) return engine.status();
  store.engine_ = std::move(engine).value();
  store.client_ = std::make_unique<NoClient>();
  LogOptions options;
  options.directory = directory;
  options.read_only = true;
  options.lock_wait = std::chrono::milliseconds(0);
  options.allow_network_file_system = true;
  auto opened = RegionLog::open(options, *store.engine_, *store.client_);
  if (!opened.ok()) return opened.status();
  store.log_.reset(static_cast<Log*>(std::move(opened).value().release()));
  // A key may come twice: the last one counts.
  std::unordered_map<ChunkKey, std::uint32_t, ChunkKeyHash> last;
  std::vector<RecoveredRecord> all;
  store.log_->adopt([&](const RecoveredRecord& record) {
    last[record.key] = static_cast<std::uint32_t>(all.size());
    all.push_back(record);
    return 0u;
  });
  for (std::uint32_t i = 0; i < all.size(); ++i) {
    if (last[all[i].key] == i) {
      store.records_.push_back(all[i]);
    } else {
      store.superseded_.push_back(all[i]);
    }
  }
  return store;
}

Status ExistingStore::read_namespaces(std::vector<std::optional<NamespaceId>>& namespaces) {
  namespaces.assign(records_.size(), std::nullopt);
  PageBuffer pages(kHeaderBatch);
  for (std::size_t begin = 0; begin < records_.size(); begin += kHeaderBatch) {
    const std::size_t count = std::min(kHeaderBatch, records_.size() - begin);
    std::vector<std::uint64_t> offsets;
    for (std::size_t i = 0; i < count; ++i) {
      const Extent& extent = records_[begin + i].extent;
      offsets.push_back(log_->offset_of(extent.region, extent.page));
    }
    const std::vector<io::IoResult> results = log_->read_pages(offsets, pages);
    for (std::size_t i = 0; i < count; ++i) {
      const RecoveredRecord& record = records_[begin + i];
      const SlotHeader& header = *slot_header(pages.page(i));
      if (results[i].status("header").ok() && check_header(pages.page(i), record.extent.pages * kPageBytes).ok() &&
          header.key == record.key && header.region_sequence == log_->words_[record.extent.region].sequence) {
        namespaces[begin + i] = header.ns;
      }
    }
  }
  return {};
}

StoreReport ExistingStore::report() const {
  StoreReport report;
  const Log& log = *log_;
  const LogStats stats = log.stats();
  report.directory = log.directory_->path();
  report.uuid = hex(log.uuid_);
  report.format = kFormatVersion;
  report.epoch = log.superblock_.epoch;
  report.region_bytes = log.geometry_.region_bytes;
  report.allocated_bytes = log.directory_->allocated_bytes();
  report.from_checkpoint = stats.recovered_from_checkpoint;
  report.from_footers = stats.recovered_from_footers;
  report.from_walks = stats.recovered_from_walk;
  report.stored_bytes = stats.life_stored_bytes;
  report.reappended_bytes = stats.life_reappended_bytes;
  report.day_bytes = log.last_day_bytes();
  report.notes = log.notes();
  report.hits.assign(7, 0);
  report.regions.resize(log.region_count_);
  for (std::uint32_t i = 0; i < log.region_count_; ++i) {
    RegionReport& region = report.regions[i];
    region.region = i;
    region.sequence = log.words_[i].sequence;
    region.state = name_of(log.regions_[i], region.sequence);
    region.prepared_unix_s = log.regions_[i].prepared_unix_s;
  }
  for (const RecoveredRecord& record : records_) {
    const std::uint64_t bytes = record.extent.pages * kPageBytes;
    RegionReport& region = report.regions[record.extent.region];
    ++region.records;
    region.record_bytes += bytes;
    ++report.records;
    report.record_bytes += bytes;
    ++report.hits[hits_class(record.hits)];
  }
  for (std::uint32_t i = 0; i < log.region_count_; ++i) {
    RegionReport& region = report.regions[i];
    const std::uint64_t used = (log.regions_[i].next_page - 1) * kPageBytes;
    region.dead_bytes = region.sequence == 0 || used < region.record_bytes ? 0 : used - region.record_bytes;
  }
  return report;
}

}  // namespace nvme

Result<StoreReport> inspect_store(const std::string& directory, bool namespaces) {
  Result<nvme::ExistingStore> store = nvme::ExistingStore::open(directory);
  if (!store.ok()) return store.status();
  StoreReport report = store->report();
  if (!namespaces) return report;
  std::vector<std::optional<NamespaceId>> found;
  LMCN_RETURN_IF_ERROR(store->read_namespaces(found));
  std::unordered_map<std::string, NamespaceReport> by_name;
  for (std::size_t i = 0; i < found.size(); ++i) {
    if (!found[i]) {
      ++report.unreadable_headers;
      continue;
    }
    NamespaceReport& ns = by_name[found[i]->to_hex()];
    ns.ns = *found[i];
    ++ns.records;
    ns.bytes += store->records()[i].extent.pages * kPageBytes;
  }
  for (auto& [name, ns] : by_name) report.namespaces.push_back(ns);
  std::sort(report.namespaces.begin(), report.namespaces.end(), [](const NamespaceReport& a, const NamespaceReport& b) {
    return a.bytes != b.bytes ? a.bytes > b.bytes : a.ns < b.ns;
  });
  return report;
}

Result<VerifyReport> verify_store(const std::string& directory, const std::function<bool(std::uint64_t, std::uint64_t)>& progress,
                                  unsigned depth) {
  Result<nvme::ExistingStore> store = nvme::ExistingStore::open(directory);
  if (!store.ok()) return store.status();
  const std::vector<nvme::RecoveredRecord>& records = store->records();
  std::uint64_t total = 0;
  std::uint32_t largest = nvme::kMinRecordPages;
  for (const nvme::RecoveredRecord& record : records) {
    total += record.extent.pages * kPageBytes;
    largest = std::max(largest, record.extent.pages);
  }
  VerifyReport report;
  if (depth == 0) return Status(Code::kInvalidArgument, "depth=0: must be at least 1");
  const std::size_t batch = std::min<std::size_t>(depth, std::max<std::size_t>(records.size(), 1));
  nvme::PageBuffer images(batch * largest);
  for (std::size_t begin = 0; begin < records.size() && !report.stopped; begin += batch) {
    const std::size_t count = std::min(batch, records.size() - begin);
    std::vector<Status> results(count);
    for (std::size_t i = 0; i < count; ++i) {
      const nvme::RecoveredRecord& record = records[begin + i];
      store->log().read(record.extent, images.page(i * largest), record.key, nullptr,
                        [&results, i](const Status& status) { results[i] = status; });
    }
    store->log().wait_idle();
    for (std::size_t i = 0; i < count; ++i) {
      const nvme::RecoveredRecord& record = records[begin + i];
      ++report.records;
      report.bytes += record.extent.pages * kPageBytes;
      if (results[i].ok()) continue;
      report.bad.push_back({record.key, record.extent.region, record.extent.page, record.extent.pages, results[i].message()});
      if (results[i].code() == Code::kUnavailable) return results[i];  // the device is gone: the rest says nothing
    }
    if (progress && !progress(report.bytes, total)) report.stopped = true;
  }
  return report;
}

}  // namespace lmcn
