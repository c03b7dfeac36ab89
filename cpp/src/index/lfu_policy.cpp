#include "index/lfu_policy.hpp"

#include <algorithm>
#include <bit>
#include <cassert>

namespace lmcn {

std::uint64_t LfuPolicy::used() const noexcept {
  return std::rotr(used_places_, base_);
}

void LfuPolicy::link(EntryId id, std::uint8_t count) noexcept {
  const std::uint8_t place = place_of(count);
  links_.state(id) = place;
  links_.push_back(ring_[place], id);
  used_places_ |= std::uint64_t{1} << place;
}

void LfuPolicy::unlink(EntryId id) noexcept {
  const std::uint8_t place = links_.state(id);
  links_.unlink(ring_[place], id);
  if (ring_[place].empty()) used_places_ &= ~(std::uint64_t{1} << place);
}

void LfuPolicy::insert(EntryId id) {
  assert(!links_.linked(id));
  links_.add(id);
  link(id, 1);
  ++size_;
}

void LfuPolicy::access(EntryId id) {
  assert(links_.linked(id));
  const int count = count_at(links_.state(id));
  unlink(id);
  link(id, static_cast<std::uint8_t>(std::min(count + 1, kCounts - 1)));
}

void LfuPolicy::postpone(EntryId id) {
  assert(links_.linked(id));
  const auto highest = static_cast<std::uint8_t>(std::bit_width(used()) - 1);
  unlink(id);
  link(id, highest);
}

void LfuPolicy::remove(EntryId id) {
  assert(links_.linked(id));
  unlink(id);
  --size_;
  if (size_ != 0) base_ = place_of(static_cast<std::uint8_t>(std::countr_zero(used())));
}

std::optional<EntryId> LfuPolicy::victim(const std::function<bool(EntryId)>& may_evict, std::uint32_t max_scan) {
  std::uint32_t scanned = 0;
  for (std::uint64_t counts = used(); counts != 0; counts &= counts - 1) {
    const IdList& list = ring_[place_of(static_cast<std::uint8_t>(std::countr_zero(counts)))];
    for (EntryId id = list.first; id != kNoEntry; id = links_.next(id)) {
      if (scanned++ == max_scan) return std::nullopt;
      if (may_evict(id)) return id;
    }
  }
  return std::nullopt;
}

}  // namespace lmcn
