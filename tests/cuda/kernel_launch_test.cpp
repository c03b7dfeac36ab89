// The host side of the copy kernels: what it refuses, what it keeps until a launch has run, and what every CUDA error ends in.
#include <future>
#include <numeric>
#include <optional>
#include <thread>

#include "kernel_fixture.hpp"
#include "memory/slot_image.hpp"
#include "paged_copy.cuh"
#include "paged_kernel.hpp"
#include "plan_ring.hpp"

namespace lmcn {
namespace {

constexpr std::int64_t kTokenBytes = 32, kBlocks = 16;

/// One plane of pages of one token, each of `kTokenBytes`; chunks of 16 pages.
class KernelLaunch : public KernelTest {
 protected:
  KernelLaunch() { make_geometry(kTokenBytes); }
  ~KernelLaunch() override {
    fake_cuda::synchronize(stream_, kKernelDevice);
    kernel_.reset();
    EXPECT_EQ(cudaHostUnregister(arena_), cudaSuccess);
    backend_.release_arena(arena_);
  }
  void make_geometry(std::int64_t page_bytes) {
    memory_ = backend_.allocate(static_cast<std::size_t>(kBlocks * kTokenBytes));
    const PagedKvLayout paged = PagedKvLayout::opaque({memory_}, kBlocks, page_bytes, page_bytes);
    const SlotLayout slot = SlotLayout::make(paged, kBlocks).value();
    const std::uint64_t bytes = image_bytes(static_cast<std::uint64_t>(slot.rank_bytes));
    arena_ = backend_.allocate_arena(bytes);
    std::memset(arena_, 0, bytes);
    EXPECT_EQ(cudaHostRegister(arena_, bytes, cudaHostRegisterMapped), cudaSuccess);
    geometry_ = CopyGeometry::make(paged, slot, arena_, bytes, 0).value();
    for (std::int64_t b = 0; b < kBlocks; ++b) {
      std::memset(memory_ + b * kTokenBytes, static_cast<int>(b + 1), kTokenBytes);
    }
  }
  void make_kernel(std::size_t plan_bytes = 2 << 20) {
    auto made = PagedKernel::make(*geometry_, kKernelDevice, plan_bytes);
    ASSERT_TRUE(made.ok()) << made.status().to_string();
    kernel_ = std::move(made).value();
  }
  /// Tokens [0, tokens) of the one slot, from block 0 on.
  static CopyJob job_of(std::uint32_t tokens, std::size_t items = 1) {
    CopyJob job{.id = 1};
    job.items.assign(items, {.generation = 1, .tokens = tokens});
    for (std::int64_t b = 0; b < kBlocks; ++b) job.block_ids.push_back(b);
    return job;
  }
  Status launch(const CopyJob& job, CopyDirection direction = CopyDirection::kGather) {
    std::vector<std::uint32_t> items(job.items.size());
    std::iota(items.begin(), items.end(), 0u);
    const std::vector<std::byte*> parts(items.size(), part());
    return kernel_->launch(job, direction, items, parts, 0, 1, stream_, 8);
  }
  std::byte* part() const { return arena_ + kPageBytes; }
  /// The tokens that lie in the slot as they do in the pages.
  std::int64_t tokens_in_place() const {
    std::int64_t count = 0;
    for (std::int64_t t = 0; t < kBlocks; ++t) {
      if (std::memcmp(part() + t * kTokenBytes, memory_ + t * kTokenBytes, kTokenBytes) == 0) ++count;
    }
    return count;
  }

  KernelBackend backend_;
  std::byte* memory_ = nullptr;
  std::byte* arena_ = nullptr;
  std::optional<CopyGeometry> geometry_;
  std::unique_ptr<PagedKernel> kernel_;
};

TEST_F(KernelLaunch, NothingToCopyIsNoLaunch) {
  make_kernel();
  CopyJob job = job_of(3);
  std::byte* const parts[] = {part()};
  const std::uint32_t items[] = {0};
  EXPECT_TRUE(kernel_->launch(job, CopyDirection::kGather, {}, {}, 0, 1, stream_, 1).ok());
  EXPECT_TRUE(kernel_->launch(job, CopyDirection::kGather, items, parts, 1, 1, stream_, 1).ok());
  EXPECT_EQ(fake_cuda::calls("cudaLaunchKernelExC"), 0);
  EXPECT_EQ(fake_cuda::calls("cudaEventRecord"), 0);
}

TEST_F(KernelLaunch, WhatIsWrongIsNamed) {
  make_kernel();
  const CopyJob job = job_of(3);
  std::byte* const right[] = {part()};
  const std::uint32_t first[] = {0}, absent[] = {1};
  const auto message = [&](std::span<const std::uint32_t> items, std::span<std::byte* const> parts, std::size_t begin,
                           std::size_t end, unsigned ctas) {
    const Status status = kernel_->launch(job, CopyDirection::kGather, items, parts, begin, end, stream_, ctas);
    EXPECT_EQ(status.code(), Code::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_EQ(message(first, right, 0, 2, 1), "plane_end is 2, must be at most 1");
  EXPECT_EQ(message(first, right, 1, 0, 1), "plane_begin is 1, must be at most plane_end, 0");
  EXPECT_EQ(message(first, right, 0, 1, 0), "max_ctas is 0, must be at least 1");
  EXPECT_EQ(message(first, {}, 0, 1, 1), "number of rank_parts is 0, must be that of items, 1");
  EXPECT_EQ(message(absent, right, 0, 1, 1), "items[0] is 1, must be below 1");
  std::byte* const null[] = {nullptr};
  EXPECT_EQ(message(first, null, 0, 1, 1), "rank_parts[0] is 0, must be an address that is a multiple of 16");
  std::byte* const crooked[] = {part() + 8};
  EXPECT_NE(message(first, crooked, 0, 1, 1).find("must be an address that is a multiple of 16"), std::string::npos);
  EXPECT_EQ(fake_cuda::calls("cudaLaunchKernelExC"), 0);
  EXPECT_EQ(PagedKernel::make(*geometry_, kKernelDevice, 31).status().message(), "plan_bytes is 31, must be at least 32");
}

TEST_F(KernelLaunch, BlocksOf2To31VectorsAreRefused) {
  const std::int64_t page_bytes = (std::int64_t{1} << 31) + 1;  // odd: vectors of one byte
  const PagedKvLayout paged = PagedKvLayout::opaque({memory_}, 1, page_bytes, page_bytes);
  const SlotLayout slot = SlotLayout::make(paged, 1).value();
  const CopyGeometry geometry = CopyGeometry::make(paged, slot, arena_, 1, 0).value();
  const Status status = PagedKernel::make(geometry, kKernelDevice).status();
  EXPECT_EQ(status.code(), Code::kUnsupported);
  EXPECT_EQ(status.message(), "plane 0: a block has 2147483649 vectors of 1 bytes, the copy kernels take less than 2147483648");
}

TEST_F(KernelLaunch, TheJobMayGoBeforeTheLaunchRuns) {
  make_kernel();
  Gate gate(stream_, kKernelDevice);
  {
    auto job = std::make_unique<CopyJob>(job_of(kBlocks));
    ASSERT_TRUE(launch(*job).ok());
  }
  EXPECT_EQ(tokens_in_place(), 0);
  gate.open();
  fake_cuda::synchronize(stream_, kKernelDevice);
  EXPECT_EQ(tokens_in_place(), kBlocks);
}

// A ring of 8 plans of one piece each, and a job of 16 pieces.
TEST_F(KernelLaunch, LargeJobsTakeSeveralLaunches) {
  make_kernel(8 * 64);
  ASSERT_TRUE(launch(job_of(kBlocks)).ok());
  fake_cuda::synchronize(stream_, kKernelDevice);
  EXPECT_EQ(tokens_in_place(), kBlocks);
  EXPECT_EQ(fake_cuda::calls("cudaLaunchKernelExC"), 1);
  make_kernel(96);  // three pieces
  std::memset(part(), 0, kBlocks * kTokenBytes);
  fake_cuda::reset();
  ASSERT_TRUE(launch(job_of(kBlocks)).ok());
  fake_cuda::synchronize(stream_, kKernelDevice);
  EXPECT_EQ(tokens_in_place(), kBlocks);
  EXPECT_EQ(fake_cuda::calls("cudaLaunchKernelExC"), 6);
}

// Many launches through a small ring whose stream stands still from time to time: no plan is overwritten before it was read.
TEST_F(KernelLaunch, PlansAreKeptUntilTheirLaunchHasRun) {
  make_kernel(7 * 64);
  std::mt19937_64 random(2);
  for (int round = 0; round < 40; ++round) {
    std::memset(part(), 0, kBlocks * kTokenBytes);
    std::optional<Gate> gate;
    gate.emplace(stream_, kKernelDevice);
    std::thread opener;
    std::int64_t done = 0;
    while (done < kBlocks) {
      CopyJob job = job_of(1);
      job.items[0].first_token = static_cast<std::uint32_t>(done);
      job.items[0].block_begin = static_cast<std::uint32_t>(done);
      job.items[0].tokens = static_cast<std::uint32_t>(std::min<std::int64_t>(kBlocks - done, 1 + random() % 5));
      done += job.items[0].tokens;
      if (done > 6 && !opener.joinable()) {
        // The ring is about to be full: someone else must let the stream go on.
        opener = std::thread([&gate] { gate->open(); });
      }
      ASSERT_TRUE(launch(job).ok());
    }
    opener.join();
    fake_cuda::synchronize(stream_, kKernelDevice);
    ASSERT_EQ(tokens_in_place(), kBlocks) << round;
  }
}

TEST_F(KernelLaunch, WaitsWhenTheRingIsFullAndOnlyThen) {
  make_kernel(2 * 64);
  Gate gate(stream_, kKernelDevice);
  ASSERT_TRUE(launch(job_of(1)).ok());
  ASSERT_TRUE(launch(job_of(1)).ok());
  // The other direction has room of its own.
  ASSERT_TRUE(launch(job_of(1), CopyDirection::kScatter).ok());
  EXPECT_EQ(fake_cuda::calls("cudaEventSynchronize"), 0);
  std::thread third([&] {
    EXPECT_EQ(cudaSetDevice(kKernelDevice), cudaSuccess);
    EXPECT_TRUE(launch(job_of(1)).ok());
  });
  EXPECT_TRUE(fake_cuda::wait_until([](const auto& s) { return s.threads_waiting == 1; }));
  gate.open();
  third.join();
}

TEST_F(KernelLaunch, SeveralThreadsMayLaunch) {
  make_kernel(3 * 64);
  constexpr std::size_t kBytes = kBlocks * kTokenBytes;
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      EXPECT_EQ(cudaSetDevice(kKernelDevice), cudaSuccess);
      const cudaStream_t stream = fake_cuda::create_stream(kKernelDevice);
      std::byte* const own = fake_cuda::allocate(kBytes, kKernelDevice);
      std::byte* const parts[] = {own};
      const std::uint32_t items[] = {0};
      for (std::uint32_t t = 0; t < kBlocks; ++t) {
        CopyJob job = job_of(1);
        job.items[0].first_token = job.items[0].block_begin = t;
        EXPECT_TRUE(kernel_->launch(job, CopyDirection::kGather, items, parts, 0, 1, stream, 4).ok());
      }
      fake_cuda::synchronize(stream, kKernelDevice);
      EXPECT_EQ(std::memcmp(own, memory_, kBytes), 0);
      fake_cuda::release(own);
      fake_cuda::destroy_stream(stream);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_F(KernelLaunch, EndsOnlyAfterItsLaunches) {
  make_kernel();
  Gate gate(stream_, kKernelDevice);
  ASSERT_TRUE(launch(job_of(kBlocks)).ok());
  std::thread end([&] { kernel_.reset(); });
  EXPECT_TRUE(fake_cuda::wait_until([](const auto& s) { return s.threads_waiting == 1; }));
  gate.open();
  end.join();
  EXPECT_EQ(tokens_in_place(), kBlocks);
}

TEST_F(KernelLaunch, EveryErrorOfMakeIsReported) {
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  for (const char* call : {"cudaGetDevice", "cudaSetDevice", "cudaMalloc", "cudaStreamCreateWithFlags", "cudaMemcpyAsync",
                           "cudaStreamSynchronize", "cudaHostAlloc", "cudaHostGetDevicePointer"}) {
    fake_cuda::fail(call, 1, cudaErrorMemoryAllocation);
    const Status status = PagedKernel::make(*geometry_, kKernelDevice).status();
    EXPECT_EQ(status.code(), Code::kIoError) << call;
    EXPECT_NE(status.message().find(call), std::string::npos) << status.message();
    EXPECT_EQ(cudaGetLastError(), cudaSuccess);
    int device = -1;
    EXPECT_EQ(cudaGetDevice(&device), cudaSuccess);
    EXPECT_EQ(device, 0);
  }
  ASSERT_EQ(cudaSetDevice(kKernelDevice), cudaSuccess);
}

TEST_F(KernelLaunch, AFailedLaunchIsReportedAndTheNextOneRuns) {
  make_kernel();
  for (const char* call : {"cudaLaunchKernelExC", "cudaEventCreateWithFlags"}) {
    make_kernel();
    fake_cuda::fail(call, 1, cudaErrorLaunchOutOfResources);
    EXPECT_EQ(launch(job_of(1)).code(), Code::kIoError) << call;
    EXPECT_EQ(cudaGetLastError(), cudaSuccess);
    EXPECT_TRUE(launch(job_of(kBlocks)).ok());
    fake_cuda::synchronize(stream_, kKernelDevice);
    EXPECT_EQ(tokens_in_place(), kBlocks);
  }
}

// What the device reads is not known: no plan is put in its place before the stream has ended.
TEST_F(KernelLaunch, AfterAnEventThatFailedItsPlanIsKeptUntilTheStreamHasEnded) {
  make_kernel(64);
  Gate gate(stream_, kKernelDevice);
  fake_cuda::fail("cudaEventRecord", 1, cudaErrorMemoryAllocation);
  const Status status = launch(job_of(1));
  EXPECT_EQ(status.to_string(), "io_error: cudaEventRecord: out of memory (2)");
  EXPECT_EQ(fake_cuda::calls("cudaLaunchKernelExC"), 1);
  EXPECT_EQ(launch(job_of(1)).message(), status.message());
  EXPECT_EQ(fake_cuda::calls("cudaLaunchKernelExC"), 1);
  // The other direction goes on.
  EXPECT_TRUE(launch(job_of(1), CopyDirection::kScatter).ok());
  gate.open();
  fake_cuda::synchronize(stream_, kKernelDevice);
  kernel_->drained(stream_);
  EXPECT_TRUE(launch(job_of(kBlocks)).ok());
  fake_cuda::synchronize(stream_, kKernelDevice);
  EXPECT_EQ(tokens_in_place(), kBlocks);
}

TEST_F(KernelLaunch, AnEventThatCannotBeAskedOnceIsAskedAgain) {
  for (const std::string call : {"cudaEventQuery", "cudaEventSynchronize"}) {
    make_kernel(64);
    Gate gate(stream_, kKernelDevice);
    ASSERT_TRUE(launch(job_of(1)).ok());
    const int launches = fake_cuda::calls("cudaLaunchKernelExC");
    fake_cuda::fail(call, 1, cudaErrorMemoryAllocation);
    EXPECT_EQ(launch(job_of(1)).message(), call + ": out of memory (2)");
    EXPECT_EQ(fake_cuda::calls("cudaLaunchKernelExC"), launches) << "the ring is full";
    gate.open();
    EXPECT_TRUE(launch(job_of(kBlocks)).ok());
    fake_cuda::synchronize(stream_, kKernelDevice);
    EXPECT_EQ(tokens_in_place(), kBlocks);
  }
}

// Events that never answer again; another stream's are left alone.
TEST_F(KernelLaunch, WhatADrainedStreamHeldIsFreeAndNothingElse) {
  make_kernel(2 * 64);
  const cudaStream_t other = fake_cuda::create_stream(kKernelDevice);
  std::byte* const parts[] = {part()};
  const std::uint32_t items[] = {0};
  Gate gate(other, kKernelDevice);
  ASSERT_TRUE(launch(job_of(1)).ok());
  ASSERT_TRUE(kernel_->launch(job_of(1), CopyDirection::kGather, items, parts, 0, 1, other, 4).ok());
  fake_cuda::synchronize(stream_, kKernelDevice);
  fake_cuda::fail_all("cudaEventQuery", cudaErrorMemoryAllocation);
  EXPECT_FALSE(launch(job_of(1)).ok());
  kernel_->drained(stream_);
  EXPECT_FALSE(launch(job_of(1)).ok()) << "the other stream's plan may still be read";
  gate.open();
  fake_cuda::synchronize(other, kKernelDevice);
  kernel_->drained(other);
  EXPECT_TRUE(launch(job_of(1)).ok()) << "there is nothing to ask";
  fake_cuda::reset();
  fake_cuda::destroy_stream(other);
}

// What the fake runtime must notice, or the tests above prove little.
TEST_F(KernelLaunch, TheFakeDeviceFailsWhereARealOneWould) {
  make_kernel();
  const std::uint32_t items[] = {0};
  alignas(16) static std::byte pageable[kBlocks * kTokenBytes];
  std::byte* const not_mapped[] = {pageable};
  Gate gate(stream_, kKernelDevice);
  ASSERT_TRUE(kernel_->launch(job_of(1), CopyDirection::kGather, items, not_mapped, 0, 1, stream_, 8).ok());
  gate.open();
  fake_cuda::synchronize(stream_, kKernelDevice);
  EXPECT_NE(fake_cuda::fault().find("not memory of the device"), std::string::npos) << fake_cuda::fault();
  EXPECT_EQ(launch(job_of(1)).code(), Code::kIoError);  // as all calls after it
  kernel_.reset();
  fake_cuda::reset();

  make_kernel();
  const cudaStream_t other = fake_cuda::create_stream(0);
  std::byte* const parts[] = {part()};
  EXPECT_NE(
      kernel_->launch(job_of(1), CopyDirection::kGather, items, parts, 0, 1, other, 8).message().find("invalid resource handle"),
      std::string::npos);
  fake_cuda::destroy_stream(other);
}

}  // namespace
}  // namespace lmcn
