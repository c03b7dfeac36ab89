#include "memory/host_arena.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <latch>
#include <thread>
#include <vector>

#include "base/seq_points.hpp"
#include "memory/arena_mapping.hpp"
#include "memory/memory_limits.hpp"
#include "memory/numa.hpp"

namespace lmcn {
namespace {

using namespace std::chrono_literals;

constexpr std::uint64_t kMiB = 1ull << 20;

std::unique_ptr<HostArena> make(std::uint64_t bytes, unsigned threads = 2, bool huge = true) {
  auto arena = HostArena::create({.bytes = bytes, .populate_threads = threads, .huge_pages = huge});
  EXPECT_TRUE(arena.ok()) << arena.status().to_string();
  return arena.ok() ? std::move(*arena) : nullptr;
}

// Bytes of the mapping at `base` for a field of /proc/self/smaps.
std::uint64_t smaps(const std::byte* base, const std::string& field) {
  std::ifstream file("/proc/self/smaps");
  char wanted[32];
  std::snprintf(wanted, sizeof wanted, "%lx-", reinterpret_cast<unsigned long>(base));
  std::string line;
  bool inside = false;
  while (std::getline(file, line)) {
    if (line.find('-') != std::string::npos && line.find(':') > line.find(' ')) inside = line.rfind(wanted, 0) == 0;
    if (inside && line.rfind(field + ":", 0) == 0) return std::stoull(line.substr(field.size() + 1)) * 1024;
  }
  return 0;
}

std::uint64_t hugetlb(const std::byte* base) {
  return smaps(base, "Shared_Hugetlb") + smaps(base, "Private_Hugetlb");
}

TEST(HostArena, RefusesBadSizesNamingThem) {
  for (const std::uint64_t bytes : {std::uint64_t{0}, 2 * kMiB - 1}) {
    const auto small = HostArena::create({.bytes = bytes});
    ASSERT_FALSE(small.ok());
    EXPECT_EQ(small.status().code(), Code::kInvalidArgument);
    EXPECT_NE(small.status().message().find(std::to_string(bytes)), std::string::npos) << small.status().message();
  }
  for (const std::uint64_t bytes : {1ull << 50, ~0ull}) {
    const auto large = HostArena::create({.bytes = bytes});
    ASSERT_FALSE(large.ok());
    EXPECT_EQ(large.status().code(), Code::kInvalidArgument);
    EXPECT_NE(large.status().message().find(std::to_string(bytes / (2 * kMiB) * (2 * kMiB))), std::string::npos)
        << large.status().message();
    EXPECT_NE(large.status().message().find("available"), std::string::npos) << large.status().message();
  }
}

TEST(HostArena, IsAlignedSealedAndRoundedDown) {
  const auto arena = make(9 * kMiB, 0);
  EXPECT_EQ(arena->bytes(), 8 * kMiB);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(arena->base()) % (2 * kMiB), 0u);
  EXPECT_EQ(::ftruncate(arena->memfd(), 4096), -1);
  EXPECT_EQ(::ftruncate(arena->memfd(), 16 * static_cast<off_t>(kMiB)), -1);
  EXPECT_EQ(::fcntl(arena->memfd(), F_ADD_SEALS, F_SEAL_FUTURE_WRITE), -1);
  EXPECT_NE(::fcntl(arena->memfd(), F_GETFD) & FD_CLOEXEC, 0);
  EXPECT_TRUE(arena->stats().populate_done);
  EXPECT_EQ(arena->stats().populated_bytes, 0u);
}

TEST(HostArena, ReadsAsZerosWhetherHugeOrNot) {
  for (const bool huge : {true, false}) {
    const auto arena = make(32 * kMiB, 2, huge);
    arena->wait_populated();
    std::uint64_t nonzero = 0;
    for (std::uint64_t i = 0; i < arena->bytes(); ++i) nonzero += arena->base()[i] != std::byte{0};
    EXPECT_EQ(nonzero, 0u);
    EXPECT_EQ(arena->stats().populated_bytes, arena->bytes());
    EXPECT_EQ(huge ? 0u : arena->stats().huge_bytes, 0u);
    EXPECT_EQ(smaps(arena->base(), "Rss") + hugetlb(arena->base()), arena->bytes());
  }
}

TEST(HostArena, StatsSayWhatTheKernelSays) {
  const auto start = std::chrono::steady_clock::now();
  const auto arena = make(256 * kMiB);
  const double opened = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  arena->wait_populated();
  const double populated = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const ArenaStats stats = arena->stats();
  const std::uint64_t kernel = smaps(arena->base(), "ShmemPmdMapped") + hugetlb(arena->base());
  std::printf("[ figure   ] arena of 256 MiB: open %.2f ms, populated after %.0f ms, huge %.1f %% (kernel: %.1f %%)\n",
              opened * 1e3, populated * 1e3, 100.0 * static_cast<double>(stats.huge_bytes) / static_cast<double>(stats.bytes),
              100.0 * static_cast<double>(kernel) / static_cast<double>(stats.bytes));
  EXPECT_TRUE(stats.populate_done);
  EXPECT_EQ(stats.populated_bytes, stats.bytes);
  EXPECT_EQ(stats.huge_bytes, kernel);
}

struct Policy {
  int mode = -1;
  unsigned long nodes = 0;  // the first 64
};
Policy policy_at(std::byte* address) {
  Policy policy;
  unsigned long nodes[16] = {};
  if (::syscall(SYS_get_mempolicy, &policy.mode, nodes, 1025ul, address, MPOL_F_ADDR) != 0) policy.mode = -errno;
  policy.nodes = nodes[0];
  return policy;
}

int first_node() {
  unsigned long allowed[16] = {};
  EXPECT_EQ(::syscall(SYS_get_mempolicy, nullptr, allowed, 1025ul, nullptr, MPOL_F_MEMS_ALLOWED), 0);
  return std::countr_zero(allowed[0]);
}

TEST(HostArena, TakesItsPagesFromTheNodesAskedFor) {
  if (check_numa_nodes(std::array{0}).code() == Code::kUnavailable) GTEST_SKIP() << "get_mempolicy is refused here";
  const int node = first_node();
  const auto of = [&](std::vector<int> nodes) {
    auto arena = HostArena::create({.bytes = 8 * kMiB, .numa_nodes = std::move(nodes)});
    EXPECT_TRUE(arena.ok()) << arena.status().to_string();
    return arena.ok() ? std::move(*arena) : nullptr;
  };
  const auto free = of({});
  ASSERT_NE(free, nullptr);
  EXPECT_EQ(policy_at(free->base()).mode, MPOL_DEFAULT);
  for (const std::vector<int>& nodes : {std::vector{node}, std::vector{node, node}}) {
    const auto arena = of(nodes);
    ASSERT_NE(arena, nullptr);
    for (const std::uint64_t at : {std::uint64_t{0}, arena->bytes() - 1}) {
      const Policy policy = policy_at(arena->base() + at);
      EXPECT_EQ(policy.mode, MPOL_PREFERRED);
      EXPECT_EQ(policy.nodes, 1ul << node);
    }
    // The memfd's, so that a worker that touches a page first gets it from there too.
    const auto mapped = MappedArena::map(::dup(arena->memfd()), arena->bytes());
    ASSERT_TRUE(mapped.ok());
    EXPECT_EQ(policy_at((*mapped)->base()).mode, MPOL_PREFERRED);
  }
}

TEST(HostArena, InterleavesSeveralNodes) {
  if (!check_numa_nodes(std::array{0, 1}).ok()) GTEST_SKIP() << "one NUMA node here";
  auto arena = HostArena::create({.bytes = 64 * kMiB, .numa_nodes = {0, 1}});
  ASSERT_TRUE(arena.ok()) << arena.status().to_string();
  EXPECT_EQ(policy_at((*arena)->base()).mode, MPOL_INTERLEAVE);
  EXPECT_EQ(policy_at((*arena)->base()).nodes, 3ul);
  (*arena)->wait_populated();
  int on_first = 0, pages = 0;
  for (std::uint64_t at = 0; at < (*arena)->bytes(); at += 2 * kMiB, ++pages) {
    int node = -1;
    ASSERT_EQ(::syscall(SYS_get_mempolicy, &node, nullptr, 0ul, (*arena)->base() + at, MPOL_F_ADDR | MPOL_F_NODE), 0);
    on_first += node == 0;
  }
  EXPECT_GT(on_first, 0);
  EXPECT_LT(on_first, pages);
}

TEST(HostArena, ANodeThatDoesNotExistIsNamed) {
  if (check_numa_nodes(std::array{0}).code() == Code::kUnavailable) GTEST_SKIP() << "get_mempolicy is refused here";
  const int node = first_node();
  for (const int absent : {1023, 1024, -1, INT32_MIN}) {
    const auto arena = HostArena::create({.bytes = 8 * kMiB, .numa_nodes = {node, absent}});
    ASSERT_FALSE(arena.ok());
    EXPECT_EQ(arena.status().code(), Code::kInvalidArgument);
    const std::string wanted =
        "numa_nodes[1] is " + std::to_string(absent) + ", must be a node with memory that this process may use: ";
    EXPECT_EQ(arena.status().message().find(wanted + std::to_string(node)), 0u) << arena.status().message();
  }
}

TEST(Numa, HugePagesTakeTurnsWhateverTheNumberOfNodes) {
  for (const std::uint64_t nodes : {2u, 3u, 4u, 5u, 7u, 8u, 64u, 511u}) {
    for (std::uint64_t huge_page = 0; huge_page < 3 * nodes; ++huge_page) {
      const std::uint64_t page = page_that_places_huge_page(huge_page, nodes);
      ASSERT_LT(page, 512u);
      ASSERT_EQ((huge_page * 512 + page) % nodes, huge_page % nodes) << huge_page << " of " << nodes;
    }
  }
  EXPECT_EQ(page_that_places_huge_page(5, 0), 0u);
  EXPECT_EQ(page_that_places_huge_page(5, 1), 0u);
}

TEST(HostArena, HugetlbIsGrantedOrRefusedWithWhatToReserve) {
  const HugePages pages = huge_pages_of_2mib();
  const std::uint64_t bytes = 8 * kMiB;
  const auto arena = HostArena::create({.bytes = bytes, .require_hugetlb = true});
  if (pages.free >= 4) {
    ASSERT_TRUE(arena.ok()) << arena.status().to_string();
    (*arena)->wait_populated();
    EXPECT_EQ(hugetlb((*arena)->base()), bytes);
  } else {
    ASSERT_FALSE(arena.ok());
    EXPECT_EQ(arena.status().code(), Code::kResourceExhausted);
    EXPECT_NE(arena.status().message().find("needs 4 huge pages of 2 MiB, " + std::to_string(pages.free) + " of " +
                                            std::to_string(pages.total) + " are free"),
              std::string::npos)
        << arena.status().message();
    EXPECT_NE(arena.status().message().find("vm.nr_hugepages=" + std::to_string(pages.total - pages.free + 4) + "`"),
              std::string::npos)
        << arena.status().message();
  }
  const auto more = HostArena::create({.bytes = (pages.free + 1) * 2 * kMiB, .huge_pages = false, .require_hugetlb = true});
  EXPECT_EQ(more.status().code(), Code::kResourceExhausted) << more.status().to_string();
}

TEST(HostArena, OpeningDoesNotWaitForItsMemory) {
  SeqPoints::hold("memory.arena.step");
  const auto arena = make(64 * kMiB);  // returns although no step can end
  const SeqPointScope scope;
  EXPECT_FALSE(arena->stats().populate_done);
  EXPECT_EQ(arena->stats().populated_bytes, 0u);
  arena->base()[64 * kMiB - 1] = std::byte{1};  // and can be used
  SeqPoints::release("memory.arena.step");
  arena->wait_populated();
  EXPECT_EQ(arena->stats().populated_bytes, 64 * kMiB);
  EXPECT_EQ(arena->base()[64 * kMiB - 1], std::byte{1});
}

TEST(HostArena, StopsBetweenTwoSteps) {
  SeqPoints::hold("memory.arena.step");
  SeqPoints::hold("memory.arena.stopping");
  auto arena = make(256 * kMiB, 1);
  const int fd = ::dup(arena->memfd());
  std::jthread destroyer;
  const SeqPointScope scope;
  ASSERT_TRUE(SeqPoints::wait_until_reached("memory.arena.step", 10s));
  destroyer = std::jthread([&arena] { arena.reset(); });
  ASSERT_TRUE(SeqPoints::wait_until_reached("memory.arena.stopping", 10s));  // the thread has all steps still before it
  SeqPoints::release("memory.arena.stopping");
  SeqPoints::release("memory.arena.step");
  destroyer.join();
  struct stat status{};
  ASSERT_EQ(::fstat(fd, &status), 0);
  EXPECT_LE(static_cast<std::uint64_t>(status.st_blocks) * 512, 16 * kMiB) << "more than the step under way";
  ::close(fd);
}

TEST(HostArena, MostOfMemoryOpensAndClosesWhileItPopulates) {
  const std::uint64_t large = available_memory().bytes / 2;
  const auto start = std::chrono::steady_clock::now();
  auto arena = make(large);
  const auto opened = std::chrono::steady_clock::now();
  ASSERT_NE(arena, nullptr);
  EXPECT_FALSE(arena->stats().populate_done);
  arena.reset();
  const auto closed = std::chrono::steady_clock::now();
  std::printf("[ figure   ] arena of %llu MiB: opened in %.2f ms, closed at once in %.1f ms\n",
              static_cast<unsigned long long>(large / kMiB), std::chrono::duration<double, std::milli>(opened - start).count(),
              std::chrono::duration<double, std::milli>(closed - opened).count());
}

// Each thread keeps rewriting its own pages and checks every word before it does, while the pages under them become huge.
TEST(HostArena, ContentSurvivesCollapseUnderWriters) {
  constexpr std::uint64_t kBytes = 128 * kMiB;
  constexpr int kWriters = 3;
  SeqPoints::hold("memory.arena.step");
  const auto arena = make(kBytes);
  const SeqPointScope scope;
  auto* const words = reinterpret_cast<std::uint64_t*>(arena->base());
  constexpr std::uint64_t kWords = kBytes / 8;
  constexpr std::uint64_t kStride = 512 / 8;  // one word each 512 bytes, so that a round is short

  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> wrong{0};
  std::atomic<std::uint64_t> rounds_during{0};
  std::latch written(kWriters);
  std::vector<std::thread> writers;
  for (int w = 0; w < kWriters; ++w) {
    writers.emplace_back([&, w] {
      for (std::uint64_t round = 1;; ++round) {
        for (std::uint64_t i = static_cast<std::uint64_t>(w) * kStride; i < kWords; i += kWriters * kStride) {
          const std::uint64_t expected = round == 1 ? 0 : (round - 1) * kWords + i;
          if (words[i] != expected) wrong.fetch_add(1);
          words[i] = round * kWords + i;
        }
        if (round == 1) written.count_down();
        if (stop.load()) return;
        rounds_during.fetch_add(1);
      }
    });
  }
  written.wait();  // every page holds data, small and mapped, before the first collapse
  SeqPoints::release("memory.arena.step");
  arena->wait_populated();
  stop.store(true);
  for (std::thread& writer : writers) writer.join();
  EXPECT_EQ(wrong.load(), 0u);
  const ArenaStats stats = arena->stats();
  std::printf("[ figure   ] collapsed under %d writers (%llu rounds): huge %.1f %%\n", kWriters,
              static_cast<unsigned long long>(rounds_during.load()),
              100.0 * static_cast<double>(stats.huge_bytes) / static_cast<double>(stats.bytes));
}

TEST(HostArena, IsSharedThroughItsDescriptor) {
  const auto arena = make(16 * kMiB);
  std::strcpy(reinterpret_cast<char*>(arena->base() + 5 * kMiB), "from the owner");
  const pid_t pid = ::fork();
  ASSERT_GE(pid, 0);
  if (pid == 0) {
    auto mapped = MappedArena::map(::dup(arena->memfd()), 16 * kMiB);
    if (!mapped.ok() || reinterpret_cast<std::uintptr_t>((*mapped)->base()) % (2 * kMiB) != 0) ::_exit(1);
    std::byte* const base = (*mapped)->base();
    if (base == arena->base() || std::strcmp(reinterpret_cast<char*>(base + 5 * kMiB), "from the owner") != 0) ::_exit(2);
    std::strcpy(reinterpret_cast<char*>(base + 9 * kMiB), "from the worker");
    ::_exit(0);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(pid, &status, 0), pid);
  EXPECT_EQ(status, 0);
  EXPECT_STREQ(reinterpret_cast<char*>(arena->base() + 9 * kMiB), "from the worker");
}

TEST(HostArena, AForkedChildMayDestroyIt) {
  SeqPoints::hold("memory.arena.step");
  auto arena = make(64 * kMiB);
  const SeqPointScope scope;
  ASSERT_TRUE(SeqPoints::wait_until_reached("memory.arena.step", 10s, 2));  // its threads live, here alone
  arena->base()[0] = std::byte{42};
  const pid_t pid = ::fork();
  ASSERT_GE(pid, 0);
  if (pid == 0) {
    ::alarm(20);
    arena.reset();  // must neither wait for threads that are not here nor harm the parent
    ::_exit(0);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(pid, &status, 0), pid);
  EXPECT_EQ(status, 0);
  SeqPoints::release("memory.arena.step");
  arena->wait_populated();
  EXPECT_EQ(arena->base()[0], std::byte{42});
  EXPECT_EQ(arena->stats().populated_bytes, 64 * kMiB);
}

TEST(MappedArena, RefusesWhatIsNotTheArenaAndClosesIt) {
  const auto refuses = [](int fd, std::uint64_t bytes) {
    const auto mapped = MappedArena::map(fd, bytes);
    EXPECT_FALSE(mapped.ok());
    EXPECT_EQ(mapped.status().code(), Code::kInvalidArgument) << mapped.status().to_string();
    EXPECT_EQ(::fcntl(fd, F_GETFD), -1) << "descriptor left open";
  };
  const auto arena = make(4 * kMiB, 0);
  refuses(::dup(arena->memfd()), 2 * kMiB);
  refuses(::dup(arena->memfd()), 8 * kMiB);
  refuses(::dup(arena->memfd()), 0);
  const int unsealed = ::memfd_create("unsealed", MFD_CLOEXEC);
  ASSERT_EQ(::ftruncate(unsealed, 2 * static_cast<off_t>(kMiB)), 0);
  refuses(unsealed, 2 * kMiB);
  EXPECT_EQ(MappedArena::map(-1, 2 * kMiB).status().code(), Code::kIoError);
}

}  // namespace
}  // namespace lmcn
