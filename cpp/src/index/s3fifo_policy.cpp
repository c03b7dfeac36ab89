#include "index/s3fifo_policy.hpp"

#include <algorithm>
#include <cassert>

namespace lmcn {

void GhostKeys::add(std::uint32_t fingerprint, std::uint64_t wanted) {
  if (buckets_.empty() || wanted > made_for_ + made_for_ / 4) {
    made_for_ = wanted;
    buckets_ = std::vector<Bucket>((wanted + kBucketKeys - 1) / kBucketKeys);
    if (buckets_.empty()) return;
  }
  Bucket& keys = bucket(fingerprint);
  std::copy_backward(keys.begin(), keys.end() - 1, keys.end());
  keys.front() = std::max(fingerprint, 1u);
}

bool GhostKeys::take(std::uint32_t fingerprint) noexcept {
  if (buckets_.empty()) return false;
  Bucket& keys = bucket(fingerprint);
  const auto at = std::find(keys.begin(), keys.end(), std::max(fingerprint, 1u));
  if (at == keys.end()) return false;
  std::copy(at + 1, keys.end(), at);
  keys.back() = 0;
  return true;
}

bool S3FifoPolicy::kept(EntryId id) noexcept {
  const State state = links_.state(id);
  return state.hits > (state.main ? 0 : 1);
}

bool S3FifoPolicy::small_is_next() const noexcept {
  if (small_.empty()) return false;
  return small_size_ * 10 >= size_ || main_.first == postponed_;
}

void S3FifoPolicy::push_main(EntryId id, std::uint8_t hits) noexcept {
  links_.state(id) = State{.hits = static_cast<std::uint8_t>(hits & kMaxHits), .main = 1};
  links_.push_back(main_, id);
}

void S3FifoPolicy::unlink(EntryId id) noexcept {
  if (links_.state(id).main) {
    if (id == postponed_) postponed_ = links_.next(id);
    links_.unlink(main_, id);
  } else {
    links_.unlink(small_, id);
    --small_size_;
  }
}

void S3FifoPolicy::insert(EntryId id) {
  assert(!links_.linked(id));
  links_.add(id);
  if (ghost_.take(key_bits_(id))) {
    push_main(id, 0);
  } else {
    links_.state(id) = State{.hits = 0, .main = 0};
    links_.push_back(small_, id);
    ++small_size_;
  }
  ++size_;
}

void S3FifoPolicy::access(EntryId id) {
  assert(links_.linked(id));
  State& state = links_.state(id);
  if (state.hits < kMaxHits) ++state.hits;
}

void S3FifoPolicy::postpone(EntryId id) {
  assert(links_.linked(id));
  const State state = links_.state(id);
  unlink(id);
  push_main(id, state.main ? state.hits : 0);
  if (postponed_ == kNoEntry) postponed_ = id;
}

void S3FifoPolicy::remove(EntryId id) {
  assert(links_.linked(id));
  if (id == last_victim_ && !links_.state(id).main) ghost_.add(key_bits_(id), size_ * 9 / 10);
  last_victim_ = kNoEntry;
  unlink(id);
  postponed_ = kNoEntry;
  --size_;
}

void S3FifoPolicy::move_kept_from_the_front() noexcept {
  for (std::uint32_t moves = 0; moves < kMoves && size_ != 0; ++moves) {
    const bool from_small = small_is_next();
    const EntryId id = from_small ? small_.first : main_.first;
    if (!kept(id)) return;
    const State state = links_.state(id);
    unlink(id);
    push_main(id, from_small ? 0 : static_cast<std::uint8_t>(state.hits - 1));
  }
}

std::optional<EntryId> S3FifoPolicy::victim(const std::function<bool(EntryId)>& may_evict, std::uint32_t max_scan) {
  move_kept_from_the_front();
  passed_over_.clear();
  last_victim_ = kNoEntry;
  std::uint32_t looked = 0;
  // True: the search is over.
  const auto look = [&](EntryId id) {
    if (looked++ == max_scan) return true;
    if (!may_evict(id)) return false;
    last_victim_ = id;
    return true;
  };
  const auto look_at_those_not_kept = [&](EntryId from, EntryId end) {
    for (EntryId id = from; id != end; id = links_.next(id)) {
      if (passed_over_.size() < kMoves && kept(id)) {
        passed_over_.push_back(id);
      } else if (look(id)) {
        return true;
      }
    }
    return false;
  };
  const auto small = [&] { return look_at_those_not_kept(small_.first, kNoEntry); };
  const auto main = [&] { return look_at_those_not_kept(main_.first, postponed_); };
  bool over = small_is_next() ? small() || main() : main() || small();
  for (std::size_t i = 0; !over && i < passed_over_.size(); ++i) over = look(passed_over_[i]);
  for (EntryId id = postponed_; !over && id != kNoEntry; id = links_.next(id)) over = look(id);
  return last_victim_ != kNoEntry ? std::optional(last_victim_) : std::nullopt;
}

std::uint64_t S3FifoPolicy::memory_bytes() const {
  return sizeof(*this) + links_.memory_bytes() + ghost_.memory_bytes() + passed_over_.capacity() * sizeof(EntryId);
}

}  // namespace lmcn
