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

/// Items that wait, by file. Not thread-safe. A file has at most `reads_per_file` reads under way, so that a drive which does not
/// answer holds so many lanes and no more; an item that is read once more is not held back.
class LoadQueue {
 public:
  explicit LoadQueue(unsigned reads_per_file) : reads_per_file_(reads_per_file) {}

  void push(const std::shared_ptr<LoadJob>& job) {
    for (std::size_t i = 0; i < job->load.items.size(); ++i) files_[job->load.items[i].path].waiting.push_back({job, i, {}});
  }
  void push_again(QueuedItem item) { again_.push_back(std::move(item)); }

  /// An item that is still queued, of the file with the fewest reads under way (among equals, of that which waited longest); it is
  /// under way until ended(). false: none.
  bool take(bool only_again, QueuedItem& out) {
    drop_ended(again_);
    if (!again_.empty()) return start(again_, files_[again_.front().item().path], out);
    if (only_again) return false;
    File* next = nullptr;
    for (auto& [path, file] : files_) {
      drop_ended(file.waiting);
      if (file.waiting.empty() || file.reading >= reads_per_file_) continue;
      if (next == nullptr || std::pair(file.reading, file.taken) < std::pair(next->reading, next->taken)) next = &file;
    }
    return next != nullptr && start(next->waiting, *next, out);
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

  static void drop_ended(std::deque<QueuedItem>& items) {
    while (!items.empty() && items.front().job->states[items.front().index] != ItemState::kQueued) items.pop_front();
  }
  bool start(std::deque<QueuedItem>& items, File& file, QueuedItem& out) {
    out = std::move(items.front());
    items.pop_front();
    ++file.reading;
    file.taken = ++taken_;
    return true;
  }

  const unsigned reads_per_file_;
  std::uint64_t taken_ = 0;
  std::map<std::string, File> files_;
  std::deque<QueuedItem> again_;
};

}  // namespace lmcn
