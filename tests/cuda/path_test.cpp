// The paths themselves: which one is asked for and had, what each error of each of their calls ends in, and batches.
#include <gtest/gtest.h>

#include <map>

#include "batch_copy.hpp"
#include "cuda_fixture.hpp"

namespace lmcn::copier_suite {
namespace {

class CudaPath : public CudaFixture, public testing::WithParamInterface<const char*> {
 protected:
  CudaPath() : CudaFixture(GetParam()) {}
  std::string path() const { return GetParam(); }
  bool has_kernel() const { return path() == "kernel" || path() == "staged"; }
};

TEST_P(CudaPath, SaysItsName) {
  EXPECT_EQ(copier_->name(), "cuda-" + path());
  EXPECT_EQ(copier_->details(), path() + " as LMCN_COPY_PATH asks; arena 0.00 GiB registered");
}

// Every call a job makes by this path, made to fail once, for each time the job makes it.
TEST_P(CudaPath, AnErrorOfAnyCallFailsTheJobAndPublishesNothing) {
  const std::map<std::string, std::vector<std::string>> calls_of = {
      {"memcpy", {"cudaMemcpyAsync"}},
      {"batch", {"cuMemcpyBatchAsync"}},
      {"staged", {"cudaMemcpyAsync", "cudaLaunchKernelExC"}},
      {"kernel", {"cudaLaunchKernelExC"}},
  };
  std::vector<std::string> calls = calls_of.at(path());
  for (const char* call : {"cudaEventRecord", "cudaStreamWaitEvent", "cudaEventElapsedTime"}) calls.emplace_back(call);
  if (has_kernel()) calls.emplace_back("cudaEventCreateWithFlags");
  copier_.reset();
  const fake_cuda::State before = fake_cuda::state();
  for (const bool by_layer : {false, true}) {
    for (const CopyDirection direction : {CopyDirection::kGather, CopyDirection::kScatter}) {
      if (by_layer && direction == CopyDirection::kGather) continue;
      CopyJob job_of = job(1, direction, {0, 1});
      job_of.layer_by_layer = by_layer;
      ASSERT_TRUE(remake().ok());
      fake_cuda::reset();
      begin_slots();
      ASSERT_TRUE(copier_->submit(job_of).ok());
      ASSERT_EQ(only_result(1).message, "");
      std::map<std::string, int> made;
      for (const std::string& call : calls) made[call] = fake_cuda::calls(call);
      // How many more a kernel needs depends on how soon those before it end.
      if (has_kernel()) made["cudaEventCreateWithFlags"] = std::min(made["cudaEventCreateWithFlags"], 1);
      for (const auto& [call, times] : made) {
        ASSERT_GE(times, 1) << call << " is not called";
        for (int nth = 1; nth <= times; ++nth) {
          SCOPED_TRACE(call + " call " + std::to_string(nth) + (by_layer ? " layer by layer" : ""));
          ASSERT_TRUE(remake().ok());
          begin_slots();
          fake_cuda::reset();
          fake_cuda::fail(call, nth, cudaErrorMemoryAllocation);
          ASSERT_TRUE(copier_->submit(job_of).ok());
          const CopyDone done = only_result(1);
          EXPECT_EQ(done.bytes, 0u);
          EXPECT_EQ(done.failed_items, (std::vector<std::uint32_t>{0, 1}));
          EXPECT_NE(done.message.find("out of memory (2)"), std::string::npos) << done.message;
          EXPECT_EQ(cudaGetLastError(), cudaSuccess);
          for (const std::size_t s : {0, 1}) {
            if (direction == CopyDirection::kGather) {
              EXPECT_EQ(state(s), RankState::kFailed);
            } else {
              EXPECT_EQ(loads_done(arena_->image(s), 1), 1u);
            }
          }
          EXPECT_NE(copier_->details().find("; 1 jobs failed by CUDA errors, the last by " + done.message), std::string::npos)
              << copier_->details();
          // The copier goes on.
          begin_slots();
          ASSERT_TRUE(copier_->submit(job_of).ok());
          EXPECT_EQ(only_result(1).message, "");
        }
      }
      ASSERT_TRUE(remake().ok());
      begin_slots();
      ASSERT_TRUE(copier_->submit(job_of).ok());
      EXPECT_EQ(only_result(1).message, "");
    }
  }
  copier_.reset();
  const fake_cuda::State after = fake_cuda::state();
  EXPECT_EQ(after.live_streams, before.live_streams);
  EXPECT_EQ(after.live_events, before.live_events);
  EXPECT_EQ(after.live_device_blocks, before.live_device_blocks);
  EXPECT_EQ(after.live_registrations, before.live_registrations);
}

TEST_P(CudaPath, AnErrorOfAnyCallThatMakesItIsItsStatusAndLeavesNothingBehind) {
  ASSERT_TRUE(remake().ok());
  fake_cuda::State before;
  auto second = [&] { return backend_->make(paged_->layout(), slot_, arena_->base(), arena_->bytes(), case_.options); };
  fake_cuda::reset();
  const auto counted = second();  // while the first holds the registration
  ASSERT_TRUE(counted.ok());
  std::map<std::string, int> made;
  for (const char* call : {"cudaSetDevice", "cudaPointerGetAttributes", "cudaDeviceGetAttribute", "cudaMalloc", "cudaHostAlloc",
                           "cudaHostGetDevicePointer", "cudaMemcpyAsync", "cudaStreamSynchronize", "cudaStreamCreateWithFlags",
                           "cudaStreamCreateWithPriority", "cudaDeviceGetStreamPriorityRange", "cudaEventCreateWithFlags"}) {
    made[call] = fake_cuda::calls(call);
  }
  before = fake_cuda::state();
  ASSERT_GE(made["cudaMalloc"], has_kernel() ? 1 : 0);
  for (const auto& [call, times] : made) {
    for (int nth = 1; nth <= times; ++nth) {
      SCOPED_TRACE(call + " call " + std::to_string(nth));
      fake_cuda::reset();
      fake_cuda::fail(call, nth, cudaErrorMemoryAllocation);
      const auto failed = second();
      ASSERT_FALSE(failed.ok());
      EXPECT_NE(failed.status().message().find(call + ": out of memory (2)"), std::string::npos) << failed.status().to_string();
    }
  }
  fake_cuda::reset();
  EXPECT_TRUE(second().ok());
  const fake_cuda::State after = fake_cuda::state();
  EXPECT_EQ(after.live_streams, before.live_streams);
  EXPECT_EQ(after.live_events, before.live_events);
  EXPECT_EQ(after.live_device_blocks, before.live_device_blocks);
  EXPECT_EQ(after.live_host_blocks, before.live_host_blocks);
  EXPECT_EQ(after.live_registrations, before.live_registrations);
}

// The device is lost while a job's copies run: the job ends, typed, and its slots stay quarantined.
TEST_P(CudaPath, AfterTheDeviceIsLostSlotsKeepNoWord) {
  begin_slots();
  fake_cuda::fail("cudaEventElapsedTime", 1, cudaErrorIllegalAddress, true);
  ASSERT_TRUE(copier_->submit(job(1, CopyDirection::kGather, {0, 1})).ok());
  EXPECT_EQ(only_result(1).message, "cudaEventElapsedTime: an illegal memory access was encountered (700)");
  for (const std::size_t s : {0, 1}) EXPECT_EQ(state(s), RankState::kEmpty);
  ASSERT_TRUE(copier_->submit(engine_job(2, CopyDirection::kScatter, {0})).ok());
  EXPECT_EQ(only_result(2).message, "cudaEventRecord: an illegal memory access was encountered (700)");
  EXPECT_EQ(loads_done(arena_->image(0), 1), 1u) << "nothing was issued";
  fake_cuda::reset();  // else the arena stays registered, as it would on a lost device
}

// Every event of a plan that a kernel may still read fails, until the stream has ended.
TEST_P(CudaPath, EventsThatCannotBeAskedAnyMoreAreReplaced) {
  if (!has_kernel()) GTEST_SKIP() << "plans are of kernels";
  begin_slots();
  ASSERT_TRUE(copier_->submit(job(1, CopyDirection::kGather, {0, 1})).ok());
  ASSERT_TRUE(only_result(1).ok);
  for (std::uint64_t id = 2; id < 6; ++id) {
    fake_cuda::fail("cudaEventQuery", 1,
                    id % 2 == 0 ? cudaErrorIllegalAddress : cudaErrorMemoryAllocation);  // the plan's comes first
    begin_slots();
    ASSERT_TRUE(copier_->submit(job(id, CopyDirection::kGather, {0, 1})).ok());
    EXPECT_FALSE(only_result(id).ok);
    ASSERT_TRUE(copier_->submit(job(id, CopyDirection::kGather, {0, 1})).ok());
    EXPECT_EQ(only_result(id).message, "");
  }
}

INSTANTIATE_TEST_SUITE_P(All, CudaPath, testing::Values("memcpy", "batch", "staged", "kernel"),
                         [](const auto& tested) { return std::string(tested.param); });

class CudaBatch : public CudaFixture {
 protected:
  CudaBatch() : CudaFixture("batch") {}
};

TEST_F(CudaBatch, TakesTheSignatureOfTheDriver) {
  for (const int driver : {12080, 12090, 13000, 13010}) {
    fake_cuda::reset();
    fake_cuda::set_driver(driver);
    Case c = case_;
    c.chunk_tokens = 11;
    EXPECT_EQ(run_case(*backend_, c, 5), "") << driver;
    EXPECT_GT(fake_cuda::calls("cuMemcpyBatchAsync"), 0);
  }
}

TEST_F(CudaBatch, ADriverWithoutItIsUnavailable) {
  const auto make = [&] {
    return make_cuda_copier(paged_->layout(), slot_, arena_->base(), arena_->bytes(), case_.options, kDevice).status().to_string();
  };
  fake_cuda::set_driver(12070);
  EXPECT_EQ(make(), "unavailable: batch: cudaGetDriverEntryPointByVersion: invalid argument (1)");
  fake_cuda::reset();
  fake_cuda::fail("cudaGetDriverEntryPointByVersion", 1, cudaErrorNotSupported);
  EXPECT_EQ(make(), "ok") << "the other version was asked for and found";
}

TEST_F(CudaBatch, BatchesAreBounded) {
  // 2 layers x 2 planes x 256 tokens x 8 heads rows in one item.
  Case rows = case_;
  rows.order = Order::kHeadsOuter;
  rows.heads = 8;
  rows.block_tokens = 256;
  rows.chunk_tokens = 256;
  PagedModel paged(*backend_, rows, 2);
  std::mt19937_64 random(5);
  paged.fill_random(random);
  paged.upload();
  const SlotLayout slot = SlotLayout::make(paged.layout(), rows.chunk_tokens).value();
  ArenaModel arena(*backend_, rows, slot, 1);
  auto made = backend_->make(paged.layout(), slot, arena.base(), arena.bytes(), rows.options);
  ASSERT_TRUE(made.ok());
  copier_ = std::move(made).value();
  const CopyItem whole{.slot_offset = 0, .generation = ArenaModel::generation(0), .tokens = 256};
  ASSERT_TRUE(copier_->submit({.id = 1, .direction = CopyDirection::kGather, .items = {whole}, .block_ids = {1}}).ok());
  EXPECT_EQ(only_result(1).message, "");
  EXPECT_EQ(fake_cuda::calls("cuMemcpyBatchAsync"), 2 * 2 * 256 * 8 / static_cast<int>(BatchCopy::kMaxCopies));
  copier_.reset();
}

TEST_F(CudaBatch, RefusesDefaultStreamsAndUnequalLists) {
  const Result<BatchCopy> batch = BatchCopy::look_up();
  ASSERT_TRUE(batch.ok());
  const std::uint64_t addresses[] = {4096, 8192};
  const std::size_t bytes[] = {1, 1};
  for (const cudaStream_t stream : {cudaStream_t{nullptr}, cudaStreamLegacy, cudaStreamPerThread}) {
    EXPECT_EQ(batch->enqueue(addresses, addresses, bytes, CopyDirection::kGather, stream).to_string(),
              "unsupported: cuMemcpyBatchAsync: a default stream, must be a stream that was created");
  }
  EXPECT_EQ(batch->enqueue(addresses, {addresses, 1}, bytes, CopyDirection::kGather, engine_).code(), Code::kInvalidArgument);
  EXPECT_EQ(fake_cuda::calls("cuMemcpyBatchAsync"), 0);
}

TEST(CudaPathAsked, AnUnknownOneIsRefusedWithTheKnownOnes) {
  const AskedPath asked("fast");
  const std::unique_ptr<Backend> backend = make_backend();
  const Case c{.chunk_tokens = 4};
  PagedModel paged(*backend, c, 2);
  const SlotLayout slot = SlotLayout::make(paged.layout(), 4).value();
  ArenaModel arena(*backend, c, slot, 1);
  EXPECT_EQ(backend->make(paged.layout(), slot, arena.base(), arena.bytes(), {}).status().to_string(),
            "invalid_argument: LMCN_COPY_PATH is \"fast\", must be auto, memcpy, batch, kernel or staged");
}

}  // namespace
}  // namespace lmcn::copier_suite
