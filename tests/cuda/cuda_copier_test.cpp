// What the CUDA copier promises whatever its path, shown on the memcpy path: how jobs queue and end, and what every CUDA error ends
// in.
#include <gtest/gtest.h>

#include <chrono>
#include <map>
#include <set>
#include <thread>

#include "cuda_fixture.hpp"
#include "per_process.hpp"

namespace lmcn::copier_suite {
namespace {

class CudaCopier : public CudaFixture {
 protected:
  CudaCopier() : CudaFixture("memcpy") {}
};

TEST_F(CudaCopier, SubmitDoesNotWaitWhereTheRuntimeHoldsItsCaller) {
  fake_cuda::hold_callers(true);
  Gate gate(engine_, kDevice);
  EXPECT_TRUE(submits_at_once(engine_job(1, CopyDirection::kGather, {0})));
  EXPECT_TRUE(submits_at_once(engine_job(2, CopyDirection::kScatter, {1})));
  EXPECT_TRUE(copier_->poll().empty());
  gate.open();
  const std::uint64_t ids[] = {1, 2};
  EXPECT_TRUE(copier_->wait(ids, 60s).ok());
  EXPECT_EQ(copier_->poll().size(), 2u);
}

TEST_F(CudaCopier, ALoadDoesNotQueueBehindAStore) {
  Gate gate(engine_, kDevice);
  ASSERT_TRUE(copier_->submit(engine_job(1, CopyDirection::kGather, {0})).ok());
  ASSERT_TRUE(fake_cuda::wait_until([](const auto& s) { return s.streams_waiting > 0; }));
  const cudaStream_t other = fake_cuda::create_stream(kDevice);
  CopyJob load = job(2, CopyDirection::kScatter, {1});
  load.stream = reinterpret_cast<std::uint64_t>(other);
  ASSERT_TRUE(copier_->submit(load).ok());
  EXPECT_TRUE(only_result(2).ok);
  gate.open();
  EXPECT_TRUE(only_result(1).ok);
  fake_cuda::destroy_stream(other);
}

TEST_F(CudaCopier, StreamsAreNonBlockingAndNothingIsLeftBehind) {
  copier_.reset();
  fake_cuda::reset();
  const fake_cuda::State before = fake_cuda::state();
  auto made = backend_->make(paged_->layout(), slot_, arena_->base(), arena_->bytes(), case_.options);
  ASSERT_TRUE(made.ok());
  copier_ = std::move(made).value();
  EXPECT_EQ(fake_cuda::state().live_streams, before.live_streams + 2);
  EXPECT_EQ(fake_cuda::state().blocking_streams, 0);
  EXPECT_EQ(fake_cuda::state().urgent_streams, 0) << "the model's work goes first";
  ASSERT_TRUE(copier_->submit(engine_job(1, CopyDirection::kGather, {0})).ok());
  EXPECT_TRUE(only_result(1).ok);
  copier_.reset();
  EXPECT_EQ(fake_cuda::state().live_streams, before.live_streams);
  EXPECT_EQ(fake_cuda::state().live_events, before.live_events);
}

TEST_F(CudaCopier, MoreJobsThanPooledEventsAllEnd) {
  Gate gate(engine_, kDevice);
  std::vector<std::uint64_t> ids;
  for (std::uint64_t id = 0; id < 60; ++id) {
    ASSERT_TRUE(submits_at_once(engine_job(id, CopyDirection::kGather, {id % kSlots})));
    ids.push_back(id);
  }
  gate.open();
  ASSERT_TRUE(copier_->wait(ids, 60s).ok());
  const std::vector<CopyDone> done = copier_->poll();
  EXPECT_EQ(done.size(), 60u);
  for (const CopyDone& d : done) EXPECT_TRUE(d.ok) << d.message;
  for (std::size_t s = 0; s < kSlots; ++s) expect_gathered(s);
  EXPECT_EQ(arena_->compare(), "");
}

TEST_F(CudaCopier, ACancelledJobOfTheQueueEndsBeforeThoseInFlight) {
  Gate gate(engine_, kDevice);
  fake_cuda::reset();
  std::vector<std::uint64_t> ids;
  for (std::uint64_t id = 0; id < 20; ++id) {
    ASSERT_TRUE(copier_->submit(engine_job(id, CopyDirection::kScatter, {id % kSlots})).ok());
    ids.push_back(id);
  }
  const std::uint64_t queued[] = {15, 19};
  copier_->cancel(queued);
  ASSERT_TRUE(copier_->wait(queued, 60s).ok()) << "the engine's stream has not moved";
  EXPECT_EQ(copier_->poll().size(), 2u);
  EXPECT_EQ(fake_cuda::state().copies_done, 0);
  EXPECT_EQ(loads_done(arena_->image(3), 1), 2u);
  // Its copies are in the stream once the next job's wait is.
  const auto until = std::chrono::steady_clock::now() + 60s;
  while (fake_cuda::calls("cudaStreamWaitEvent") < 2 && std::chrono::steady_clock::now() < until) std::this_thread::yield();
  const std::uint64_t submitted[] = {0};
  copier_->cancel(submitted);
  gate.open();
  ASSERT_TRUE(copier_->wait(ids, 60s).ok());
  const std::vector<CopyDone> done = copier_->poll();
  EXPECT_EQ(done.size(), 18u);
  for (const CopyDone& d : done) EXPECT_TRUE(d.ok) << d.id << ": " << d.message;
}

TEST_F(CudaCopier, AnErrorOfAJobLayerByLayerIsToldToWhoWaitsForIt) {
  ASSERT_TRUE(copier_->submit(layered_job(1, {0})).ok());  // makes the events of its layers
  ASSERT_TRUE(only_result(1).ok);
  for (const std::string call : {"cudaEventRecord", "cudaStreamWaitEvent", "cudaMemcpyAsync"}) {
    fake_cuda::reset();
    ASSERT_TRUE(copier_->submit(layered_job(2, {0})).ok());
    ASSERT_TRUE(only_result(2).ok);
    const int times = fake_cuda::calls(call);
    for (int nth = 1; nth <= times; ++nth) {
      SCOPED_TRACE(call + " call " + std::to_string(nth));
      fake_cuda::reset();
      fake_cuda::fail(call, nth, cudaErrorMemoryAllocation);
      ASSERT_TRUE(copier_->submit(layered_job(3, {0})).ok());
      const CopyDone done = only_result(3);
      EXPECT_EQ(done.message, call + ": out of memory (2)");
      EXPECT_EQ(copier_->wait_layers(3, 1, 60s, 0).message(), "job 3 failed: " + call + ": out of memory (2)");
    }
  }
  ASSERT_GE(fake_cuda::calls("cudaMemcpyAsync"), 1);

  // Events of layers that cannot be made.
  auto made = backend_->make(paged_->layout(), slot_, arena_->base(), arena_->bytes(), case_.options);
  ASSERT_TRUE(made.ok());
  copier_ = std::move(made).value();
  fake_cuda::reset();
  fake_cuda::fail("cudaEventCreateWithFlags", 2, cudaErrorMemoryAllocation);
  ASSERT_TRUE(copier_->submit(layered_job(4, {0})).ok());
  EXPECT_EQ(copier_->wait_layers(4, 1, 60s, 0).message(), "job 4 failed: cudaEventCreateWithFlags: out of memory (2)");
  EXPECT_FALSE(only_result(4).ok);
  EXPECT_GE(loads_done(arena_->image(0), 1), 1u);

  // The waiting itself, while the job is under way.
  Gate gate(engine_, kDevice);
  CopyJob load = layered_job(5, {0});
  load.stream = reinterpret_cast<std::uint64_t>(engine_);
  ASSERT_TRUE(copier_->submit(load).ok());
  ASSERT_TRUE(copier_->wait_layers(5, 0, 60s, 0).ok());
  ASSERT_TRUE(copier_->wait_layers(5, 2, 60s, reinterpret_cast<std::uint64_t>(engine_)).ok());
  fake_cuda::fail("cudaStreamWaitEvent", 1, cudaErrorInvalidValue);
  EXPECT_EQ(copier_->wait_layers(5, 2, 60s, 0).to_string(), "io_error: cudaStreamWaitEvent: invalid argument (1)");
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  gate.open();
  EXPECT_TRUE(only_result(5).ok);
}

// Every call a job makes, made to fail once, for each time the job makes it.
TEST_F(CudaCopier, AnErrorOfAnyCallFailsTheJobAndPublishesNothing) {
  const char* const calls[] = {"cudaGetDevice",   "cudaSetDevice",  "cudaEventRecord",     "cudaStreamWaitEvent",
                               "cudaMemcpyAsync", "cudaEventQuery", "cudaEventElapsedTime"};
  for (const CopyDirection direction : {CopyDirection::kGather, CopyDirection::kScatter}) {
    // On the default stream, which is the one that needs the device to be current. Counts what a job calls.
    fake_cuda::reset();
    ASSERT_TRUE(copier_->submit(job(1, direction, {0, 1})).ok());
    ASSERT_TRUE(only_result(1).ok);
    std::map<std::string, int> made;
    for (const char* call : calls) made[call] = std::string(call) == "cudaEventQuery" ? 1 : fake_cuda::calls(call);
    made["cudaSetDevice"] = 1;  // the second one goes back to the device before and may fail unheard
    ASSERT_GE(made["cudaMemcpyAsync"], 4);
    ASSERT_EQ(made["cudaEventRecord"], 3);
    std::uint32_t loads = direction == CopyDirection::kScatter ? 1 : 0;
    for (const auto& [call, times] : made) {
      ASSERT_GE(times, 1) << call << " is not called any more";
      for (int nth = 1; nth <= times; ++nth) {
        SCOPED_TRACE(call + " call " + std::to_string(nth));
        for (const std::size_t s : {0, 1}) {
          const std::uint32_t generation = ArenaModel::generation(s);
          begin_slot(arena_->image(s), {}, {}, ArenaModel::kRanks * static_cast<std::uint64_t>(slot_.rank_bytes),
                     ArenaModel::kRanks, generation);
        }
        loads = 0;
        fake_cuda::reset();
        fake_cuda::fail(call, nth, cudaErrorMemoryAllocation);
        ASSERT_TRUE(copier_->submit(job(2, direction, {0, 1})).ok());
        EXPECT_EQ(cudaGetLastError(), cudaSuccess) << "left for the engine to find";
        const CopyDone done = only_result(2);
        EXPECT_FALSE(done.ok);
        EXPECT_EQ(done.bytes, 0u);
        EXPECT_EQ(done.failed_items, (std::vector<std::uint32_t>{0, 1}));
        EXPECT_EQ(done.message, call + ": out of memory (2)");
        for (const std::size_t s : {0, 1}) {
          if (direction == CopyDirection::kGather) {
            EXPECT_EQ(state(s), RankState::kFailed);
          } else {
            EXPECT_EQ(state(s), RankState::kEmpty);
            EXPECT_EQ(loads_done(arena_->image(s), 1), loads + 1);
          }
        }
        // The copier goes on.
        ASSERT_TRUE(copier_->submit(job(3, direction, {0, 1})).ok());
        EXPECT_TRUE(only_result(3).ok);
      }
    }
  }
}

TEST_F(CudaCopier, AnErrorOfARowCopyFailsTheJob) {
  Case rows = case_;
  rows.order = Order::kHeadsOuter;
  PagedModel paged(*backend_, rows, kNumBlocks);
  copier_ = std::move(backend_->make(paged.layout(), slot_, arena_->base(), arena_->bytes(), rows.options)).value();
  fake_cuda::fail("cudaMemcpy2DAsync", 2, cudaErrorInvalidValue);
  ASSERT_TRUE(copier_->submit(engine_job(1, CopyDirection::kGather, {0})).ok());
  EXPECT_EQ(only_result(1).message, "cudaMemcpy2DAsync: invalid argument (1)");
  EXPECT_EQ(state(0), RankState::kFailed);
}

TEST_F(CudaCopier, AnErrorOfMakingMoreEventsFailsThatJobOnly) {
  Gate gate(engine_, kDevice);
  fake_cuda::fail("cudaEventCreateWithFlags", 1, cudaErrorMemoryAllocation);
  std::vector<std::uint64_t> ids;
  for (std::uint64_t id = 0; id < 40; ++id) {
    ASSERT_TRUE(copier_->submit(engine_job(id, CopyDirection::kGather, {id % kSlots})).ok());
    ids.push_back(id);
  }
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  gate.open();
  ASSERT_TRUE(copier_->wait(ids, 60s).ok());
  int failed = 0;
  for (const CopyDone& done : copier_->poll()) {
    if (done.ok) continue;
    ++failed;
    EXPECT_EQ(done.message, "cudaEventCreateWithFlags: out of memory (2)");
  }
  EXPECT_EQ(failed, 1);
}

// A slot that is told kFailed may be handed out anew: no copy into it may still be under way.
TEST_F(CudaCopier, AFailureIsPublishedOnlyAfterTheIssuedCopiesEnded) {
  Gate gate(engine_, kDevice);
  fake_cuda::fail("cudaMemcpyAsync", 2, cudaErrorInvalidValue);
  ASSERT_TRUE(copier_->submit(engine_job(1, CopyDirection::kGather, {0})).ok());
  ASSERT_TRUE(fake_cuda::wait_until([&](const auto& s) { return s.threads_waiting > 0 || state(0) != RankState::kEmpty; }));
  EXPECT_EQ(state(0), RankState::kEmpty);
  EXPECT_TRUE(copier_->poll().empty());
  gate.open();
  EXPECT_FALSE(only_result(1).ok);
  EXPECT_EQ(state(0), RankState::kFailed);
}

// The engine may hand a load's pages out anew once it is reported, and the store a gather's slot: asking is tried until it
// succeeds.
TEST_F(CudaCopier, AJobIsReportedOnlyAfterItsCopiesEndedThoughAskingFails) {
  for (const CopyDirection direction : {CopyDirection::kGather, CopyDirection::kScatter}) {
    Gate gate(engine_, kDevice);
    fake_cuda::reset();
    fake_cuda::fail("cudaEventRecord", 3, cudaErrorMemoryAllocation);  // behind the copies
    fake_cuda::fail("cudaStreamSynchronize", 1, cudaErrorMemoryAllocation);
    ASSERT_TRUE(copier_->submit(engine_job(1, direction, {0})).ok());
    std::vector<CopyDone> early;
    const auto until = std::chrono::steady_clock::now() + 60s;
    while (early.empty() && fake_cuda::calls("cudaStreamSynchronize") < 2 && std::chrono::steady_clock::now() < until) {
      early = copier_->poll();
      std::this_thread::yield();
    }
    ASSERT_TRUE(early.empty()) << "reported while its copies are still to run";
    EXPECT_EQ(fake_cuda::state().copies_done, 0);
    EXPECT_EQ(loads_done(arena_->image(0), 1), 0u);
    gate.open();
    EXPECT_EQ(only_result(1).message, "cudaEventRecord: out of memory (2)");
    EXPECT_GE(fake_cuda::state().copies_done, 4);
    if (direction == CopyDirection::kGather) {
      EXPECT_EQ(state(0), RankState::kFailed);
    } else {
      EXPECT_EQ(loads_done(arena_->image(0), 1), 1u);
    }
  }
}

TEST_F(CudaCopier, ALostDeviceFailsJobsAndTellsNothingOfCopiesThatMayStillRun) {
  fake_cuda::fail("cudaMemcpyAsync", 2, cudaErrorIllegalAddress, true);
  ASSERT_TRUE(copier_->submit(engine_job(1, CopyDirection::kGather, {0})).ok());
  EXPECT_EQ(only_result(1).message, "cudaMemcpyAsync: an illegal memory access was encountered (700)");
  EXPECT_EQ(state(0), RankState::kEmpty) << "one copy was issued and its end cannot be known";
  ASSERT_TRUE(copier_->submit(engine_job(2, CopyDirection::kGather, {1})).ok());
  EXPECT_EQ(only_result(2).message, "cudaEventRecord: an illegal memory access was encountered (700)");
  EXPECT_EQ(state(1), RankState::kFailed) << "nothing was issued";
  ASSERT_TRUE(copier_->submit(engine_job(3, CopyDirection::kScatter, {1})).ok());
  EXPECT_FALSE(only_result(3).ok);
  EXPECT_EQ(loads_done(arena_->image(1), 1), 1u);
  fake_cuda::reset();  // else the arena stays registered, as it would on a lost device
}

// torch captures an engine's graphs in global mode.
TEST_F(CudaCopier, ACaptureOfTheEngineIsNotDisturbed) {
  cudaEvent_t event = nullptr;
  ASSERT_EQ(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), cudaSuccess);
  fake_cuda::capture(true);
  EXPECT_EQ(cudaEventQuery(event), cudaErrorStreamCaptureUnsupported) << "a thread that took no care";
  EXPECT_EQ(cudaGetLastError(), cudaErrorStreamCaptureUnsupported);
  EXPECT_EQ(fake_cuda::spoilt_capture(), "cudaEventQuery");
  ASSERT_EQ(cudaEventDestroy(event), cudaSuccess);

  copier_.reset();
  for (const char* path : {"auto", "memcpy", "batch", "kernel", "staged"}) {
    SCOPED_TRACE(path);
    fake_cuda::capture(true);
    ::setenv("LMCN_COPY_PATH", path, 1);
    ASSERT_TRUE(remake().ok());
    EXPECT_GT(fake_cuda::state().live_registrations, 0);
    begin_slots();
    ASSERT_TRUE(copier_->submit(engine_job(1, CopyDirection::kGather, {0})).ok());
    EXPECT_EQ(only_result(1).message, "");
    ASSERT_TRUE(copier_->submit(engine_job(2, CopyDirection::kScatter, {0})).ok());
    EXPECT_EQ(only_result(2).message, "");
    copier_.reset();
    EXPECT_EQ(fake_cuda::state().live_registrations, 0);
    EXPECT_EQ(fake_cuda::spoilt_capture(), "");
  }
}

TEST_F(CudaCopier, ASubmitLeavesTheThreadsDeviceAlone) {
  ASSERT_TRUE(cudaSetDevice(0) == cudaSuccess);
  ASSERT_TRUE(copier_->submit(job(1, CopyDirection::kGather, {0})).ok());  // default stream: device 1's
  EXPECT_TRUE(only_result(1).ok);
  int device = -1;
  ASSERT_TRUE(cudaGetDevice(&device) == cudaSuccess);
  EXPECT_EQ(device, 0);
}

// A context of ours on another device than the engine's would take memory there.
TEST_F(CudaCopier, NoThreadMakesAContextOnAnotherDevice) {
  for (const char* path : {"auto", "memcpy", "batch", "kernel", "staged"}) {
    SCOPED_TRACE(path);
    copier_.reset();
    ::setenv("LMCN_COPY_PATH", path, 1);
    fake_cuda::reset();
    ASSERT_TRUE(remake().ok());
    begin_slots();
    for (const CopyDirection direction : {CopyDirection::kGather, CopyDirection::kScatter}) {
      ASSERT_TRUE(cudaSetDevice(kDevice) == cudaSuccess);  // the engine's thread
      ASSERT_TRUE(copier_->submit(engine_job(1, direction, {0})).ok());
      EXPECT_EQ(only_result(1).message, "");
      ASSERT_TRUE(cudaSetDevice(0) == cudaSuccess);
    }
    std::thread([this] { copier_.reset(); }).join();
    EXPECT_EQ(fake_cuda::contexts(), std::set<int>{kDevice});
  }
}

/// A device that answers with errors which are not said to be its end.
class SilentDevice : public CudaCopier {
 protected:
  SilentDevice() {
    case_.options.lost_after = 0ms;
    case_.options.arena_owner = owner_;
    EXPECT_TRUE(remake().ok());
  }
  ~SilentDevice() override {
    fake_cuda::reset();
    copier_.reset();
    EXPECT_TRUE(cudaSetDevice(kDevice) == cudaSuccess);
    release_kept();
    EXPECT_TRUE(cudaSetDevice(0) == cudaSuccess);
  }
  /// The job's copies stand behind the engine's stream, and what it is asked for fails from the last event on.
  void submit_and_fall_silent(std::uint64_t id, CopyDirection direction) {
    fake_cuda::reset();
    fake_cuda::fail("cudaEventRecord", 3, cudaErrorNotPermitted);
    fake_cuda::fail_all("cudaStreamSynchronize", cudaErrorNotPermitted);
    ASSERT_TRUE(copier_->submit(engine_job(id, direction, {0})).ok());
  }
  std::shared_ptr<int> owner_ = std::make_shared<int>(1);
};

TEST_F(SilentDevice, CountsAsLostAndAStoreFailsWithoutAWord) {
  Gate gate(engine_, kDevice);
  submit_and_fall_silent(1, CopyDirection::kGather);
  EXPECT_EQ(only_result(1).message, "cudaEventRecord: some other error (800)");
  EXPECT_EQ(state(0), RankState::kEmpty) << "a copy may still write there";
  EXPECT_TRUE(copier_->lost().ok()) << "of a store no page is in danger";
  // What comes later is not handed to it, and fails at once.
  ASSERT_TRUE(copier_->submit(engine_job(2, CopyDirection::kGather, {1})).ok());
  EXPECT_NE(only_result(2).message.find("the CUDA device counts as lost after 0 ms of errors"), std::string::npos);
  EXPECT_EQ(state(1), RankState::kFailed) << "nothing was issued";
  EXPECT_EQ(fake_cuda::state().copies_done, 0);
  fake_cuda::reset();
  gate.open();  // the fake's streams end only when all is done
  const int registrations = fake_cuda::state().live_registrations;
  copier_.reset();
  EXPECT_EQ(fake_cuda::state().live_registrations, registrations) << "memory under a copy stays registered";
  case_.options.arena_owner.reset();
  EXPECT_GT(owner_.use_count(), 1) << "and attached";
}

TEST_F(SilentDevice, CountsAsLostAndALoadIsNeverReported) {
  Gate gate(engine_, kDevice);
  submit_and_fall_silent(1, CopyDirection::kScatter);
  const std::uint64_t ids[] = {1};
  const Status waited = copier_->wait(ids, 60s);
  EXPECT_EQ(waited.code(), Code::kUnavailable);
  EXPECT_EQ(
      waited.message(),
      "the CUDA device counts as lost after 0 ms of errors, and may still copy: cudaStreamSynchronize: some other error (800)");
  EXPECT_TRUE(copier_->poll().empty()) << "its pages would be given to others";
  EXPECT_EQ(loads_done(arena_->image(0), 1), 0u);
  EXPECT_EQ(copier_->lost().message(), waited.message());
  EXPECT_EQ(copier_->submit(engine_job(2, CopyDirection::kGather, {1})).message(), waited.message());
  fake_cuda::reset();
  gate.open();
  copier_.reset();
  case_.options.arena_owner.reset();
  EXPECT_GT(owner_.use_count(), 1);
}

TEST_F(SilentDevice, OneThatAnswersInTimeIsNotLost) {
  case_.options.lost_after = 60s;
  ASSERT_TRUE(remake().ok());
  fake_cuda::fail("cudaEventRecord", 3, cudaErrorNotPermitted);
  fake_cuda::fail("cudaStreamSynchronize", 1, cudaErrorNotPermitted);
  ASSERT_TRUE(copier_->submit(engine_job(1, CopyDirection::kScatter, {0})).ok());
  EXPECT_EQ(only_result(1).message, "cudaEventRecord: some other error (800)");
  EXPECT_EQ(loads_done(arena_->image(0), 1), 1u);
  copier_.reset();
  case_.options.arena_owner.reset();
  EXPECT_EQ(owner_.use_count(), 1);
  EXPECT_EQ(fake_cuda::state().live_registrations, 0);
}

class MakeCudaCopier : public CudaCopier {
 protected:
  std::string make(const PagedKvLayout& paged, int device) {
    const auto made = make_cuda_copier(paged, slot_, arena_->base(), arena_->bytes(), case_.options, device);
    return made.ok() ? "made" : made.status().to_string();
  }
};

TEST_F(MakeCudaCopier, SaysWhatIsMissing) {
  EXPECT_EQ(make(paged_->layout(), 1), "made");
  EXPECT_EQ(make(paged_->layout(), 2), "invalid_argument: device is 2, must be in 0..1");
  EXPECT_EQ(make(paged_->layout(), -1), "invalid_argument: device is -1, must be in 0..1");
  EXPECT_EQ(
      make(paged_->layout(), 0).find("invalid_argument: the first byte of layers[0].planes[0] is memory of type 2 on device 1"),
      0u);
  PagedKvLayout on_host = paged_->layout();
  std::vector<std::byte> memory(65536);
  on_host.layers[1].base = memory.data();
  EXPECT_EQ(make(on_host, 1).find("invalid_argument: the first byte of layers[1].planes[0] is memory of type 0"), 0u);
  PagedKvLayout too_long = paged_->layout();
  too_long.num_blocks = 1 << 20;
  EXPECT_EQ(make(too_long, 1).find("invalid_argument: the last byte of layers[0].planes[0] is memory of type 0"), 0u);
  fake_cuda::set_devices(0);
  EXPECT_EQ(make(paged_->layout(), 0), "unavailable: no CUDA device");
  fake_cuda::fail("cudaGetDeviceCount", 1, cudaErrorInsufficientDriver);
  EXPECT_EQ(make(paged_->layout(), 0),
            "unavailable: cudaGetDeviceCount: CUDA driver version is insufficient for CUDA runtime version (35)");
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

TEST_F(MakeCudaCopier, AnErrorOfAnyCallIsItsStatusAndLeavesNothingBehind) {
  const fake_cuda::State before = fake_cuda::state();
  ASSERT_EQ(make(paged_->layout(), 1), "made");
  for (const std::string call : {"cudaSetDevice", "cudaDeviceGetStreamPriorityRange", "cudaStreamCreateWithPriority",
                                 "cudaDeviceGetAttribute", "cudaEventCreateWithFlags", "cudaPointerGetAttributes"}) {
    // One of the copier's end, which may fail unheard.
    const int times = fake_cuda::calls(call) - (call == "cudaSetDevice" ? 1 : 0);
    ASSERT_GE(times, 2) << call;  // once a lane at least
    for (int nth = 1; nth <= times; ++nth) {
      fake_cuda::reset();
      fake_cuda::fail(call, nth, cudaErrorMemoryAllocation);
      EXPECT_NE(make(paged_->layout(), 1).find(": " + call + ": out of memory (2)"), std::string::npos) << call << " " << nth;
    }
    fake_cuda::reset();
    ASSERT_EQ(make(paged_->layout(), 1), "made");
  }
  EXPECT_EQ(fake_cuda::state().live_streams, before.live_streams);
  EXPECT_EQ(fake_cuda::state().live_events, before.live_events);
}

}  // namespace
}  // namespace lmcn::copier_suite
