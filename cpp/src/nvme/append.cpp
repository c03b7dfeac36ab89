// Records into regions; full regions into sealed ones.
#include <algorithm>
#include <utility>

#include "base/seq_points.hpp"
#include "nvme/log.hpp"

namespace lmcn::nvme {

Status Log::check_image(const std::byte* image, std::uint64_t bytes) const {
  if (reinterpret_cast<std::uintptr_t>(image) % kPageBytes != 0) {
    return {Code::kInvalidArgument, "append: the image must be 4096-aligned"};
  }
  if (bytes < kMinRecordPages * kPageBytes || bytes > options_.max_record_bytes) {
    return {Code::kInvalidArgument, "append: image of " + std::to_string(bytes) + " bytes, must be from " +
                                        std::to_string(kMinRecordPages * kPageBytes) + " to " +
                                        std::to_string(options_.max_record_bytes)};
  }
  const SlotHeader& header = *slot_header(image);
  if (header.magic != kSlotMagic || header.format != kFormatVersion || header.payload_bytes == 0 || header.payload_bytes > bytes ||
      image_bytes(header.payload_bytes) != bytes) {
    return {Code::kInvalidArgument, "append: not a slot image of " + std::to_string(bytes) + " bytes (payload_bytes is " +
                                        std::to_string(header.payload_bytes) + ")"};
  }
  return {};
}

Status Log::append(std::byte* image, std::uint64_t bytes, std::uint32_t cookie, WriteDone done, bool again) {
  LMCN_RETURN_IF_ERROR(usable());
  LMCN_RETURN_IF_ERROR(check_image(image, bytes));
  const auto pages = static_cast<std::uint32_t>(bytes / kPageBytes);
  LMCN_RETURN_IF_ERROR(make_room(pages));

  appends_.fetch_add(1, std::memory_order_relaxed);
  const std::uint32_t region = open_;
  const std::uint64_t record_sequence = next_record_sequence_++;
  std::uint32_t page = 0;
  std::size_t index = 0;
  {
    std::lock_guard lock(mutex_);
    Region& r = regions_[region];
    page = r.next_page;
    index = r.records.size();
    Record record;
    record.key = slot_header(image)->key;
    record.page = page;
    record.pages = pages;
    record.cookie = cookie;
    record.again = again;
    record.done = [this, done = std::move(done)](const Status& status, Extent extent) {
      appends_.fetch_sub(1, std::memory_order_relaxed);
      done(status, extent);
    };
    r.records.push_back(std::move(record));
    r.next_page += pages;
    r.last_record_sequence = record_sequence;
  }
  seal_slot(image, words_[region].sequence.load(std::memory_order_relaxed), record_sequence);
  submit(io::Op::kWrite, image, bytes, offset_of(region, page),
         [this, region, index, begin = std::chrono::steady_clock::now()](const io::IoResult& result) {
           write_latency_.add(std::chrono::steady_clock::now() - begin);
           on_written(region, index, result);
         });
  return {};
}

bool Log::fits(const Region& region, std::uint32_t pages) const {
  return std::uint64_t{region.next_page} + pages + footer_pages(region.records.size() + 1) <= geometry_.region_pages;
}

Status Log::make_room(std::uint32_t pages) {
  for (int attempt = 0; attempt < 2; ++attempt) {
    std::uint32_t to_seal = kNoRegion;
    bool taken = false;
    {
      std::lock_guard lock(mutex_);
      settle_active();
      if (open_ != kNoRegion) {
        Region& r = regions_[open_];
        if (!r.walk_broken && fits(r, pages)) return {};
        r.state = RegionState::kClosing;
        if (begin_sealing(r)) to_seal = open_;
        open_ = kNoRegion;
      }
      // In order of their sequences, also when a later one was prepared faster: recovery takes that as the order of appends.
      std::uint32_t next = kNoRegion;
      for (std::uint32_t i = 0; i < region_count_; ++i) {
        if (regions_[i].state != RegionState::kClean && regions_[i].state != RegionState::kPreparing) continue;
        if (next == kNoRegion || words_[i].sequence < words_[next].sequence) next = i;
      }
      if (next != kNoRegion && regions_[next].state == RegionState::kClean) {
        regions_[next].state = RegionState::kOpen;
        active_.push_back(next);
        open_ = next;
        taken = true;
      }
    }
    if (to_seal != kNoRegion) seal(to_seal);
    if (taken || attempt == 0) prepare_ahead();
    if (taken) return {};
    LMCN_RETURN_IF_ERROR(usable());
  }
  return {Code::kResourceExhausted, "no clean region in " + data_.path() + " yet" +
                                        (allocation_refusal_.empty() ? std::string() : " (" + allocation_refusal_ + ")")};
}

void Log::on_written(std::uint32_t region, std::size_t index, const io::IoResult& result) {
  dirty_.store(true, std::memory_order_relaxed);
  Status status = result.status(what("write of a record to "));
  if (!status.ok()) {
    count_write_failure(status);
    if (!quarantined()) {
      write_skip(region, index, std::move(status));
      return;
    }
  }
  LMCN_SEQ_POINT("nvme.record_written");
  end_record(region, index, std::move(status));
}

// Whatever the failed write left of its header page must not stop a walk, nor be taken for a record.
void Log::write_skip(std::uint32_t region, std::size_t index, Status failure) {
  auto buffer = std::make_shared<PageBuffer>(1);
  auto* skip = reinterpret_cast<SkipHeader*>(buffer->data());
  std::uint32_t page = 0;
  {
    std::lock_guard lock(mutex_);
    const Record& record = regions_[region].records[index];
    page = record.page;
    skip->pages = record.pages;
    skip->region_sequence = words_[region].sequence;
  }
  skip->magic = kSkipMagic;
  skip->uuid = uuid_;
  seal_page(*skip);
  submit(io::Op::kWrite, buffer->data(), kPageBytes, offset_of(region, page),
         [this, region, index, buffer, failure = std::move(failure)](const io::IoResult& result) {
           if (const Status status = result.status(what("write of a skip header to ")); !status.ok()) {
             count_write_failure(status);
             std::lock_guard lock(mutex_);
             regions_[region].walk_broken = true;
           }
           end_record(region, index, failure);
         });
}

// L3: delivers the records that this one held up, and itself, unless an earlier one is still under way. One thread at a time
// delivers a region's records: checkpoint() relies on their order.
void Log::end_record(std::uint32_t region, std::size_t index, Status status) {
  {
    std::lock_guard lock(mutex_);
    Region& r = regions_[region];
    r.records[index].state = status.ok() ? WriteState::kWritten : WriteState::kFailed;
    r.records[index].failure = std::move(status);
    if (r.delivering) return;
    r.delivering = true;
  }
  for (;;) {
    Delivery delivery;
    bool sealing = false;
    {
      std::lock_guard lock(mutex_);
      Region& r = regions_[region];
      if (!next_delivery(region, delivery)) {
        r.delivering = false;
        sealing = begin_sealing(r);
      }
    }
    if (!delivery.done) {
      if (sealing) seal(region);
      return;
    }
    delivery.done(delivery.status, delivery.extent);
    std::lock_guard lock(mutex_);
    ++regions_[region].delivered;
  }
}

bool Log::next_delivery(std::uint32_t region, Delivery& delivery) {
  Region& r = regions_[region];
  if (r.delivered == r.records.size() || r.records[r.delivered].state == WriteState::kPending) return false;
  Record& record = r.records[r.delivered];
  delivery.done = std::exchange(record.done, nullptr);
  delivery.status = std::exchange(record.failure, {});
  if (!delivery.status.ok()) return true;
  if (r.state == RegionState::kRetired) {
    delivery.status = Status(Code::kAborted, "the store was cleared while the record was written");
    return true;
  }
  const std::uint64_t bytes = record.pages * kPageBytes;
  delivery.extent = Extent{region, record.page, record.pages};
  r.cookies.push_back(record.cookie);
  words_[region].live_bytes.fetch_add(bytes, std::memory_order_relaxed);
  counters_.appended_records.fetch_add(1, std::memory_order_relaxed);
  counters_.appended_bytes.fetch_add(bytes, std::memory_order_relaxed);
  if (record.again) counters_.reappended_bytes.fetch_add(bytes, std::memory_order_relaxed);
  return true;
}

bool Log::begin_sealing(Region& region) {
  if (region.state != RegionState::kClosing || region.delivered != region.records.size()) return false;
  region.state = RegionState::kSealing;
  ++region.busy;
  return true;
}

// L2: records durable, then the footer that names them.
void Log::seal(std::uint32_t region) {
  if (quarantined()) return end_sealing(region, false);
  submit(io::Op::kSync, nullptr, 0, 0, [this, region](const io::IoResult& result) {
    if (count_sync(result).ok()) {
      write_footer(region);
    } else {
      end_sealing(region, false);
    }
  });
}

void Log::write_footer(std::uint32_t region) {
  std::shared_ptr<PageBuffer> buffer;
  {
    std::unique_lock lock(mutex_);
    const Region& r = regions_[region];
    if (r.state != RegionState::kSealing) {  // cleared meanwhile
      lock.unlock();
      return end_sealing(region, false);
    }
    const auto written = [](const Record& record) { return record.state == WriteState::kWritten; };
    const auto count = static_cast<std::size_t>(std::count_if(r.records.begin(), r.records.end(), written));
    const std::uint32_t pages = footer_pages(count);
    buffer = std::make_shared<PageBuffer>(pages);
    auto* entry = reinterpret_cast<FooterEntry*>(buffer->data());
    for (const Record& record : r.records) {
      if (written(record)) *entry++ = FooterEntry{record.key, record.page, record.pages};
    }
    auto* trailer = reinterpret_cast<FooterTrailer*>(buffer->data() + buffer->bytes() - sizeof(FooterTrailer));
    trailer->magic = kFooterMagic;
    trailer->format = kFormatVersion;
    trailer->footer_pages = pages;
    trailer->uuid = uuid_;
    trailer->sequence = words_[region].sequence;
    trailer->last_record_sequence = r.last_record_sequence;
    trailer->record_count = static_cast<std::uint32_t>(count);
    trailer->checksum = footer_checksum(reinterpret_cast<const FooterEntry*>(buffer->data()), count, *trailer);
  }
  const std::uint64_t offset = (region + 1) * geometry_.region_bytes - buffer->bytes();
  submit(io::Op::kWrite, buffer->data(), buffer->bytes(), offset, [this, region, buffer](const io::IoResult& result) {
    dirty_.store(true, std::memory_order_relaxed);
    const Status status = result.status(what("write of a footer to "));
    if (!status.ok()) count_write_failure(status);
    end_sealing(region, status.ok());
  });
}

void Log::end_sealing(std::uint32_t region, bool footer_written) {
  std::lock_guard lock(mutex_);
  Region& r = regions_[region];
  --r.busy;
  if (r.state != RegionState::kSealing) return;  // cleared meanwhile
  r.state = RegionState::kSealed;
  r.footer_missing = !footer_written;
}

// What was delivered before this call of the writer is in every snapshot of the index that the caller takes after it.
void Log::settle() {
  std::lock_guard lock(mutex_);
  settle_active();
}

void Log::settle_active() {
  std::erase_if(active_, [this](std::uint32_t region) {
    Region& r = regions_[region];
    r.settled_pages = r.delivered < r.records.size() ? r.records[r.delivered].page : r.next_page;
    if (r.state < RegionState::kOpen) return true;
    if (r.state != RegionState::kSealed || r.footer_missing) return false;
    r.records = {};
    r.delivered = 0;
    return true;
  });
}

}  // namespace lmcn::nvme
