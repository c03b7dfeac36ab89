#include "fake_cudart.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <set>
#include <thread>
#include <utility>

namespace {

using Clock = std::chrono::steady_clock;

/// One cudaEventRecord. An event may be recorded anew, on another stream too, while an earlier record is still to be reached.
struct Record {
  bool reached = false;
  Clock::time_point when{};
  double when_us = 0;  // by set_cost()
};

struct Event {
  int device = 0;
  bool timing = false;
  std::shared_ptr<Record> last = nullptr;
  bool reached() const { return last == nullptr || last->reached; }
};

struct Injection {
  int nth = 0;
  cudaError_t error = cudaSuccess;
  bool sticky = false;
};

struct Allocation {
  std::size_t bytes = 0;
  int device = 0;
};

// One lock for all: the fake is about order, not speed.
std::mutex g_mutex;
std::condition_variable g_changed;
fake_cuda::State g_state;
std::map<std::string, Injection> g_injections;
std::map<std::string, int> g_calls;
cudaError_t g_sticky = cudaSuccess;
int g_devices = fake_cuda::kDevices;
bool g_hold_callers = false;
std::map<std::byte*, Allocation> g_memory;
struct HostRange {
  std::size_t bytes = 0;
  std::byte* device = nullptr;  // where the device sees it
  bool registered = false;      // else allocated
};
// That CUDA knows. Never destroyed: what a device may still use is left to the process.
auto& g_host_memory = *new std::map<std::byte*, HostRange>;
struct HostView {
  std::size_t bytes = 0;
  std::byte* device = nullptr;
};
std::map<std::byte*, HostView> g_host_views;  // of allocate_host()
struct Cost {
  double call_us = 0, copy_us = 0;
};
std::map<std::string, Cost> g_costs;
int g_driver = 13000;
std::size_t g_lockable = SIZE_MAX;
bool g_ignore_waits = false;
std::string g_fault;
std::map<Event*, std::shared_ptr<Event>> g_events;  // a stream may still wait for one that was destroyed

thread_local int t_device = 0;
thread_local cudaError_t t_last = cudaSuccess;

class Stream {
 public:
  explicit Stream(int device) : device_(device), thread_([this] { run(); }) {}
  ~Stream() {
    {
      std::lock_guard lock(g_mutex);
      stop_ = true;
    }
    g_changed.notify_all();
    thread_.join();
  }
  int device() const { return device_; }

  /// All REQUIRE g_mutex. `ready`: checked under g_mutex until true; then `work` runs without the lock.
  void push(std::function<bool()> ready, std::function<void()> work, double us = 0) {
    queue_.push_back({std::move(ready), std::move(work), us});
    ++pushed_;
    g_changed.notify_all();
  }
  std::uint64_t pushed() const { return pushed_; }
  bool ended(std::uint64_t operation) const { return ended_ >= operation; }
  double now_us() const { return now_us_; }

 private:
  struct Operation {
    std::function<bool()> ready;
    std::function<void()> work;
    double us = 0;
  };

  void run() {
    std::unique_lock lock(g_mutex);
    for (;;) {
      g_changed.wait(lock, [&] { return stop_ || !queue_.empty(); });
      if (queue_.empty()) return;
      Operation operation = std::move(queue_.front());
      queue_.pop_front();
      if (operation.ready && !operation.ready()) {
        ++g_state.streams_waiting;
        g_changed.notify_all();
        g_changed.wait(lock, operation.ready);
        --g_state.streams_waiting;
      }
      if (operation.work) {
        lock.unlock();
        operation.work();
        lock.lock();
      }
      now_us_ += operation.us;
      ++ended_;
      g_changed.notify_all();
    }
  }

  const int device_;
  std::deque<Operation> queue_;
  std::uint64_t pushed_ = 0, ended_ = 0;
  double now_us_ = 0;
  bool stop_ = false;
  std::thread thread_;
};

std::set<Stream*> g_streams;

Stream* default_stream(int device) {
  static std::array<Stream, fake_cuda::kDevices> streams{Stream(0), Stream(1)};
  return &streams.at(static_cast<std::size_t>(device));
}

// nullptr: not a stream. REQUIRES g_mutex.
Stream* resolve(cudaStream_t handle, int device) {
  if (handle == nullptr || handle == cudaStreamLegacy) return default_stream(device);
  auto* const stream = reinterpret_cast<Stream*>(handle);
  return g_streams.contains(stream) ? stream : nullptr;
}

cudaError_t fail_with(cudaError_t error) {
  t_last = error;
  return error;
}

// Counts the call and says whether it is to fail. REQUIRES g_mutex.
std::optional<cudaError_t> injected(const std::string& call) {
  ++g_calls[call];
  if (g_sticky != cudaSuccess) return fail_with(g_sticky);
  const auto found = g_injections.find(call);
  if (found == g_injections.end() || --found->second.nth > 0) return std::nullopt;
  const Injection injection = found->second;
  g_injections.erase(found);
  if (injection.sticky) g_sticky = injection.error;
  return fail_with(injection.error);
}

const Allocation* allocation_of(const std::byte* address, std::size_t extent) {
  auto after = g_memory.upper_bound(const_cast<std::byte*>(address));
  if (after == g_memory.begin()) return nullptr;
  const auto& [begin, allocation] = *--after;
  const auto at = static_cast<std::size_t>(address - begin);
  return at < allocation.bytes && extent <= allocation.bytes - at ? &allocation : nullptr;
}

// The range that CUDA knows and that holds `address`; end() when it knows none. REQUIRES g_mutex.
std::map<std::byte*, HostRange>::iterator host_range_of(const std::byte* address) {
  const auto after = g_host_memory.upper_bound(const_cast<std::byte*>(address));
  if (after == g_host_memory.begin()) return g_host_memory.end();
  const auto range = std::prev(after);
  return address < range->first + range->second.bytes ? range : g_host_memory.end();
}

// Wholly in one range that CUDA knows, or wholly in none.
bool host_fits(const std::byte* begin, std::size_t extent) {
  if (allocation_of(begin, 1) != nullptr) return false;
  const auto range = host_range_of(begin);
  if (range != g_host_memory.end()) return begin + extent <= range->first + range->second.bytes;
  const auto next = g_host_memory.upper_bound(const_cast<std::byte*>(begin));
  return next == g_host_memory.end() || begin + extent <= next->first;
}

// The same for an address of the device: in one range that it sees.
bool mapped_fits(const std::byte* begin, std::size_t extent) {
  return std::ranges::any_of(g_host_memory, [&](const auto& entry) {
    const HostRange& range = entry.second;
    return begin >= range.device && begin + extent <= range.device + range.bytes;
  });
}

// One side on the device, whole in one allocation, the other in host memory.
bool sides_fit(const void* to, std::size_t to_extent, const void* from, std::size_t from_extent, cudaMemcpyKind kind) {
  const auto* t = static_cast<const std::byte*>(to);
  const auto* f = static_cast<const std::byte*>(from);
  if (kind == cudaMemcpyDeviceToHost) return allocation_of(f, from_extent) != nullptr && host_fits(t, to_extent);
  if (kind == cudaMemcpyHostToDevice) return allocation_of(t, to_extent) != nullptr && host_fits(f, from_extent);
  return false;
}

double cost_of(const std::string& call, std::size_t copies) {
  const auto found = g_costs.find(call);
  return found == g_costs.end() ? 0 : found->second.call_us + static_cast<double>(copies) * found->second.copy_us;
}

cudaError_t enqueue_copy(std::unique_lock<std::mutex>& lock, const std::string& call, std::size_t copies, cudaStream_t handle,
                         std::function<void()> copy) {
  Stream* const stream = resolve(handle, t_device);
  if (stream == nullptr) return fail_with(cudaErrorInvalidResourceHandle);
  stream->push(
      {},
      [copy = std::move(copy)] {
        copy();
        std::lock_guard guard(g_mutex);
        ++g_state.copies_done;
      },
      cost_of(call, copies));
  if (g_hold_callers) {
    const std::uint64_t operation = stream->pushed();
    ++g_state.threads_waiting;
    g_changed.notify_all();
    g_changed.wait(lock, [&] { return stream->ended(operation); });
    --g_state.threads_waiting;
  }
  return cudaSuccess;
}

/// As the driver defines them.
struct BatchAttributes {
  int source_order = 0;
  struct {
    int type = 0, id = 0;
  } source_hint, destination_hint;
  unsigned flags = 0;
};

int copy_batch(std::uint64_t* to, std::uint64_t* from, std::size_t* bytes, std::size_t count, BatchAttributes* attributes,
               std::size_t* attribute_begin, std::size_t attribute_count, cudaStream_t stream) {
  constexpr int kStreamOrder = 1, kAnyOrder = 3;
  std::unique_lock lock(g_mutex);
  if (const auto error = injected("cuMemcpyBatchAsync")) return *error;
  if (count == 0 || attribute_count != 1 || attribute_begin[0] != 0 || attributes[0].flags > 1 || stream == nullptr ||
      stream == cudaStreamLegacy || (attributes[0].source_order != kStreamOrder && attributes[0].source_order != kAnyOrder)) {
    return cudaErrorInvalidValue;
  }
  struct Copy {
    std::byte* to;
    const std::byte* from;
    std::size_t bytes;
    std::vector<std::byte> early;
  };
  std::vector<Copy> copies;
  for (std::size_t i = 0; i < count; ++i) {
    Copy copy{reinterpret_cast<std::byte*>(to[i]), reinterpret_cast<const std::byte*>(from[i]), bytes[i], {}};
    const bool store = allocation_of(copy.from, copy.bytes) != nullptr && mapped_fits(copy.to, copy.bytes);
    const bool load = allocation_of(copy.to, copy.bytes) != nullptr && mapped_fits(copy.from, copy.bytes);
    if (copy.bytes == 0 || (!store && !load)) return cudaErrorInvalidValue;
    // A source that may be read at any time is read now, and one that a kernel or copy still writes shows it.
    if (attributes[0].source_order == kAnyOrder) copy.early.assign(copy.from, copy.from + copy.bytes);
    copies.push_back(std::move(copy));
  }
  return enqueue_copy(lock, "cuMemcpyBatchAsync", count, stream, [copies = std::move(copies)] {
    // Within a batch there is no order.
    for (auto copy = copies.rbegin(); copy != copies.rend(); ++copy) {
      std::memcpy(copy->to, copy->early.empty() ? copy->from : copy->early.data(), copy->bytes);
    }
  });
}

int copy_batch_12080(std::uint64_t* to, std::uint64_t* from, std::size_t* bytes, std::size_t count, BatchAttributes* attributes,
                     std::size_t* attribute_begin, std::size_t attribute_count, std::size_t* failed, cudaStream_t stream) {
  *failed = SIZE_MAX;
  return copy_batch(to, from, bytes, count, attributes, attribute_begin, attribute_count, stream);
}

}  // namespace

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
  g_ignore_waits = false;
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

void ignore_waits(bool ignore) {
  std::lock_guard lock(g_mutex);
  g_ignore_waits = ignore;
}

void set_cost(const std::string& call, double call_us, double copy_us) {
  std::lock_guard lock(g_mutex);
  g_costs[call] = {call_us, copy_us};
}

std::byte* allocate_host(std::size_t bytes) {
  const std::size_t rounded = (bytes + 4095) / 4096 * 4096;
  const int file = memfd_create("fake_cuda", MFD_CLOEXEC);
  void* host = MAP_FAILED;
  void* device = MAP_FAILED;
  if (file >= 0 && ftruncate(file, static_cast<off_t>(rounded)) == 0) {
    host = mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    device = mmap(nullptr, rounded, PROT_NONE, MAP_SHARED, file, 0);
  }
  if (file >= 0) close(file);
  if (host == MAP_FAILED || device == MAP_FAILED) throw std::bad_alloc();
  std::lock_guard lock(g_mutex);
  g_host_views[static_cast<std::byte*>(host)] = {rounded, static_cast<std::byte*>(device)};
  return static_cast<std::byte*>(host);
}

void release_host(std::byte* memory) {
  std::lock_guard lock(g_mutex);
  const auto found = g_host_views.find(memory);
  munmap(found->second.device, found->second.bytes);
  munmap(memory, found->second.bytes);
  g_host_views.erase(found);
}

std::byte* allocate(std::size_t bytes, int device) {
  auto* const memory = new std::byte[bytes];  // exactly: ASan sees the first byte past the end
  std::lock_guard lock(g_mutex);
  g_memory[memory] = {bytes, device};
  return memory;
}

void release(std::byte* memory) {
  {
    std::lock_guard lock(g_mutex);
    g_memory.erase(memory);
  }
  delete[] memory;
}

std::vector<Range> kernel_memory(int device) {
  std::lock_guard lock(g_mutex);
  std::map<const std::byte*, std::size_t> found;
  for (const auto& [begin, range] : g_host_memory) found[range.device] = range.bytes;
  for (const auto& [begin, allocation] : g_memory) {
    if (allocation.device == device) found[begin] = allocation.bytes;
  }
  std::vector<Range> ranges;
  for (const auto& [begin, bytes] : found) ranges.push_back({begin, begin + bytes});
  return ranges;
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

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaDeviceGetAttribute")) return *error;
  if (attribute != cudaDevAttrMaxPitch) return fail_with(cudaErrorInvalidValue);
  *value = 2048;  // real devices: 2^31-1; small here so that both ways of copying rows are taken
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaPointerGetAttributes")) return *error;
  const Allocation* const allocation = allocation_of(static_cast<const std::byte*>(address), 1);
  *attributes = {};
  attributes->type = allocation != nullptr ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  attributes->device = allocation != nullptr ? allocation->device : cudaInvalidDeviceId;
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

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  std::unique_lock lock(g_mutex);
  if (const auto error = injected("cudaMemcpyAsync")) return *error;
  if (bytes == 0 || !sides_fit(to, bytes, from, bytes, kind)) return fail_with(cudaErrorInvalidValue);
  return enqueue_copy(lock, "cudaMemcpyAsync", 1, stream, [=] { std::memcpy(to, from, bytes); });
}

cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t width,
                              std::size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  std::unique_lock lock(g_mutex);
  if (const auto error = injected("cudaMemcpy2DAsync")) return *error;
  const bool pitches_fit = to_pitch >= width && from_pitch >= width && to_pitch <= 2048 && from_pitch <= 2048;
  if (width == 0 || height == 0 || !pitches_fit ||
      !sides_fit(to, (height - 1) * to_pitch + width, from, (height - 1) * from_pitch + width, kind)) {
    return fail_with(cudaErrorInvalidValue);
  }
  return enqueue_copy(lock, "cudaMemcpy2DAsync", height, stream, [=] {
    for (std::size_t row = 0; row < height; ++row) {
      std::memcpy(static_cast<std::byte*>(to) + row * to_pitch, static_cast<const std::byte*>(from) + row * from_pitch, width);
    }
  });
}

cudaError_t cudaDriverGetVersion(int* version) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaDriverGetVersion")) return *error;
  *version = g_driver;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaGetDriverEntryPointByVersion")) return *error;
  if (static_cast<int>(version) > g_driver) return fail_with(cudaErrorInvalidValue);
  const bool known = std::string(symbol) == "cuMemcpyBatchAsync" && version >= 12080;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  *function = nullptr;
  if (known) *function = version >= 13000 ? reinterpret_cast<void*>(copy_batch) : reinterpret_cast<void*>(copy_batch_12080);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaHostAlloc")) return *error;
  auto* const made = new (std::align_val_t{4096}) std::byte[bytes];
  g_host_memory[made] = {bytes, made, false};
  ++g_state.live_host_blocks;
  *memory = made;
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* memory) {
  {
    std::lock_guard lock(g_mutex);
    if (g_host_memory.erase(static_cast<std::byte*>(memory)) == 0) return fail_with(cudaErrorInvalidValue);
    --g_state.live_host_blocks;
  }
  ::operator delete[](memory, std::align_val_t{4096});
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void* memory, std::size_t bytes, unsigned flags) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaHostRegister")) return *error;
  auto* const begin = static_cast<std::byte*>(memory);
  if (bytes == 0 || reinterpret_cast<std::uintptr_t>(memory) % 4096 != 0 || (flags & ~3u) != 0) {
    return fail_with(cudaErrorInvalidValue);
  }
  const auto next = g_host_memory.upper_bound(begin);
  if (host_range_of(begin) != g_host_memory.end() || (next != g_host_memory.end() && next->first < begin + bytes)) {
    return fail_with(cudaErrorHostMemoryAlreadyRegistered);
  }
  if (g_state.registered_bytes + bytes > g_lockable) return fail_with(cudaErrorMemoryAllocation);
  HostRange range{bytes, begin, true};
  const auto after = g_host_views.upper_bound(begin);
  if (after != g_host_views.begin()) {
    const auto& [view, known] = *std::prev(after);
    if (begin < view + known.bytes) {
      if (begin + bytes > view + known.bytes) return fail_with(cudaErrorInvalidValue);
      range.device = known.device + (begin - view);
      mprotect(range.device, bytes, PROT_READ | PROT_WRITE);
    }
  }
  g_host_memory[begin] = range;
  ++g_state.live_registrations;
  g_state.registered_bytes += bytes;
  g_changed.notify_all();
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* memory) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaHostUnregister")) return *error;
  const auto found = g_host_memory.find(static_cast<std::byte*>(memory));
  if (found == g_host_memory.end() || !found->second.registered) return fail_with(cudaErrorHostMemoryNotRegistered);
  if (found->second.device != found->first) mprotect(found->second.device, found->second.bytes, PROT_NONE);
  --g_state.live_registrations;
  g_state.registered_bytes -= found->second.bytes;
  g_host_memory.erase(found);
  return cudaSuccess;
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaHostGetDevicePointer")) return *error;
  const auto range = host_range_of(static_cast<std::byte*>(host));
  if (range == g_host_memory.end()) return fail_with(cudaErrorInvalidValue);
  *device = range->second.device + (static_cast<std::byte*>(host) - range->first);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  {
    std::lock_guard lock(g_mutex);
    if (const auto error = injected("cudaMalloc")) return *error;
    ++g_state.live_device_blocks;
  }
  *memory = fake_cuda::allocate(bytes, t_device);
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  if (memory == nullptr) return cudaSuccess;
  {
    std::lock_guard lock(g_mutex);
    --g_state.live_device_blocks;
  }
  fake_cuda::release(static_cast<std::byte*>(memory));
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaGetDeviceProperties")) return *error;
  *properties = {};
  std::strcpy(properties->name, "fake runtime on the CPU");
  return cudaSuccess;
}

// What only gpu_check calls.

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  {
    std::lock_guard lock(g_mutex);
    if (!sides_fit(to, bytes, from, bytes, kind)) return fail_with(cudaErrorInvalidValue);
  }
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemset(void* memory, int value, std::size_t bytes) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream) {
  fake_cuda::enqueue(stream, t_device, [=] { std::memset(memory, value, bytes); });
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  fake_cuda::enqueue(stream, t_device, [=] { function(data); });
  return cudaSuccess;
}

}  // extern "C"
