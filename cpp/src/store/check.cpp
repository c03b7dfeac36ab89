// verify=all: bytes in host memory are checked too, before a request gets them. A checksum over the payload is taken as soon as a
// chunk is published, and compared when a request looks the chunk up. On the promoter's thread: an engine's thread computes none.
#include <algorithm>

#include "base/seq_points.hpp"
#include "memory/checksum.hpp"
#include "store/store_core.hpp"

namespace lmcn {

// mu held. Pins the slot until run_check().
void StoreCore::start_check(SlotId id, bool take) {
  SlotRecord& record = slots[id];
  ++record.pins;
  ++checks_in_flight;
  if (take) {
    ++checksums_in_flight;
  } else {
    ++record.checks_wanted;
  }
  PromoterJob check;
  check.kind = take ? PromoterJob::Kind::kTakeChecksum : PromoterJob::Kind::kCompareChecksum;
  check.slot = id;
  check.offset = record.slot.offset;
  // Not from the header's word alone: workers can write it, and a flipped bit there is what is looked for.
  check.payload_bytes = std::min(slot_header(image(id))->payload_bytes, record.slot.bytes - kPageBytes);
  promote_queue.push_back(check);
}

void StoreCore::run_check(const PromoterJob& check) {
  LMCN_SEQ_POINT("store.before_check");
  const Clock::time_point begin = Clock::now();
  const std::uint64_t found = checksum64(arena->base() + check.offset + kPageBytes, check.payload_bytes);
  latency.check.add(Clock::now() - begin);
  {
    std::lock_guard lock(mu);
    counters.verified_bytes += check.payload_bytes;
    SlotRecord& record = slots[check.slot];
    if (check.kind == PromoterJob::Kind::kTakeChecksum) {
      --checksums_in_flight;
      record.checksum = found;
      record.has_checksum = true;
      if (record.entry != kNoEntry) static_cast<void>(offer_to_nvme(record.entry, false));
    } else {
      ++record.checks_done;
      if (record.checksum != found && record.entry != kNoEntry) {
        ++counters.corrupt_host_chunks;
        drop_host_copy(record.entry);
        pin_epoch.fetch_add(1, std::memory_order_acq_rel);  // requests that pinned it must not remember a hit
      }
    }
    --checks_in_flight;
    unpin(check.slot);
    changed();
  }
  promoted_cv.notify_all();
  if (check.kind == PromoterJob::Kind::kTakeChecksum) keeper_cv.notify_one();  // flush() waits for it, too
}

}  // namespace lmcn
