// The parts below the host copier: which runs are joined, stores that bypass the cache, build facts.
#include <gtest/gtest.h>

#include <cstring>
#include <numeric>
#include <vector>

#include "copier_suite.hpp"
#include "copy/byte_copy.hpp"
#include "copy/copy_geometry.hpp"
#include "lmcn/version.hpp"

namespace lmcn {
namespace {

using copier_suite::Order;

std::vector<RunGroup> runs_of(const PagedKvLayout& kv, std::int64_t chunk_tokens, std::vector<std::int64_t> block_ids) {
  static std::byte arena[4096];
  const SlotLayout slot = SlotLayout::make(kv, chunk_tokens).value();
  const CopyGeometry geometry = CopyGeometry::make(kv, slot, arena, sizeof arena, 0).value();
  const CopyJob job{.block_ids = std::move(block_ids)};
  const CopyItem item{.tokens = static_cast<std::uint32_t>(chunk_tokens)};
  std::vector<RunGroup> groups;
  geometry.for_each_run(job, item, 0, geometry.planes().size(), [&](const RunGroup& group) { groups.push_back(group); });
  return groups;
}

std::vector<RunGroup> runs_of(Order order, std::vector<std::int64_t> block_ids) {
  const auto backend = copier_suite::make_backend();
  copier_suite::PagedModel paged(*backend, {.order = order, .layers = 3, .block_tokens = 4, .heads = 2, .head_dim = 8}, 10);
  return runs_of(paged.layout(), 8, std::move(block_ids));
}

constexpr std::int64_t kBlockBytes = 4 * 2 * 8 * 2;  // one plane

TEST(Runs, NeighbouringBlocksAreOneRun) {
  const std::vector<RunGroup> joined = runs_of(Order::kPlanesOuter, {3, 4});
  ASSERT_EQ(joined.size(), 6u);  // one per layer and plane
  for (const RunGroup& run : joined) EXPECT_EQ(run.bytes, 2 * kBlockBytes);
  EXPECT_EQ(runs_of(Order::kPlanesOuter, {3, 5}).size(), 12u);
  EXPECT_EQ(runs_of(Order::kPlanesOuter, {4, 3}).size(), 12u);
}

TEST(Runs, OpaquePagesJoinAcrossNeighboursAndAcrossLayersOfOneBlock) {
  static std::byte memory[100000];
  const auto pages = [](std::int64_t stride, std::int64_t layer_distance, std::vector<std::int64_t> ids) {
    const PagedKvLayout kv = PagedKvLayout::opaque({memory, memory + layer_distance}, 10, 512, stride);
    const auto blocks = static_cast<std::int64_t>(ids.size());
    return runs_of(kv, blocks, std::move(ids));
  };
  EXPECT_EQ(pages(512, 50000, {2, 3, 4}).size(), 2u);
  EXPECT_EQ(pages(512, 50000, {2, 3, 4})[1].bytes, 3 * 512);
  EXPECT_EQ(pages(640, 50000, {2, 3, 4}).size(), 6u) << "a gap between pages is never copied";
  // Layers inside a block: [block][layer][page].
  ASSERT_EQ(pages(1024, 512, {7}).size(), 1u);
  EXPECT_EQ(pages(1024, 512, {7})[0].bytes, 2 * 512);
  // Layer 1's block 0 lies right behind layer 0's block 9, in memory and in the slot: perhaps in another allocation.
  EXPECT_EQ(pages(512, 5120, {0, 9}).size(), 4u);
}

TEST(Runs, EachOrderUsesItsLongestContiguousUnit) {
  EXPECT_EQ(runs_of(Order::kPlanesApart, {3, 5})[0].bytes, kBlockBytes);
  const std::vector<RunGroup> heads_outer = runs_of(Order::kHeadsOuter, {3, 4});
  EXPECT_EQ(heads_outer.size(), 12u);
  EXPECT_EQ(heads_outer[0].bytes, 16);
  EXPECT_EQ(heads_outer[0].outer.count * heads_outer[0].inner.count, 8);
  // K and V packed side by side: a row is one head of one token, whatever the order of the rest.
  for (const Order order : {Order::kLBNHC, Order::kLBHNC, Order::kLHBNC, Order::kBLHNC, Order::kBLNHC, Order::kBHLNC}) {
    const std::vector<RunGroup> packed = runs_of(order, {3, 4});
    EXPECT_EQ(packed[0].bytes, 16) << copier_suite::order_name(order);
    EXPECT_EQ(packed[0].outer.count * packed[0].inner.count, 8) << copier_suite::order_name(order);
  }
  const std::vector<RunGroup> transposed = runs_of(Order::kTransposedKeys, {3, 4});
  EXPECT_EQ(transposed[0].bytes, 2);
  EXPECT_EQ(transposed[0].inner.count, 8);
  EXPECT_EQ(transposed[0].outer.count, 4);
}

TEST(NonTemporalCopy, EveryLengthAndAlignment) {
  std::vector<std::byte> from(2048), to(2048), want(2048);
  for (std::size_t i = 0; i < from.size(); ++i) from[i] = static_cast<std::byte>(i * 7 + i / 256);
  for (std::size_t to_at = 0; to_at < 65; ++to_at) {
    for (const std::size_t from_at : {std::size_t{0}, std::size_t{1}, std::size_t{31}, to_at}) {
      for (std::size_t bytes = 0; bytes < 1024; bytes = bytes < 200 ? bytes + 1 : bytes + 61) {
        std::ranges::fill(to, std::byte{0xEE});
        want = to;
        std::memcpy(want.data() + to_at, from.data() + from_at, bytes);
        copy_non_temporal(to.data() + to_at, from.data() + from_at, bytes);
        fence_non_temporal();
        ASSERT_EQ(to, want) << to_at << " " << from_at << " " << bytes;
      }
    }
  }
  EXPECT_NE(std::string(non_temporal_path()), "");
}

TEST(HostCopier, RefusesThreadCounts) {
  const PagedKvLayout kv = PagedKvLayout::opaque({reinterpret_cast<std::byte*>(4096)}, 1, 1, 1);
  const SlotLayout slot = SlotLayout::make(kv, 1).value();
  std::byte arena[1];
  for (const unsigned threads : {0u, 257u}) {
    CopierOptions options;
    options.threads = threads;
    const auto made = make_host_copier(kv, slot, arena, 1, options);
    ASSERT_FALSE(made.ok());
    EXPECT_EQ(made.status().message(), "threads is " + std::to_string(threads) + ", must be in 1..256");
  }
}

TEST(BuildInfo, SaysWhatWasBuilt) {
  const BuildInfo info = build_info();
  EXPECT_EQ(info.version.find_first_not_of("0123456789."), std::string::npos);
  EXPECT_FALSE(info.version.empty());
  EXPECT_FALSE(info.compiler.empty());
  EXPECT_FALSE(info.build_type.empty());
  EXPECT_TRUE(info.cuda_choice == "AUTO" || info.cuda_choice == "ON" || info.cuda_choice == "OFF") << info.cuda_choice;
  EXPECT_EQ(info.cuda, !info.cuda_toolkit.empty());
  EXPECT_FALSE(info.xxhash.empty());
  EXPECT_FALSE(info.openssl.empty());
  EXPECT_EQ(info.format_version, 1);
  const CudaStatus cuda = cuda_status();
  EXPECT_EQ(cuda.built, info.cuda);
  EXPECT_FALSE(cuda.message.empty());
}

TEST(BuildInfo, ACudaCopierWithoutCudaSaysWhy) {
  const CudaStatus cuda = cuda_status();
  if (cuda.devices > 0) GTEST_SKIP() << "a CUDA device is here: gpu_check proves the copier";
  static std::byte page[4096];
  const PagedKvLayout kv = PagedKvLayout::opaque({page}, 1, 64, 64);
  const auto made = make_cuda_copier(kv, SlotLayout::make(kv, 1).value(), page, sizeof page, {}, 0);
  ASSERT_FALSE(made.ok());
  EXPECT_EQ(made.status().code(), Code::kUnavailable);
  if (!cuda.built) {
    EXPECT_EQ(made.status().message(), "built without CUDA (LMCN_CUDA=" + build_info().cuda_choice + ")");
  } else {
    EXPECT_EQ(made.status().message(), cuda.message);
  }
}

}  // namespace
}  // namespace lmcn
