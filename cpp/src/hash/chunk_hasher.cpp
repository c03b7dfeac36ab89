// The low-level SHA256_* are deprecated since OpenSSL 3.0, not gone: they alone link without the providers (35 KB, EVP 3.8 MB).
#define OPENSSL_SUPPRESS_DEPRECATED
#include "lmcn/chunk_hasher.hpp"

#include <openssl/sha.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <string>

namespace lmcn {
namespace {

static_assert(std::endian::native == std::endian::little, "tokens and lengths are hashed as they lie in memory");

/// A message given piece by piece. Small pieces gather in a buffer, because each SHA256_Update that begins or ends inside a
/// block costs a copy and a compression call of its own (584 -> 566 ns per 256-token chunk).
class Sha256 {
 public:
  Sha256() noexcept { SHA256_Init(&context_); }

  void update(const void* data, std::size_t bytes) noexcept {
    if (bytes > buffer_.size() - used_) {
      flush();
      if (bytes > buffer_.size()) {
        SHA256_Update(&context_, data, bytes);
        return;
      }
    }
    if (bytes > 0) std::memcpy(buffer_.data() + used_, data, bytes);
    used_ += bytes;
  }

  void update_u32(std::uint32_t value) noexcept { update(&value, sizeof value); }

  std::array<std::uint8_t, SHA256_DIGEST_LENGTH> finish() noexcept {
    flush();
    std::array<std::uint8_t, SHA256_DIGEST_LENGTH> digest;
    SHA256_Final(digest.data(), &context_);
    return digest;
  }

 private:
  void flush() noexcept {
    if (used_ > 0) SHA256_Update(&context_, buffer_.data(), used_);
    used_ = 0;
  }

  SHA256_CTX context_;
  std::size_t used_ = 0;
  std::array<std::uint8_t, 2048> buffer_;  // not initialised: only the first used_ bytes are ever read
};

// Tokens per piece of one step: 4 KiB of int32, so that narrowing stays on the stack whatever the chunk size.
constexpr std::size_t kPieceTokens = 1024;

void update_tokens(Sha256& sha, std::span<const std::int32_t> tokens) noexcept {
  sha.update(tokens.data(), tokens.size_bytes());
}

// REQUIRES: all fit int32 (narrowable()).
void update_tokens(Sha256& sha, std::span<const std::int64_t> tokens) noexcept {
  std::array<std::int32_t, kPieceTokens> narrow;  // only what was written is read
  while (!tokens.empty()) {
    const std::size_t count = std::min(tokens.size(), narrow.size());
    for (std::size_t i = 0; i < count; ++i) narrow[i] = static_cast<std::int32_t>(tokens[i]);
    sha.update(narrow.data(), count * sizeof(std::int32_t));
    tokens = tokens.subspan(count);
  }
}

// No exit from inside the loop, so that it vectorises: shifted by 2^31, every int32 has nothing above its low 32 bits.
bool narrowable(std::span<const std::int64_t> tokens) noexcept {
  std::uint64_t high_bits = 0;
  for (const std::int64_t token : tokens) high_bits |= (static_cast<std::uint64_t>(token) + 0x8000'0000u) >> 32;
  return high_bits == 0;
}

template <class Token>
ChunkKey chain(const ChunkKey& parent, std::span<const Token> tokens, std::string_view extra) noexcept {
  Sha256 sha;
  sha.update(parent.bytes.data(), parent.bytes.size());
  update_tokens(sha, tokens);
  sha.update(extra.data(), extra.size());
  sha.update_u32(static_cast<std::uint32_t>(tokens.size()));
  sha.update_u32(static_cast<std::uint32_t>(extra.size()));
  return ChunkKey{sha.finish()};
}

// REQUIRES: !narrowable(tokens)
Status not_narrowable(std::span<const std::int64_t> tokens) {
  const auto bad = std::find_if(tokens.begin(), tokens.end(), [](std::int64_t token) {
    return token < std::numeric_limits<std::int32_t>::min() || token > std::numeric_limits<std::int32_t>::max();
  });
  return Status(Code::kInvalidArgument, "tokens[" + std::to_string(bad - tokens.begin()) + "] is " + std::to_string(*bad) +
                                            ", which is outside int32 (-2147483648..2147483647)");
}

template <class Token>
Status hash_chunks(std::uint32_t chunk_tokens, ChunkKey parent, std::span<const Token> tokens,
                   std::span<const std::string_view> extra, std::vector<ChunkKey>& out) {
  const std::size_t chunks = tokens.size() / chunk_tokens;
  if (!extra.empty() && extra.size() != chunks) {
    return Status(Code::kInvalidArgument, "extra has " + std::to_string(extra.size()) + " entries for " + std::to_string(chunks) +
                                              " whole chunks; give one per chunk, or none");
  }
  if constexpr (sizeof(Token) > sizeof(std::int32_t)) {
    const auto hashed = tokens.first(chunks * chunk_tokens);
    if (!narrowable(hashed)) return not_narrowable(hashed);
  }
  const std::size_t before = out.size();
  out.resize(before + chunks);
  for (std::size_t i = 0; i < chunks; ++i) {
    parent = chain(parent, tokens.subspan(i * chunk_tokens, chunk_tokens), extra.empty() ? std::string_view{} : extra[i]);
    out[before + i] = parent;
  }
  return {};
}

}  // namespace

ChunkKey sha256(std::span<const std::byte> data) noexcept {
  Sha256 sha;
  sha.update(data.data(), data.size());
  return ChunkKey{sha.finish()};
}

NamespaceId make_namespace(std::string_view canonical_description) noexcept {
  return NamespaceId{sha256(std::as_bytes(std::span(canonical_description))).bytes};
}

Result<ChunkHasher> ChunkHasher::create(const NamespaceId& ns, std::uint32_t chunk_tokens) {
  if (chunk_tokens == 0) return Status(Code::kInvalidArgument, "chunk_tokens is 0; it must be at least 1");
  return ChunkHasher(sha256(std::as_bytes(std::span(ns.bytes))), chunk_tokens);
}

Status ChunkHasher::hash(std::span<const std::int32_t> tokens, std::span<const std::string_view> extra, const ChunkKey* parent,
                         std::vector<ChunkKey>& out) const {
  return hash_chunks(chunk_tokens_, parent != nullptr ? *parent : root_, tokens, extra, out);
}

Status ChunkHasher::hash(std::span<const std::int64_t> tokens, std::span<const std::string_view> extra, const ChunkKey* parent,
                         std::vector<ChunkKey>& out) const {
  return hash_chunks(chunk_tokens_, parent != nullptr ? *parent : root_, tokens, extra, out);
}

ChunkKey ChunkHasher::step(const ChunkKey& parent, std::span<const std::int32_t> tokens, std::string_view extra) const noexcept {
  return chain(parent, tokens, extra);
}

Result<ChunkKey> ChunkHasher::step(const ChunkKey& parent, std::span<const std::int64_t> tokens, std::string_view extra) const {
  if (!narrowable(tokens)) return not_narrowable(tokens);
  return chain(parent, tokens, extra);
}

ChunkKey KeyDeriver::derive(std::span<const std::byte> engine_key) const noexcept {
  Sha256 sha;
  sha.update(ns_.bytes.data(), ns_.bytes.size());
  sha.update_u32(static_cast<std::uint32_t>(engine_key.size()));
  sha.update(engine_key.data(), engine_key.size());
  return ChunkKey{sha.finish()};
}

}  // namespace lmcn
