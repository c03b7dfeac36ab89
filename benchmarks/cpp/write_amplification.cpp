// What reclaim costs in writes and what it gains in hits: a Zipf workload over several times more chunks than the NVMe limit holds,
// through a real store on a real disk, once with and once without writing used chunks again. Counts only, no times: the same
// arguments give nearly the same figures on any machine. Fails when the write amplification is above --most.
#include <getopt.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "store/store_core.hpp"

namespace lmcn {
namespace {

struct Arguments {
  std::string directory = ".bench/writes";
  std::uint64_t limit_mib = 256;
  std::uint64_t over_commit = 4;
  std::uint64_t chunk_kib = 64;
  std::uint64_t requests = 150'000;
  double zipf = 0.9;
  double most = 1.25;
  bool json = false;
};

struct Outcome {
  double share = 0;
  std::uint64_t hits = 0, hits_nvme = 0, misses = 0, dropped = 0;
  std::uint64_t written = 0, again = 0, device = 0;
  /// Bytes of chunks written for each byte of chunks stored.
  double application() const { return static_cast<double>(written) / static_cast<double>(written - again); }
  /// With headers, footers, skipped space and checkpoints.
  double whole() const { return static_cast<double>(device) / static_cast<double>(written - again); }
  double hit_rate() const { return static_cast<double>(hits) / static_cast<double>(hits + misses); }
};

class Zipf {
 public:
  Zipf(std::uint64_t count, double exponent) : sums_(count) {
    double sum = 0;
    for (std::uint64_t i = 0; i < count; ++i) sums_[i] = sum += std::pow(static_cast<double>(i + 1), -exponent);
  }
  template <class Random>
  std::uint64_t operator()(Random& random) const {
    const double at = std::uniform_real_distribution<double>(0, sums_.back())(random);
    return static_cast<std::uint64_t>(std::lower_bound(sums_.begin(), sums_.end(), at) - sums_.begin());
  }

 private:
  std::vector<double> sums_;
};

void require(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.to_string().c_str());
  std::exit(2);
}

Outcome run(const Arguments& a, double share) {
  const std::uint64_t payload = (a.chunk_kib << 10) - kPageBytes;
  StoreOptions options;
  options.directories = {a.directory};
  options.nvme_bytes = a.limit_mib << 20;
  options.region_bytes = std::max<std::uint64_t>(options.nvme_bytes / 32 >> 20 << 20, 1 << 20);
  options.host_bytes = std::max<std::uint64_t>(options.nvme_bytes / 16, 8 << 20);
  options.max_payload_bytes = payload;
  options.nvme_daily_bytes = UINT64_MAX;
  std::filesystem::remove_all(a.directory);
  std::filesystem::create_directories(std::filesystem::path(a.directory).parent_path());
  StoreCore store(options);
  store.reappend_share = share;
  require(store.start());

  const NamespaceId ns = make_namespace("write_amplification");
  const KeyDeriver deriver(ns);
  const std::uint64_t chunks = a.over_commit * options.nvme_bytes / (a.chunk_kib << 10);
  const Zipf zipf(chunks, a.zipf);
  std::mt19937_64 random(1);
  Outcome outcome{.share = share};
  for (std::uint64_t i = 0; i < a.requests; ++i) {
    const std::uint64_t chunk = zipf(random);
    const ChunkKey key = deriver.derive(std::as_bytes(std::span(&chunk, 1)));
    const std::span<const ChunkKey> keys(&key, 1);
    auto lease = store.acquire(ns, keys, std::chrono::seconds(30));
    if (lease.ok()) {
      std::uint64_t first = 0;
      std::memcpy(&first, lease->payload(0).data(), sizeof first);
      if (first != chunk) require(Status(Code::kCorruption, "chunk " + std::to_string(chunk) + " has the bytes of another"));
      ++outcome.hits;
      continue;
    }
    ++outcome.misses;
    auto fill = store.reserve(ns, keys, payload, false);
    require(fill.status());
    std::memset(fill->payload(0), static_cast<int>(chunk), payload);
    std::memcpy(fill->payload(0), &chunk, sizeof chunk);
    fill->mark_filled(0);
    fill->commit();
    if (outcome.misses % 32 == 0) require(store.flush(std::chrono::seconds(60)));
  }
  require(store.close(std::chrono::seconds(60)));
  const StoreStats stats = store.stats();
  outcome.hits_nvme = stats.hits_nvme;
  outcome.dropped = stats.demotion_drops + stats.demotion_failures;
  outcome.written = stats.demoted_bytes;
  outcome.again = stats.reappended_bytes;
  outcome.device = stats.nvme_day_bytes;
  std::filesystem::remove_all(a.directory);
  return outcome;
}

void print(const Arguments& a, const std::vector<Outcome>& outcomes) {
  if (a.json) {
    std::printf("[");
    for (std::size_t i = 0; i < outcomes.size(); ++i) {
      const Outcome& o = outcomes[i];
      std::printf(
          "%s{\"share\": %.2f, \"hit_rate\": %.4f, \"nvme_hits\": %llu, \"application\": %.4f, \"whole\": %.4f, \"dropped\": %llu}",
          i != 0 ? ", " : "", o.share, o.hit_rate(), static_cast<unsigned long long>(o.hits_nvme), o.application(), o.whole(),
          static_cast<unsigned long long>(o.dropped));
    }
    std::printf("]\n");
    return;
  }
  std::printf("%llu requests, Zipf %.2f over %llux the NVMe limit of %llu MiB, chunks of %llu KiB, host memory 1/16 of the limit\n",
              static_cast<unsigned long long>(a.requests), a.zipf, static_cast<unsigned long long>(a.over_commit),
              static_cast<unsigned long long>(a.limit_mib), static_cast<unsigned long long>(a.chunk_kib));
  std::printf("%-14s %9s %10s %22s %22s %8s\n", "written again", "hit rate", "NVMe hits", "amplification, chunks",
              "amplification, device", "dropped");
  for (const Outcome& o : outcomes) {
    char share[32];
    std::snprintf(share, sizeof share, o.share == 0 ? "nothing" : "up to %.0f %%", o.share * 100);
    std::printf("%-14s %8.2f%% %10llu %22.3f %22.3f %8llu\n", share, o.hit_rate() * 100,
                static_cast<unsigned long long>(o.hits_nvme), o.application(), o.whole(),
                static_cast<unsigned long long>(o.dropped));
  }
}

int main_of(int argc, char** argv) {
  Arguments a;
  const option names[] = {{"directory", 1, nullptr, 'd'}, {"limit-mib", 1, nullptr, 'l'}, {"over-commit", 1, nullptr, 'o'},
                          {"chunk-kib", 1, nullptr, 'c'}, {"requests", 1, nullptr, 'r'},  {"zipf", 1, nullptr, 'z'},
                          {"most", 1, nullptr, 'm'},      {"json", 0, nullptr, 'j'},      {"help", 0, nullptr, 'h'},
                          {nullptr, 0, nullptr, 0}};
  for (int c = 0; (c = ::getopt_long(argc, argv, "h", names, nullptr)) != -1;) {
    switch (c) {
      case 'd':
        a.directory = optarg;
        break;
      case 'l':
        a.limit_mib = std::strtoull(optarg, nullptr, 10);
        break;
      case 'o':
        a.over_commit = std::strtoull(optarg, nullptr, 10);
        break;
      case 'c':
        a.chunk_kib = std::strtoull(optarg, nullptr, 10);
        break;
      case 'r':
        a.requests = std::strtoull(optarg, nullptr, 10);
        break;
      case 'z':
        a.zipf = std::strtod(optarg, nullptr);
        break;
      case 'm':
        a.most = std::strtod(optarg, nullptr);
        break;
      case 'j':
        a.json = true;
        break;
      default:
        std::printf(
            "usage: %s [--directory PATH] [--limit-mib N] [--over-commit N] [--chunk-kib N] [--requests N] [--zipf S] [--most X] "
            "[--json]\n",
            argv[0]);
        return c == 'h' ? 0 : 2;
    }
  }
  std::vector<Outcome> outcomes;
  for (const double share : {0.0, 0.10, 0.15}) outcomes.push_back(run(a, share));
  print(a, outcomes);
  for (const Outcome& o : outcomes) {
    if (o.application() > a.most) {
      std::fprintf(stderr, "write amplification %.3f with %.2f written again is above %.3f\n", o.application(), o.share, a.most);
      return 1;
    }
  }
  return 0;
}

}  // namespace
}  // namespace lmcn

int main(int argc, char** argv) {
  return lmcn::main_of(argc, argv);
}
