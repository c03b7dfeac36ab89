// Of the fake runtime: memory of the device and of the host, and copies between them.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <new>
#include <vector>

#include "fake_state.hpp"

using namespace fake_cuda::shared;

namespace {

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

}  // namespace fake_cuda

extern "C" {

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaPointerGetAttributes")) return *error;
  const Allocation* const allocation = allocation_of(static_cast<const std::byte*>(address), 1);
  *attributes = {};
  attributes->type = allocation != nullptr ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  attributes->device = allocation != nullptr ? allocation->device : cudaInvalidDeviceId;
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
  g_host_memory[made] = {bytes, made, false, cudaHostAllocPortable | cudaHostAllocMapped, t_device};
  ++g_state.live_host_blocks;
  *memory = made;
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* memory) {
  {
    std::lock_guard lock(g_mutex);
    static_cast<void>(injected("cudaFreeHost"));
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
  if (bytes == 0 || reinterpret_cast<std::uintptr_t>(memory) % 4096 != 0 || (flags & ~(3u | cudaHostRegisterReadOnly)) != 0) {
    return fail_with(cudaErrorInvalidValue);
  }
  const auto next = g_host_memory.upper_bound(begin);
  if (host_range_of(begin) != g_host_memory.end() || (next != g_host_memory.end() && next->first < begin + bytes)) {
    return fail_with(cudaErrorHostMemoryAlreadyRegistered);
  }
  if (g_state.registered_bytes + bytes > g_lockable) return fail_with(cudaErrorMemoryAllocation);
  HostRange range{bytes, begin, true, flags, t_device};
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
  const bool mapped = (range->second.flags & cudaHostRegisterMapped) != 0;
  const bool here = (range->second.flags & cudaHostRegisterPortable) != 0 || range->second.registered_on == t_device;
  if (!g_unified && (!mapped || !here)) return fail_with(cudaErrorInvalidValue);
  *device = range->second.device + (static_cast<std::byte*>(host) - range->first);
  return cudaSuccess;
}

cudaError_t cudaHostGetFlags(unsigned* flags, void* host) {
  std::lock_guard lock(g_mutex);
  if (const auto error = injected("cudaHostGetFlags")) return *error;
  const auto range = host_range_of(static_cast<std::byte*>(host));
  if (range == g_host_memory.end()) return fail_with(cudaErrorInvalidValue);
  *flags = range->second.flags;
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
    static_cast<void>(injected("cudaFree"));
    --g_state.live_device_blocks;
  }
  fake_cuda::release(static_cast<std::byte*>(memory));
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

}  // extern "C"
