// What the policies' tests share: the order of a policy, and each policy as its header describes it, over plain containers.
#pragma once

#include <algorithm>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "index/eviction_policy.hpp"

namespace lmcn {

using Ids = std::vector<EntryId>;
inline constexpr std::uint32_t kNoLimit = 0xFFFFFFFFu;

/// A policy of entries whose keys are their ids.
inline std::unique_ptr<EvictionPolicy> make_policy(
    const std::string& name, KeyBits key_bits = [](EntryId id) { return static_cast<std::uint32_t>(id * 2654435761u); }) {
  return std::move(make_eviction_policy(name, std::move(key_bits))).value();
}

/// All ids in eviction order, found by passing over those seen.
inline Ids order_of(EvictionPolicy& policy) {
  Ids ids;
  policy.victim(
      [&](EntryId id) {
        ids.push_back(id);
        return false;
      },
      kNoLimit);
  return ids;
}

/// The first in eviction order, removed.
inline EntryId evict(EvictionPolicy& policy) {
  const EntryId id = policy.victim([](EntryId) { return true; }, 1).value();
  policy.remove(id);
  return id;
}

class PolicyModel {
 public:
  virtual ~PolicyModel() = default;
  virtual bool has(EntryId id) const = 0;
  virtual std::size_t size() const = 0;
  virtual void insert(EntryId id, std::uint32_t key_bits) = 0;
  virtual void access(EntryId id) = 0;
  virtual void remove(EntryId id) = 0;
  virtual void postpone(EntryId id) = 0;
  virtual Ids order() = 0;
  /// Removes the first in eviction order.
  virtual EntryId evict() {
    const EntryId id = order().front();
    remove(id);
    return id;
  }
};

/// LRU, LFU, FIFO, MRU.
class OneListModel final : public PolicyModel {
 public:
  explicit OneListModel(std::string name) : name_(std::move(name)) {}

  bool has(EntryId id) const override { return std::ranges::find(entries_, id, &Entry::id) != entries_.end(); }
  std::size_t size() const override { return entries_.size(); }
  void insert(EntryId id, std::uint32_t) override { entries_.push_back({id, 1}); }
  void access(EntryId id) override {
    if (name_ == "FIFO") return;
    Entry entry = take(id);
    entry.count = std::min(entry.count + 1, 63);
    entries_.push_back(entry);
  }
  void remove(EntryId id) override {
    take(id);
    if (name_ != "LFU" || entries_.empty()) return;
    const int lowest = std::ranges::min(entries_, {}, &Entry::count).count;
    for (Entry& entry : entries_) entry.count -= lowest;
  }
  void postpone(EntryId id) override {
    const int highest = std::ranges::max(entries_, {}, &Entry::count).count;
    Entry entry = take(id);
    entry.count = highest;
    entries_.insert(name_ == "MRU" ? entries_.begin() : entries_.end(), entry);
  }
  Ids order() override {
    std::vector<Entry> sorted = entries_;
    if (name_ == "MRU") std::ranges::reverse(sorted);
    if (name_ == "LFU") std::ranges::stable_sort(sorted, {}, &Entry::count);
    Ids ids;
    for (const Entry& entry : sorted) ids.push_back(entry.id);
    return ids;
  }

 private:
  struct Entry {
    EntryId id;
    int count;
  };
  Entry take(EntryId id) {
    const auto at = std::ranges::find(entries_, id, &Entry::id);
    const Entry entry = *at;
    entries_.erase(at);
    return entry;
  }

  const std::string name_;
  std::vector<Entry> entries_;  // in the order of insertions, hits (not of FIFO) and postponements
};

class S3FifoModel final : public PolicyModel {
 public:
  bool has(EntryId id) const override { return holds(small_, id) || holds(main_, id) || holds(late_, id); }
  std::size_t size() const override { return small_.size() + main_.size() + late_.size(); }
  void insert(EntryId id, std::uint32_t key_bits) override {
    const bool known = remembered(key_bits);
    (known ? back() : small_).push_back({id, 0, key_bits});
  }
  void access(EntryId id) override {
    Entry& entry = *find(id);
    entry.hits = std::min(entry.hits + 1, 3);
  }
  void remove(EntryId id) override { drop(id); }
  void postpone(EntryId id) override {
    Entry entry = *find(id);
    if (holds(small_, id)) entry.hits = 0;
    take(id);
    late_.push_back(entry);
  }
  Ids order() override {
    move_kept();
    Ids ids, passed;
    const auto list = [&](const Queue& queue, int may_have) {
      for (const Entry& e : queue) (e.hits > may_have ? passed : ids).push_back(e.id);
    };
    if (small_is_next()) list(small_, 1);
    list(main_, 0);
    if (!small_is_next()) list(small_, 1);
    ids.insert(ids.end(), passed.begin(), passed.end());
    for (const Entry& e : late_) ids.push_back(e.id);
    return ids;
  }
  EntryId evict() override {
    const EntryId id = order().front();
    if (holds(small_, id)) remember(find(id)->key_bits);
    drop(id);
    return id;
  }

 private:
  struct Entry {
    EntryId id;
    int hits;
    std::uint32_t key_bits;
  };
  using Queue = std::deque<Entry>;

  static bool holds(const Queue& queue, EntryId id) { return std::ranges::find(queue, id, &Entry::id) != queue.end(); }
  Queue& back() { return late_.empty() ? main_ : late_; }
  Queue& queue_of(EntryId id) { return holds(small_, id) ? small_ : holds(main_, id) ? main_ : late_; }
  Queue::iterator find(EntryId id) { return std::ranges::find(queue_of(id), id, &Entry::id); }
  void take(EntryId id) { queue_of(id).erase(find(id)); }
  void drop(EntryId id) {
    take(id);
    main_.insert(main_.end(), late_.begin(), late_.end());
    late_.clear();
  }
  bool small_is_next() const { return !small_.empty() && (small_.size() * 10 >= size() || main_.empty()); }
  void move_kept() {
    while (size() > 0) {
      Queue& from = small_is_next() ? small_ : !main_.empty() ? main_ : late_;
      Entry entry = from.front();
      if (entry.hits <= (&from == &small_ ? 1 : 0)) return;
      entry.hits = &from == &small_ ? 0 : entry.hits - 1;
      from.pop_front();
      back().push_back(entry);
    }
  }

  std::deque<std::uint32_t>& bucket(std::uint32_t key_bits) { return ghost_[std::uint64_t{key_bits} * ghost_.size() >> 32]; }
  void remember(std::uint32_t key_bits) {
    const std::size_t wanted = size() * 9 / 10;
    if (ghost_.empty() || wanted > ghost_made_for_ * 5 / 4) {
      ghost_made_for_ = wanted;
      ghost_.assign((wanted + 15) / 16, {});
    }
    if (ghost_.empty()) return;
    bucket(key_bits).push_back(key_bits);
    if (bucket(key_bits).size() > 16) bucket(key_bits).pop_front();
  }
  bool remembered(std::uint32_t key_bits) {
    if (ghost_.empty()) return false;
    auto& keys = bucket(key_bits);
    const auto at = std::find(keys.rbegin(), keys.rend(), key_bits);
    if (at == keys.rend()) return false;
    keys.erase(std::next(at).base());
    return true;
  }

  Queue small_, main_, late_;  // late_: postponed since the last removal, and what was moved after it
  std::vector<std::deque<std::uint32_t>> ghost_;
  std::size_t ghost_made_for_ = 0;
};

inline std::unique_ptr<PolicyModel> make_model(const std::string& name) {
  if (name == "S3FIFO") return std::make_unique<S3FifoModel>();
  return std::make_unique<OneListModel>(name);
}

}  // namespace lmcn
