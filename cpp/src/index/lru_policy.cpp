#include "index/lru_policy.hpp"

#include <cassert>

namespace lmcn {

bool LruPolicy::resident(EntryId id) noexcept {
  const std::size_t block = id / kBlockLinks;
  return block < blocks_.size() && blocks_[block] && links(id).colder != kAbsent;
}

void LruPolicy::push_hottest(EntryId id) noexcept {
  links(id) = Links{.colder = hottest_, .hotter = kNoEntry};
  (hottest_ == kNoEntry ? coldest_ : links(hottest_).hotter) = id;
  hottest_ = id;
}

void LruPolicy::unlink(EntryId id) noexcept {
  const Links around = links(id);
  (around.colder == kNoEntry ? coldest_ : links(around.colder).hotter) = around.hotter;
  (around.hotter == kNoEntry ? hottest_ : links(around.hotter).colder) = around.colder;
}

void LruPolicy::insert(EntryId id) {
  assert(!resident(id));
  const std::size_t block = id / kBlockLinks;
  if (block >= blocks_.size()) blocks_.resize(block + 1);
  if (!blocks_[block]) {
    blocks_[block] = std::make_unique<Block>();
    ++block_count_;
  }
  push_hottest(id);
  ++size_;
}

void LruPolicy::access(EntryId id) {
  assert(resident(id));
  if (id == hottest_) return;
  unlink(id);
  push_hottest(id);
}

void LruPolicy::remove(EntryId id) {
  assert(resident(id));
  unlink(id);
  links(id) = Links{};
  --size_;
}

std::optional<EntryId> LruPolicy::victim(const std::function<bool(EntryId)>& may_evict, std::uint32_t max_scan) {
  EntryId id = coldest_;
  for (std::uint32_t scanned = 0; id != kNoEntry && scanned < max_scan; ++scanned, id = links(id).hotter) {
    if (may_evict(id)) return id;
  }
  return std::nullopt;
}

}  // namespace lmcn
