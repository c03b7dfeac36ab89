// ChunkIndex and LRU at one million entries.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstring>
#include <ctime>
#include <random>
#include <span>
#include <vector>

#include "index/chunk_index.hpp"

namespace lmcn {
namespace {

constexpr std::size_t kEntries = 1'000'000;
constexpr std::size_t kPrefixKeys = 1000;
constexpr std::size_t kAhead = 8;  // keys that prefetch() runs before find()

ChunkKey random_key(std::mt19937_64& random) {
  ChunkKey key;
  for (std::size_t i = 0; i < key.bytes.size(); i += 8) {
    const std::uint64_t word = random();
    std::memcpy(key.bytes.data() + i, &word, sizeof word);
  }
  return key;
}

std::vector<ChunkKey> random_keys(std::size_t count, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<ChunkKey> keys(count);
  for (ChunkKey& key : keys) key = random_key(random);
  return keys;
}

struct Million {
  std::vector<ChunkKey> keys = random_keys(kEntries, 1);
  ChunkIndex index;
  Million() {
    for (const ChunkKey& key : keys) index.insert(key);
  }
};

Million& million() {
  static Million instance;
  return instance;
}

void find_hot(benchmark::State& state) {
  Million& m = million();
  for (auto _ : state) benchmark::DoNotOptimize(m.index.find(m.keys[4711]));
}
BENCHMARK(find_hot)->Name("find/one_hot_key");

/// 1000 keys of one prompt, another prompt each time: nothing of it is in the cache. `scattered`: the prompt's chunks were
/// stored at different times, so that their entries lie apart.
void find_prefix(benchmark::State& state, bool present, bool scattered, bool prefetch) {
  Million& m = million();
  constexpr std::size_t kPrompts = 200;
  std::vector<ChunkKey> keys = present ? m.keys : random_keys(kPrompts * kPrefixKeys, 2);
  if (scattered) std::shuffle(keys.begin(), keys.end(), std::mt19937_64(3));
  std::size_t prompt = 0;
  for (auto _ : state) {
    const std::span<const ChunkKey> prefix(keys.data() + prompt * kPrefixKeys, kPrefixKeys);
    prompt = (prompt + 1) % kPrompts;
    std::uint64_t found = 0;
    for (std::size_t i = 0; i < prefix.size(); ++i) {
      if (prefetch && i + kAhead < prefix.size()) m.index.prefetch(prefix[i + kAhead]);
      const EntryId id = m.index.find(prefix[i]);
      if (id != kNoEntry) found += m.index.entry(id).extent.pages + 1;
    }
    if (found != (present ? kPrefixKeys : 0)) state.SkipWithError("wrong answer");
  }
  state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(kPrefixKeys));
}
BENCHMARK_CAPTURE(find_prefix, a, true, false, true)->Name("find/1000_of_1M/in_order");
BENCHMARK_CAPTURE(find_prefix, b, true, true, true)->Name("find/1000_of_1M/scattered");
BENCHMARK_CAPTURE(find_prefix, c, true, true, false)->Name("find/1000_of_1M/scattered_no_prefetch");
BENCHMARK_CAPTURE(find_prefix, d, false, false, true)->Name("find/1000_of_1M/absent");

/// A full cache at work: the oldest entry goes, a new one comes, with its place in the LRU order.
void replace_oldest(benchmark::State& state) {
  const std::vector<ChunkKey> keys = random_keys(2 * kEntries, 4);
  ChunkIndex index;
  const auto policy = std::move(make_eviction_policy("LRU", index)).value();
  for (std::size_t i = 0; i < kEntries; ++i) policy->insert(index.insert(keys[i]));
  std::size_t next = kEntries;
  for (auto _ : state) {
    const EntryId victim = *policy->victim([](EntryId) { return true; }, 64);
    policy->remove(victim);
    index.erase(victim);
    policy->insert(index.insert(keys[next]));
    next = (next + 1) % keys.size();
  }
  state.SetItemsProcessed(state.iterations());
}
BENCHMARK(replace_oldest)->Name("replace_oldest/1M");

/// Processor time of this thread, in the kernel too (page faults count, waiting for a processor does not).
double thread_us() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) * 1e6 + static_cast<double>(now.tv_nsec) * 1e-3;
}

/// From nothing to 1 M entries; `worst_insert_us` is the longest single insert, growth of the table included.
void fill(benchmark::State& state) {
  const std::vector<ChunkKey> keys = random_keys(kEntries, 5);
  double worst_us = 0;
  for (auto _ : state) {
    ChunkIndex index;
    double before_us = thread_us();
    for (const ChunkKey& key : keys) {
      index.insert(key);
      const double after_us = thread_us();
      worst_us = std::max(worst_us, after_us - before_us);
      before_us = after_us;
    }
    state.counters["bytes_per_entry"] = static_cast<double>(index.memory_bytes()) / static_cast<double>(index.size());
  }
  state.counters["worst_insert_us"] = worst_us;
  state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(kEntries));
}
BENCHMARK(fill)->Name("fill/1M")->Unit(benchmark::kMillisecond)->Iterations(1);

}  // namespace
}  // namespace lmcn
