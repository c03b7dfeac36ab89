// The slot image: what a slot of the host arena and a record on NVMe both are. docs/format.md draws it.
//
//   [0, 4096)                 header page (below)
//   [4096, 4096+payload)      payload: rank 0's part, rank 1's part, ... each rank_bytes = payload_bytes / rank_count. Where the
//                             ranks' KV is the same: one part, rank_count 1, whatever number of ranks reads it
//   then zeros to the next 4 KiB boundary: an image is image_bytes(payload_bytes) long
//
// The header is filled by the store's process; the rank words by each rank's worker. On NVMe the rank words are undefined
// and not covered by the root checksum (readers of the host slot count themselves in them while the record is written).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>

#include "lmcn/key.hpp"
#include "lmcn/status.hpp"

namespace lmcn {

inline constexpr std::uint64_t kSlotMagic = 0x31544F4C534E434DULL;  // "MCNSLOT1" little-endian
inline constexpr std::uint32_t kFormatVersion = 1;
inline constexpr std::uint64_t kPageBytes = 4096;
inline constexpr std::uint32_t kMaxRanks = 64;
inline constexpr std::uint32_t kMinSegmentBytes = 64 * 1024;
inline constexpr std::uint32_t kMaxSegments = 368;
inline constexpr std::uint32_t kMaxSegmentBytes = 1u << 31;
inline constexpr std::uint64_t kMaxPayloadBytes = std::uint64_t{kMaxSegments} * kMaxSegmentBytes;

enum class RankState : std::uint32_t { kEmpty = 0, kOk = 1, kFailed = 2 };

/// One rank's word: written by that rank's worker after its job, read by the store. Lock-free, shared between processes.
struct RankWord {
  std::uint32_t generation;  // of the slot, as given with the store job; stored last with release order
  RankState state;           // outcome of the gather for `generation`
  std::uint32_t loads_done;  // scatters of this generation that have ended (ok or not)
  std::uint32_t reserved;
};
static_assert(sizeof(RankWord) == 16);

struct SlotHeader {
  std::uint64_t magic;
  std::uint32_t format;
  std::uint32_t header_bytes;  // 4096
  ChunkKey key;
  NamespaceId ns;
  std::uint64_t payload_bytes;  // exact; >= 1; a multiple of rank_count
  std::uint32_t segment_bytes;  // 64 KiB, or the next power of two for which the table fits
  std::uint32_t segment_count;
  std::uint32_t generation;             // slot generation when it was filled
  std::uint32_t rank_count;             // parts of the payload
  std::uint64_t region_sequence;        // NVMe: sequence of the region it was appended to; 0 in host memory
  std::uint64_t record_sequence;        // NVMe: position in the log's order of appends; 0 in host memory
  std::uint64_t root;                   // XXH3-64 of bytes [0, offsetof(root)) and [offsetof(segment), offsetof(rank))
  std::uint64_t segment[kMaxSegments];  // XXH3-64 of each payload segment; unused entries 0
  RankWord rank[kMaxRanks];
};
static_assert(sizeof(SlotHeader) == kPageBytes);
static_assert(offsetof(SlotHeader, key) == 16 && offsetof(SlotHeader, ns) == 48 && offsetof(SlotHeader, payload_bytes) == 80);
static_assert(offsetof(SlotHeader, segment_bytes) == 88 && offsetof(SlotHeader, generation) == 96);
static_assert(offsetof(SlotHeader, region_sequence) == 104 && offsetof(SlotHeader, root) == 120);
static_assert(offsetof(SlotHeader, segment) == 128 && offsetof(SlotHeader, rank) == 3072);

inline SlotHeader* slot_header(std::byte* image) noexcept {
  return reinterpret_cast<SlotHeader*>(image);
}
inline const SlotHeader* slot_header(const std::byte* image) noexcept {
  return reinterpret_cast<const SlotHeader*>(image);
}

inline constexpr std::uint64_t image_bytes(std::uint64_t payload_bytes) noexcept {
  return kPageBytes + (payload_bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
}

/// Segment size for a payload: 64 KiB doubled until payload/segment <= kMaxSegments.
std::uint32_t segment_bytes_for(std::uint64_t payload_bytes) noexcept;

/// Starts a slot: header fields, rank words reset to kEmpty with generation-1 (so that no stale word can match). The payload is
/// not touched. REQUIRES: 1 <= payload_bytes <= kMaxPayloadBytes, 1 <= rank_count <= kMaxRanks, rank_count divides payload_bytes.
void begin_slot(std::byte* image, const ChunkKey& key, const NamespaceId& ns, std::uint64_t payload_bytes, std::uint32_t rank_count,
                std::uint32_t generation) noexcept;

/// Fills the checksum table and region/record sequence, then the root; zeroes the padding between the payload and the next 4 KiB
/// boundary (here and not in begin_slot, so that what is written out never holds bytes of the slot's earlier life). The payload is
/// not changed. Payload must be at rest. REQUIRES: a header from begin_slot() or one that passed check_header().
void seal_slot(std::byte* image, std::uint64_t region_sequence, std::uint64_t record_sequence) noexcept;

/// Header alone: magic, format, lengths within `image_bytes`, segment geometry, root checksum. kCorruption (names the field) or
/// kFormatVersion.
Status check_header(const std::byte* image, std::uint64_t image_bytes) noexcept;
/// check_header, then key, namespace and every payload segment. "Verify or miss": nothing is visible before this is ok.
Status verify_slot(const std::byte* image, std::uint64_t image_bytes, const ChunkKey& key, const NamespaceId& ns) noexcept;

/// Worker side: publish rank's outcome for `generation` (release).
void publish_rank(std::byte* image, std::uint32_t rank, std::uint32_t generation, RankState state) noexcept;
/// Worker side: one scatter of this slot has ended (release).
void count_load_done(std::byte* image, std::uint32_t rank) noexcept;
/// Store side (acquire): kEmpty until the word carries `generation`.
RankState rank_state(const std::byte* image, std::uint32_t rank, std::uint32_t generation) noexcept;
std::uint32_t loads_done(const std::byte* image, std::uint32_t rank) noexcept;
/// Store side, after a verified promotion and before publishing: header gets the slot's `generation`, every rank word
/// {generation, kOk, 0 loads}. The root then no longer covers the header until the next seal_slot().
void adopt_slot(std::byte* image, std::uint32_t generation, std::uint32_t rank_count) noexcept;

}  // namespace lmcn
