// Control-plane costs of a store: lookups as vLLM's scheduler does them (key by key, the same prefix again and again), batch
// prefix lookups, reserve+commit, opening. Figures are per key unless the name says otherwise.
#include <benchmark/benchmark.h>
#include <stdlib.h>

#include <filesystem>
#include <string>
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

// 1000 chunks on NVMe alone, in a new directory under TMPDIR that is removed at the end.
struct FilledNvme {
  FilledNvme() : ns(make_namespace("bench")) {
    const char* const base = std::getenv("TMPDIR");
    std::string name = std::string(base != nullptr ? base : "/tmp") + "/bench_store.XXXXXX";
    directory = ::mkdtemp(name.data());
    StoreOptions options;
    options.host_bytes = 64 << 20;
    options.max_payload_bytes = 1 << 20;
    options.directories = {directory + "/kv"};
    options.nvme_bytes = 1ull << 30;
    const KeyDeriver deriver(ns);
    {
      auto writer = std::move(TieredStore::open(options)).value();
      for (int i = 0; i < 1000; ++i) {
        const EngineKey key = engine_key(i);
        keys.push_back(deriver.derive(key));
        auto lease = writer->reserve(ns, std::span(&keys.back(), 1), kPayload, false);
        lease->mark_filled(0);
        lease->commit();
      }
      if (!writer->close(std::chrono::seconds(60)).ok()) std::abort();
    }
    store = std::move(TieredStore::open(options)).value();
  }
  ~FilledNvme() {
    store.reset();
    std::filesystem::remove_all(directory);
  }
  NamespaceId ns;
  std::string directory;
  std::unique_ptr<TieredStore> store;
  std::vector<ChunkKey> keys;
};

FilledNvme& filled_nvme() {
  static FilledNvme f;
  return f;
}

// What a scheduler asks about a load past host memory: how much of the prefix is there. With two locks for each chunk on NVMe, as
// it was before lookup_tiers ...
void DirectLookup1000KeyByKey(benchmark::State& state) {
  FilledNvme& f = filled_nvme();
  const std::span<const ChunkKey> keys = f.keys;
  for (auto _ : state) {
    auto request = f.store->begin_request(f.ns, {.promote = false});
    std::size_t hits = 0;
    while (hits < keys.size()) {
      hits += request->lookup_prefix(keys.subspan(hits)).hits;
      if (hits == keys.size() || f.store->lookup(keys.subspan(hits, 1)).nvme == 0) break;
      ++hits;
    }
    if (hits != keys.size()) state.SkipWithError("not all keys are hits");
  }
}
BENCHMARK(DirectLookup1000KeyByKey)->Unit(benchmark::kMicrosecond);

// ... and with one for all.
void DirectLookup1000(benchmark::State& state) {
  FilledNvme& f = filled_nvme();
  for (auto _ : state) {
    auto request = f.store->begin_request(f.ns, {.promote = false});
    if (request->lookup_tiers(f.keys).hits != f.keys.size()) state.SkipWithError("not all keys are hits");
  }
}
BENCHMARK(DirectLookup1000)->Unit(benchmark::kMicrosecond);

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
