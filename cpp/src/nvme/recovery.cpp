#include "nvme/recovery.hpp"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <mutex>

#include "nvme/log.hpp"

namespace lmcn::nvme {
namespace {

constexpr std::size_t kBatch = 64;  // one-page reads at once

class BatchSink final : public io::CompletionSink {
 public:
  explicit BatchSink(std::size_t count) : results(count), left_(count) {}
  void on_io(const io::IoResult& result) noexcept override {
    std::lock_guard lock(mutex_);
    results[result.tag] = result;
    if (--left_ == 0) done_.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return left_ == 0; });
  }
  std::vector<io::IoResult> results;

 private:
  std::mutex mutex_;
  std::condition_variable done_;
  std::size_t left_;
};

}  // namespace

std::vector<io::IoResult> StoreReader::read_pages(std::span<const std::pair<std::uint32_t, std::uint32_t>> places,
                                                  PageBuffer& pages) {
  BatchSink sink(places.size());
  if (places.empty()) return {};
  std::vector<io::IoRequest> requests(places.size());
  for (std::size_t i = 0; i < places.size(); ++i) {
    requests[i].fd = fd_;
    requests[i].data = pages.page(i);
    requests[i].bytes = kPageBytes;
    requests[i].offset = offset_of(places[i].first, places[i].second);
    requests[i].tag = i;
    requests[i].sink = &sink;
  }
  engine_.submit(requests);
  sink.wait();
  for (const io::IoResult& result : sink.results) read_errors_ += result.status("read").ok() ? 0 : 1;
  return std::move(sink.results);
}

bool StoreReader::read_now(std::byte* data, std::uint64_t bytes, std::uint64_t offset) {
  io::IoRequest request;
  request.fd = fd_;
  request.data = data;
  request.bytes = bytes;
  request.offset = offset;
  const bool ok = io::run_sync(engine_, request).status("read").ok();
  read_errors_ += ok ? 0 : 1;
  return ok;
}

void StoreReader::read_headers(std::uint32_t count, const HeaderSink& sink) {
  PageBuffer pages(kBatch);
  for (std::uint32_t begin = 0; begin < count && go_on_(); begin += kBatch) {
    std::vector<std::pair<std::uint32_t, std::uint32_t>> places;
    for (std::uint32_t i = begin; i < std::min<std::uint64_t>(count, begin + kBatch); ++i) places.emplace_back(i, 0);
    const std::vector<io::IoResult> results = read_pages(places, pages);
    for (std::uint32_t i = 0; i < results.size(); ++i) {
      const std::uint32_t region = begin + i;
      RegionHeader header;
      std::memcpy(static_cast<void*>(&header), pages.page(i), sizeof header);
      const Status status = results[i].status("read of a region header from " + path_);
      const bool holds = status.ok() && page_holds(header, kRegionMagic) && header.uuid == superblock_.uuid &&
                         header.region == region && header.sequence != 0;
      sink(region, status, holds ? &header : nullptr);
    }
  }
}

void sort_found(std::vector<FoundRegion>& found) {
  std::sort(found.begin(), found.end(), [](const FoundRegion& a, const FoundRegion& b) { return a.sequence < b.sequence; });
  for (std::size_t i = 0; i + 1 < found.size();) {
    if (found[i].sequence != found[i + 1].sequence) {
      ++i;
      continue;
    }
    const std::uint64_t twice = found[i].sequence;
    std::erase_if(found, [twice](const FoundRegion& f) { return f.sequence == twice; });
  }
}

void StoreReader::read_contents(std::span<const FoundRegion> found, const LoadedCheckpoint* checkpoint, const ContentsSink& sink) {
  for (std::size_t begin = 0; begin < found.size(); begin += kBatch) {
    const std::span<const FoundRegion> some = found.subspan(begin, std::min(kBatch, found.size() - begin));
    std::vector<std::pair<std::uint32_t, std::uint32_t>> places;
    std::vector<std::size_t> page_of(some.size(), SIZE_MAX);
    for (std::size_t i = 0; i < some.size(); ++i) {
      const CheckpointRegion* known = checkpoint ? checkpoint->find(some[i].region, some[i].sequence) : nullptr;
      if (known && known->sealed != 0) continue;
      page_of[i] = places.size();
      places.emplace_back(some[i].region, region_pages() - 1);
    }
    PageBuffer pages(std::max<std::size_t>(places.size(), 1));
    const std::vector<io::IoResult> results = read_pages(places, pages);
    for (std::size_t i = 0; i < some.size(); ++i) {
      if (!go_on_()) return;
      const bool read = page_of[i] != SIZE_MAX && results[page_of[i]].status("read").ok();
      RegionContents contents = contents_of(some[i], checkpoint, read ? pages.page(page_of[i]) : nullptr);
      contents.read_failed |= page_of[i] != SIZE_MAX && !read;
      sink(some[i], contents);
    }
  }
}

RegionContents StoreReader::contents_of(const FoundRegion& found, const LoadedCheckpoint* checkpoint, const std::byte* last_page) {
  RegionContents contents;
  std::vector<PlacedRecord>& records = contents.records;
  std::uint32_t page = 1;
  const CheckpointRegion* known = checkpoint ? checkpoint->find(found.region, found.sequence) : nullptr;
  if (known && known->known_pages >= 1 && known->known_pages < region_pages()) {
    for (const CheckpointEntry& e : checkpoint->of(found.region)) {
      if (e.page < page || e.pages < kMinRecordPages || std::uint64_t{e.page} + e.pages > known->known_pages) continue;
      records.push_back({e.key, e.page, e.pages, e.hits});
      page = e.page + e.pages;
    }
    page = known->known_pages;
  } else {
    known = nullptr;
  }
  contents.from_checkpoint = records.size();
  if (known && known->sealed != 0) {
    contents.end = RegionEnd::kCheckpoint;
    contents.next_page = page;
  } else if (last_page && read_footer(found, last_page, page, contents)) {
    contents.end = RegionEnd::kFooter;
    contents.next_page = records.empty() ? page : std::max(page, records.back().page + records.back().pages);
  } else {
    contents.end = RegionEnd::kWalk;
    contents.next_page = walk(found, page, contents);
  }
  return contents;
}

bool StoreReader::read_footer(const FoundRegion& found, const std::byte* last_page, std::uint32_t from_page,
                              RegionContents& contents) {
  FooterTrailer trailer;
  std::memcpy(&trailer, last_page + kPageBytes - sizeof trailer, sizeof trailer);
  if (trailer.magic != kFooterMagic || trailer.format != kFormatVersion || trailer.uuid != superblock_.uuid ||
      trailer.sequence != found.sequence || trailer.record_count > region_pages() / kMinRecordPages ||
      trailer.footer_pages != footer_pages(trailer.record_count) || trailer.footer_pages >= region_pages()) {
    return false;
  }
  PageBuffer pages(trailer.footer_pages);
  const std::uint32_t first_page = region_pages() - trailer.footer_pages;
  if (!read_now(pages.data(), pages.bytes(), offset_of(found.region, first_page))) {
    contents.read_failed = true;
    return false;
  }
  const auto* entries = reinterpret_cast<const FooterEntry*>(pages.data());
  std::memcpy(&trailer, pages.data() + pages.bytes() - sizeof trailer, sizeof trailer);
  if (trailer.checksum != footer_checksum(entries, trailer.record_count, trailer)) return false;
  std::uint32_t end = 1;
  for (std::uint32_t i = 0; i < trailer.record_count; ++i) {
    const FooterEntry& e = entries[i];
    if (e.page < end || e.pages < kMinRecordPages || std::uint64_t{e.page} + e.pages > first_page) return false;
    end = e.page + e.pages;
  }
  for (std::uint32_t i = 0; i < trailer.record_count; ++i) {
    if (entries[i].page >= from_page) contents.records.push_back({entries[i].key, entries[i].page, entries[i].pages, 0});
  }
  contents.last_record_sequence = trailer.last_record_sequence;
  return true;
}

RegionContents StoreReader::walk_all(const FoundRegion& found) {
  RegionContents contents;
  contents.next_page = walk(found, 1, contents);
  return contents;
}

// 0: there is no record of this life of the region.
std::uint64_t StoreReader::record_sequence_at(const FoundRegion& found, std::uint32_t page, RegionContents& contents) {
  PageBuffer buffer(1);
  if (!read_now(buffer.data(), kPageBytes, offset_of(found.region, page))) {
    contents.read_failed = true;
    return 0;
  }
  const SlotHeader& header = *slot_header(buffer.data());
  const bool holds = check_header(buffer.data(), (region_pages() - 1 - page) * kPageBytes).ok();
  return holds && header.region_sequence == found.sequence ? header.record_sequence : 0;
}

// Header page by header page; returns the page after the last record.
std::uint32_t StoreReader::walk(const FoundRegion& found, std::uint32_t from_page, RegionContents& contents) {
  PageBuffer buffer(1);
  const std::uint32_t end = region_pages() - 1;  // at least one page is the footer's
  std::uint32_t page = from_page;
  // What a checkpoint lists comes before, so that leftovers of a torn tail which it was written over are not taken for its heirs.
  std::uint64_t last_sequence = contents.records.empty() ? 0 : record_sequence_at(found, contents.records.back().page, contents);
  while (page + kMinRecordPages <= end) {
    if (!read_now(buffer.data(), kPageBytes, offset_of(found.region, page))) {
      contents.read_failed = true;
      break;
    }
    const auto* skip = reinterpret_cast<const SkipHeader*>(buffer.data());
    if (skip->magic == kSkipMagic) {
      if (!page_holds(*skip, kSkipMagic) || skip->uuid != superblock_.uuid || skip->region_sequence != found.sequence ||
          skip->pages < kMinRecordPages || skip->pages > end - page) {
        break;
      }
      page += skip->pages;
      continue;
    }
    const SlotHeader& header = *slot_header(buffer.data());
    if (!check_header(buffer.data(), (end - page) * kPageBytes).ok() || header.region_sequence != found.sequence ||
        header.record_sequence <= last_sequence) {
      break;
    }
    last_sequence = header.record_sequence;
    const auto pages = static_cast<std::uint32_t>(image_bytes(header.payload_bytes) / kPageBytes);
    contents.records.push_back({header.key, page, pages, 0});
    page += pages;
  }
  contents.last_record_sequence = last_sequence;
  return page;
}

// ---- the log's side ----

Status Log::recover() {
  const Result<std::uint32_t> count = data_.regions();
  if (!count.ok()) return count.status();
  region_count_ = std::max(geometry_.max_regions, *count);
  regions_.resize(region_count_);
  words_ = std::make_unique<RegionWord[]>(region_count_);
  next_region_sequence_ = next_record_sequence_ = superblock_.sequence_floor;

  StoreReader reader(engine_, data_.fd(), data_.path(), superblock_);
  Status ended;  // by options_.go_on
  if (options_.go_on) {
    reader.ask([&] {
      if (ended.ok()) ended = options_.go_on();
      return ended.ok();
    });
  }
  std::vector<FoundRegion> found;
  LMCN_RETURN_IF_ERROR(find_regions(reader, *count, found));
  LMCN_RETURN_IF_ERROR(ended);
  sort_found(found);
  LMCN_RETURN_IF_ERROR(fit_into_limit(*count, found));

  const CheckpointFile file = load_checkpoint(*directory_, engine_, superblock_);
  if (!file.why_not.empty()) note("index.ckpt not used (" + file.why_not + "): reading footers");
  checkpoint_bytes_ = file.bytes;
  totals_before_ = file.totals;
  written_.restore(file.hours, static_cast<std::int64_t>(unix_seconds_now()));
  if (totals_before_.since_unix_s == 0) totals_before_.since_unix_s = unix_seconds_now();
  counts_since_checkpoint_ = file.loaded.has_value();
  if (file.loaded) {
    next_region_sequence_ = std::max(next_region_sequence_, file.loaded->header.next_region_sequence);
    next_record_sequence_ = std::max(next_record_sequence_, file.loaded->header.next_record_sequence);
  }
  reader.read_contents(found, file.loaded ? &*file.loaded : nullptr,
                       [this](const FoundRegion& region, const RegionContents& contents) { recover_region(region, contents); });
  LMCN_RETURN_IF_ERROR(ended);
  counters_.read_errors.fetch_add(reader.read_errors(), std::memory_order_relaxed);
  if (checkpoint_bytes_ > checkpoint_allowance()) {
    LMCN_RETURN_IF_ERROR(directory_->remove("index.ckpt"));
    checkpoint_bytes_ = 0;
  }
  settle_recovered(found);
  next_region_sequence_ += kSequenceGap;
  next_record_sequence_ += kSequenceGap;
  // L2: headers of clean regions may not have been durable when the last owner died.
  if (*count != 0) LMCN_RETURN_IF_ERROR(sync_now());
  const bool ready = std::any_of(regions_.begin(), regions_.end(),
                                 [](const Region& r) { return r.state == RegionState::kOpen || r.state == RegionState::kClean; });
  if (!ready && prepare_one(false)) in_flight_.wait_zero();
  return {};
}

Status Log::find_regions(StoreReader& reader, std::uint32_t count, std::vector<FoundRegion>& found) {
  std::uint32_t unreadable = 0;
  Status last_failure;
  reader.read_headers(count, [&](std::uint32_t region, const Status& status, const RegionHeader* header) {
    if (!status.ok()) {
      ++unreadable;
      last_failure = status;
      regions_[region].state = RegionState::kRetired;
    } else if (header == nullptr) {
      // Never used, or lost with its sequence. Space it may hold is given back, so that it is not counted.
      if (!data_.punch(region).ok()) regions_[region].state = RegionState::kRetired;
    } else {
      next_region_sequence_ = std::max(next_region_sequence_, header->sequence + 1);
      regions_[region].state = RegionState::kRetired;
      if (header->epoch == superblock_.epoch) found.push_back({region, header->sequence, header->opened_unix_s});
    }
  });
  return unreadable != 0 && unreadable == count ? last_failure : Status();
}

// Space first: what does not fit into the limit goes before anything is read. Regions without content, then the oldest.
Status Log::fit_into_limit(std::uint32_t count, std::vector<FoundRegion>& found) {
  std::vector<bool> has_content(count);
  for (const FoundRegion& f : found) has_content[f.region] = true;
  std::vector<std::uint32_t> order;  // to be dropped
  for (std::uint32_t i = 0; i < count; ++i) {
    if (regions_[i].state == RegionState::kRetired && !has_content[i]) order.push_back(i);
  }
  const std::size_t without_content = order.size();
  for (const FoundRegion& f : found) order.push_back(f.region);
  const std::size_t excess = order.size() > geometry_.max_regions ? order.size() - geometry_.max_regions : 0;
  if (excess > without_content && !options_.allow_shrink_below_contents) {
    return {Code::kInvalidArgument, "limit_bytes of " + std::to_string(options_.limit_bytes) + " leaves room for " +
                                        std::to_string(geometry_.max_regions) + " regions, the store in " + directory_->path() +
                                        " has " + std::to_string(found.size()) + " with contents; raise the limit or clear it"};
  }
  const auto drop = [&](std::uint32_t region) {
    regions_[region].state = RegionState::kAbsent;
    std::erase_if(found, [region](const FoundRegion& f) { return f.region == region; });
  };
  bool punched = true;
  for (std::size_t i = 0; i < excess && punched; ++i) {
    punched = data_.punch(order[i]).ok();
    if (punched) drop(order[i]);
  }
  if (!punched) {  // no holes here: what lies beyond the limit is cut off
    for (std::uint32_t i = geometry_.max_regions; i < count; ++i) drop(i);
  }
  if (excess != 0) note("limit_bytes is lower than before: " + std::to_string(excess) + " regions dropped");
  std::uint32_t end = count;
  while (end > 0 && regions_[end - 1].state == RegionState::kAbsent) --end;
  if (end != count) LMCN_RETURN_IF_ERROR(data_.truncate(end));
  allocated_ = static_cast<std::uint32_t>(
      std::count_if(regions_.begin(), regions_.end(), [](const Region& r) { return r.state != RegionState::kAbsent; }));
  return {};
}

void Log::recover_region(const FoundRegion& found, const RegionContents& contents) {
  Region& r = regions_[found.region];
  words_[found.region].sequence.store(found.sequence, std::memory_order_release);
  const std::size_t rest = contents.records.size() - contents.from_checkpoint;
  recovered_from_checkpoint_ += contents.from_checkpoint;
  (contents.end == RegionEnd::kWalk ? recovered_from_walk_ : recovered_from_footers_) += rest;
  next_record_sequence_ = std::max(next_record_sequence_, contents.last_record_sequence + 1);
  r.state = RegionState::kSealed;
  r.footer_missing = contents.end == RegionEnd::kWalk;
  r.next_page = r.settled_pages = contents.next_page;
  std::uint64_t live_bytes = 0, since_checkpoint = 0;
  for (std::size_t i = contents.from_checkpoint; i < contents.records.size(); ++i)
    since_checkpoint += contents.records[i].pages * kPageBytes;
  // The checkpoint's count of the day's writes ends where its records do.
  if (counts_since_checkpoint_) written_.add(since_checkpoint);
  for (const PlacedRecord& record : contents.records) {
    recovered_.push_back({record.key, Extent{found.region, record.page, record.pages}, record.hits});
    live_bytes += record.pages * kPageBytes;
  }
  words_[found.region].live_bytes.store(live_bytes, std::memory_order_relaxed);
  r.cookies.reserve(contents.records.size());
  if (!r.footer_missing) return;
  r.records.reserve(contents.records.size());
  for (const PlacedRecord& placed : contents.records) {
    Record record;
    record.key = placed.key;
    record.page = placed.page;
    record.pages = placed.pages;
    record.state = WriteState::kWritten;
    r.records.push_back(std::move(record));
  }
  r.delivered = r.records.size();
}

// Of the regions without a footer, the newest with records goes on; those without records are clean, unless they would come
// before it in the order of sequences.
void Log::settle_recovered(std::span<const FoundRegion> found) {
  std::uint32_t newest = kNoRegion;
  for (const FoundRegion& f : found) {
    if (regions_[f.region].next_page > 1) newest = f.region;  // ascending
  }
  const std::uint64_t newest_sequence = newest == kNoRegion ? 0 : words_[newest].sequence.load(std::memory_order_relaxed);
  for (const FoundRegion& f : found) {
    Region& r = regions_[f.region];
    if (!r.footer_missing) continue;
    if (r.next_page == 1) {
      r.footer_missing = false;
      r.state = f.sequence > newest_sequence ? RegionState::kClean : RegionState::kRetired;
      if (r.state == RegionState::kRetired) words_[f.region].sequence.store(0, std::memory_order_release);
      continue;
    }
    active_.push_back(f.region);
    if (f.region != newest) continue;
    r.footer_missing = false;
    r.state = RegionState::kOpen;
    open_ = f.region;
  }
}

void Log::adopt(const std::function<std::uint32_t(const RecoveredRecord&)>& f) {
  for (const RecoveredRecord& record : recovered_) {
    const std::uint32_t cookie = f(record);
    std::lock_guard lock(mutex_);
    regions_[record.extent.region].cookies.push_back(cookie);
  }
  recovered_ = {};
}

}  // namespace lmcn::nvme
