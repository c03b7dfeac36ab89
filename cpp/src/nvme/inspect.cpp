#include "nvme/inspect.hpp"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <map>
#include <unordered_map>

#include "nvme/striped_log.hpp"

namespace lmcn::nvme {

Result<std::unique_ptr<StoreFiles>> StoreFiles::open(const std::string& path, Access access, io::IoEngine& engine) {
  Result<std::unique_ptr<Directory>> directory = Directory::open_existing(path, access == Access::kChange);
  if (!directory.ok()) return directory.status();
  const Result<std::optional<Superblock>> superblock = load_superblock(**directory, engine);
  if (!superblock.ok()) return superblock.status();
  if (!superblock->has_value()) return Status(Code::kNotFound, path + " is not a store directory: it has no superblock");
  std::unique_ptr<StoreFiles> files(new StoreFiles(engine, std::move(directory).value(), **superblock));
  files->access_ = access;
  const int mode = access == Access::kChange ? O_RDWR : O_RDONLY;
  Result<Fd> data = files->directory_->open_file("data.000", mode | O_DIRECT);
  if (data.status().sys_errno() == EINVAL || data.status().sys_errno() == EOPNOTSUPP) {
    data = files->directory_->open_file("data.000", mode);
  }
  if (data.ok()) {
    files->data_ = std::move(data).value();
  } else if (data.status().code() != Code::kNotFound) {
    return data.status();
  }
  return files;
}

Result<std::uint64_t> StoreFiles::allocated_bytes() const {
  std::uint64_t bytes = 0;
  for (const char* name : {"LOCK", "superblock", "data.000", "index.ckpt", "superblock.tmp", "index.ckpt.tmp"}) {
    const Result<Fd> fd = directory_->open_file(name, O_RDONLY);
    if (fd.status().code() == Code::kNotFound) continue;
    if (!fd.ok()) return fd.status();
    struct stat found{};
    if (::fstat(fd->get(), &found) != 0) return Status::from_errno(errno, "fstat " + directory_->path_of(name));
    bytes += static_cast<std::uint64_t>(found.st_blocks) * 512;
  }
  return bytes;
}

Result<StoreFiles::Contents> StoreFiles::read_contents(StoreReader& reader, bool all_may_fail) {
  Contents out;
  out.checkpoint = load_checkpoint(*directory_, engine_, superblock_);
  out.next_sequence = superblock_.sequence_floor;
  const LoadedCheckpoint* checkpoint = out.checkpoint.loaded ? &*out.checkpoint.loaded : nullptr;
  if (checkpoint) {
    out.next_sequence =
        std::max({out.next_sequence, checkpoint->header.next_region_sequence, checkpoint->header.next_record_sequence});
  }
  if (!out.checkpoint.why_not.empty()) out.notes.push_back("index.ckpt is not used: " + out.checkpoint.why_not);
  if (!data_.valid()) return out;
  struct stat file{};
  if (::fstat(data_.get(), &file) != 0) return Status::from_errno(errno, "fstat " + directory_->path_of("data.000"));
  const std::uint64_t regions = static_cast<std::uint64_t>(file.st_size) / superblock_.region_bytes;
  if (regions > kMaxRegionsPerPath) {
    return Status(Code::kCorruption, directory_->path_of("data.000") + " has " + std::to_string(regions) +
                                         " regions, there can be " + std::to_string(kMaxRegionsPerPath));
  }
  const auto count = static_cast<std::uint32_t>(regions);
  out.regions.resize(count);
  std::uint32_t unreadable = 0;
  Status last_failure;
  reader.read_headers(count, [&](std::uint32_t number, const Status& status, const RegionHeader* header) {
    RegionReport& report = out.regions[number].report;
    report.region = number;
    if (!status.ok()) {
      report.state = "unreadable";
      ++unreadable;
      last_failure = status;
      out.notes.push_back(status.message() + " (region " + std::to_string(number) + ")");
    } else if (header == nullptr) {
      report.state = "unused";
    } else {
      report.sequence = header->sequence;
      report.epoch = header->epoch;
      report.opened_unix_s = header->opened_unix_s;
      report.state = "cleared";
      out.next_sequence = std::max(out.next_sequence, header->sequence + 1);
      if (header->epoch == superblock_.epoch) out.found.push_back({number, header->sequence, header->opened_unix_s});
    }
  });
  out.unreadable_regions = unreadable;
  if (unreadable != 0 && unreadable == count && !all_may_fail) return last_failure;
  sort_found(out.found);
  std::unordered_map<ChunkKey, std::pair<std::uint32_t, std::uint32_t>, ChunkKeyHash> last;  // region, page
  reader.read_contents(out.found, checkpoint, [&](const FoundRegion& found, const RegionContents& contents) {
    Region& region = out.regions[found.region];
    region.found = true;
    region.contents = contents;
    region.report.state = contents.end != RegionEnd::kWalk ? "sealed" : contents.next_page == 1 ? "clean" : "open";
    out.next_sequence = std::max(out.next_sequence, contents.last_record_sequence + 1);
    for (const PlacedRecord& record : contents.records) last[record.key] = {found.region, record.page};
  });
  for (Region& region : out.regions) {
    const std::uint32_t number = region.report.region;
    std::uint64_t pages = 0;
    for (const PlacedRecord& record : region.contents.records) {
      if (last.at(record.key) != std::pair(number, record.page)) continue;
      out.live.push_back({record.key, Extent{number, record.page, record.pages}, record.hits});
      pages += record.pages;
      ++region.report.records;
    }
    region.report.live_bytes = pages * kPageBytes;
    if (region.found) region.report.dead_bytes = (region.contents.next_page - 1 - pages) * kPageBytes;
  }
  out.read_errors = reader.read_errors();
  return out;
}

void StoreFiles::read_record_headers(StoreReader& reader, const std::vector<Region>& regions,
                                     const std::vector<std::pair<std::uint32_t, std::uint32_t>>& places,
                                     const std::function<void(const RecordHeader&)>& sink) {
  constexpr std::size_t kAtOnce = 64;
  PageBuffer pages(kAtOnce);
  for (std::size_t begin = 0; begin < places.size(); begin += kAtOnce) {
    const auto some = std::span(places).subspan(begin, std::min(kAtOnce, places.size() - begin));
    const std::vector<io::IoResult> results = reader.read_pages(some, pages);
    for (std::size_t i = 0; i < some.size(); ++i) {
      const SlotHeader& header = *slot_header(pages.page(i));
      const auto [region, page] = some[i];
      const bool holds = results[i].status("read").ok() &&
                         check_header(pages.page(i), (reader.region_pages() - page) * kPageBytes).ok() &&
                         header.region_sequence == regions[region].report.sequence;
      sink({region, page, holds, holds ? header.ns : NamespaceId{}});
    }
  }
}

Result<Inspection> StoreFiles::inspect(bool namespaces) {
  StoreReader files = reader();
  Result<Contents> contents = read_contents(files);
  if (!contents.ok()) return contents.status();
  const Result<std::uint64_t> allocated = allocated_bytes();
  if (!allocated.ok()) return allocated.status();

  Inspection out;
  out.path = directory_->path();
  out.uuid = superblock_.uuid;
  out.format_version = superblock_.format;
  out.region_bytes = superblock_.region_bytes;
  out.epoch = superblock_.epoch;
  out.created_unix_s = superblock_.created_unix_s;
  out.limit_bytes = contents->checkpoint.limit_bytes;
  out.allocated_bytes = *allocated;
  out.checkpoint_bytes = contents->checkpoint.bytes;
  out.checkpoint_note = contents->checkpoint.why_not;
  out.totals = contents->checkpoint.totals;
  out.now_unix_s = unix_seconds_now();
  const auto add = [](Tally& tally, std::uint64_t bytes) {
    ++tally.records;
    tally.bytes += bytes;
  };
  for (const Live& record : contents->live) {
    const std::uint64_t bytes = record.extent.pages * kPageBytes;
    add(out.live, bytes);
    add(out.hits[static_cast<std::size_t>(std::bit_width(record.hits))], bytes);
    const std::uint64_t opened = contents->regions[record.extent.region].report.opened_unix_s;
    const std::uint64_t age = out.now_unix_s - std::min(out.now_unix_s, opened);
    const auto at = std::find_if(kAgeClasses_s.begin(), kAgeClasses_s.end(), [age](std::uint64_t end) { return age < end; });
    add(out.ages[opened == 0 ? kAgeClasses_s.size() + 1 : static_cast<std::size_t>(at - kAgeClasses_s.begin())], bytes);
  }
  if (namespaces) {
    std::vector<std::pair<std::uint32_t, std::uint32_t>> places;
    for (const Live& record : contents->live) places.emplace_back(record.extent.region, record.extent.page);
    std::map<NamespaceId, Tally> tallies;
    std::size_t at = 0;
    read_record_headers(files, contents->regions, places, [&](const RecordHeader& header) {
      const Live& record = contents->live[at++];
      if (header.holds) {
        add(tallies[header.ns], record.extent.pages * kPageBytes);
      } else {
        ++out.unreadable_headers;
      }
    });
    for (const auto& [ns, tally] : tallies) out.namespaces.push_back({ns, tally});
    std::stable_sort(out.namespaces.begin(), out.namespaces.end(),
                     [](const NamespaceReport& a, const NamespaceReport& b) { return a.tally.bytes > b.tally.bytes; });
  }
  for (const Region& region : contents->regions) {
    out.dead_bytes += region.report.dead_bytes;
    out.regions.push_back(region.report);
  }
  out.read_errors = files.read_errors();
  return out;
}

}  // namespace lmcn::nvme
