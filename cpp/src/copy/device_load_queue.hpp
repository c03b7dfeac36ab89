// Jobs of a DeviceLoader, and which of their items is read next.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "copy/device_load_stage.hpp"
#include "lmcn/device_load.hpp"

namespace lmcn {

enum class ItemState : std::uint8_t { kQueued, kReading, kMoving, kEnded };

struct LoadJob {
  DeviceLoadJob load;
  CopyJob copy;  // the same items as the copying code takes them
  std::shared_ptr<const StreamMark> mark;
  std::vector<ItemState> states;
  std::size_t open_items = 0;
  std::uint64_t bytes = 0;
  std::vector<DeviceLoadFailure> failed;
  std::chrono::steady_clock::time_point started{};

  bool has_open() const {
    return std::ranges::any_of(states, [](ItemState s) { return s == ItemState::kQueued || s == ItemState::kReading; });
  }
};

struct QueuedItem {
  std::shared_ptr<LoadJob> job;
  std::size_t index = 0;
  Status gds_failure;  // of an earlier attempt: this one goes through host memory

  const DeviceLoadItem& item() const { return job->load.items[index]; }
};

/// Items that wait, by file. Not thread-safe.
class LoadQueue {
 public:
  void push(const std::shared_ptr<LoadJob>& job) {
    for (std::size_t i = 0; i < job->load.items.size(); ++i) files_[job->load.items[i].path].waiting.push_back({job, i, {}});
  }
  void push_again(QueuedItem item) { again_.push_back(std::move(item)); }

  /// An item that is still queued, one that is read again before others; of the file with the fewest reads under way, among equals
  /// of that which waited longest. It is under way until ended(). No file has more than `reads_per_file` of them, so that a drive
  /// which does not answer holds so many lanes and no more. false: none.
  bool take(bool only_again, unsigned reads_per_file, QueuedItem& out) {
    std::erase_if(again_, [](const QueuedItem& item) { return !waits(item); });
    for (auto item = again_.begin(); item != again_.end(); ++item) {
      File& file = files_[item->item().path];
      if (file.reading >= reads_per_file) continue;
      out = std::move(*item);
      again_.erase(item);
      start(file);
      return true;
    }
    if (only_again) return false;
    File* next = nullptr;
    for (auto& [path, file] : files_) {
      while (!file.waiting.empty() && !waits(file.waiting.front())) file.waiting.pop_front();
      if (file.waiting.empty() || file.reading >= reads_per_file) continue;
      if (next == nullptr || std::pair(file.reading, file.taken) < std::pair(next->reading, next->taken)) next = &file;
    }
    if (next == nullptr) return false;
    out = std::move(next->waiting.front());
    next->waiting.pop_front();
    start(*next);
    return true;
  }

  void ended(const QueuedItem& item) {
    const auto found = files_.find(item.item().path);
    if (--found->second.reading == 0 && found->second.waiting.empty()) files_.erase(found);
  }

  void drop_waiting() {
    again_.clear();
    for (auto& [path, file] : files_) file.waiting.clear();
  }

 private:
  struct File {
    std::deque<QueuedItem> waiting;
    unsigned reading = 0;
    std::uint64_t taken = 0;  // when last, counted in items
  };

  static bool waits(const QueuedItem& item) { return item.job->states[item.index] == ItemState::kQueued; }
  void start(File& file) {
    ++file.reading;
    file.taken = ++taken_;
  }

  std::uint64_t taken_ = 0;
  std::map<std::string, File> files_;
  std::deque<QueuedItem> again_;
};

}  // namespace lmcn
