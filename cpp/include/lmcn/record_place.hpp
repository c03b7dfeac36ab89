// Where a chunk's record lies on NVMe, for a reader that has a descriptor of its own: a worker that loads it straight into device
// memory. Plain data.
#pragma once

#include <cstdint>

namespace lmcn {

/// Nothing holds a record in its place: its region may be reused at any time, and then carries another sequence. Whoever reads it
/// must check the header (whole, key, namespace, region_sequence) and the payload's checksums before using a byte of it.
struct RecordPlace {
  std::uint32_t position = 0;         // of the chunk, in the keys that were given
  std::uint32_t path = 0;             // index into StoreOptions::directories; the file is data.000 there
  std::uint64_t offset_bytes = 0;     // in the file, of the slot image; a multiple of 4096
  std::uint64_t image_bytes = 0;      // header page and padding included; a multiple of 4096
  std::uint64_t region_sequence = 0;  // that the record's header must have
};

}  // namespace lmcn
