// Taking things out of a store that nobody has open.
//
// Invariant: whatever names a record (checkpoint, footer) is replaced durably before the record is destroyed, and sequences that a
// destroyed region header showed are in the superblock's floor before. So after a death at any point the next open finds whole
// records or none of them, and clearing again finishes what was begun.
#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <unordered_set>

#include "nvme/geometry.hpp"
#include "nvme/inspect.hpp"

namespace lmcn::nvme {

struct StoreFiles::Victims {
  std::vector<bool> whole;                                                   // by region: nothing in it stays
  std::map<std::pair<std::uint32_t, std::uint32_t>, std::uint32_t> records;  // region, page: pages; of regions that stay
  std::vector<RegionContents> listed;                                        // by region: what its footer or a walk gives

  bool has(std::uint32_t region, std::uint32_t page) const { return whole[region] || records.contains({region, page}); }
};

Status StoreFiles::write_page(const std::byte* page, std::uint64_t bytes, std::uint64_t offset) {
  io::IoRequest request;
  request.op = io::Op::kWrite;
  request.fd = data_.get();
  request.data = const_cast<std::byte*>(page);
  request.bytes = bytes;
  request.offset = offset;
  return io::run_sync(engine_, request).status("write to " + directory_->path_of("data.000"));
}

Status StoreFiles::sync_data() {
  io::IoRequest request;
  request.op = io::Op::kSync;
  request.fd = data_.get();
  return io::run_sync(engine_, request).status("fdatasync of " + directory_->path_of("data.000"));
}

Result<ClearReport> StoreFiles::clear(const ClearRequest& request) {
  if (access_ != Access::kChange) return Status(Code::kInternal, "clear: the store was opened for looking only");
  if (request.older_than_s && request.ns) {
    return Status(Code::kInvalidArgument, "clear: an age and a namespace together; give one");
  }
  StoreReader files = reader();
  const bool all = !request.older_than_s && !request.ns;
  Result<Contents> read = read_contents(files, all);
  if (!read.ok()) return read.status();
  const Contents& contents = *read;
  const Result<std::uint64_t> before = allocated_bytes();
  if (!before.ok()) return before.status();
  for (const char* leftover : {"superblock.tmp", "index.ckpt.tmp"}) LMCN_RETURN_IF_ERROR(directory_->remove(leftover));

  ClearReport out;
  Victims victims;
  victims.whole.resize(contents.regions.size());
  victims.listed.resize(contents.regions.size());
  if (all) {
    victims.whole.assign(contents.regions.size(), true);
  } else if (request.older_than_s) {
    const std::uint64_t now = unix_seconds_now();
    for (const FoundRegion& found : contents.found) {
      const RegionContents& listed = contents.regions[found.region].contents;
      if (listed.next_page == 1 && !listed.read_failed) continue;  // clean
      if (found.opened_unix_s == 0) {
        ++out.regions_of_unknown_age;
      } else if (now - std::min(now, found.opened_unix_s) >= *request.older_than_s) {
        victims.whole[found.region] = true;
      }
    }
  } else {
    std::vector<std::pair<std::uint32_t, std::uint32_t>> places;
    std::vector<std::uint32_t> pages_of;
    std::vector<bool> in_doubt(contents.regions.size());  // there may be records that nothing showed
    // Also what the checkpoint leaves out, which a footer would bring back when the checkpoint is lost; and what a footer leaves
    // out, which a walk would: a clear that ended half-way may have come so far.
    files.read_contents(contents.found, nullptr, [&](const FoundRegion& found, const RegionContents& listed) {
      std::unordered_set<std::uint32_t> known;
      const auto take = [&](const PlacedRecord& record) {
        if (!known.insert(record.page).second) return;
        places.emplace_back(found.region, record.page);
        pages_of.push_back(record.pages);
      };
      std::for_each(listed.records.begin(), listed.records.end(), take);
      const std::vector<PlacedRecord>& by_checkpoint = contents.regions[found.region].contents.records;
      std::for_each(by_checkpoint.begin(), by_checkpoint.end(), take);  // a walk may have ended before these
      in_doubt[found.region] = listed.read_failed;
      if (listed.end != RegionEnd::kWalk) {
        const RegionContents walked = files.walk_all(found);
        std::for_each(walked.records.begin(), walked.records.end(), take);
        in_doubt[found.region] = in_doubt[found.region] || walked.read_failed;
      }
      victims.listed[found.region] = listed;
    });
    std::vector<std::uint64_t> staying(contents.regions.size());
    std::size_t at_place = 0;
    read_record_headers(files, contents.regions, places, [&](const RecordHeader& header) {
      const std::uint32_t pages = pages_of[at_place++];
      out.unreadable_headers += header.holds ? 0 : 1;
      if (header.holds && header.ns == *request.ns) {
        victims.records.insert({{header.region, header.page}, pages});
      } else {
        ++staying[header.region];
      }
    });
    for (auto at = victims.records.begin(); at != victims.records.end();) {
      const std::uint32_t region = at->first.first;
      if (staying[region] == 0 && !in_doubt[region]) {
        victims.whole[region] = true;
        at = victims.records.erase(at);
      } else {
        ++at;
      }
    }
  }
  if (!all) {
    out.unreadable_regions = contents.unreadable_regions;
    out.read_errors = files.read_errors();
  }
  for (const Live& record : contents.live) {
    if (!victims.has(record.extent.region, record.extent.page)) continue;
    ++out.cleared.records;
    out.cleared.bytes += record.extent.pages * kPageBytes;
  }
  for (const FoundRegion& found : contents.found) out.regions_dropped += victims.whole[found.region] ? 1 : 0;
  LMCN_RETURN_IF_ERROR(all ? clear_all(contents) : clear_some(contents, victims));
  const Result<std::uint64_t> after = allocated_bytes();
  if (!after.ok()) return after.status();
  out.freed_bytes = *before - std::min(*before, *after);
  return out;
}

// The epoch is all that counts; the rest gives space back.
Status StoreFiles::clear_all(const Contents& contents) {
  Superblock raised = superblock_;
  ++raised.epoch;
  raised.sequence_floor = contents.next_sequence + kSequenceGap;
  LMCN_RETURN_IF_ERROR(store_superblock(*directory_, engine_, raised));
  superblock_ = raised;
  if (data_.valid() && ::ftruncate(data_.get(), 0) != 0) {
    return Status::from_errno(errno, "ftruncate " + directory_->path_of("data.000"));
  }
  if (!contents.checkpoint.known) return directory_->remove("index.ckpt");
  // Nothing but the totals and the day's bytes, so that they go on; until it is replaced the old one has them.
  Result<FileReplacement> file = FileReplacement::create(*directory_, engine_, "index.ckpt");
  if (!file.ok()) return file.status();
  CheckpointWriter writer(*file, [](std::uint64_t) { return Status(); });
  CheckpointHeader header{};
  header.uuid = superblock_.uuid;
  header.epoch = superblock_.epoch;
  header.next_region_sequence = header.next_record_sequence = raised.sequence_floor;
  header.totals = contents.checkpoint.totals;
  header.limit_bytes = contents.checkpoint.limit_bytes;
  header.hours = contents.checkpoint.hours;
  return writer.commit(header);
}

Status StoreFiles::replace_checkpoint(const Contents& contents, const Victims& victims) {
  if (!contents.checkpoint.loaded) return {};
  const LoadedCheckpoint& old = *contents.checkpoint.loaded;
  // Two at once only where the limit has room for both.
  const std::uint64_t limit = contents.checkpoint.limit_bytes;
  const std::uint64_t regions = contents.regions.size() * superblock_.region_bytes;
  const std::uint64_t room = limit - std::min(limit, overhead_bytes(limit) + regions);
  if (2 * contents.checkpoint.bytes > room) {
    LMCN_RETURN_IF_ERROR(directory_->remove("index.ckpt"));
    LMCN_RETURN_IF_ERROR(directory_->sync());
  }
  Result<FileReplacement> file = FileReplacement::create(*directory_, engine_, "index.ckpt");
  if (!file.ok()) return file.status();
  CheckpointWriter writer(*file, [](std::uint64_t) { return Status(); });  // it is no longer than the old one
  CheckpointHeader header = old.header;
  header.entry_count = 0;
  for (const CheckpointEntry& entry : old.entries) {
    if (entry.region < victims.whole.size() && victims.has(entry.region, entry.page)) continue;
    writer.add(entry);
    ++header.entry_count;
  }
  for (std::uint32_t i = 0; i < old.regions.size(); ++i) {
    // Sealed and empty: until its header is gone, neither its footer nor a walk is asked.
    const bool whole = i < victims.whole.size() && victims.whole[i];
    const Region* region = whole && contents.regions[i].found ? &contents.regions[i] : nullptr;
    writer.add(region ? CheckpointRegion{region->report.sequence, region->contents.next_page, 1} : old.regions[i]);
  }
  return writer.commit(header);
}

Status StoreFiles::clear_some(const Contents& contents, Victims& victims) {
  // Sequences of headers that go must not be lost with them. And behind a torn record there may be whole ones that nothing shows,
  // in reach of a walk as soon as a record with a lower sequence takes the torn one's place: also when nothing goes now.
  Superblock raised = superblock_;
  raised.sequence_floor = std::max(raised.sequence_floor, contents.next_sequence + kSequenceGap);
  LMCN_RETURN_IF_ERROR(store_superblock(*directory_, engine_, raised));
  superblock_ = raised;
  const bool any_whole = std::find(victims.whole.begin(), victims.whole.end(), true) != victims.whole.end();
  if (victims.records.empty() && !any_whole) return {};
  LMCN_RETURN_IF_ERROR(replace_checkpoint(contents, victims));

  // A footer that is torn here is no footer: the region is walked then.
  bool any_footer = false;
  for (std::uint32_t i = 0; i < victims.listed.size(); ++i) {
    const RegionContents& listed = victims.listed[i];
    const auto goes = [&](const PlacedRecord& record) { return victims.records.contains({i, record.page}); };
    if (listed.end != RegionEnd::kFooter || std::none_of(listed.records.begin(), listed.records.end(), goes)) continue;
    std::vector<FooterEntry> stay;
    for (const PlacedRecord& record : listed.records) {
      if (!goes(record)) stay.push_back({record.key, record.page, record.pages});
    }
    const PageBuffer footer = make_footer(stay, superblock_.uuid, contents.regions[i].report.sequence, listed.last_record_sequence);
    LMCN_RETURN_IF_ERROR(write_page(footer.data(), footer.bytes(), (i + 1) * superblock_.region_bytes - footer.bytes()));
    any_footer = true;
  }
  if (any_footer) LMCN_RETURN_IF_ERROR(sync_data());

  bool any_header = false;
  for (const auto& [place, pages] : victims.records) {
    const auto [region, page] = place;
    PageBuffer buffer(1);
    auto* skip = reinterpret_cast<SkipHeader*>(buffer.data());
    skip->magic = kSkipMagic;
    skip->uuid = superblock_.uuid;
    skip->region_sequence = contents.regions[region].report.sequence;
    skip->pages = pages;
    seal_page(*skip);
    LMCN_RETURN_IF_ERROR(write_page(buffer.data(), kPageBytes, region * superblock_.region_bytes + page * kPageBytes));
    any_header = true;
  }
  for (const FoundRegion& found : contents.found) {
    if (!victims.whole[found.region]) continue;
    PageBuffer buffer(1);
    auto* header = reinterpret_cast<RegionHeader*>(buffer.data());
    header->magic = kRegionMagic;
    header->uuid = superblock_.uuid;
    header->region = found.region;
    header->sequence = found.sequence;
    header->epoch = 0;  // never the superblock's
    seal_page(*header);
    LMCN_RETURN_IF_ERROR(write_page(buffer.data(), kPageBytes, found.region * superblock_.region_bytes));
    any_header = true;
  }
  if (any_header) LMCN_RETURN_IF_ERROR(sync_data());
  for (const FoundRegion& found : contents.found) {
    if (!victims.whole[found.region]) continue;
    const int punched =
        ::fallocate(data_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                    static_cast<off_t>(found.region * superblock_.region_bytes), static_cast<off_t>(superblock_.region_bytes));
    // Without holes the store keeps the space, and uses it again.
    if (punched != 0 && errno != EOPNOTSUPP && errno != ENOSYS) {
      return Status::from_errno(errno,
                                "punch region " + std::to_string(found.region) + " out of " + directory_->path_of("data.000"));
    }
  }
  return {};
}

}  // namespace lmcn::nvme
