// The chunks of the crash tests: a small world of ids, each with one key, one length and one content for ever. So what a key may
// answer needs no history: exactly these bytes, or a miss.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "lmcn/key.hpp"
#include "split_mix.hpp"

namespace lmcn::crash {

class Random : public SplitMix {
 public:
  using SplitMix::SplitMix;
  std::uint64_t below(std::uint64_t bound) noexcept { return (*this)() % bound; }
  bool one_in(std::uint64_t n) noexcept { return below(n) == 0; }
};

inline NamespaceId crash_namespace() {
  NamespaceId ns;
  ns.bytes.fill(0xC5);
  return ns;
}

inline ChunkKey key_of(std::uint32_t id) {
  ChunkKey key;
  Random random(id);
  for (std::size_t i = 0; i < 24; i += 8) {
    const std::uint64_t word = random();
    std::memcpy(&key.bytes[i], &word, 8);
  }
  std::memcpy(&key.bytes[24], &id, sizeof id);
  return key;
}

/// The id whose key this is; `none` when it is nobody's.
inline std::uint32_t id_of(const ChunkKey& key, std::uint32_t none) {
  std::uint32_t id = 0;
  std::memcpy(&id, &key.bytes[24], sizeof id);
  return key_of(id) == key ? id : none;
}

inline void fill(std::span<std::byte> to, std::uint32_t id) {
  const std::uint64_t start = Random(id ^ 0xABCDEF0123456789ull)();
  std::uint64_t at = 0;
  for (; at + 8 <= to.size(); at += 8) {
    const std::uint64_t word = start + at * 0x9E3779B97F4A7C15ull;
    std::memcpy(to.data() + at, &word, 8);
  }
  const std::uint64_t word = start + at * 0x9E3779B97F4A7C15ull;
  std::memcpy(to.data() + at, &word, to.size() - at);
}

/// Whether `bytes` are the first bytes.size() of that id's content.
inline bool holds(std::span<const std::byte> bytes, std::uint32_t id) {
  const std::uint64_t start = Random(id ^ 0xABCDEF0123456789ull)();
  std::uint64_t at = 0;
  for (; at + 8 <= bytes.size(); at += 8) {
    const std::uint64_t word = start + at * 0x9E3779B97F4A7C15ull;
    if (std::memcmp(bytes.data() + at, &word, 8) != 0) return false;
  }
  const std::uint64_t word = start + at * 0x9E3779B97F4A7C15ull;
  return std::memcmp(bytes.data() + at, &word, bytes.size() - at) == 0;
}

}  // namespace lmcn::crash
