// Bytes of memory an entry, from what the process grows by, for each policy; each figure from a process of its own. At 917505 and
// 3670017 entries the table has just grown and its own count is the highest, most of it untouched. Exits with 1 above 96.
//   bench_index_memory [ENTRIES...]
#include <sys/wait.h>

#include <cstdlib>
#include <vector>

#include "index_memory.hpp"

int main(int argc, char** argv) {
  using namespace lmcn::bench;
  constexpr double kTarget = 96;
  std::vector<std::uint64_t> sizes = {917'505, 1'000'000, 3'670'017, 4'000'000};
  if (argc > 1) sizes.clear();
  for (int i = 1; i < argc; ++i) {
    sizes.push_back(std::strtoull(argv[i], nullptr, 10));
    if (sizes.back() == 0) {
      std::fprintf(stderr, "bench_index_memory: entries: a number >= 1 expected, got \"%s\"\n", argv[i]);
      return 2;
    }
  }
  std::printf("bytes an entry, target <= %.0f\n%-8s %10s %18s %18s\n", kTarget, "policy", "entries", "process grew by",
              "counted itself");
  bool good = true;
  for (const std::uint64_t entries : sizes) {
    for (const char* policy : {"LRU", "S3FIFO", "LFU", "FIFO", "MRU"}) {
      std::fflush(stdout);
      const pid_t child = ::fork();
      if (child == 0) {
        const IndexMemory memory = measure_index_memory(policy, entries);
        const double each = memory.resident_bytes / static_cast<double>(entries);
        std::printf("%-8s %10llu %18.2f %18.2f%s\n", policy, static_cast<unsigned long long>(entries), each,
                    memory.counted_bytes / static_cast<double>(entries), each > kTarget ? "   ABOVE" : "");
        std::fflush(stdout);
        ::_exit(each > 0 && each <= kTarget ? 0 : 1);
      }
      int state = 1;
      if (child < 0 || ::waitpid(child, &state, 0) != child || state != 0) good = false;
    }
  }
  return good ? 0 : 1;
}
