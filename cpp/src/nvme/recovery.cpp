// What a directory holds after any end of its last owner: headers of regions, then checkpoint, footers, walks. No payload reads.
#include <algorithm>
#include <cstring>

#include "nvme/loaded_checkpoint.hpp"
#include "nvme/log.hpp"

namespace lmcn::nvme {
namespace {

constexpr std::size_t kBatch = 64;  // one-page reads at once
// Sequences that a lost header, footer or checkpoint would have shown are not given out again.
constexpr std::uint64_t kSequenceGap = 1 << 20;

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

Record recovered_record(const ChunkKey& key, std::uint32_t page, std::uint32_t pages) {
  Record record;
  record.key = key;
  record.page = page;
  record.pages = pages;
  record.state = WriteState::kWritten;
  return record;
}

}  // namespace

/// A region whose header holds, of this store and epoch.
struct Log::FoundRegion {
  std::uint32_t region;
  std::uint64_t sequence;
};

std::vector<io::IoResult> Log::read_pages(const std::vector<std::uint64_t>& offsets, PageBuffer& pages) {
  BatchSink sink(offsets.size());
  if (offsets.empty()) return {};
  std::vector<io::IoRequest> requests(offsets.size());
  for (std::size_t i = 0; i < offsets.size(); ++i) {
    requests[i].fd = data_.fd();
    requests[i].data = pages.page(i);
    requests[i].bytes = kPageBytes;
    requests[i].offset = offsets[i];
    requests[i].tag = i;
    requests[i].sink = &sink;
  }
  engine_.submit(requests);
  sink.wait();
  return std::move(sink.results);
}

io::IoResult Log::read_now(std::byte* data, std::uint64_t bytes, std::uint64_t offset) {
  io::IoRequest request;
  request.fd = data_.fd();
  request.data = data;
  request.bytes = bytes;
  request.offset = offset;
  return io::run_sync(engine_, request);
}

Status Log::recover() {
  const Result<std::uint32_t> count = data_.regions();
  if (!count.ok()) return count.status();
  region_count_ = std::max(geometry_.max_regions, *count);
  regions_.resize(region_count_);
  words_ = std::make_unique<RegionWord[]>(region_count_);
  next_region_sequence_ = next_record_sequence_ = superblock_.sequence_floor;

  std::vector<FoundRegion> found;
  LMCN_RETURN_IF_ERROR(find_regions(*count, found));
  std::sort(found.begin(), found.end(), [](const FoundRegion& a, const FoundRegion& b) { return a.sequence < b.sequence; });
  LMCN_RETURN_IF_ERROR(fit_into_limit(*count, found));

  std::optional<LoadedCheckpoint> checkpoint = load_checkpoint();
  if (checkpoint) {
    next_region_sequence_ = std::max(next_region_sequence_, checkpoint->next_region_sequence);
    next_record_sequence_ = std::max(next_record_sequence_, checkpoint->next_record_sequence);
  }
  for (std::size_t i = 0; i < found.size(); i += kBatch) {
    recover_regions(std::span(found).subspan(i, std::min(kBatch, found.size() - i)), checkpoint ? &*checkpoint : nullptr);
  }
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

Status Log::find_regions(std::uint32_t count, std::vector<FoundRegion>& found) {
  PageBuffer pages(kBatch);
  std::uint32_t unreadable = 0;
  for (std::uint32_t begin = 0; begin < count; begin += kBatch) {
    std::vector<std::uint64_t> offsets;
    for (std::uint32_t i = begin; i < std::min<std::uint64_t>(count, begin + kBatch); ++i) offsets.push_back(offset_of(i, 0));
    const std::vector<io::IoResult> results = read_pages(offsets, pages);
    for (std::uint32_t i = 0; i < results.size(); ++i) {
      const std::uint32_t region = begin + i;
      RegionHeader header;
      std::memcpy(static_cast<void*>(&header), pages.page(i), sizeof header);
      if (const Status status = results[i].status(what("read of a region header from ")); !status.ok()) {
        counters_.read_errors.fetch_add(1, std::memory_order_relaxed);
        if (++unreadable == count) return status;
        regions_[region].state = RegionState::kRetired;
        continue;
      }
      if (!page_holds(header, kRegionMagic) || header.uuid != uuid_ || header.region != region || header.sequence == 0) {
        // Never used, or lost with its sequence. Space it may hold is given back, so that it is not counted.
        if (!data_.punch(region).ok()) regions_[region].state = RegionState::kRetired;
        continue;
      }
      next_region_sequence_ = std::max(next_region_sequence_, header.sequence + 1);
      regions_[region].state = RegionState::kRetired;
      if (header.epoch == superblock_.epoch) found.push_back({region, header.sequence});
    }
  }
  return {};
}

// Space first: what does not fit into the limit goes before anything is read. Regions without content, then the oldest.
Status Log::fit_into_limit(std::uint32_t count, std::vector<FoundRegion>& found) {
  // Sequences are unique: two regions with the same one are both lies.
  for (std::size_t i = 0; i + 1 < found.size();) {
    if (found[i].sequence != found[i + 1].sequence) {
      ++i;
      continue;
    }
    const std::uint64_t twice = found[i].sequence;
    std::erase_if(found, [twice](const FoundRegion& f) { return f.sequence == twice; });
  }
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

void Log::recover_regions(std::span<const FoundRegion> found, const LoadedCheckpoint* checkpoint) {
  std::vector<std::uint64_t> offsets;
  std::vector<std::size_t> page_of(found.size(), SIZE_MAX);
  for (std::size_t i = 0; i < found.size(); ++i) {
    const CheckpointRegion* known = checkpoint ? checkpoint->find(found[i].region, found[i].sequence) : nullptr;
    if (known && known->sealed != 0) continue;
    page_of[i] = offsets.size();
    offsets.push_back(offset_of(found[i].region, geometry_.region_pages - 1));
  }
  PageBuffer pages(std::max<std::size_t>(offsets.size(), 1));
  const std::vector<io::IoResult> results = read_pages(offsets, pages);
  for (std::size_t i = 0; i < found.size(); ++i) {
    const std::byte* last_page = nullptr;
    if (page_of[i] != SIZE_MAX) {
      if (results[page_of[i]].status(what("read of a footer from ")).ok()) {
        last_page = pages.page(page_of[i]);
      } else {
        counters_.read_errors.fetch_add(1, std::memory_order_relaxed);
      }
    }
    recover_region(found[i], checkpoint, last_page);
  }
}

void Log::recover_region(const FoundRegion& found, const LoadedCheckpoint* checkpoint, const std::byte* last_page) {
  Region& r = regions_[found.region];
  words_[found.region].sequence.store(found.sequence, std::memory_order_release);
  std::vector<Record> records;
  std::uint32_t page = 1;
  const CheckpointRegion* known = checkpoint ? checkpoint->find(found.region, found.sequence) : nullptr;
  if (known && known->known_pages >= 1 && known->known_pages < geometry_.region_pages) {
    for (const CheckpointEntry& e : checkpoint->of(found.region)) {
      if (e.page < page || e.pages < kMinRecordPages || std::uint64_t{e.page} + e.pages > known->known_pages) continue;
      records.push_back(recovered_record(e.key, e.page, e.pages));
      page = e.page + e.pages;
    }
    page = known->known_pages;
  } else {
    known = nullptr;
  }
  const std::size_t from_checkpoint = records.size();
  recovered_from_checkpoint_ += from_checkpoint;
  r.state = RegionState::kSealed;
  if (known && known->sealed != 0) {
    r.next_page = page;
  } else if (last_page && read_footer(found, last_page, page, records)) {
    recovered_from_footers_ += records.size() - from_checkpoint;
    r.next_page = records.empty() ? page : std::max(page, records.back().page + records.back().pages);
  } else {
    r.next_page = walk(found, page, records);
    recovered_from_walk_ += records.size() - from_checkpoint;
    r.footer_missing = true;
  }
  r.settled_pages = r.next_page;
  std::uint64_t live_bytes = 0;
  for (const Record& record : records) {
    recovered_.push_back({record.key, Extent{found.region, record.page, record.pages}});
    live_bytes += record.pages * kPageBytes;
  }
  words_[found.region].live_bytes.store(live_bytes, std::memory_order_relaxed);
  r.cookies.reserve(records.size());
  if (!r.footer_missing) return;
  r.records = std::move(records);
  r.delivered = r.records.size();
}

bool Log::read_footer(const FoundRegion& found, const std::byte* last_page, std::uint32_t from_page, std::vector<Record>& records) {
  FooterTrailer trailer;
  std::memcpy(&trailer, last_page + kPageBytes - sizeof trailer, sizeof trailer);
  if (trailer.magic != kFooterMagic || trailer.format != kFormatVersion || trailer.uuid != uuid_ ||
      trailer.sequence != found.sequence || trailer.record_count > geometry_.region_pages / kMinRecordPages ||
      trailer.footer_pages != footer_pages(trailer.record_count) || trailer.footer_pages >= geometry_.region_pages) {
    return false;
  }
  PageBuffer pages(trailer.footer_pages);
  const std::uint32_t first_page = geometry_.region_pages - trailer.footer_pages;
  if (!read_now(pages.data(), pages.bytes(), offset_of(found.region, first_page)).status(what("read of a footer from ")).ok()) {
    counters_.read_errors.fetch_add(1, std::memory_order_relaxed);
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
    if (entries[i].page >= from_page) records.push_back(recovered_record(entries[i].key, entries[i].page, entries[i].pages));
  }
  next_record_sequence_ = std::max(next_record_sequence_, trailer.last_record_sequence + 1);
  return true;
}

// Header page by header page; returns the page after the last record.
std::uint32_t Log::walk(const FoundRegion& found, std::uint32_t from_page, std::vector<Record>& records) {
  PageBuffer buffer(1);
  const std::uint32_t end = geometry_.region_pages - 1;  // at least one page is the footer's
  std::uint32_t page = from_page;
  std::uint64_t last_sequence = 0;
  while (page + kMinRecordPages <= end) {
    if (!read_now(buffer.data(), kPageBytes, offset_of(found.region, page)).status(what("read of a header from ")).ok()) {
      counters_.read_errors.fetch_add(1, std::memory_order_relaxed);
      break;
    }
    const auto* skip = reinterpret_cast<const SkipHeader*>(buffer.data());
    if (skip->magic == kSkipMagic) {
      if (!page_holds(*skip, kSkipMagic) || skip->uuid != uuid_ || skip->region_sequence != found.sequence ||
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
    records.push_back(recovered_record(header.key, page, pages));
    page += pages;
  }
  next_record_sequence_ = std::max(next_record_sequence_, last_sequence + 1);
  return page;
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
