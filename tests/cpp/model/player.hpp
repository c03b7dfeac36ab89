// Plays a script on a TieredStore and on a model of it, which is a table: what each chunk may, must and must not answer.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "model/script.hpp"

namespace lmcn::model {

enum class DiskKind : std::uint8_t { kMemory, kFaulty, kFile };

struct World {
  DiskKind disk = DiskKind::kMemory;
  std::uint64_t host_bytes = 4 << 20;
  std::uint64_t nvme_bytes = 64 << 20;
  std::uint32_t seed = 1;  // of the order in which the disk serves
  std::filesystem::path directory;
};

struct Played {
  std::uint64_t hits = 0, misses = 0, must_hits = 0, kills = 0, reopens = 0, reclaims = 0, faults = 0;
};

/// nullopt: every answer was one that the model allows. `played` is added to.
std::optional<std::string> play(const World& world, const Script& script, Played& played);

}  // namespace lmcn::model
