#include "index_memory.hpp"

#include <gtest/gtest.h>

namespace lmcn {
namespace {

// What the parts count themselves is tested at every size; here the process is asked, at the sizes where a table has just grown.
// Runs alone in its process, as ctest does it: memory that others freed would be used first.
TEST(IndexMemory, TheProcessGrowsByAtMost96BytesAnEntry) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "sanitizers have an allocator of their own";
#else
  constexpr std::uint64_t kEntries = 917'505;
  const bench::IndexMemory memory = bench::measure_index_memory("S3FIFO", kEntries);
  const double each = memory.resident_bytes / static_cast<double>(kEntries);
  EXPECT_GT(each, 52.0) << "less than the entries alone: nothing was measured";
  EXPECT_LE(each, 96.0);
  std::printf("[ figure   ] %.2f bytes an entry by the process, %.2f by its own count\n", each,
              memory.counted_bytes / static_cast<double>(kEntries));
#endif
}

}  // namespace
}  // namespace lmcn
