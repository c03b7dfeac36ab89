#include "memory/memory_limits.hpp"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

namespace lmcn {
namespace {

constexpr std::uint64_t kGiB = 1ull << 30;

// A root directory with the files that the limits are read from.
class MemoryLimits : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = std::filesystem::path(::testing::TempDir()) /
            ("lmcn_limits_" + std::string(::testing::UnitTest::GetInstance()->current_test_info()->name()));
    std::filesystem::remove_all(root_);
    write("/proc/meminfo", "MemTotal:       33554432 kB\nMemFree:         1048576 kB\nMemAvailable:   16777216 kB\n");
  }
  void TearDown() override { std::filesystem::remove_all(root_); }
  void write(const std::string& path, const std::string& text) {
    const auto full = root_.string() + path;
    std::filesystem::create_directories(std::filesystem::path(full).parent_path());
    std::ofstream(full) << text;
  }
  AvailableMemory read() { return available_memory(root_.string()); }
  std::filesystem::path root_;
};

TEST_F(MemoryLimits, WithoutCgroups) {
  EXPECT_EQ(read().bytes, 16 * kGiB);
  EXPECT_EQ(read().source, "MemAvailable");
}

TEST_F(MemoryLimits, Version2LimitOfAnAncestorCounts) {
  write("/proc/self/cgroup", "0::/kube/pod\n");
  write("/sys/fs/cgroup/kube/pod/memory.max", "max\n");
  write("/sys/fs/cgroup/kube/pod/memory.current", "1\n");
  write("/sys/fs/cgroup/kube/memory.max", std::to_string(8 * kGiB));
  write("/sys/fs/cgroup/kube/memory.current", std::to_string(5 * kGiB));
  write("/sys/fs/cgroup/kube/memory.stat", "anon 1\ninactive_file " + std::to_string(2 * kGiB) + "\n");
  EXPECT_EQ(read().bytes, 5 * kGiB);
  EXPECT_NE(read().source.find("/kube/memory.max"), std::string::npos);
}

TEST_F(MemoryLimits, Version1) {
  write("/proc/self/cgroup", "9:cpu,cpuacct:/x\n4:hugetlb,memory:/jobs/7\n0::/\n");
  write("/sys/fs/cgroup/memory/jobs/7/memory.limit_in_bytes", std::to_string(4 * kGiB));
  write("/sys/fs/cgroup/memory/jobs/7/memory.usage_in_bytes", std::to_string(1 * kGiB));
  EXPECT_EQ(read().bytes, 3 * kGiB);
}

TEST_F(MemoryLimits, NamespacedContainerSeesItsLimitAtTheRoot) {
  write("/proc/self/cgroup", "0::/\n");
  write("/sys/fs/cgroup/memory.max", std::to_string(4 * kGiB));
  write("/sys/fs/cgroup/memory.current", std::to_string(5 * kGiB));
  EXPECT_EQ(read().bytes, 0u) << "above its limit";
}

TEST_F(MemoryLimits, LimitsAboveWhatTheMachineHasDoNotCount) {
  write("/proc/self/cgroup", "0::/a\n");
  write("/sys/fs/cgroup/a/memory.max", std::to_string(640 * kGiB));
  write("/sys/fs/cgroup/a/memory.current", "0\n");
  EXPECT_EQ(read().source, "MemAvailable");
}

TEST_F(MemoryLimits, NothingToReadIsNothingAvailable) {
  std::filesystem::remove_all(root_);
  EXPECT_EQ(read().bytes, 0u);
  EXPECT_EQ(read().source, "/proc/meminfo");
}

TEST_F(MemoryLimits, HugePagesThatArePromisedAreNotFree) {
  EXPECT_EQ(huge_pages_of_2mib(root_.string()).total, 0u);
  const std::string pool = "/sys/kernel/mm/hugepages/hugepages-2048kB/";
  write(pool + "nr_hugepages", "100\n");
  write(pool + "free_hugepages", "60\n");
  write(pool + "resv_hugepages", "25\n");
  EXPECT_EQ(huge_pages_of_2mib(root_.string()).total, 100u);
  EXPECT_EQ(huge_pages_of_2mib(root_.string()).free, 35u);
}

TEST(MemoryLimitsHere, SomethingIsAvailable) {
  EXPECT_GT(available_memory().bytes, 0u);
}

}  // namespace
}  // namespace lmcn
