// index.ckpt: how it is written and read. Used by the log and by the tools that look at a store which nobody has open.
#pragma once

#include <algorithm>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "nvme/directory.hpp"
#include "nvme/format.hpp"

namespace lmcn::nvme {

/// A checkpoint that holds, in memory.
struct LoadedCheckpoint {
  CheckpointHeader header;
  std::vector<CheckpointRegion> regions;
  std::vector<CheckpointEntry> entries;  // by region, then page

  /// nullptr: it says nothing about this life of the region.
  const CheckpointRegion* find(std::uint32_t region, std::uint64_t sequence) const noexcept {
    return region < regions.size() && regions[region].sequence == sequence ? &regions[region] : nullptr;
  }
  std::span<const CheckpointEntry> of(std::uint32_t region) const noexcept {
    const auto begin =
        std::partition_point(entries.begin(), entries.end(), [=](const CheckpointEntry& e) { return e.region < region; });
    const auto end = std::partition_point(begin, entries.end(), [=](const CheckpointEntry& e) { return e.region == region; });
    return {begin, end};
  }
};

/// What index.ckpt is good for. Without one, all is 0 and `why_not` empty.
struct CheckpointFile {
  std::uint64_t bytes = 0;
  std::optional<LoadedCheckpoint> loaded;
  std::string why_not;  // it is there and is not used, because ...
  bool known = false;   // the three below are: also of one that is older than the last clear
  LifetimeTotals totals;
  std::uint64_t limit_bytes = 0;
  WriteWindow::Hours hours;
};

/// Reads and judges it; changes nothing.
CheckpointFile load_checkpoint(const Directory& directory, io::IoEngine& engine, const Superblock& superblock);

/// Writes a new index.ckpt piece by piece, entries first; it replaces the old one in commit().
class CheckpointWriter {
 public:
  /// `admit` is asked before the file grows to so many bytes.
  CheckpointWriter(FileReplacement& file, std::function<Status(std::uint64_t)> admit);

  template <class T>
  void add(const T& item) {
    if (buffer_.size() + sizeof item > kChunkBytes) flush();
    const auto* bytes = reinterpret_cast<const std::byte*>(&item);
    buffer_.insert(buffer_.end(), bytes, bytes + sizeof item);
  }
  /// Fills magic, format and checksums of `header`. The first failure, if any.
  Status commit(CheckpointHeader& header);
  std::uint64_t file_bytes() const noexcept { return offset_; }

  static constexpr std::size_t kChunkBytes = 1 << 20;

 private:
  void flush();

  FileReplacement& file_;
  std::function<Status(std::uint64_t)> admit_;
  std::vector<std::byte> buffer_;
  StreamChecksum checksum_;
  std::uint64_t offset_ = kPageBytes;
  Status status_;
};

}  // namespace lmcn::nvme
