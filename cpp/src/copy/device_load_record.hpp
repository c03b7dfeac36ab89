// A record as one rank's DeviceLoader reads it: its header page, and the segments with that rank's part.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include "lmcn/device_load.hpp"
#include "memory/slot_image.hpp"

namespace lmcn {

/// Which bytes of a payload one rank needs: whole segments, so that they can be verified.
struct RankSegments {
  std::uint32_t first = 0, count = 0, segment_bytes = 0;
  std::uint64_t begin = 0, bytes = 0;  // in the payload
  std::uint64_t padded_bytes = 0;      // to a multiple of 4096, as a record is
  std::uint64_t rank_part = 0;         // from `begin`

  RankSegments(std::uint64_t rank_bytes, std::uint32_t rank, std::uint32_t rank_count) {
    const std::uint64_t payload = rank_bytes * rank_count, from = rank_bytes * rank, to = from + rank_bytes;
    segment_bytes = segment_bytes_for(payload);
    first = static_cast<std::uint32_t>(from / segment_bytes);
    count = static_cast<std::uint32_t>((to + segment_bytes - 1) / segment_bytes) - first;
    begin = std::uint64_t{first} * segment_bytes;
    bytes = std::min(begin + std::uint64_t{count} * segment_bytes, payload) - begin;
    padded_bytes = (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
    rank_part = from - begin;
  }
};

struct HeaderPage {
  alignas(kPageBytes) std::byte bytes[kPageBytes];
};

/// kCorruption, kFormatVersion: what lies on `page` is not the header of `item`, or not of this layout.
inline Status check_record(const std::byte* page, const DeviceLoadItem& item, std::uint32_t rank_count,
                           std::uint64_t payload_bytes) {
  LMCN_RETURN_IF_ERROR(check_header(page, item.image_bytes));
  const SlotHeader& header = *slot_header(page);
  if (header.key != item.key || header.ns != item.ns || header.region_sequence != item.region_sequence) {
    return {Code::kCorruption, "another record lies at byte " + std::to_string(item.offset) + " (key " + header.key.to_hex() +
                                   ", namespace " + header.ns.to_hex() + ", region sequence " +
                                   std::to_string(header.region_sequence) + "), expected key " + item.key.to_hex() +
                                   ", namespace " + item.ns.to_hex() + ", sequence " + std::to_string(item.region_sequence)};
  }
  if (header.rank_count != rank_count || header.payload_bytes != payload_bytes) {
    return {Code::kCorruption, "payload of " + std::to_string(header.payload_bytes) + " bytes for " +
                                   std::to_string(header.rank_count) + " ranks, expected " + std::to_string(payload_bytes) +
                                   " bytes for " + std::to_string(rank_count)};
  }
  return {};
}

}  // namespace lmcn
