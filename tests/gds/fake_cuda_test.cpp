// The loader with staging and pages on a fake CUDA runtime, checksums and copies by the kernels, and a plugin that reads into that
// memory as if by GPUDirect Storage.
#include <cuda_runtime_api.h>

#include "fake_cudart.hpp"
#include "fake_gds.hpp"
#include "load_fixture.hpp"

namespace lmcn::load_test {

// Device 1, so that a missing cudaSetDevice shows.
constexpr int kDevice = 1;

/// cuFile registers and gives back in the current context: so here only where the device is current.
LmcnGdsPlugin strict_gds() {
  LmcnGdsPlugin plugin = kFakeGds;
  plugin.register_memory = [](LmcnGdsReader* reader, void* base, std::uint64_t bytes, LmcnGdsError error) {
    int device = -1;
    EXPECT_EQ(cudaGetDevice(&device), cudaSuccess);
    EXPECT_EQ(device, kDevice);
    return kFakeGds.register_memory(reader, base, bytes, error);
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
  EXPECT_EQ(loader->name(), "gds");
  EXPECT_EQ(fake_gds().registered_bytes % (2 * kMinSegmentBytes), 0u);
  EXPECT_GT(fake_gds().registered_bytes, 0u);
  const DeviceLoadJob job = two_records();
  expect_loaded(job, 0, 0);
  expect_loaded(job, 1, 1);
  EXPECT_TRUE(load(job).ok);
  expect_pages();
  loader.reset();
  const fake_cuda::State after = fake_cuda::state();
  EXPECT_EQ(after.live_streams, before.live_streams);
  EXPECT_EQ(after.live_events, before.live_events);
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
  EXPECT_EQ(make_device_loader(layout, slot, loading).status().code(), Code::kResourceExhausted);
}

}  // namespace
}  // namespace lmcn::load_test
