// What the region log writes, byte for byte (little-endian; docs/format.md is the long form). Records are slot images
// (memory/slot_image.hpp).
//
//   superblock   [Superblock 4096]
//   data.000     [region 0][region 1]...            region r at r * region_bytes
//     region     [RegionHeader 4096][record][record]...   ...free...   [footer, whole pages, ends at the region's end]
//     record     [SlotHeader 4096][payload][zeros to 4096]   or   [SkipHeader 4096][anything, pages - 1 pages]
//     footer     [FooterEntry 40]*record_count [zeros] [FooterTrailer 64]
//   index.ckpt   [CheckpointHeader 4096][CheckpointEntry 48]*entry_count [CheckpointRegion 16]*region_count
//   LOCK         the owner's pid, decimal, newline
//
// Every structure carries magic, format version, store uuid and an XXH3-64 checksum; one that does not hold is as good as absent.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>

#include "lmcn/key.hpp"
#include "memory/slot_image.hpp"
#include "nvme/write_window.hpp"

namespace lmcn::nvme {

using Uuid = std::array<std::uint8_t, 16>;

inline constexpr std::uint64_t kSuperblockMagic = 0x3152505553434D4CULL;  // "LMCSUPR1"
inline constexpr std::uint64_t kRegionMagic = 0x314E474552434D4CULL;      // "LMCREGN1"
inline constexpr std::uint64_t kSkipMagic = 0x3150494B53434D4CULL;        // "LMCSKIP1"
inline constexpr std::uint64_t kFooterMagic = 0x31544F4F46434D4CULL;      // "LMCFOOT1"
inline constexpr std::uint64_t kCheckpointMagic = 0x3154504B43434D4CULL;  // "LMCCKPT1"
inline constexpr std::size_t kPageChecksumOffset = kPageBytes - 8;        // of one-page structures; covers all before it

struct Superblock {
  std::uint64_t magic;
  std::uint32_t format;
  std::uint32_t header_bytes;    // 4096
  Uuid uuid;                     // random, of this store
  std::uint64_t region_bytes;    // for the life of the store
  std::uint64_t epoch;           // raised by clear(); regions of another epoch are empty
  std::uint64_t sequence_floor;  // region and record sequences below it were given out before the last clear()
  std::uint64_t created_unix_s;  // 0: unknown
  std::uint8_t reserved[kPageChecksumOffset - 64];
  std::uint64_t checksum;
};
static_assert(sizeof(Superblock) == kPageBytes);
static_assert(offsetof(Superblock, format) == 8 && offsetof(Superblock, uuid) == 16 && offsetof(Superblock, region_bytes) == 32);
static_assert(offsetof(Superblock, epoch) == 40 && offsetof(Superblock, sequence_floor) == 48 &&
              offsetof(Superblock, created_unix_s) == 56);
static_assert(offsetof(Superblock, checksum) == kPageChecksumOffset);

struct RegionHeader {
  std::uint64_t magic;
  std::uint32_t format;
  std::uint32_t header_bytes;  // 4096
  Uuid uuid;
  std::uint32_t region;  // its own number: a misplaced write is noticed
  std::uint32_t reserved0;
  std::uint64_t sequence;       // unique in the store's life, raised before each reuse
  std::uint64_t epoch;          // 0: cleared alone
  std::uint64_t opened_unix_s;  // when it was prepared for its records; 0: unknown
  std::uint8_t reserved[kPageChecksumOffset - 64];
  std::uint64_t checksum;
};
static_assert(sizeof(RegionHeader) == kPageBytes);
static_assert(offsetof(RegionHeader, format) == 8 && offsetof(RegionHeader, uuid) == 16 && offsetof(RegionHeader, region) == 32);
static_assert(offsetof(RegionHeader, sequence) == 40 && offsetof(RegionHeader, epoch) == 48 &&
              offsetof(RegionHeader, opened_unix_s) == 56);
static_assert(offsetof(RegionHeader, checksum) == kPageChecksumOffset);

/// In place of the header of a record whose write failed: lets a walk step over it.
struct SkipHeader {
  std::uint64_t magic;
  std::uint32_t format;
  std::uint32_t header_bytes;  // 4096
  Uuid uuid;
  std::uint64_t region_sequence;
  std::uint32_t pages;  // of the failed record, header page included
  std::uint32_t reserved0;
  std::uint8_t reserved[kPageChecksumOffset - 48];
  std::uint64_t checksum;
};
static_assert(sizeof(SkipHeader) == kPageBytes);
static_assert(offsetof(SkipHeader, uuid) == 16 && offsetof(SkipHeader, region_sequence) == 32 && offsetof(SkipHeader, pages) == 40);
static_assert(offsetof(SkipHeader, checksum) == kPageChecksumOffset);

struct FooterEntry {
  ChunkKey key;
  std::uint32_t page;   // of the record, from the region's start
  std::uint32_t pages;  // its length, header page included
};
static_assert(sizeof(FooterEntry) == 40 && offsetof(FooterEntry, page) == 32 && offsetof(FooterEntry, pages) == 36);

/// The region's last 64 bytes.
struct FooterTrailer {
  std::uint64_t magic;
  std::uint32_t format;
  std::uint32_t footer_pages;  // length of the footer, this page included
  Uuid uuid;
  std::uint64_t sequence;              // of the region
  std::uint64_t last_record_sequence;  // 0 without records
  std::uint32_t record_count;
  std::uint32_t reserved;
  std::uint64_t checksum;  // of the entries, then of the trailer up to here
};
static_assert(sizeof(FooterTrailer) == 64 && offsetof(FooterTrailer, uuid) == 16 && offsetof(FooterTrailer, sequence) == 32);
static_assert(offsetof(FooterTrailer, last_record_sequence) == 40 && offsetof(FooterTrailer, record_count) == 48);
static_assert(offsetof(FooterTrailer, checksum) == 56);

/// What was written since `since_unix_s`: the store's creation, or the last open that found no checkpoint. As of this checkpoint.
struct LifetimeTotals {
  std::uint64_t records = 0;           // all that were acknowledged
  std::uint64_t first_bytes = 0;       // of records whose chunk was new to the log
  std::uint64_t reappended_bytes = 0;  // of records that reclaim wrote again
  std::uint64_t since_unix_s = 0;      // 0: nothing is known
};
static_assert(sizeof(LifetimeTotals) == 32);

struct CheckpointHeader {
  std::uint64_t magic;
  std::uint32_t format;
  std::uint32_t header_bytes;  // 4096
  Uuid uuid;
  std::uint64_t epoch;
  std::uint64_t next_region_sequence;
  std::uint64_t next_record_sequence;
  std::uint64_t entry_count;
  std::uint32_t region_count;
  std::uint32_t reserved0;
  std::uint64_t body_checksum;  // of everything after this page
  LifetimeTotals totals;
  std::uint64_t limit_bytes;  // that was in force; 0: unknown
  std::uint8_t reserved[2048 - 120];
  WriteWindow::Hours hours;  // bytes written to this path within the last 24 hours
  std::uint8_t reserved1[kPageChecksumOffset - 2048 - sizeof(WriteWindow::Hours)];
  std::uint64_t checksum;
};
static_assert(sizeof(WriteWindow::Hours) == 208 && offsetof(CheckpointHeader, hours) == 2048);
static_assert(sizeof(CheckpointHeader) == kPageBytes);
static_assert(offsetof(CheckpointHeader, epoch) == 32 && offsetof(CheckpointHeader, entry_count) == 56);
static_assert(offsetof(CheckpointHeader, region_count) == 64 && offsetof(CheckpointHeader, body_checksum) == 72);
static_assert(offsetof(CheckpointHeader, totals) == 80 && offsetof(CheckpointHeader, limit_bytes) == 112);
static_assert(offsetof(CheckpointHeader, checksum) == kPageChecksumOffset);

/// State of one region when the checkpoint was written.
struct CheckpointRegion {
  std::uint64_t sequence;     // 0: nothing in it
  std::uint32_t known_pages;  // the entries are complete for the pages below this one; the rest is in the footer or walked
  std::uint32_t sealed;       // 1: nothing was appended after known_pages
};
static_assert(sizeof(CheckpointRegion) == 16 && offsetof(CheckpointRegion, known_pages) == 8);

struct CheckpointEntry {
  ChunkKey key;
  std::uint32_t region;
  std::uint32_t page;
  std::uint32_t pages;
  std::uint16_t hits;  // saturating, since it was written
  std::uint16_t reserved;
};
static_assert(sizeof(CheckpointEntry) == 48 && offsetof(CheckpointEntry, hits) == 44 && offsetof(CheckpointEntry, region) == 32 &&
              offsetof(CheckpointEntry, pages) == 40);

/// Pages that a footer of `records` records takes.
inline constexpr std::uint32_t footer_pages(std::uint64_t records) noexcept {
  return static_cast<std::uint32_t>((records * sizeof(FooterEntry) + sizeof(FooterTrailer) + kPageBytes - 1) / kPageBytes);
}

/// The smallest record: a header page and one payload page.
inline constexpr std::uint32_t kMinRecordPages = 2;

std::uint64_t unix_seconds_now() noexcept;

std::uint64_t checksum_bytes(const void* data, std::size_t bytes) noexcept;

/// XXH3-64 of bytes that come in pieces.
class StreamChecksum {
 public:
  StreamChecksum();
  ~StreamChecksum();
  StreamChecksum(const StreamChecksum&) = delete;
  StreamChecksum& operator=(const StreamChecksum&) = delete;
  void update(const void* data, std::size_t bytes) noexcept;
  std::uint64_t digest() const noexcept;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// One-page structures: fill format, header_bytes and checksum; and whether all that holds.
template <class Page>
void seal_page(Page& page) noexcept {
  static_assert(sizeof(Page) == kPageBytes);
  page.format = kFormatVersion;
  page.header_bytes = static_cast<std::uint32_t>(kPageBytes);
  page.checksum = checksum_bytes(&page, kPageChecksumOffset);
}
template <class Page>
bool page_holds(const Page& page, std::uint64_t magic) noexcept {
  static_assert(sizeof(Page) == kPageBytes);
  return page.magic == magic && page.format == kFormatVersion && page.header_bytes == kPageBytes &&
         page.checksum == checksum_bytes(&page, kPageChecksumOffset);
}

std::uint64_t footer_checksum(const FooterEntry* entries, std::size_t count, const FooterTrailer& trailer) noexcept;

class PageBuffer;
/// A whole footer. `entries` ascend by page.
PageBuffer make_footer(std::span<const FooterEntry> entries, const Uuid& uuid, std::uint64_t region_sequence,
                       std::uint64_t last_record_sequence);

/// 4 KiB-aligned memory for O_DIRECT, zeroed.
class PageBuffer {
 public:
  explicit PageBuffer(std::uint64_t pages);
  std::byte* data() noexcept { return memory_.get(); }
  const std::byte* data() const noexcept { return memory_.get(); }
  std::byte* page(std::uint64_t index) noexcept { return memory_.get() + index * kPageBytes; }
  std::uint64_t bytes() const noexcept { return bytes_; }

 private:
  struct Free {
    void operator()(std::byte* p) const noexcept { ::operator delete[](p, std::align_val_t{kPageBytes}); }
  };
  std::uint64_t bytes_;
  std::unique_ptr<std::byte[], Free> memory_;
};

}  // namespace lmcn::nvme
