// Proves the CUDA copier on a real device.
//   gpu_check PART... [--small]     0: proven. 1: a difference or an error. 77: no GPU here, nothing proven.
//   bytes   every case of the copier suite, bit for bit
//   plans   100 random layouts and jobs, bit for bit
//   order   copies wait for the engine's streams and the streams for copies
//   reuse   slots given away and filled again under load
//   verify  checksums taken on the device beside the host's, of whole and of damaged images
// Without PART all of them. Each by every path that a copy can take and by the calibrated choice, in an arena that the copier
// registers with CUDA while copies run and in one that somebody else has registered.
#include "gpu_check.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "copy_path.hpp"
#include "lmcn/version.hpp"
#include "memory/slot_image.hpp"

namespace lmcn::gpu_check {
namespace {

// Other threads may be in the middle of something: nothing is destroyed.
[[noreturn]] void fail(const std::string& what, const std::string& why) {
  std::fflush(stdout);
  std::fprintf(stderr, "gpu_check: FAILED: %s: %s\n", what.c_str(), why.c_str());
  std::_Exit(1);
}

}  // namespace

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  fail(what, std::string(cudaGetErrorString(error)) + " (" + std::to_string(static_cast<int>(error)) + ")");
}
void check(const std::string& error, const std::string& what) {
  if (error.empty()) return;
  fail(what, error);
}
void check(const Status& status, const std::string& what) {
  check(status.ok() ? "" : status.to_string(), what);
}

std::byte* GpuBackend::allocate(std::size_t bytes) {
  void* memory = nullptr;
  CHECK_CUDA(cudaMalloc(&memory, bytes));
  memory_.push_back(memory);
  return static_cast<std::byte*>(memory);
}
void GpuBackend::release_all() {
  for (void* memory : memory_) CHECK_CUDA(cudaFree(memory));
  memory_.clear();
}
std::byte* GpuBackend::allocate_arena(std::size_t bytes) {
  std::byte* const arena = Backend::allocate_arena(bytes);
  std::memset(arena, 0, bytes);
  if (registered_) CHECK_CUDA(cudaHostRegister(arena, bytes, cudaHostRegisterDefault));
  return arena;
}
void GpuBackend::release_arena(std::byte* arena) {
  if (registered_) CHECK_CUDA(cudaHostUnregister(arena));
  Backend::release_arena(arena);
}
void GpuBackend::upload(std::byte* to, const std::byte* from, std::size_t bytes) {
  CHECK_CUDA(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice));
}
void GpuBackend::download(std::byte* to, const std::byte* from, std::size_t bytes) {
  CHECK_CUDA(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
}
void GpuBackend::synchronize() {
  CHECK_CUDA(cudaStreamSynchronize(nullptr));
}
Result<std::unique_ptr<PagedCopier>> GpuBackend::make(const PagedKvLayout& paged, const SlotLayout& slot, std::byte* arena,
                                                      std::uint64_t arena_bytes, const CopierOptions& options) {
  return make_cuda_copier(paged, slot, arena, arena_bytes, options, kDevice);
}

namespace {

using copier_suite::Case;
using copier_suite::Order;

void check_bytes(GpuBackend& backend, int every) {
  std::map<std::string, int> ran;
  int number = 0;
  for (const Case& c : copier_suite::all_cases()) {
    if (number++ % every != 0) continue;
    check(copier_suite::run_case(backend, c, 11), c.name() + ", " + backend.host_memory() + " arena");
    backend.release_all();
    ++ran[copier_suite::order_name(c.order)];
  }
  std::printf("  bytes: ");
  for (const auto& [order, cases] : ran) std::printf("%s %d  ", order.c_str(), cases);
  std::printf("cases, every byte as expected\n");
}

void check_plans(GpuBackend& backend, int plans) {
  // The seed names the plan: a failure is found again with it.
  for (std::uint64_t seed = 1; seed <= static_cast<std::uint64_t>(plans); ++seed) {
    std::mt19937_64 random(seed);
    const auto pick = [&](std::initializer_list<std::int64_t> from) { return from.begin()[random() % from.size()]; };
    Case c{.order = static_cast<Order>(random() % (static_cast<std::uint64_t>(Order::kOpaqueInBlock) + 1))};
    c.layers = pick({1, 2, 3, 5});
    c.options.rank = 1;
    if (c.order == Order::kOpaque || c.order == Order::kOpaqueInBlock) {
      c.planes = c.block_tokens = c.heads = c.element_bytes = 1;
      c.head_dim = pick({1, 16, 127, 4096, 65536, 65552});
      c.chunk_tokens = pick({1, 2, 7});
    } else {
      c.planes = pick({1, 2});
      c.block_tokens = pick({1, 2, 8, 16, 17, 32, 64});
      c.heads = pick({1, 2, 3, 8});
      c.head_dim = pick({1, 8, 24, 64, 128});
      c.element_bytes = pick({1, 2, 4, 8});
      c.chunk_tokens = 1 + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(3 * c.block_tokens));
    }
    check(copier_suite::run_case(backend, c, seed),
          "plan " + std::to_string(seed) + ": " + c.name() + ", " + backend.host_memory() + " arena");
    backend.release_all();
  }
  std::printf("  plans: %d random ones, every byte as expected\n", plans);
}

/// Whether the path asked for is here at all: of a copier over one page.
Status can_be_made(GpuBackend& backend) {
  const PagedKvLayout paged = PagedKvLayout::opaque({backend.allocate(4096)}, 1, 4096, 4096);
  const SlotLayout slot = SlotLayout::make(paged, 1).value();
  const std::uint64_t bytes = image_bytes(static_cast<std::uint64_t>(slot.rank_bytes));
  std::byte* const arena = backend.allocate_arena(bytes);
  const Status status = backend.make(paged, slot, arena, bytes, {}).status();
  backend.release_arena(arena);
  backend.release_all();
  return status;
}

int run(const std::set<std::string>& parts, bool small) {
  const CudaStatus status = cuda_status();
  if (status.devices == 0) {
    std::printf("gpu_check: NO GPU HERE, NOTHING PROVEN: %s\n", status.message.c_str());
    return 77;
  }
  cudaDeviceProp properties{};
  CHECK_CUDA(cudaSetDevice(kDevice));
  CHECK_CUDA(cudaGetDeviceProperties(&properties, kDevice));
  std::printf("device %d: %s, compute capability %d.%d, %.1f GiB\n", kDevice, properties.name, properties.major, properties.minor,
              static_cast<double>(properties.totalGlobalMem) / (1 << 30));
  if (parts.contains("verify")) {
    GpuBackend backend(false);
    check_verify(backend, small ? 10 : 200);
  }
  std::vector<std::string> paths;
  for (const PathKind kind : kAllPaths) paths.emplace_back(path_name(kind));
  paths.emplace_back("auto");
  for (const std::string& path : paths) {
    check(setenv("LMCN_COPY_PATH", path.c_str(), 1) == 0 ? "" : "setenv", "LMCN_COPY_PATH");
    for (const bool registered : {false, true}) {
      GpuBackend backend(registered);
      const Status status = can_be_made(backend);
      if (status.code() == Code::kUnavailable) {
        std::printf("path %s: not to be had here: %s\n", path.c_str(), status.message().c_str());
        break;
      }
      check(status, "path " + path);
      std::printf("path %s, %s arena\n", path.c_str(), backend.host_memory());
      if (parts.contains("bytes")) check_bytes(backend, small ? 7 : 1);
      if (parts.contains("plans")) check_plans(backend, small ? 10 : 100);
      if (parts.contains("order")) check_order(backend, small ? 2 : 25);
      if (parts.contains("reuse")) check_reuse(backend, small ? 30 : 1000);
    }
  }
#ifdef LMCN_FAKE_CUDART
  std::printf("gpu_check: passed on the fake runtime; says nothing about a GPU\n");
#else
  std::printf("gpu_check: proven\n");
#endif
  return 0;
}

}  // namespace
}  // namespace lmcn::gpu_check

int main(int argc, char** argv) {
  const std::set<std::string> known = {"bytes", "plans", "order", "reuse", "verify"};
  std::set<std::string> parts;
  bool small = false;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--small") == 0) {
      small = true;
    } else if (known.contains(argv[i])) {
      parts.insert(argv[i]);
    } else {
      std::fprintf(stderr, "gpu_check: %s: must be bytes, plans, order, reuse, verify or --small\n", argv[i]);
      return 2;
    }
  }
  return lmcn::gpu_check::run(parts.empty() ? known : parts, small);
}
