// Tokens -> chunk keys.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "lmcn/key.hpp"
#include "lmcn/status.hpp"

namespace lmcn {

/// SHA-256 of arbitrary bytes (NamespaceId and tests).
ChunkKey sha256(std::span<const std::byte> data) noexcept;

/// NamespaceId of a canonical description (a sorted "name=value\n" text built by the caller).
NamespaceId make_namespace(std::string_view canonical_description) noexcept;

/// Chain of SHA-256 over whole chunks of tokens:
///   key[-1] = SHA256(namespace)
///   key[i]  = SHA256(key[i-1] || tokens of chunk i as int32 little-endian || extra[i]
///                    || u32le token count || u32le extra bytes)
/// The trailer makes the message decodable from its end, so no two (tokens, extra) pairs share one.
/// int64 tokens give the same keys as int32 ones; a value outside int32 is kInvalidArgument naming its position.
/// Immutable after construction; safe to share between threads.
class ChunkHasher {
 public:
  /// REQUIRES: chunk_tokens >= 1 (checked by create()).
  static Result<ChunkHasher> create(const NamespaceId& ns, std::uint32_t chunk_tokens);

  std::uint32_t chunk_tokens() const noexcept { return chunk_tokens_; }
  const ChunkKey& root() const noexcept { return root_; }

  /// Keys of all whole chunks of `tokens` (a tail shorter than a chunk is ignored), appended to `out`.
  /// `extra`: empty, or one byte string per whole chunk (LoRA, multimodal hashes, salts). `parent`: the key that
  /// precedes the first chunk; nullptr = root(), i.e. the start of the prompt.
  Status hash(std::span<const std::int32_t> tokens, std::span<const std::string_view> extra, const ChunkKey* parent,
              std::vector<ChunkKey>& out) const;
  Status hash(std::span<const std::int64_t> tokens, std::span<const std::string_view> extra, const ChunkKey* parent,
              std::vector<ChunkKey>& out) const;

  /// One step of the chain, any number of tokens (a partial tail chunk has its own key by its token count). int64 tokens give the
  /// same key; a value outside int32 is kInvalidArgument naming its position.
  ChunkKey step(const ChunkKey& parent, std::span<const std::int32_t> tokens, std::string_view extra) const noexcept;
  Result<ChunkKey> step(const ChunkKey& parent, std::span<const std::int64_t> tokens, std::string_view extra) const;

 private:
  ChunkHasher(const ChunkKey& root, std::uint32_t chunk_tokens) : root_(root), chunk_tokens_(chunk_tokens) {}
  ChunkKey root_;
  std::uint32_t chunk_tokens_;
};

/// Engine key (a block hash, opaque bytes) -> chunk key: SHA256(namespace || u32le length || engine key).
/// <= 119 - 36 = 83 bytes of engine key cost two SHA-256 blocks. Immutable; thread-safe.
class KeyDeriver {
 public:
  explicit KeyDeriver(const NamespaceId& ns) : ns_(ns) {}
  ChunkKey derive(std::span<const std::byte> engine_key) const noexcept;
  const NamespaceId& ns() const noexcept { return ns_; }

 private:
  NamespaceId ns_;
};

}  // namespace lmcn
