// The copy kernels against the suite's map of every element: each layout, block size, element size and alignment, both directions.
#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <tuple>

#include "kernel_fixture.hpp"
#include "memory/slot_image.hpp"
#include "paged_copy.cuh"
#include "paged_kernel.hpp"

namespace lmcn::copier_suite {
namespace {

/// A case with its memory, its geometry and the kernels for it.
struct Bench {
  Bench(const Case& of, std::size_t shift, std::uint64_t seed)
      : c(of), random(seed), backend(shift), plan(plan_job(of, random)), paged(backend, of, plan.num_blocks) {
    slot = SlotLayout::make(paged.layout(), c.chunk_tokens).value();
    arena = std::make_unique<ArenaModel>(backend, c, slot, plan.slots);
    EXPECT_EQ(cudaHostRegister(arena->base(), arena->bytes(), cudaHostRegisterMapped), cudaSuccess);
    geometry = std::make_unique<CopyGeometry>(
        CopyGeometry::make(paged.layout(), slot, arena->base(), arena->bytes(), c.options.rank).value());
    job = {.id = 1, .items = plan.items, .block_ids = plan.block_ids};
    for (CopyItem& item : job.items) {
      slots.push_back(item.slot_offset);
      item.slot_offset = arena->offset(item.slot_offset);
      parts.push_back(geometry->rank_part(item));
    }
    EXPECT_TRUE(geometry->check_job(job).ok());
    paged.fill_random(random);
    paged.upload();
  }
  ~Bench() { EXPECT_EQ(cudaHostUnregister(arena->base()), cudaSuccess); }

  /// f(byte of the paged mirror, expected byte of the slot) for each byte of the job.
  template <class F>
  void for_each_byte(F&& f) {
    for (std::size_t i = 0; i < job.items.size(); ++i) {
      const CopyItem& item = job.items[i];
      for (std::int64_t l = 0; l < c.layers; ++l)
        for (std::int64_t p = 0; p < c.planes; ++p) {
          std::size_t block = item.block_begin;
          std::int64_t in_block = item.token_in_block;
          for (std::int64_t t = 0; t < item.tokens; ++t) {
            for (std::int64_t h = 0; h < c.heads; ++h)
              for (std::int64_t d = 0; d < c.head_dim; ++d)
                for (std::int64_t b = 0; b < c.element_bytes; ++b)
                  f(paged.at(l, p, job.block_ids[block], in_block, h, d, b),
                    arena->expected(slots[i], c.options.rank, l, p, t + item.first_token, h, d, b));
            if (++in_block == c.block_tokens) {
              in_block = 0;
              ++block;
            }
          }
        }
    }
  }

  /// The whole job, in launches over random planes and items.
  std::string copy(PagedKernel& kernel, CopyDirection direction, cudaStream_t stream) {
    const std::size_t planes = geometry->planes().size(), cut = random() % (planes + 1);
    std::vector<std::uint32_t> items(job.items.size());
    std::iota(items.begin(), items.end(), 0u);
    std::shuffle(items.begin(), items.end(), random);
    const std::size_t middle = random() % (items.size() + 1);
    for (const auto& [item_begin, item_end] : {std::pair{std::size_t{0}, middle}, std::pair{middle, items.size()}}) {
      const std::span<const std::uint32_t> some(items.data() + item_begin, item_end - item_begin);
      std::vector<std::byte*> some_parts;
      for (const std::uint32_t i : some) some_parts.push_back(parts[i]);
      for (const auto& [begin, end] : {std::pair{std::size_t{0}, cut}, std::pair{cut, planes}}) {
        const auto ctas = static_cast<unsigned>(random() % 40 + 1);
        if (Status s = kernel.launch(job, direction, some, some_parts, begin, end, stream, ctas); !s.ok()) return s.to_string();
      }
    }
    fake_cuda::synchronize(stream, kKernelDevice);
    return fake_cuda::fault();
  }

  const Case c;
  std::mt19937_64 random;
  KernelBackend backend;
  JobPlan plan;
  PagedModel paged;
  SlotLayout slot;
  std::unique_ptr<ArenaModel> arena;
  std::unique_ptr<CopyGeometry> geometry;
  CopyJob job;
  std::vector<std::size_t> slots;
  std::vector<std::byte*> parts;
};

/// Gathers, compares all of the arena, then scatters into memory with another content and compares all of that.
std::string round_trip(const Case& c, std::size_t shift, std::uint64_t seed, cudaStream_t stream) {
  Bench bench(c, shift, seed);
  Result<std::unique_ptr<PagedKernel>> kernel = PagedKernel::make(*bench.geometry, kKernelDevice);
  if (!kernel.ok()) return "make: " + kernel.status().to_string();
  bench.for_each_byte([](const std::byte& paged, std::byte& slot) { slot = paged; });
  if (std::string error = bench.copy(**kernel, CopyDirection::kGather, stream); !error.empty()) return "gather: " + error;
  if (std::string error = bench.arena->compare(); !error.empty()) return "gather: " + error;
  if (std::string error = bench.paged.compare(); !error.empty()) return "gather changed its source: " + error;

  bench.paged.fill(std::byte{0x5C});
  bench.paged.upload();
  bench.for_each_byte([](std::byte& paged, const std::byte& slot) { paged = slot; });
  if (std::string error = bench.copy(**kernel, CopyDirection::kScatter, stream); !error.empty()) return "scatter: " + error;
  if (std::string error = bench.paged.compare(); !error.empty()) return "scatter: " + error;
  if (std::string error = bench.arena->compare(); !error.empty()) return "scatter changed its source: " + error;
  return "";
}

const Order kOrders[] = {Order::kPlanesApart,    Order::kPlanesOuter,   Order::kBlocksOuter, Order::kHeadsOuter,
                         Order::kTransposedKeys, Order::kLayersInBlock, Order::kPadded};

class KernelLayouts : public KernelTest, public testing::WithParamInterface<std::tuple<Order, std::int64_t>> {};

TEST_P(KernelLayouts, MoveEveryByteAndNoOther) {
  const auto [order, block_tokens] = GetParam();
  std::uint64_t seed = 1;
  for (const std::int64_t element_bytes : {1, 2, 4}) {
    for (const std::size_t shift : {0, 1, 2, 4, 8}) {
      if (shift % static_cast<std::size_t>(element_bytes) != 0) continue;  // no engine has elements that are not aligned
      for (const std::int64_t head_dim : {8, 7}) {
        Case c{.order = order, .planes = shift == 8 ? 1 : 2, .block_tokens = block_tokens};
        c.heads = head_dim == 7 ? 3 : 2;
        c.head_dim = head_dim;
        c.element_bytes = element_bytes;
        c.chunk_tokens = block_tokens == 1 ? 7 : block_tokens + 3;
        c.options.rank = 1;
        EXPECT_EQ(round_trip(c, shift, ++seed, stream_), "") << c.name() << " shift " << shift;
        if (HasFailure()) return;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, KernelLayouts, testing::Combine(testing::ValuesIn(kOrders), testing::Values(1, 16, 17, 64, 256)),
                         [](const auto& tested) {
                           return std::string(order_name(std::get<0>(tested.param))) + "_block" +
                                  std::to_string(std::get<1>(tested.param));
                         });

class KernelSuite : public KernelTest, public testing::WithParamInterface<Order> {};

TEST_P(KernelSuite, EveryCase) {
  std::uint64_t seed = 100;
  for (const Case& c : all_cases()) {
    if (c.order != GetParam()) continue;
    ASSERT_EQ(round_trip(c, 0, ++seed, stream_), "") << c.name();
  }
  EXPECT_GE(seed, 107u);
}

INSTANTIATE_TEST_SUITE_P(All, KernelSuite, testing::ValuesIn(copier_suite::kOrders),
                         [](const auto& tested) { return order_name(tested.param); });

using KernelCopy = KernelTest;

TEST_F(KernelCopy, OpaquePagesOfAnySizeAndAlignment) {
  for (const Order order : {Order::kOpaque, Order::kOpaqueInBlock}) {
    for (const std::int64_t page_bytes : {1, 2, 24, 48, 4096, 8209, 33008}) {
      for (const std::size_t shift : {0, 1, 2, 4, 8}) {
        Case c{.order = order, .planes = 1, .block_tokens = 1, .heads = 1, .head_dim = page_bytes, .element_bytes = 1};
        c.chunk_tokens = 4;
        c.options.rank = 1;
        ASSERT_EQ(round_trip(c, shift, shift + 1, stream_), "") << c.name() << " shift " << shift;
      }
    }
  }
}

// An arena that is not mapped is served through memory of the device with the same layout.
TEST_F(KernelCopy, SlotsMayLieOnTheDevice) {
  Case c{.order = Order::kHeadsOuter, .block_tokens = 16, .chunk_tokens = 35};
  c.options.rank = 2;
  Bench bench(c, 0, 5);
  const auto bytes = static_cast<std::size_t>(bench.slot.rank_bytes);
  std::map<std::uint64_t, std::byte*> staging;
  for (std::size_t i = 0; i < bench.parts.size(); ++i) {
    std::byte*& part = staging[bench.job.items[i].slot_offset];
    if (part == nullptr) {
      part = fake_cuda::allocate(bytes, kKernelDevice);
      std::memcpy(part, bench.parts[i], bytes);
    }
    bench.parts[i] = part;
  }
  auto kernel = PagedKernel::make(*bench.geometry, kKernelDevice).value();
  bench.for_each_byte([](const std::byte& paged, std::byte& slot) { slot = paged; });
  EXPECT_EQ(bench.copy(*kernel, CopyDirection::kGather, stream_), "");
  for (const auto& [offset, part] : staging) {
    std::memcpy(bench.arena->base() + offset + kPageBytes + c.options.rank * bytes, part, bytes);
    fake_cuda::release(part);
  }
  EXPECT_EQ(bench.arena->compare(), "");
}

TEST_F(KernelCopy, NeverMoreThreadBlocksThanAllowed) {
  Case c{.order = Order::kOpaque, .layers = 1, .planes = 1, .block_tokens = 1, .heads = 1, .head_dim = 150000, .element_bytes = 1};
  c.chunk_tokens = 9;
  c.options.rank = 0;
  Bench bench(c, 0, 1);
  auto kernel = PagedKernel::make(*bench.geometry, kKernelDevice).value();
  std::vector<std::uint32_t> items(bench.job.items.size());
  std::iota(items.begin(), items.end(), 0u);
  for (const unsigned most : {1u, 2u, 3u, 7u, 16u, 64u, 1000u}) {
    fake_cuda::reset();
    ASSERT_TRUE(kernel->launch(bench.job, CopyDirection::kGather, items, bench.parts, 0, 1, stream_, most).ok());
    fake_cuda::synchronize(stream_, kKernelDevice);
    const dim3 grid = fake_cuda::state().last_grid;
    EXPECT_LE(grid.x * grid.y * grid.z, most);
    // Here are more units than blocks of 1 to 16: all of them are used. Of 1000 each unit has several.
    if (most <= 16) {
      EXPECT_EQ(grid.x * grid.y * grid.z, most);
    } else if (most == 1000) {
      EXPECT_GT(grid.z, 1u);
    }
  }
}

TEST(CopyKernelDivisor, DividesExactly) {
  std::mt19937_64 random(4);
  std::vector<std::uint32_t> divisors{1, 2, 3, 5, 7, 16, 17, 641, 65535, 65536, 65537, INT32_MAX, 1u << 31};
  for (int i = 0; i < 200; ++i) divisors.push_back(static_cast<std::uint32_t>(random() >> (33 + random() % 31)) + 1);
  for (const std::uint32_t d : divisors) {
    const Divisor divisor = Divisor::of(d);
    const auto check = [&](std::uint32_t n) {
      if (n > INT32_MAX) return;
      ASSERT_EQ(divisor.quotient(n), n / d) << n << " / " << d;
      ASSERT_EQ(divisor.remainder(n, divisor.quotient(n)), n % d);
    };
    for (const std::uint32_t n : {0u, 1u, d - 1, d, d + 1, 2 * d - 1, 2 * d, std::uint32_t{INT32_MAX}, INT32_MAX / d * d - 1,
                                  INT32_MAX / d * d, INT32_MAX - 1u}) {
      check(n);
    }
    for (int i = 0; i < 200; ++i) check(static_cast<std::uint32_t>(random() >> 33));
  }
}

}  // namespace
}  // namespace lmcn::copier_suite
