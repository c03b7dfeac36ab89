// The loader with staging and pages on a fake CUDA runtime, checksums and copies by the kernels, and a plugin that reads into that
// memory as if by GPUDirect Storage.
#include <cuda_runtime_api.h>

#include <latch>
#include <mutex>
#include <set>
#include <thread>

#include "copy/device_load_files.hpp"
#include "fake_cudart.hpp"
#include "fake_gds.hpp"
#include "load_fixture.hpp"

namespace lmcn::load_test {

// Device 1, so that a missing cudaSetDevice shows.
constexpr int kDevice = 1;

/// Where GDS reads went.
struct ReadInto {
  std::mutex mutex;
  std::set<void*> memory;
};
ReadInto& read_into() {
  static ReadInto into;
  return into;
}

/// cuFile registers and gives back in the current context: so here only where the device is current.
LmcnGdsPlugin strict_gds() {
  LmcnGdsPlugin plugin = kFakeGds;
  plugin.register_memory = [](LmcnGdsReader* reader, void* base, std::uint64_t bytes, LmcnGdsError error) {
    int device = -1;
    EXPECT_EQ(cudaGetDevice(&device), cudaSuccess);
    EXPECT_EQ(device, kDevice);
    return kFakeGds.register_memory(reader, base, bytes, error);
  };
  plugin.read = [](LmcnGdsReader* reader, std::uint32_t file, std::uint64_t offset, void* memory, std::uint64_t bytes,
                   LmcnGdsError error) {
    {
      std::lock_guard lock(read_into().mutex);
      read_into().memory.insert(memory);
    }
    return kFakeGds.read(reader, file, offset, memory, bytes, error);
  };
  plugin.destroy = [](LmcnGdsReader* reader) {
    int device = -1;
    const bool lost = cudaGetDevice(&device) != cudaSuccess;
    EXPECT_TRUE(lost || device == kDevice) << device;
    kFakeGds.destroy(reader);
  };
  return plugin;
}
const LmcnGdsPlugin* plugin_under_test() {
  fake_gds().fault = Fault::kNone;
  static const LmcnGdsPlugin plugin = strict_gds();
  return &plugin;
}
std::string name_under_test() {
  return "gds-compat";
}
int device_under_test() {
  return kDevice;
}
std::byte* allocate_pages(std::size_t bytes) {
  return fake_cuda::allocate(bytes, kDevice);
}
void release_pages(std::byte* pages) {
  fake_cuda::release(pages);
}

namespace {

class OnDevice : public LoadFixture {
 protected:
  OnDevice() {
    fake_cuda::reset();
    fake_gds().fault = Fault::kNone;
    fake_gds().compat = false;
    loading.allow_compat = false;
  }
  ~OnDevice() override {
    loader.reset();
    fake_cuda::reset();
  }
  DeviceLoadJob two_records() {
    DeviceLoadJob job{.id = 1};
    add(job, write(0));
    add(job, write(1));
    return job;
  }
};

TEST_F(OnDevice, StagingIsRegisteredAndEverythingIsGivenBack) {
  const fake_cuda::State before = fake_cuda::state();
  make_loader();
  EXPECT_EQ(fake_gds().registered_bytes % (2 * kMinSegmentBytes), 0u);
  EXPECT_GT(fake_gds().registered_bytes, 0u);
  const DeviceLoadJob job = two_records();
  expect_loaded(job, 0, 0);
  expect_loaded(job, 1, 1);
  EXPECT_TRUE(load(job).ok);
  expect_pages();
  EXPECT_EQ(loader->name(), "gds");
  loader.reset();
  const fake_cuda::State after = fake_cuda::state();
  EXPECT_EQ(after.live_streams, before.live_streams);
  EXPECT_EQ(after.live_events, before.live_events);
}

TEST_F(OnDevice, AFileThatCuFileWouldCopyThroughHostMemoryIsNotReadByIt) {
  fake_gds().compat = true;
  fake_gds().reads = 0;
  make_loader();
  const DeviceLoadJob job = two_records();
  expect_loaded(job, 0, 0);
  expect_loaded(job, 1, 1);
  EXPECT_TRUE(load(job).ok);
  expect_pages();
  EXPECT_EQ(fake_gds().reads, 0);
  EXPECT_TRUE(loader->gds_given_up());
  const std::vector<DeviceLoadPath> paths = loader->paths();
  ASSERT_EQ(paths.size(), 1u);
  EXPECT_EQ(paths[0].name, "host");
  EXPECT_EQ(paths[0].reason, "a fake");
  EXPECT_EQ(loader->name(), "host");
}

TEST_F(OnDevice, PagesAreWrittenAfterTheEnginesStream) {
  make_loader();
  const cudaStream_t stream = fake_cuda::create_stream(kDevice);
  std::promise<void> go;
  fake_cuda::enqueue(stream, kDevice, [gone = go.get_future().share()] { gone.wait(); });
  DeviceLoadJob job = two_records();
  job.stream = reinterpret_cast<std::uintptr_t>(stream);
  ASSERT_TRUE(loader->submit(job).ok());
  const bool waiting = fake_cuda::wait_until([](const fake_cuda::State& s) { return s.streams_waiting == 2; });
  expect_pages();
  expect_loaded(job, 0, 0);
  expect_loaded(job, 1, 1);
  go.set_value();
  EXPECT_TRUE(result(1).ok);
  EXPECT_TRUE(waiting);
  expect_pages();
  fake_cuda::destroy_stream(stream);
}

TEST_F(OnDevice, WhatTheKernelCannotVerifyFails) {
  make_loader();
  const DeviceLoadJob job = two_records();
  fake_cuda::fail("cudaLaunchKernelExC", 1, cudaErrorLaunchOutOfResources);
  DeviceLoadDone done = load(job);
  ASSERT_EQ(done.failed.size(), 1u);
  EXPECT_EQ(done.failed[0].status.code(), Code::kIoError) << done.failed[0].status.to_string();
  fake_cuda::fail("cudaEventSynchronize", 1, cudaErrorIllegalAddress, true);
  done = load(job);
  EXPECT_EQ(done.failed.size(), 2u);
  for (const DeviceLoadFailure& one : done.failed) EXPECT_EQ(one.status.code(), Code::kIoError) << one.status.to_string();
}

TEST_F(OnDevice, ACaptureOfTheEngineIsNotDisturbed) {
  make_loader();
  const DeviceLoadJob job = two_records();
  expect_loaded(job, 0, 0);
  expect_loaded(job, 1, 1);
  fake_cuda::capture(true);
  EXPECT_TRUE(load(job).ok);
  EXPECT_EQ(fake_cuda::spoilt_capture(), "");
  fake_cuda::capture(false);
  expect_pages();
}

/// An engine's stream that stands still until open().
class HeldStream {
 public:
  HeldStream() {
    fake_cuda::enqueue(stream_, kDevice, [this] { latch_.wait(); });
  }
  ~HeldStream() {
    open();
    fake_cuda::destroy_stream(stream_);
  }
  HeldStream(const HeldStream&) = delete;
  HeldStream& operator=(const HeldStream&) = delete;
  void open() {
    if (!latch_.try_wait()) latch_.count_down();
  }
  std::uint64_t handle() const { return reinterpret_cast<std::uintptr_t>(stream_); }

 private:
  std::latch latch_{1};
  const cudaStream_t stream_ = fake_cuda::create_stream(kDevice);
};

class Broken : public OnDevice {
 protected:
  void make_lanes(unsigned lanes) {
    loading.in_flight = lanes;
    make_loader();
  }
  DeviceLoadJob one_record(std::uint64_t id, std::uint32_t record) {
    DeviceLoadJob job{.id = id};
    add(job, write(record));
    return job;
  }
  /// The scatter of `job`, whose kernel waits for `held`, and asking for its end ends in `error` however it is asked for the first
  /// time. REQUIRES: no other item is under way.
  void fail_scatter(DeviceLoadJob& job, const HeldStream& held, const std::string& call, cudaError_t error) {
    job.stream = held.handle();
    fake_cuda::reset();
    // Records: submit()'s, the verification's, of the kernel's plan, the scatter's.
    fake_cuda::fail(call, call == "cudaEventRecord" ? 4 : 2, error);
    fake_cuda::fail("cudaStreamSynchronize", 1, error);
    ASSERT_TRUE(loader->submit(job).ok());
  }
  /// Asking for the end of anything is answered by an error that says nothing of it, and the lanes do not ask for long.
  void answer_nothing() {
    fake_cuda::reset();
    fake_cuda::fail_all("cudaStreamSynchronize", cudaErrorNotPermitted);
  }
  static void release_kept() {
    EXPECT_EQ(cudaSetDevice(kDevice), cudaSuccess);
    release_lost();
    EXPECT_EQ(cudaSetDevice(0), cudaSuccess);
  }
  static void expect_lost(const Status& status) {
    EXPECT_EQ(status.code(), Code::kUnavailable) << status.to_string();
    EXPECT_NE(status.message().find("counts as lost after 0 ms of errors, and may still copy"), std::string::npos)
        << status.to_string();
  }
};

// To report it, even as failed, would give pages to another request that the kernel then writes.
TEST_F(Broken, AnItemWhoseKernelMayStillRunIsNeverReportedAndWhatItReadsIsKept) {
  const fake_cuda::State before = fake_cuda::state();
  loading.lost_after = 0ms;
  make_lanes(1);
  DeviceLoadJob job = one_record(1, 1);
  expect_loaded(job, 0, 1);
  DeviceLoadJob behind = one_record(2, 2);
  HeldStream held;
  job.stream = held.handle();
  answer_nothing();
  fake_cuda::fail("cudaEventSynchronize", 2, cudaErrorNotPermitted);  // after the verification's
  ASSERT_TRUE(loader->submit(job).ok());
  ASSERT_TRUE(fake_cuda::wait_until([](const fake_cuda::State& s) { return s.streams_waiting == 1; }));
  static_cast<void>(loader->submit(behind));  // refused, or accepted and failed
  const std::uint64_t ids[] = {1};
  const Status waited = loader->wait(ids, 60s);
  EXPECT_NE(waited.message().find("scatter: cudaEventSynchronize: some other error (800); "), std::string::npos)
      << waited.to_string();
  expect_lost(waited);
  expect_lost(loader->lost());
  for (const DeviceLoadDone& done : loader->poll()) EXPECT_EQ(done.id, 2u) << "its kernel is still to run";
  expect_lost(loader->submit(one_record(3, 3)));
  loader->cancel(ids);
  EXPECT_TRUE(loader->poll().empty());
  held.open();
  loader.reset();
  EXPECT_GT(fake_cuda::state().live_device_blocks, before.live_device_blocks) << "memory of a kernel that may still run";
  expect_pages();
  EXPECT_GT(fake_gds().open_files, 0);
  fake_cuda::reset();
  release_kept();
  EXPECT_EQ(fake_cuda::state().live_device_blocks, before.live_device_blocks);
  EXPECT_EQ(fake_gds().open_files, 0);
}

TEST_F(Broken, AnItemThatMayStillBeVerifiedFailsAndItsMemoryIsKept) {
  const fake_cuda::State before = fake_cuda::state();
  loading.lost_after = 0ms;
  make_lanes(2);
  const DeviceLoadJob job = one_record(1, 1);
  answer_nothing();
  fake_cuda::fail("cudaEventSynchronize", 1, cudaErrorNotPermitted);
  expect_failed(load(job), 0, Code::kIoError, "cudaEventSynchronize: some other error (800)");
  EXPECT_TRUE(loader->lost().ok()) << "no page was touched: " << loader->lost().to_string();
  fake_cuda::reset();
  const DeviceLoadJob next = one_record(2, 2);
  expect_loaded(next, 0, 2);
  EXPECT_TRUE(load(next).ok) << "the other lane goes on";
  expect_pages();
  loader.reset();
  EXPECT_GT(fake_cuda::state().live_device_blocks, before.live_device_blocks);
  release_kept();
  EXPECT_EQ(fake_cuda::state().live_device_blocks, before.live_device_blocks);
}

// vLLM hands pages out anew as soon as a load is reported.
TEST_F(Broken, AnItemIsReportedOnlyAfterItsKernelHasEnded) {
  make_lanes(1);
  std::uint32_t record = 0;
  for (const std::string call : {"cudaEventRecord", "cudaEventSynchronize"}) {
    SCOPED_TRACE(call);
    HeldStream held;
    DeviceLoadJob job = one_record(record, record);
    fail_scatter(job, held, call, cudaErrorMemoryAllocation);
    std::vector<DeviceLoadDone> early;
    const auto until = std::chrono::steady_clock::now() + 60s;
    while (early.empty() && fake_cuda::calls("cudaStreamSynchronize") < 2 && std::chrono::steady_clock::now() < until) {
      early = loader->poll();
      std::this_thread::yield();
    }
    EXPECT_TRUE(early.empty()) << "reported while its kernel is still to run";
    expect_pages();
    expect_loaded(job, 0, record);
    held.open();
    if (early.empty()) expect_failed(result(job.id), 0, Code::kIoError, call + ": out of memory (2)");
    expect_pages();
    const DeviceLoadJob next = one_record(record + 1, record + 1);
    expect_loaded(next, 0, record + 1);
    EXPECT_TRUE(load(next).ok) << "the lane goes on";
    expect_pages();
    record += 2;
  }
}

TEST_F(Broken, NothingIsReadIntoTheMemoryOfALaneThatNobodyKnowsTheEndOf) {
  make_lanes(2);
  HeldStream held;
  DeviceLoadJob lost = one_record(100, 100);
  read_into().memory.clear();
  fail_scatter(lost, held, "cudaEventSynchronize", cudaErrorIllegalAddress);
  expect_failed(result(100), 0, Code::kIoError, "an illegal memory access");
  ASSERT_EQ(read_into().memory.size(), 1u);
  void* const memory = *read_into().memory.begin();
  read_into().memory.clear();
  DeviceLoadJob rest{.id = 1};
  for (std::uint32_t i = 0; i < 8; ++i) add(rest, write(i));
  for (std::uint32_t i = 0; i < 8; ++i) expect_loaded(rest, i, i);
  EXPECT_TRUE(load(rest).ok) << "the other lane goes on";
  EXPECT_EQ(read_into().memory.size(), 1u);
  EXPECT_FALSE(read_into().memory.contains(memory));
  expect_pages();
  held.open();
  loader.reset();
  expect_loaded(lost, 0, 100);  // by the kernel that was still to run: of its own record
  expect_pages();
}

TEST_F(Broken, WithoutAnyLaneItemsFail) {
  make_lanes(1);
  HeldStream held;
  DeviceLoadJob job = one_record(1, 1);
  add(job, write(2));
  add(job, write(3));
  read_into().memory.clear();
  fake_gds().reads = 0;
  fail_scatter(job, held, "cudaEventSynchronize", cudaErrorIllegalAddress);
  const DeviceLoadDone done = result(1);
  ASSERT_EQ(done.failed.size(), 3u);
  EXPECT_EQ(done.failed[0].status.code(), Code::kIoError);
  for (const std::size_t i : {1, 2}) {
    EXPECT_EQ(done.failed[i].status.code(), Code::kUnavailable);
    EXPECT_NE(done.failed[i].status.message().find("every lane has lost the device: scatter: cudaEventSynchronize: "),
              std::string::npos)
        << done.failed[i].status.to_string();
  }
  expect_failed(load(one_record(2, 4)), 0, Code::kUnavailable, "every lane has lost the device");
  EXPECT_EQ(fake_gds().reads, 1);
}

TEST_F(OnDevice, TheProbeTakesGdsOnlyWhereItIsReal) {
  GdsProbeOptions probing;
  probing.directory = root.path().string();
  probing.plugin = plugin_under_test();
  probing.device = kDevice;
  probing.bytes = 8 * kMiB;
  probing.in_flight = 2;
  for (const bool compat : {false, true}) {
    fake_gds().compat = compat;
    const Result<GdsProbe> probe = probe_gds(probing);
    ASSERT_TRUE(probe.ok()) << probe.status().to_string();
    EXPECT_EQ(probe->mode, compat ? "compat" : "gds");
    EXPECT_EQ(probe->reason, "a fake");
    EXPECT_GT(probe->gds_read, 0);
    EXPECT_GT(probe->host_read, 0);
    EXPECT_EQ(probe->use_gds(), !compat && probe->gds_read > 1.1 * probe->host_read);
  }
}

TEST_F(OnDevice, DevicesAndMemoryThatAreNotThere) {
  loading.device = fake_cuda::kDevices;
  EXPECT_EQ(make_device_loader(layout, slot, loading).status().code(), Code::kUnavailable);
  loading.device = 0;
  const Status status = make_device_loader(layout, slot, loading).status();
  EXPECT_EQ(status.code(), Code::kInvalidArgument) << "the pages are on device 1";
  loading.device = kDevice;
  fake_cuda::fail("cudaMalloc", 1, cudaErrorMemoryAllocation);
  const Status full = make_device_loader(layout, slot, loading).status();
  EXPECT_EQ(full.code(), Code::kResourceExhausted);
  EXPECT_NE(full.message().find(" bytes of staging memory: cudaMalloc"), std::string::npos) << full.to_string();
}

}  // namespace
}  // namespace lmcn::load_test
