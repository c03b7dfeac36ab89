// Chunk keys and namespaces: 32-byte SHA-256 digests.
#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

namespace lmcn {

/// Identity of a chunk: a SHA-256 chain over namespace, tokens and extra keys (ChunkHasher), or
/// H(namespace || engine key) where the engine hashes its blocks itself (KeyDeriver).
struct ChunkKey {
  std::array<std::uint8_t, 32> bytes{};

  auto operator<=>(const ChunkKey&) const = default;
  /// The digest's first 8 bytes: uniformly distributed, so it serves as the hash of a table.
  std::uint64_t prefix64() const noexcept {
    std::uint64_t v;
    std::memcpy(&v, bytes.data(), sizeof v);
    return v;
  }
  std::string to_hex() const;
};
static_assert(sizeof(ChunkKey) == 32);

/// H(everything that must match before bytes may be shared); see docs/design.md, "namespace".
struct NamespaceId {
  std::array<std::uint8_t, 32> bytes{};
  auto operator<=>(const NamespaceId&) const = default;
  std::string to_hex() const;
};

struct ChunkKeyHash {
  std::size_t operator()(const ChunkKey& k) const noexcept { return static_cast<std::size_t>(k.prefix64()); }
};

}  // namespace lmcn
