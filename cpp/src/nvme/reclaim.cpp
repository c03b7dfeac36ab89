// Clean regions ahead of the writer: from retired ones, from unallocated space, or from the oldest sealed region.
#include <cerrno>

#include "base/seq_points.hpp"
#include "nvme/log.hpp"

namespace lmcn::nvme {
namespace {

constexpr std::chrono::seconds kAllocationRetry{5};  // after the file system had no room

}  // namespace

Status Log::maintain() {
  if (quarantined()) return {};
  LMCN_RETURN_IF_ERROR(usable());
  std::uint32_t to_seal = kNoRegion;
  {
    std::lock_guard lock(mutex_);
    settle_active();
    if (open_ != kNoRegion && regions_[open_].walk_broken) {
      regions_[open_].state = RegionState::kClosing;
      if (begin_sealing(regions_[open_])) to_seal = open_;
      open_ = kNoRegion;
    }
  }
  if (to_seal != kNoRegion) seal(to_seal);
  prepare_ahead();
  retry_footer();
  start_sync();
  return {};
}

void Log::start_sync() {
  const auto now = std::chrono::steady_clock::now();
  if (now < next_sync_ || syncing_.load(std::memory_order_acquire) || !dirty_.exchange(false, std::memory_order_relaxed)) return;
  next_sync_ = now + options_.sync_interval;
  syncing_.store(true, std::memory_order_relaxed);
  submit(io::Op::kSync, nullptr, 0, 0, [this](const io::IoResult& result) {
    static_cast<void>(count_sync(result));  // counted, and quarantined on failure
    syncing_.store(false, std::memory_order_release);
  });
}

void Log::retry_footer() {
  std::uint32_t to_seal = kNoRegion;
  {
    std::lock_guard lock(mutex_);
    for (const std::uint32_t i : active_) {
      Region& r = regions_[i];
      if (r.state != RegionState::kSealed || !r.footer_missing || r.busy != 0) continue;
      r.state = RegionState::kSealing;
      ++r.busy;
      to_seal = i;
      break;
    }
  }
  if (to_seal != kNoRegion) seal(to_seal);
}

void Log::prepare_ahead() {
  for (std::uint32_t i = 0; i < target_clean(); ++i) {
    {
      std::lock_guard lock(mutex_);
      std::uint32_t ahead = 0;
      for (const Region& r : regions_) ahead += r.state == RegionState::kClean || r.state == RegionState::kPreparing ? 1 : 0;
      if (ahead >= target_clean()) return;
    }
    if (quarantined() || !prepare_one(true)) return;
  }
}

// mutex_ held.
std::uint32_t Log::oldest_sealed() const {
  std::uint32_t oldest = kNoRegion;
  for (std::uint32_t i = 0; i < region_count_; ++i) {
    if (regions_[i].state != RegionState::kSealed || regions_[i].busy != 0) continue;
    if (oldest == kNoRegion || words_[i].sequence < words_[oldest].sequence) oldest = i;
  }
  return oldest;
}

bool Log::may_reclaim(std::uint32_t region) {
  const auto now = std::chrono::steady_clock::now();
  const std::uint64_t sequence = words_[region].sequence;
  if (evacuating_ != sequence) {
    evacuating_ = sequence;
    evacuation_ends_ = now + options_.evacuation_patience;
  }
  std::vector<std::uint32_t> cookies;
  {
    std::lock_guard lock(mutex_);
    cookies = regions_[region].cookies;
  }
  return client_.evacuated(region, cookies) || now >= evacuation_ends_;
}

bool Log::prepare_one(bool may_take_sealed) {
  std::uint32_t retired = kNoRegion;
  std::uint32_t absent = kNoRegion;
  {
    std::lock_guard lock(mutex_);
    for (std::uint32_t i = 0; i < region_count_ && retired == kNoRegion; ++i) {
      const Region& r = regions_[i];
      if (r.state == RegionState::kRetired && r.busy == 0 && r.delivered == r.records.size()) retired = i;
      if (r.state == RegionState::kAbsent && absent == kNoRegion && allocated_ < geometry_.max_regions) absent = i;
    }
  }
  const bool fresh = retired == kNoRegion && absent != kNoRegion && try_allocate(absent);
  std::uint32_t region = fresh ? absent : retired;
  const bool reclaim = region == kNoRegion;
  if (reclaim) {
    if (!may_take_sealed) return false;
    {
      std::lock_guard lock(mutex_);
      region = oldest_sealed();
    }
    if (region == kNoRegion || !may_reclaim(region)) return false;
  }
  std::uint64_t sequence = 0;
  std::vector<std::uint32_t> cookies;
  {
    std::lock_guard lock(mutex_);
    sequence = next_region_sequence_++;
    Region& r = regions_[region];
    cookies = std::move(r.cookies);
    r = Region{};
    r.state = RegionState::kPreparing;
    r.busy = 1;
    words_[region].sequence.store(sequence, std::memory_order_release);  // I2: before on_reclaim
    words_[region].live_bytes.store(0, std::memory_order_relaxed);
  }
  if (reclaim) {
    counters_.reclaimed_regions.fetch_add(1, std::memory_order_relaxed);
    LMCN_SEQ_POINT("nvme.sequence_raised");
    client_.on_reclaim(region, cookies);
  }
  write_header(region, sequence, !fresh);
  return true;
}

bool Log::try_allocate(std::uint32_t region) {
  const auto now = std::chrono::steady_clock::now();
  if (now < next_allocation_) return false;
  const InFlight::Scope scope(&in_flight_, InFlight::Lane::kDirect);
  const Result<std::uint64_t> free = directory_->free_bytes();
  Status status = free.status();
  if (status.ok() && *free < geometry_.region_bytes + options_.free_space_floor_bytes) {
    status = Status(Code::kResourceExhausted, "the file system has " + std::to_string(*free) + " bytes free, a region takes " +
                                                  std::to_string(geometry_.region_bytes) + " and " +
                                                  std::to_string(options_.free_space_floor_bytes) + " must stay free");
  }
  if (status.ok()) status = data_.allocate(region);
  if (!status.ok()) {
    counters_.refused_allocations.fetch_add(1, std::memory_order_relaxed);
    next_allocation_ = now + kAllocationRetry;
    allocation_refusal_ = status.message();
    if (status.sys_errno() == EIO || status.sys_errno() == EROFS) quarantine(status);
    return false;
  }
  allocation_refusal_.clear();
  std::lock_guard lock(mutex_);
  ++allocated_;
  regions_[region].state = RegionState::kRetired;
  return true;
}

// L2. A fresh region reads as zeros, so its header need not be durable before its records.
void Log::write_header(std::uint32_t region, std::uint64_t sequence, bool must_be_durable) {
  auto buffer = std::make_shared<PageBuffer>(1);
  auto* header = reinterpret_cast<RegionHeader*>(buffer->data());
  header->magic = kRegionMagic;
  header->uuid = uuid_;
  header->region = region;
  header->sequence = sequence;
  header->epoch = superblock_.epoch;
  header->opened_unix_s = unix_seconds_now();
  seal_page(*header);
  submit(io::Op::kWrite, buffer->data(), kPageBytes, offset_of(region, 0),
         [this, region, sequence, must_be_durable, buffer](const io::IoResult& written) {
           dirty_.store(true, std::memory_order_relaxed);
           Status status = written.status(what("write of a region header to "));
           if (!status.ok()) count_write_failure(status);
           if (!status.ok() || !must_be_durable) return end_preparing(region, sequence, status);
           submit(io::Op::kSync, nullptr, 0, 0,
                  [this, region, sequence](const io::IoResult& synced) { end_preparing(region, sequence, count_sync(synced)); });
         });
}

void Log::end_preparing(std::uint32_t region, std::uint64_t sequence, const Status& status) {
  std::lock_guard lock(mutex_);
  Region& r = regions_[region];
  --r.busy;
  if (r.state != RegionState::kPreparing || words_[region].sequence != sequence) return;  // cleared meanwhile
  if (status.ok()) {
    r.state = RegionState::kClean;
  } else {
    r.state = RegionState::kRetired;
    words_[region].sequence.store(0, std::memory_order_release);
  }
}

}  // namespace lmcn::nvme
