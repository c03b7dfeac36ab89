// Tokens -> keys. Items are chunks (or engine keys).
#include <benchmark/benchmark.h>

#include <string>
#include <vector>

#include "lmcn/chunk_hasher.hpp"

namespace lmcn {
namespace {

constexpr std::uint32_t kChunkTokens = 256;

template <class Token>
void hash_tokens(benchmark::State& state) {
  const ChunkHasher hasher = *ChunkHasher::create(make_namespace("model=bench\n"), kChunkTokens);
  std::vector<Token> tokens;
  for (std::int64_t i = 0; i < state.range(0); ++i) tokens.push_back(static_cast<Token>(i * 7919 % 128'000));
  std::vector<ChunkKey> keys;
  for (auto _ : state) {
    keys.clear();
    if (!hasher.hash(std::span<const Token>(tokens), {}, nullptr, keys).ok()) state.SkipWithError("hash() failed");
    benchmark::DoNotOptimize(keys.data());
  }
  state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(keys.size()));
}
BENCHMARK(hash_tokens<std::int32_t>)->Name("hash/int32_tokens")->Arg(256)->Arg(128 * 1024);
BENCHMARK(hash_tokens<std::int64_t>)->Name("hash/int64_tokens")->Arg(256)->Arg(128 * 1024);

void derive(benchmark::State& state) {
  const KeyDeriver deriver(make_namespace("model=bench\n"));
  std::string engine_key(static_cast<std::size_t>(state.range(0)), 'k');
  for (auto _ : state) {
    ++engine_key[0];
    benchmark::DoNotOptimize(deriver.derive(std::as_bytes(std::span(engine_key))));
  }
  state.SetItemsProcessed(state.iterations());
}
BENCHMARK(derive)->Name("derive/engine_key_bytes")->Arg(36)->Arg(83);

}  // namespace
}  // namespace lmcn
