#include "memory/slot_image.hpp"

#include <xxhash.h>

#include <algorithm>
#include <cassert>
#include <cstring>
#include <string>

#include "memory/checksum.hpp"

namespace lmcn {
namespace {

// Rank words are plain fields in shared memory; every access goes through these.
std::uint32_t load_acquire(const std::uint32_t& word) noexcept {
  return std::atomic_ref<std::uint32_t>(const_cast<std::uint32_t&>(word)).load(std::memory_order_acquire);
}
void store_release(std::uint32_t& word, std::uint32_t value) noexcept {
  std::atomic_ref<std::uint32_t>(word).store(value, std::memory_order_release);
}
void store_relaxed(std::uint32_t& word, std::uint32_t value) noexcept {
  std::atomic_ref<std::uint32_t>(word).store(value, std::memory_order_relaxed);
}
static_assert(std::atomic_ref<std::uint32_t>::is_always_lock_free && std::atomic_ref<RankState>::is_always_lock_free);

void store_state(RankState& word, RankState value) noexcept {
  std::atomic_ref<RankState>(word).store(value, std::memory_order_relaxed);
}
// A state that is none of ours is a failure, never a success.
RankState load_state(const RankState& word) noexcept {
  const RankState state = std::atomic_ref<RankState>(const_cast<RankState&>(word)).load(std::memory_order_relaxed);
  return state == RankState::kOk || state == RankState::kEmpty ? state : RankState::kFailed;
}

// The part of the header that the root covers around the root itself; the rank words are left out.
std::uint64_t root_of(const SlotHeader& header) noexcept {
  const auto* bytes = reinterpret_cast<const std::byte*>(&header);
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  XXH3_64bits_update(&state, bytes, offsetof(SlotHeader, root));
  XXH3_64bits_update(&state, bytes + offsetof(SlotHeader, segment), offsetof(SlotHeader, rank) - offsetof(SlotHeader, segment));
  return XXH3_64bits_digest(&state);
}

std::uint64_t segment_checksum(const std::byte* image, const SlotHeader& header, std::uint32_t index) noexcept {
  const std::uint64_t begin = std::uint64_t{index} * header.segment_bytes;
  const std::uint64_t left = header.payload_bytes - begin;
  return checksum64(image + kPageBytes + begin, left < header.segment_bytes ? left : header.segment_bytes);
}

std::uint32_t segments_of(std::uint64_t payload_bytes, std::uint32_t segment_bytes) noexcept {
  return static_cast<std::uint32_t>((payload_bytes + segment_bytes - 1) / segment_bytes);
}

void zero_tail(std::byte* image, std::uint64_t payload_bytes) noexcept {
  const std::uint64_t end = kPageBytes + payload_bytes;
  std::memset(image + end, 0, image_bytes(payload_bytes) - end);
}

Status corrupt(const char* field, std::uint64_t found, const std::string& expected) {
  return {Code::kCorruption, std::string("slot header: ") + field + " is " + std::to_string(found) + ", expected " + expected};
}
Status corrupt(const char* field, std::uint64_t found, std::uint64_t expected) {
  return corrupt(field, found, std::to_string(expected));
}

}  // namespace

std::uint32_t segment_bytes_for(std::uint64_t payload_bytes) noexcept {
  std::uint64_t segment = kMinSegmentBytes;
  while (segment < kMaxSegmentBytes && payload_bytes > segment * kMaxSegments) segment *= 2;
  return static_cast<std::uint32_t>(segment);
}

void begin_slot(std::byte* image, const ChunkKey& key, const NamespaceId& ns, std::uint64_t payload_bytes, std::uint32_t rank_count,
                std::uint32_t generation) noexcept {
  assert(payload_bytes >= 1 && payload_bytes <= kMaxPayloadBytes);
  assert(rank_count >= 1 && rank_count <= kMaxRanks && payload_bytes % rank_count == 0);
  SlotHeader& header = *slot_header(image);
  // A worker of the slot's previous life may still write its own rank word (with its old generation): those are stored atomically.
  std::memset(static_cast<void*>(&header), 0, offsetof(SlotHeader, rank));
  header.magic = kSlotMagic;
  header.format = kFormatVersion;
  header.header_bytes = static_cast<std::uint32_t>(kPageBytes);
  header.key = key;
  header.ns = ns;
  header.payload_bytes = payload_bytes;
  header.segment_bytes = segment_bytes_for(payload_bytes);
  header.segment_count = segments_of(payload_bytes, header.segment_bytes);
  header.generation = generation;
  header.rank_count = rank_count;
  for (RankWord& word : header.rank) {
    store_state(word.state, RankState::kEmpty);
    store_relaxed(word.loads_done, 0);
    store_relaxed(word.reserved, 0);
    store_release(word.generation, generation - 1);
  }
}

void seal_slot(std::byte* image, std::uint64_t region_sequence, std::uint64_t record_sequence) noexcept {
  SlotHeader& header = *slot_header(image);
  header.region_sequence = region_sequence;
  header.record_sequence = record_sequence;
  zero_tail(image, header.payload_bytes);
  for (std::uint32_t i = 0; i < header.segment_count; ++i) header.segment[i] = segment_checksum(image, header, i);
  header.root = root_of(header);
}

Status check_header(const std::byte* image, std::uint64_t available_bytes) noexcept {
  if (available_bytes < kPageBytes)
    return corrupt("length of the image", available_bytes, "at least " + std::to_string(kPageBytes));
  const SlotHeader& header = *slot_header(image);
  if (header.magic != kSlotMagic) return corrupt("magic", header.magic, kSlotMagic);
  if (header.format != kFormatVersion) {
    return {Code::kFormatVersion,
            "slot header: format is " + std::to_string(header.format) + ", this build reads " + std::to_string(kFormatVersion)};
  }
  if (header.header_bytes != kPageBytes) return corrupt("header_bytes", header.header_bytes, kPageBytes);
  // Bounded before any arithmetic, so that image_bytes() cannot overflow.
  const std::uint64_t room = std::min(available_bytes - kPageBytes, kMaxPayloadBytes);
  if (header.payload_bytes == 0 || header.payload_bytes > room || image_bytes(header.payload_bytes) > available_bytes) {
    return corrupt("payload_bytes", header.payload_bytes, "1 to " + std::to_string(room) + " with its padding");
  }
  if (header.rank_count == 0 || header.rank_count > kMaxRanks || header.payload_bytes % header.rank_count != 0) {
    return corrupt("rank_count", header.rank_count, "1 to " + std::to_string(kMaxRanks) + ", a divisor of payload_bytes");
  }
  const std::uint32_t segment = segment_bytes_for(header.payload_bytes);
  if (header.segment_bytes != segment) return corrupt("segment_bytes", header.segment_bytes, segment);
  const std::uint32_t count = segments_of(header.payload_bytes, segment);
  if (header.segment_count != count) return corrupt("segment_count", header.segment_count, count);
  const std::uint64_t root = root_of(header);
  if (header.root != root) return corrupt("root checksum", header.root, root);
  return {};
}

Status verify_slot(const std::byte* image, std::uint64_t available_bytes, const ChunkKey& key, const NamespaceId& ns) noexcept {
  if (Status status = check_header(image, available_bytes); !status.ok()) return status;
  const SlotHeader& header = *slot_header(image);
  if (header.key != key) return {Code::kCorruption, "slot header: key is " + header.key.to_hex() + ", expected " + key.to_hex()};
  if (header.ns != ns) return {Code::kCorruption, "slot header: namespace is " + header.ns.to_hex() + ", expected " + ns.to_hex()};
  for (std::uint32_t i = 0; i < header.segment_count; ++i) {
    const std::uint64_t checksum = segment_checksum(image, header, i);
    if (header.segment[i] != checksum) {
      return {Code::kCorruption, "slot payload: checksum of segment " + std::to_string(i) + " of " +
                                     std::to_string(header.segment_count) + " does not match (key " + key.to_hex() + ")"};
    }
  }
  return {};
}

void publish_rank(std::byte* image, std::uint32_t rank, std::uint32_t generation, RankState state) noexcept {
  if (rank >= kMaxRanks) return;
  RankWord& word = slot_header(image)->rank[rank];
  store_state(word.state, state);
  store_release(word.generation, generation);
}

void count_load_done(std::byte* image, std::uint32_t rank) noexcept {
  if (rank >= kMaxRanks) return;
  std::atomic_ref<std::uint32_t>(slot_header(image)->rank[rank].loads_done).fetch_add(1, std::memory_order_release);
}

RankState rank_state(const std::byte* image, std::uint32_t rank, std::uint32_t generation) noexcept {
  if (rank >= kMaxRanks) return RankState::kFailed;
  const RankWord& word = slot_header(image)->rank[rank];
  if (load_acquire(word.generation) != generation) return RankState::kEmpty;
  return load_state(word.state);
}

std::uint32_t loads_done(const std::byte* image, std::uint32_t rank) noexcept {
  return rank < kMaxRanks ? load_acquire(slot_header(image)->rank[rank].loads_done) : 0;
}

void adopt_slot(std::byte* image, std::uint32_t generation, std::uint32_t rank_count) noexcept {
  SlotHeader& header = *slot_header(image);
  header.generation = generation;
  header.rank_count = rank_count;
  header.region_sequence = 0;
  header.record_sequence = 0;
  for (std::uint32_t rank = 0; rank < kMaxRanks; ++rank) {
    RankWord& word = header.rank[rank];
    const bool used = rank < rank_count;
    store_state(word.state, used ? RankState::kOk : RankState::kEmpty);
    store_relaxed(word.loads_done, 0);
    store_relaxed(word.reserved, 0);
    store_release(word.generation, used ? generation : generation - 1);
  }
}

}  // namespace lmcn
