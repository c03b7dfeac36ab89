// Control-plane costs of a store: lookups as vLLM's scheduler does them (key by key, the same prefix again and again), batch
// prefix lookups, reserve+commit, opening. Figures are per key unless the name says otherwise.
#include <benchmark/benchmark.h>

#include <vector>

#include "lmcn/store.hpp"

namespace lmcn {
namespace {

constexpr std::uint64_t kPayload = 4096;
using EngineKey = std::array<std::byte, 36>;

EngineKey engine_key(int i) {
  EngineKey key{};
  const ChunkKey digest = sha256(std::as_bytes(std::span(&i, 1)));
  std::memcpy(key.data(), digest.bytes.data(), digest.bytes.size());
  return key;
}

struct Filled {
  explicit Filled(int chunks) : ns(make_namespace("bench")) {
    StoreOptions options;
    options.host_bytes = (static_cast<std::uint64_t>(chunks) * 2 * kPayload * 5 / 4 + (64 << 20)) >> 21 << 21;
    options.max_payload_bytes = 1 << 20;
    store = std::move(TieredStore::open(options)).value();
    const KeyDeriver deriver(ns);
    for (int i = 0; i < chunks; ++i) {
      engine_keys.push_back(engine_key(i));
      keys.push_back(deriver.derive(engine_keys.back()));
      auto lease = store->reserve(ns, std::span(&keys.back(), 1), kPayload, false);
      lease->mark_filled(0);
      lease->commit();
    }
  }
  NamespaceId ns;
  std::unique_ptr<TieredStore> store;
  std::vector<EngineKey> engine_keys;
  std::vector<ChunkKey> keys;
};

Filled& filled() {
  static Filled f(50'000);
  return f;
}

void FirstScan(benchmark::State& state) {
  Filled& f = filled();
  std::size_t start = 0;
  for (auto _ : state) {
    auto request = f.store->begin_request(f.ns, {});
    for (std::size_t i = 0; i < 1000; ++i) benchmark::DoNotOptimize(request->lookup(f.engine_keys[start + i]));
    start = (start + 1009) % 49'000;
  }
  state.counters["per_key"] = benchmark::Counter(1000, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}
BENCHMARK(FirstScan)->Unit(benchmark::kMicrosecond);

void RepeatedScan(benchmark::State& state) {
  Filled& f = filled();
  auto request = f.store->begin_request(f.ns, {});
  for (auto _ : state) {
    for (std::size_t i = 0; i < 1000; ++i) benchmark::DoNotOptimize(request->lookup(f.engine_keys[i]));
  }
  state.counters["per_key"] = benchmark::Counter(1000, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}
BENCHMARK(RepeatedScan)->Unit(benchmark::kMicrosecond);

// A request's scheduling steps: the same prefix again and again, with one call.
void LookupPrefix16000Memoised(benchmark::State& state) {
  Filled& f = filled();
  auto request = f.store->begin_request(f.ns, {});
  const std::span<const ChunkKey> keys = std::span(f.keys).first(16'000);
  if (request->lookup_prefix(keys).hits != keys.size()) state.SkipWithError("not all keys are hits");
  for (auto _ : state) benchmark::DoNotOptimize(request->lookup_prefix(keys));
}
BENCHMARK(LookupPrefix16000Memoised)->Unit(benchmark::kMicrosecond);

void BatchPrefixLookup1000(benchmark::State& state) {
  Filled& f = filled();
  std::size_t start = 0;
  for (auto _ : state) {
    benchmark::DoNotOptimize(f.store->lookup(std::span(f.keys).subspan(start, 1000)));
    start = (start + 1009) % 49'000;
  }
}
BENCHMARK(BatchPrefixLookup1000)->Unit(benchmark::kMicrosecond);

void ReserveCommit(benchmark::State& state) {
  Filled& f = filled();
  static int i = 10'000'000;  // goes on over the repetitions: each chunk is new
  for (auto _ : state) {
    const int value = i++;
    const ChunkKey key = sha256(std::as_bytes(std::span(&value, 1)));
    auto lease = f.store->reserve(f.ns, std::span(&key, 1), kPayload, false);
    lease->mark_filled(0);
    benchmark::DoNotOptimize(lease->commit());
  }
}
BENCHMARK(ReserveCommit);

void OpenHostArena(benchmark::State& state) {
  for (auto _ : state) {
    StoreOptions options;
    options.host_bytes = static_cast<std::uint64_t>(state.range(0)) << 30;
    auto store = TieredStore::open(options);
    benchmark::DoNotOptimize(store.ok());
    state.PauseTiming();
    store = Status(Code::kAborted, "closed");
    state.ResumeTiming();
  }
}
BENCHMARK(OpenHostArena)->Arg(1)->Arg(8)->Unit(benchmark::kMillisecond)->Iterations(3);

}  // namespace
}  // namespace lmcn

BENCHMARK_MAIN();
