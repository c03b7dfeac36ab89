// What the fake runtime's files share: its objects, and who is to fail next. For them only.
#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>

#include "fake_cudart.hpp"

namespace fake_cuda::shared {

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
// Never destroyed: threads of streams that nobody ended still wait when the process exits.
inline auto& g_mutex = *new std::mutex;
inline auto& g_changed = *new std::condition_variable;
inline auto& g_state = *new fake_cuda::State;
inline auto& g_injections = *new std::map<std::string, Injection>;
inline auto& g_calls = *new std::map<std::string, int>;
inline cudaError_t g_sticky = cudaSuccess;
inline int g_devices = fake_cuda::kDevices;
inline bool g_hold_callers = false;
inline auto& g_memory = *new std::map<std::byte*, Allocation>;
struct HostRange {
  std::size_t bytes = 0;
  std::byte* device = nullptr;  // where the device sees it
  bool registered = false;      // else allocated
  unsigned flags = 0;           // of registering it
  int registered_on = 0;
};
// That CUDA knows. Never destroyed: what a device may still use is left to the process.
inline auto& g_host_memory = *new std::map<std::byte*, HostRange>;
struct HostView {
  std::size_t bytes = 0;
  std::byte* device = nullptr;
};
inline auto& g_host_views = *new std::map<std::byte*, HostView>;  // of allocate_host()
struct Cost {
  double call_us = 0, copy_us = 0, first_us = 0;
};
inline auto& g_costs = *new std::map<std::string, Cost>;
inline int g_driver = 13000;
inline std::size_t g_lockable = SIZE_MAX;
inline bool g_unified = true;
inline auto& g_contexts = *new std::set<int>;
inline bool g_ignore_waits = false;
inline auto& g_fault = *new std::string;
inline bool g_capture = false;
inline auto& g_spoilt_capture = *new std::string;
inline auto& g_events = *new std::map<Event*, std::shared_ptr<Event>>;  // a stream may still wait for one that was destroyed

inline thread_local int t_device = 0;
inline thread_local cudaStreamCaptureMode t_capture_mode = cudaStreamCaptureModeGlobal;
inline thread_local cudaError_t t_last = cudaSuccess;

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

inline auto& g_streams = *new std::set<Stream*>;

inline Stream* default_stream(int device) {
  static std::array<Stream, fake_cuda::kDevices> streams{Stream(0), Stream(1)};
  return &streams.at(static_cast<std::size_t>(device));
}

// nullptr: not a stream. REQUIRES g_mutex.
inline Stream* resolve(cudaStream_t handle, int device) {
  if (handle == nullptr || handle == cudaStreamLegacy) return default_stream(device);
  auto* const stream = reinterpret_cast<Stream*>(handle);
  return g_streams.contains(stream) ? stream : nullptr;
}

inline cudaError_t fail_with(cudaError_t error) {
  t_last = error;
  return error;
}

// Counts the call and says whether it is to fail. REQUIRES g_mutex.
inline std::optional<cudaError_t> injected(const std::string& call) {
  ++g_calls[call];
  static const std::set<std::string> unsafe{"cudaMalloc",         "cudaHostAlloc",         "cudaHostRegister",
                                            "cudaHostUnregister", "cudaStreamSynchronize", "cudaEventSynchronize",
                                            "cudaEventQuery"};
  if (g_capture && t_capture_mode != cudaStreamCaptureModeRelaxed && unsafe.contains(call)) {
    g_spoilt_capture = call;
    return fail_with(cudaErrorStreamCaptureUnsupported);
  }
  static const std::set<std::string> without_context{
      "cudaGetDeviceCount",   "cudaGetDevice",           "cudaThreadExchangeStreamCaptureMode",
      "cudaDriverGetVersion", "cudaGetDeviceProperties", "cudaDeviceGetAttribute",
      "cudaSetDevice"};
  if (!without_context.contains(call)) g_contexts.insert(t_device);
  if (g_sticky != cudaSuccess) return fail_with(g_sticky);
  const auto found = g_injections.find(call);
  if (found == g_injections.end()) return std::nullopt;
  if (found->second.nth == 0) return fail_with(found->second.error);  // fail_all()
  if (--found->second.nth > 0) return std::nullopt;
  const Injection injection = found->second;
  g_injections.erase(found);
  if (injection.sticky) g_sticky = injection.error;
  return fail_with(injection.error);
}

inline const Allocation* allocation_of(const std::byte* address, std::size_t extent) {
  auto after = g_memory.upper_bound(const_cast<std::byte*>(address));
  if (after == g_memory.begin()) return nullptr;
  const auto& [begin, allocation] = *--after;
  const auto at = static_cast<std::size_t>(address - begin);
  return at < allocation.bytes && extent <= allocation.bytes - at ? &allocation : nullptr;
}

inline double cost_of(const std::string& call, std::size_t copies) {
  const auto found = g_costs.find(call);
  if (found == g_costs.end()) return 0;
  Cost& cost = found->second;
  return std::exchange(cost.first_us, 0) + cost.call_us + static_cast<double>(copies) * cost.copy_us;
}

}  // namespace fake_cuda::shared
