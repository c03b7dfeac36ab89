#include "lmcn/chunk_hasher.hpp"

#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "../../data/hash_vectors.hpp"

namespace lmcn {
namespace {

constexpr std::int64_t kInt32Min = std::numeric_limits<std::int32_t>::min();
constexpr std::int64_t kInt32Max = std::numeric_limits<std::int32_t>::max();

template <class Token = std::int32_t>
std::vector<Token> make_tokens(std::uint32_t seed, std::uint32_t count) {
  std::vector<Token> tokens;
  for (std::uint32_t i = 0; i < count; ++i) tokens.push_back(static_cast<std::int32_t>((seed + i) * 2654435761u));
  return tokens;
}

std::string from_hex(const std::string& hex) {
  std::string bytes;
  for (std::size_t i = 0; i < hex.size(); i += 2) bytes.push_back(static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16)));
  return bytes;
}

ChunkKey key_from_hex(const std::string& hex) {
  ChunkKey key;
  const std::string bytes = from_hex(hex);
  EXPECT_EQ(bytes.size(), key.bytes.size());
  std::memcpy(key.bytes.data(), bytes.data(), key.bytes.size());
  return key;
}

std::span<const std::byte> as_bytes(const std::string& text) {
  return std::as_bytes(std::span(text));
}

const NamespaceId& test_namespace() {
  static const NamespaceId ns = make_namespace(vectors::kDescription);
  return ns;
}

ChunkHasher hasher(std::uint32_t chunk_tokens) {
  return *ChunkHasher::create(test_namespace(), chunk_tokens);
}

/// hash() with what a case of the vectors asks for.
template <class Token>
Status hash_case(const vectors::Chain& chain, std::vector<ChunkKey>& out) {
  std::vector<std::string> extra_bytes;
  for (const std::string& hex : chain.extra) extra_bytes.push_back(from_hex(hex));
  const std::vector<std::string_view> extra(extra_bytes.begin(), extra_bytes.end());
  const ChunkKey parent = chain.parent.empty() ? ChunkKey{} : key_from_hex(chain.parent);
  const std::vector<Token> tokens = make_tokens<Token>(chain.seed, chain.token_count);
  return hasher(chain.chunk_tokens).hash(std::span(tokens), extra, chain.parent.empty() ? nullptr : &parent, out);
}

template <class Token>
void expect_vectors() {
  ASSERT_FALSE(vectors::kChains.empty());
  for (const vectors::Chain& chain : vectors::kChains) {
    SCOPED_TRACE(chain.name);
    std::vector<ChunkKey> keys{ChunkKey{}};  // one that is there already: hash() appends
    ASSERT_TRUE(hash_case<Token>(chain, keys).ok());
    ASSERT_EQ(keys.size(), chain.keys.size() + 1);
    EXPECT_EQ(keys[0], ChunkKey{});
    for (std::size_t i = 0; i < chain.keys.size(); ++i) EXPECT_EQ(keys[i + 1].to_hex(), chain.keys[i]) << i;
  }
}

TEST(Sha256, Fips180Examples) {
  EXPECT_EQ(sha256({}).to_hex(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256(as_bytes("abc")).to_hex(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sha256(as_bytes(std::string(1'000'000, 'a'))).to_hex(),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(ChunkHasher, Int32Vectors) {
  expect_vectors<std::int32_t>();
}
TEST(ChunkHasher, Int64Vectors) {
  expect_vectors<std::int64_t>();
}

TEST(ChunkHasher, StepVectors) {
  for (const vectors::Step& step : vectors::kSteps) {
    const std::string extra = from_hex(step.extra);
    EXPECT_EQ(hasher(256).step(key_from_hex(step.parent), make_tokens(1, step.token_count), extra).to_hex(), step.key);
  }
}

TEST(ChunkHasher, NamespaceVectors) {
  for (const vectors::Namespace& ns : vectors::kNamespaces) EXPECT_EQ(make_namespace(ns.description).to_hex(), ns.id);
}

TEST(ChunkHasher, RootIsTheHashOfTheNamespace) {
  EXPECT_EQ(hasher(16).root(), sha256(std::as_bytes(std::span(test_namespace().bytes))));
  EXPECT_EQ(hasher(16).chunk_tokens(), 16u);
}

TEST(ChunkHasher, GoesOnFromAParentAsIfHashedAtOnce) {
  const std::vector<std::int32_t> tokens = make_tokens(9, 96);
  std::vector<ChunkKey> at_once, in_parts;
  ASSERT_TRUE(hasher(16).hash(std::span(tokens), {}, nullptr, at_once).ok());
  ASSERT_TRUE(hasher(16).hash(std::span(tokens).first(32), {}, nullptr, in_parts).ok());
  ASSERT_TRUE(hasher(16).hash(std::span(tokens).subspan(32), {}, &in_parts.back(), in_parts).ok());  // parent lies in out
  EXPECT_EQ(in_parts, at_once);
}

TEST(ChunkHasher, TokensAndExtraCannotBeMistakenForEachOther) {
  const ChunkKey parent{};
  const std::vector<std::int32_t> tokens = {1, 2, 0x61616161};
  const ChunkKey all_tokens = hasher(4).step(parent, tokens, "");
  EXPECT_NE(all_tokens, hasher(4).step(parent, std::span(tokens).first(2), "aaaa"));
  // Bytes that imitate the trailer of the shorter message.
  const std::vector<std::int32_t> imitation = {1, 2, 2, 0};
  EXPECT_NE(hasher(4).step(parent, std::span(tokens).first(2), ""), hasher(4).step(parent, imitation, ""));
}

TEST(ChunkHasher, ExtremeInt64TokensHashLikeInt32) {
  const std::vector<std::int64_t> wide = {kInt32Min, kInt32Max, -1, 0};
  const std::vector<std::int32_t> narrow = {std::numeric_limits<std::int32_t>::min(), std::numeric_limits<std::int32_t>::max(), -1,
                                            0};
  std::vector<ChunkKey> from_wide, from_narrow;
  ASSERT_TRUE(hasher(4).hash(std::span(wide), {}, nullptr, from_wide).ok());
  ASSERT_TRUE(hasher(4).hash(std::span(narrow), {}, nullptr, from_narrow).ok());
  EXPECT_EQ(from_wide, from_narrow);
}

TEST(ChunkHasher, TokenOutsideInt32IsNamed) {
  constexpr std::int64_t kInt64Min = std::numeric_limits<std::int64_t>::min();
  constexpr std::int64_t kInt64Max = std::numeric_limits<std::int64_t>::max();
  for (const std::int64_t bad : {kInt32Max + 1, kInt32Min - 1, std::int64_t{1} << 32, kInt64Min, kInt64Max}) {
    for (const std::size_t position : {0u, 255u, 256u, 300u, 511u}) {
      std::vector<std::int64_t> tokens = make_tokens<std::int64_t>(1, 512);
      tokens[position] = bad;
      tokens[511] = bad;  // the first one is named
      std::vector<ChunkKey> keys{ChunkKey{}};
      const Status status = hasher(256).hash(std::span<const std::int64_t>(tokens), {}, nullptr, keys);
      EXPECT_EQ(status.code(), Code::kInvalidArgument);
      EXPECT_EQ(status.message(), "tokens[" + std::to_string(position) + "] is " + std::to_string(bad) +
                                      ", which is outside int32 (-2147483648..2147483647)");
      EXPECT_EQ(keys.size(), 1u);
    }
  }
}

TEST(ChunkHasher, TokenOutsideInt32InTheTailIsIgnoredLikeTheTail) {
  std::vector<std::int64_t> tokens = make_tokens<std::int64_t>(1, 20);
  tokens[17] = kInt32Max + 1;
  std::vector<ChunkKey> keys;
  EXPECT_TRUE(hasher(16).hash(std::span<const std::int64_t>(tokens), {}, nullptr, keys).ok());
  EXPECT_EQ(keys.size(), 1u);
}

TEST(ChunkHasher, StepOfInt64IsThatOfInt32OrNamesThePosition) {
  const std::vector<std::int32_t> narrow = make_tokens(4, 2500);  // more than one piece
  std::vector<std::int64_t> wide(narrow.begin(), narrow.end());
  const ChunkHasher shared = hasher(16);
  const auto step = [&] { return shared.step(shared.root(), std::span<const std::int64_t>(wide), "salt"); };
  ASSERT_TRUE(step().ok());
  EXPECT_EQ(*step(), shared.step(shared.root(), std::span<const std::int32_t>(narrow), "salt"));
  EXPECT_NE(*step(), shared.step(shared.root(), std::span<const std::int32_t>(narrow), ""));
  wide[2077] = kInt32Max + 1;
  EXPECT_EQ(step().status().code(), Code::kInvalidArgument);
  EXPECT_EQ(step().status().message().find("tokens[2077] is 2147483648"), 0u) << step().status().message();
}

TEST(ChunkHasher, ExtraCountMustMatchWholeChunks) {
  const std::vector<std::int32_t> tokens = make_tokens(1, 40);  // 2 whole chunks of 16
  for (const std::size_t count : {1u, 3u}) {
    const std::vector<std::string_view> extra(count, "x");
    std::vector<ChunkKey> keys;
    const Status status = hasher(16).hash(std::span<const std::int32_t>(tokens), extra, nullptr, keys);
    EXPECT_EQ(status.code(), Code::kInvalidArgument);
    EXPECT_EQ(status.message(), "extra has " + std::to_string(count) + " entries for 2 whole chunks; give one per chunk, or none");
    EXPECT_TRUE(keys.empty());
  }
}

TEST(ChunkHasher, ZeroChunkTokensIsRefused) {
  const auto created = ChunkHasher::create(test_namespace(), 0);
  ASSERT_FALSE(created.ok());
  EXPECT_EQ(created.status().code(), Code::kInvalidArgument);
}

TEST(ChunkHasher, IsSharedByThreads) {
  const ChunkHasher shared = hasher(256);
  const std::vector<std::int32_t> tokens = make_tokens(3, 256 * 64);
  std::vector<ChunkKey> expected;
  ASSERT_TRUE(shared.hash(std::span(tokens), {}, nullptr, expected).ok());
  std::vector<std::vector<ChunkKey>> results(4);
  {
    std::vector<std::jthread> threads;
    for (auto& result : results) {
      threads.emplace_back([&] { EXPECT_TRUE(shared.hash(std::span(tokens), {}, nullptr, result).ok()); });
    }
  }
  for (const auto& result : results) EXPECT_EQ(result, expected);
}

TEST(KeyDeriver, Vectors) {
  const KeyDeriver deriver(test_namespace());
  EXPECT_EQ(deriver.ns(), test_namespace());
  for (const vectors::Derived& derived : vectors::kDerived) {
    EXPECT_EQ(deriver.derive(as_bytes(from_hex(derived.engine_key))).to_hex(), derived.key) << derived.engine_key.size() / 2;
  }
}

TEST(KeyDeriver, NamespaceAndLengthSeparateKeys) {
  const std::string key(36, 'k');
  EXPECT_NE(KeyDeriver(make_namespace("a")).derive(as_bytes(key)), KeyDeriver(make_namespace("b")).derive(as_bytes(key)));
  EXPECT_NE(KeyDeriver(test_namespace()).derive(as_bytes(key)), KeyDeriver(test_namespace()).derive(as_bytes(key + '\0')));
}

}  // namespace
}  // namespace lmcn
