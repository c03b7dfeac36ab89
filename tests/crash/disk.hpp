// What lies in a store's directory, read with nothing but docs/format.md's structs: the tests' own view, beside recovery's.
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

namespace lmcn::crash {

/// Sequence of each region's header, 0 where none holds for the superblock's store and epoch. Empty without a superblock.
std::vector<std::uint64_t> region_sequences(const std::filesystem::path& directory);

/// Bytes that the directory's files take on the device (allocated blocks, also beyond a file's end).
std::uint64_t allocated_bytes(const std::filesystem::path& directory);

}  // namespace lmcn::crash
