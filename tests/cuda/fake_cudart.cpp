// Of the fake runtime: devices, streams, events, launches, and what a test tells it.
#include <algorithm>
#include <cstring>

#include "fake_state.hpp"

using namespace fake_cuda::shared;

namespace fake_cuda {

void reset() {
  std::lock_guard lock(g_mutex);
  g_state.copies_done = 0;
  g_state.kernels_done = 0;
  g_fault.clear();
  g_state.blocking_streams = 0;
  g_state.urgent_streams = 0;
  g_costs.clear();
  g_driver = 13000;
  g_lockable = SIZE_MAX;
  g_unified = true;
  g_contexts.clear();
  g_ignore_waits = false;
  g_capture = false;
  g_spoilt_capture.clear();
  g_injections.clear();
  g_calls.clear();
  g_sticky = cudaSuccess;
  g_devices = kDevices;
  g_hold_callers = false;
}

State state() {
  std::lock_guard lock(g_mutex);
  return g_state;
}

bool wait_until(const std::function<bool(const State&)>& reached) {
  const auto deadline = Clock::now() + std::chrono::minutes(1);
  std::unique_lock lock(g_mutex);
  while (!reached(g_state)) {
    if (Clock::now() > deadline) return false;
    g_changed.wait_for(lock, std::chrono::milliseconds(1));
  }
  return true;
}

void fail(const std::string& call, int nth, cudaError_t error, bool sticky) {
  std::lock_guard lock(g_mutex);
  g_injections[call] = {nth, error, sticky};
}

void fail_all(const std::string& call, cudaError_t error) {
  std::lock_guard lock(g_mutex);
  g_injections[call] = {0, error, false};
}

int calls(const std::string& call) {
  std::lock_guard lock(g_mutex);
  return g_calls[call];
}

void set_devices(int devices) {
  std::lock_guard lock(g_mutex);
  g_devices = devices;
}

void hold_callers(bool hold) {
  std::lock_guard lock(g_mutex);
  g_hold_callers = hold;
}

void set_driver(int version) {
  std::lock_guard lock(g_mutex);
  g_driver = version;
}

void set_lockable(std::size_t bytes) {
  std::lock_guard lock(g_mutex);
  g_lockable = bytes;
}

void set_unified(bool unified) {
  std::lock_guard lock(g_mutex);
  g_unified = unified;
}

std::set<int> contexts() {
  std::lock_guard lock(g_mutex);
  return g_contexts;
}

void capture(bool under_way) {
  std::lock_guard lock(g_mutex);
  g_capture = under_way;
  if (under_way) g_spoilt_capture.clear();
}

std::string spoilt_capture() {
  std::lock_guard lock(g_mutex);
  return g_spoilt_capture;
}

void ignore_waits(bool ignore) {
  std::lock_guard lock(g_mutex);
  g_ignore_waits = ignore;
}

void set_cost(const std::string& call, double call_us, double copy_us) {
  std::lock_guard lock(g_mutex);
  g_costs[call] = {call_us, copy_us, 0};
}

void set_first_cost(const std::string& call, double us) {
  std::lock_guard lock(g_mutex);
  g_costs[call].first_us = us;
}

cudaError_t launch(cudaStream_t handle, dim3 grid, bool fits, std::function<void(int device)> kernel) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaLaunchKernelExC")) return *error;
  if (!fits) return fail_with(cudaErrorInvalidConfiguration);
  Stream* const stream = resolve(handle, t_device);
  if (stream == nullptr || stream->device() != t_device) return fail_with(cudaErrorInvalidResourceHandle);
  g_state.last_grid = grid;
  stream->push(
      {},
      [kernel = std::move(kernel), device = stream->device()] {
        kernel(device);
        std::lock_guard guard(g_mutex);
        ++g_state.kernels_done;
      },
      cost_of("kernel", 0));
  return cudaSuccess;
}

void fault(cudaError_t error, const std::string& what) {
  std::lock_guard lock(g_mutex);
  if (!g_fault.empty()) return;
  g_fault = what;
  g_sticky = error;
}

std::string fault() {
  std::lock_guard lock(g_mutex);
  return g_fault;
}

cudaStream_t create_stream(int device) {
  auto* const stream = new Stream(device);
  std::lock_guard lock(g_mutex);
  g_streams.insert(stream);
  return reinterpret_cast<cudaStream_t>(stream);
}

void destroy_stream(cudaStream_t handle) {
  auto* const stream = reinterpret_cast<Stream*>(handle);
  {
    std::lock_guard lock(g_mutex);
    g_streams.erase(stream);
  }
  delete stream;
}

void enqueue(cudaStream_t handle, int device, std::function<void()> work) {
  std::lock_guard lock(g_mutex);
  resolve(handle, device)->push({}, std::move(work));
}

void synchronize(cudaStream_t handle, int device) {
  std::unique_lock lock(g_mutex);
  const Stream* const stream = resolve(handle, device);
  g_changed.wait(lock, [&, operation = stream->pushed()] { return stream->ended(operation); });
}

}  // namespace fake_cuda

extern "C" {

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNotReady:
      return "device not ready";
    default:
      return "some other error";
  }
}

cudaError_t cudaGetLastError() {
  return std::exchange(t_last, cudaSuccess);
}

cudaError_t cudaGetDeviceCount(int* count) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaGetDeviceCount")) return *error;
  *count = g_devices;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaGetDevice")) return *error;
  *device = t_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaSetDevice")) return *error;
  t_device = device;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaThreadExchangeStreamCaptureMode")) return *error;
  std::swap(t_capture_mode, *mode);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaDeviceGetAttribute")) return *error;
  if (attribute == cudaDevAttrUnifiedAddressing) {
    *value = g_unified ? 1 : 0;
    return cudaSuccess;
  }
  if (attribute != cudaDevAttrMaxPitch) return fail_with(cudaErrorInvalidValue);
  *value = 2048;  // real devices: 2^31-1; small here so that both ways of copying rows are taken
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  {
    std::lock_guard lock(g_mutex);
    if (const auto error = injected("cudaStreamCreateWithFlags")) return *error;
    ++g_state.live_streams;
    if (flags != cudaStreamNonBlocking) ++g_state.blocking_streams;
  }
  *stream = fake_cuda::create_stream(t_device);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* lowest, int* highest) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaDeviceGetStreamPriorityRange")) return *error;
  *lowest = 0;
  *highest = -5;
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  {
    std::lock_guard lock(g_mutex);
    if (const auto error = injected("cudaStreamCreateWithPriority")) return *error;
    ++g_state.live_streams;
    if (flags != cudaStreamNonBlocking) ++g_state.blocking_streams;
    if (priority != 0) ++g_state.urgent_streams;
  }
  *stream = fake_cuda::create_stream(t_device);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  {
    std::lock_guard lock(g_mutex);
    static_cast<void>(injected("cudaStreamDestroy"));
    --g_state.live_streams;
  }
  fake_cuda::destroy_stream(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  std::unique_lock lock(g_mutex);
  if (const auto error = injected("cudaStreamSynchronize")) return *error;
  const Stream* const stream = resolve(handle, t_device);
  if (stream == nullptr) return fail_with(cudaErrorInvalidResourceHandle);
  ++g_state.threads_waiting;
  g_changed.notify_all();
  g_changed.wait(lock, [&, operation = stream->pushed()] { return stream->ended(operation); });
  --g_state.threads_waiting;
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaStreamWaitEvent")) return *error;
  Stream* const stream = resolve(handle, t_device);
  const auto found = g_events.find(reinterpret_cast<Event*>(event_handle));
  if (stream == nullptr || found == g_events.end()) return fail_with(cudaErrorInvalidResourceHandle);
  if (g_ignore_waits) return cudaSuccess;
  // Waits for the last record before this call; a later one does not matter.
  stream->push([record = found->second->last] { return record == nullptr || record->reached; }, {});
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaEventCreateWithFlags")) return *error;
  auto made = std::make_shared<Event>(Event{.device = t_device, .timing = (flags & cudaEventDisableTiming) == 0});
  *event = reinterpret_cast<cudaEvent_t>(made.get());
  g_events.emplace(made.get(), std::move(made));
  ++g_state.live_events;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  std::lock_guard lock(g_mutex);
  static_cast<void>(injected("cudaEventDestroy"));
  g_events.erase(reinterpret_cast<Event*>(handle));
  --g_state.live_events;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event_handle, cudaStream_t handle) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaEventRecord")) return *error;
  Stream* const stream = resolve(handle, t_device);
  const auto found = g_events.find(reinterpret_cast<Event*>(event_handle));
  if (stream == nullptr || found == g_events.end() || stream->device() != found->second->device) {
    return fail_with(cudaErrorInvalidResourceHandle);
  }
  found->second->last = std::make_shared<Record>();
  stream->push({}, [record = found->second->last, stream] {
    std::lock_guard guard(g_mutex);
    record->reached = true;
    record->when = Clock::now();
    record->when_us = stream->now_us();
  });
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaEventQuery")) return *error;
  auto* const event = reinterpret_cast<Event*>(handle);
  if (!g_events.contains(event)) return fail_with(cudaErrorInvalidResourceHandle);
  return event->reached() ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  std::unique_lock lock(g_mutex);
  if (const auto error = injected("cudaEventSynchronize")) return *error;
  auto* const event = reinterpret_cast<Event*>(handle);
  if (!g_events.contains(event)) return fail_with(cudaErrorInvalidResourceHandle);
  ++g_state.threads_waiting;
  g_changed.notify_all();
  g_changed.wait(lock, [record = event->last] { return record == nullptr || record->reached; });
  --g_state.threads_waiting;
  return g_sticky != cudaSuccess ? fail_with(g_sticky) : cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from_handle, cudaEvent_t to_handle) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaEventElapsedTime")) return *error;
  const auto* const from = reinterpret_cast<Event*>(from_handle);
  const auto* const to = reinterpret_cast<Event*>(to_handle);
  if (!from->timing || !to->timing || !from->last || !to->last) return fail_with(cudaErrorInvalidResourceHandle);
  if (!from->reached() || !to->reached()) return fail_with(cudaErrorNotReady);
  *milliseconds = g_costs.empty() ? std::chrono::duration<float, std::milli>(to->last->when - from->last->when).count()
                                  : static_cast<float>((to->last->when_us - from->last->when_us) / 1e3);
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaDriverGetVersion")) return *error;
  *version = g_driver;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaGetDeviceProperties")) return *error;
  *properties = {};
  std::strcpy(properties->name, "fake runtime on the CPU");
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  fake_cuda::enqueue(stream, t_device, [=] { function(data); });
  return cudaSuccess;
}

}  // extern "C"
