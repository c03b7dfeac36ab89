// What lies in a store's directory, read with nothing but docs/format.md's structs: the tests' own view, beside recovery's.
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "index/chunk_index.hpp"

namespace lmcn::crash {

/// Sequence of each region's header, 0 where none holds for the superblock's store and epoch. Empty without a superblock.
std::vector<std::uint64_t> region_sequences(const std::filesystem::path& directory);

/// A record that a whole footer, or a whole checkpoint for pages that it knows, names in the region's present life.
struct NamedRecord {
  ChunkKey key;
  Extent extent;
  std::uint64_t sequence;  // of the region
};
std::vector<NamedRecord> named_records(const std::filesystem::path& directory);

/// Bytes that the directory's files take on the device (allocated blocks, also beyond a file's end).
std::uint64_t allocated_bytes(const std::filesystem::path& directory);

}  // namespace lmcn::crash
