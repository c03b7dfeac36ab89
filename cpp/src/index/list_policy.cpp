#include "index/list_policy.hpp"

#include <cassert>

namespace lmcn {

std::string_view ListPolicy::name() const {
  switch (order_) {
    case ListOrder::kLeastRecent:
      return "LRU";
    case ListOrder::kOldest:
      return "FIFO";
    case ListOrder::kMostRecent:
      return "MRU";
  }
  return {};
}

void ListPolicy::insert(EntryId id) {
  assert(!links_.linked(id));
  links_.add(id);
  links_.push_back(list_, id);
  ++size_;
}

void ListPolicy::access(EntryId id) {
  assert(links_.linked(id));
  if (order_ == ListOrder::kOldest || id == list_.last) return;
  links_.unlink(list_, id);
  links_.push_back(list_, id);
}

void ListPolicy::postpone(EntryId id) {
  assert(links_.linked(id));
  links_.unlink(list_, id);
  if (order_ == ListOrder::kMostRecent) {
    links_.push_front(list_, id);
  } else {
    links_.push_back(list_, id);
  }
}

void ListPolicy::remove(EntryId id) {
  assert(links_.linked(id));
  links_.unlink(list_, id);
  --size_;
}

std::optional<EntryId> ListPolicy::victim(const std::function<bool(EntryId)>& may_evict, std::uint32_t max_scan) {
  const bool newest_first = order_ == ListOrder::kMostRecent;
  EntryId id = newest_first ? list_.last : list_.first;
  for (std::uint32_t scanned = 0; id != kNoEntry && scanned < max_scan; ++scanned) {
    if (may_evict(id)) return id;
    id = newest_first ? links_.previous(id) : links_.next(id);
  }
  return std::nullopt;
}

}  // namespace lmcn
