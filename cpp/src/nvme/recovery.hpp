// What the files of a store hold, read the way open() reads it: headers of regions, then checkpoint, footers, walks. Writes
// nothing and reads no payload. Used by the log and by the tools that look at a store which nobody has open.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "io/io_engine.hpp"
#include "nvme/checkpoint.hpp"
#include "nvme/format.hpp"

namespace lmcn::nvme {

/// Sequences that a lost header, footer or checkpoint would have shown are not given out again: they go on so far above.
inline constexpr std::uint64_t kSequenceGap = 1 << 20;

/// A region whose header holds, of this store and epoch.
struct FoundRegion {
  std::uint32_t region;
  std::uint64_t sequence;
  std::uint64_t opened_unix_s;
};

struct PlacedRecord {
  ChunkKey key;
  std::uint32_t page = 0;
  std::uint32_t pages = 0;
  std::uint16_t hits = 0;
};

/// Who said where a region's records end.
enum class RegionEnd : std::uint8_t { kCheckpoint, kFooter, kWalk };

struct RegionContents {
  std::vector<PlacedRecord> records;  // ascending, none overlaps another
  std::size_t from_checkpoint = 0;    // so many of them, the first
  RegionEnd end = RegionEnd::kWalk;
  std::uint32_t next_page = 1;             // the first that no record takes
  std::uint64_t last_record_sequence = 0;  // seen in a footer or on a walk
  bool read_failed = false;                // so there may be more
};

class StoreReader {
 public:
  /// `fd`: data.000, `path` its name in errors. Both must outlive the reader.
  StoreReader(io::IoEngine& engine, int fd, std::string path, const Superblock& superblock)
      : engine_(engine), fd_(fd), path_(std::move(path)), superblock_(superblock) {}

  /// Asked before each part of what read_headers() and read_contents() read, which end when it says false.
  void ask(std::function<bool()> go_on) { go_on_ = std::move(go_on); }
  /// Gives every region's header, or nullptr for one that does not hold; not ok: could not be read.
  using HeaderSink = std::function<void(std::uint32_t region, const Status&, const RegionHeader*)>;
  void read_headers(std::uint32_t count, const HeaderSink& sink);
  /// Those of `found` in the order given; `checkpoint` may be nullptr.
  using ContentsSink = std::function<void(const FoundRegion&, const RegionContents&)>;
  void read_contents(std::span<const FoundRegion> found, const LoadedCheckpoint* checkpoint, const ContentsSink& sink);
  /// What a walk from the first record finds, whatever a footer says.
  RegionContents walk_all(const FoundRegion& found);
  /// Reads the page at each (region, page), many at once.
  std::vector<io::IoResult> read_pages(std::span<const std::pair<std::uint32_t, std::uint32_t>> places, PageBuffer& pages);

  std::uint64_t offset_of(std::uint32_t region, std::uint32_t page) const noexcept {
    return region * superblock_.region_bytes + page * kPageBytes;
  }
  std::uint32_t region_pages() const noexcept { return static_cast<std::uint32_t>(superblock_.region_bytes / kPageBytes); }
  /// Reads that failed so far.
  std::uint64_t read_errors() const noexcept { return read_errors_; }

 private:
  RegionContents contents_of(const FoundRegion& found, const LoadedCheckpoint* checkpoint, const std::byte* last_page);
  bool read_footer(const FoundRegion& found, const std::byte* last_page, std::uint32_t from_page, RegionContents& contents);
  std::uint32_t walk(const FoundRegion& found, std::uint32_t from_page, RegionContents& contents);
  std::uint64_t record_sequence_at(const FoundRegion& found, std::uint32_t page, RegionContents& contents);
  bool read_now(std::byte* data, std::uint64_t bytes, std::uint64_t offset);

  io::IoEngine& engine_;
  const int fd_;
  const std::string path_;
  const Superblock superblock_;
  std::function<bool()> go_on_ = [] { return true; };
  std::uint64_t read_errors_ = 0;
};

/// Sorts by sequence. Sequences are unique: regions that have the same one are lies and go.
void sort_found(std::vector<FoundRegion>& found);

}  // namespace lmcn::nvme
