// A link-level stand-in for the CUDA runtime calls the project makes: device memory is host memory, a stream is a thread that does
// its operations in order, an event is a mark in a stream. As strict as the real one where a copier could go wrong: copies must
// stay inside one allocation of the right kind, events belong to devices, errors stay with the thread until fetched.
// Not shown here: what only a device has (alignment faults, copy engines running side by side, its memory model).
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <functional>
#include <set>
#include <string>
#include <vector>

namespace fake_cuda {

constexpr int kDevices = 2;

struct State {
  int copies_done = 0;      // executed by streams
  int kernels_done = 0;     // as well
  dim3 last_grid{0, 0, 0};  // of the newest launch
  int streams_waiting = 0;  // streams that stand at an event not yet reached
  int threads_waiting = 0;  // threads inside cudaStreamSynchronize, or in a copy of pageable memory
  int live_streams = 0, live_events = 0;
  int blocking_streams = 0;                          // created without cudaStreamNonBlocking
  int urgent_streams = 0;                            // created with another priority than the lowest
  int live_device_blocks = 0, live_host_blocks = 0;  // of cudaMalloc, of cudaHostAlloc
  int live_registrations = 0;
  std::size_t registered_bytes = 0;
};

/// Forgets counters and injected errors. Streams, events and memory live on.
void reset();
State state();
/// Waits until `reached(state)`; evaluated whenever the state changes and every millisecond. false: a minute passed.
bool wait_until(const std::function<bool(const State&)>& reached);

/// The `nth` call (1 = next) of `call` from now on returns `error`. `sticky`: every later call of anything does too.
/// fail_all: each call of it does, until reset().
void fail_all(const std::string& call, cudaError_t error);
void fail(const std::string& call, int nth, cudaError_t error, bool sticky = false);
/// Calls of `call` since reset().
int calls(const std::string& call);
/// As many devices as cudaGetDeviceCount reports; the default is kDevices.
void set_devices(int devices);
/// Copies hold their caller until they are done, as the real ones may when the host memory is not registered.
void hold_callers(bool hold);

/// Of the driver, as in cudaDriverGetVersion; the default is 13000. Before 13000 cuMemcpyBatchAsync has another signature, before
/// 12080 there is none.
void set_driver(int version);
/// cudaHostRegister gives no more than this in all, as when RLIMIT_MEMLOCK is reached.
void set_lockable(std::size_t bytes);
/// Whether host and device memory have one space of addresses; the default. Where not, host memory is mapped and portable only
/// where it was registered so.
void set_unified(bool unified);
/// Devices on which a context was made since reset(): every call but a few makes one on its thread's current device, which is 0
/// where nobody set one.
std::set<int> contexts();
/// A graph is being captured in global mode: calls that are unsafe then (allocating, registering, asking, synchronising) fail on
/// threads that are not in relaxed mode, and spoil it.
void capture(bool under_way);
/// Which call of which kind spoilt the capture; "": none since capture(true).
std::string spoilt_capture();
/// cudaStreamWaitEvent does nothing: what a missing event would do to the data.
void ignore_waits(bool ignore);
/// From now on time passes in streams by this only: for each call, "kernel" for launches, and each of the copies that one makes.
/// cudaEventElapsedTime tells it.
void set_cost(const std::string& call, double call_us, double copy_us = 0);
/// The next one takes so much longer.
void set_first_cost(const std::string& call, double us);

/// Host memory, 4 KiB-aligned, that the device sees at another address when it is registered, and cannot touch before.
std::byte* allocate_host(std::size_t bytes);
void release_host(std::byte* memory);

/// Memory of `device` for cudaPointerGetAttributes and the range checks of copies.
std::byte* allocate(std::size_t bytes, int device);
void release(std::byte* memory);

/// Memory that kernels on `device` may touch: that device's, and host memory that was allocated by or registered with CUDA.
struct Range {
  const std::byte *begin = nullptr, *end = nullptr;
};
std::vector<Range> kernel_memory(int device);  // sorted
/// Puts a kernel into the stream. `fits`: the shape of the launch is within the device's limits.
cudaError_t launch(cudaStream_t stream, dim3 grid, bool fits, std::function<void(int device)> kernel);
/// A kernel did what ends it on a device: from now on every call returns `error`. The first says what, until reset().
void fault(cudaError_t error, const std::string& what);
std::string fault();

/// An engine's stream on `device`, and something for a stream to do (nullptr: the legacy default stream of the device).
cudaStream_t create_stream(int device);
void destroy_stream(cudaStream_t stream);
void enqueue(cudaStream_t stream, int device, std::function<void()> work);
void synchronize(cudaStream_t stream, int device);

}  // namespace fake_cuda
