// Proves the CUDA copier on a real device, bit for bit against the oracle of the copier suite, in pageable and in registered host
// memory; shows that copies wait for the engine's stream; prints GB/s in each direction.
//   gpu_check [--small]     0: proven. 1: a difference or an error. 77: no GPU here, nothing proven.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <latch>
#include <map>
#include <string>
#include <vector>

#include "copier_suite.hpp"
#include "lmcn/version.hpp"
#include "memory/slot_image.hpp"

namespace {

using namespace lmcn;
using copier_suite::Case;

constexpr int kDevice = 0;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "gpu_check: FAILED: %s: %s (%d)\n", what, cudaGetErrorString(error), static_cast<int>(error));
  std::exit(1);
}
#define CHECK_CUDA(call) check((call), #call)

void check(const std::string& error, const std::string& what) {
  if (error.empty()) return;
  std::fprintf(stderr, "gpu_check: FAILED: %s: %s\n", what.c_str(), error.c_str());
  std::exit(1);
}
void check(const Status& status, const std::string& what) {
  check(status.ok() ? "" : status.to_string(), what);
}

class GpuBackend final : public copier_suite::Backend {
 public:
  explicit GpuBackend(bool registered) : registered_(registered) {}
  ~GpuBackend() override { release_all(); }
  const char* host_memory() const { return registered_ ? "registered" : "pageable"; }

  std::byte* allocate(std::size_t bytes) override {
    void* memory = nullptr;
    CHECK_CUDA(cudaMalloc(&memory, bytes));
    memory_.push_back(memory);
    return static_cast<std::byte*>(memory);
  }
  void release_all() override {
    for (void* memory : memory_) CHECK_CUDA(cudaFree(memory));
    memory_.clear();
  }
  std::byte* allocate_arena(std::size_t bytes) override {
    std::byte* const arena = Backend::allocate_arena(bytes);
    std::memset(arena, 0, bytes);
    if (registered_) CHECK_CUDA(cudaHostRegister(arena, bytes, cudaHostRegisterDefault));
    return arena;
  }
  void release_arena(std::byte* arena) override {
    if (registered_) CHECK_CUDA(cudaHostUnregister(arena));
    Backend::release_arena(arena);
  }
  void upload(std::byte* to, const std::byte* from, std::size_t bytes) override {
    CHECK_CUDA(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice));
  }
  void download(std::byte* to, const std::byte* from, std::size_t bytes) override {
    CHECK_CUDA(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
  }
  void synchronize() override { CHECK_CUDA(cudaStreamSynchronize(nullptr)); }
  Result<std::unique_ptr<PagedCopier>> make(const PagedKvLayout& paged, const SlotLayout& slot, std::byte* arena,
                                            std::uint64_t arena_bytes, const CopierOptions& options) override {
    return make_cuda_copier(paged, slot, arena, arena_bytes, options, kDevice);
  }

 private:
  const bool registered_;
  std::vector<void*> memory_;
};

void check_bytes(GpuBackend& backend) {
  std::map<std::string, int> ran;
  for (const Case& c : copier_suite::all_cases()) {
    check(copier_suite::run_case(backend, c, 11), c.name() + ", " + backend.host_memory() + " arena");
    backend.release_all();
    ++ran[copier_suite::order_name(c.order)];
  }
  std::printf("bytes (%s arena): ", backend.host_memory());
  for (const auto& [order, cases] : ran) std::printf("%s %d  ", order.c_str(), cases);
  std::printf("cases, every byte as expected\n");
}

CopyDone run(PagedCopier& copier, const CopyJob& job) {
  check(copier.submit(job), "submit");
  const std::uint64_t ids[] = {job.id};
  check(copier.wait(ids, std::chrono::minutes(1)), "wait");
  std::vector<CopyDone> done = copier.poll();
  check(done.size() == 1 ? "" : "poll() returned " + std::to_string(done.size()) + " results", "job");
  check(done[0].ok ? "" : done[0].message, "job");
  return done[0];
}

// The engine's stream stands at a host function; the page is written only after it. A copier that does not wait stores old bytes.
void check_order(GpuBackend& backend) {
  constexpr std::size_t kPage = 1 << 20;
  std::byte* const page = backend.allocate(kPage);
  const PagedKvLayout paged = PagedKvLayout::opaque({page}, 1, kPage, kPage);
  const SlotLayout slot = SlotLayout::make(paged, 1).value();
  const std::uint64_t bytes = image_bytes(static_cast<std::uint64_t>(slot.rank_bytes));
  std::byte* const arena = backend.allocate_arena(bytes);
  auto made = backend.make(paged, slot, arena, bytes, {});
  check(made.ok() ? Status() : made.status(), "make");
  cudaStream_t engine = nullptr;
  CHECK_CUDA(cudaStreamCreateWithFlags(&engine, cudaStreamNonBlocking));
  for (int round = 0; round < 20; ++round) {
    for (const cudaStream_t stream : {engine, cudaStream_t{nullptr}}) {
      const auto generation = static_cast<std::uint32_t>(round + 1);
      begin_slot(arena, {}, {}, static_cast<std::uint64_t>(slot.rank_bytes), 1, generation);
      CHECK_CUDA(cudaMemset(page, 1, kPage));
      CHECK_CUDA(cudaStreamSynchronize(nullptr));
      std::latch gate(1);
      CHECK_CUDA(cudaLaunchHostFunc(stream, [](void* g) { static_cast<std::latch*>(g)->wait(); }, &gate));
      CHECK_CUDA(cudaMemsetAsync(page, 2, kPage, stream));
      const CopyJob gather{.id = 1,
                           .direction = CopyDirection::kGather,
                           .items = {{.slot_offset = 0, .generation = generation, .tokens = 1}},
                           .block_ids = {0},
                           .stream = reinterpret_cast<std::uint64_t>(stream)};
      check((*made)->submit(gather), "submit");
      const std::uint64_t ids[] = {1};
      // Time in which a copier that does not wait would copy; one that waits cannot end.
      const bool early = (*made)->wait(ids, std::chrono::milliseconds(20)).ok();
      gate.count_down();
      check(early ? "a gather ended before the engine's stream reached it" : "", "order");
      check((*made)->wait(ids, std::chrono::minutes(1)), "wait");
      check((*made)->poll().at(0).ok ? "" : "gather failed", "order");
      const std::byte* const payload = arena + kPageBytes;
      const bool right = std::all_of(payload, payload + kPage, [](std::byte b) { return b == std::byte{2}; });
      check(right ? "" : "the gather holds bytes older than the model's writes", "order");
    }
  }
  CHECK_CUDA(cudaStreamDestroy(engine));
  made->reset();
  backend.release_arena(arena);
  backend.release_all();
  std::printf("order (%s arena): 40 gathers waited for the engine's stream\n", backend.host_memory());
}

struct Shape {
  const char* name;
  bool layers_in_block;  // all layers of a block in one place: long runs
  bool opaque;
};

// Chunks of 256 tokens of a model with 32 layers, 8 KV heads of 128, 2 bytes, in blocks of 16: 32 MiB each.
void measure(GpuBackend& backend, const Shape& shape, bool small) {
  const std::int64_t layers = small ? 2 : 32, block_tokens = 16, heads = 8, head_dim = small ? 16 : 128, element_bytes = 2;
  const std::int64_t plane_bytes = block_tokens * heads * head_dim * element_bytes, page_bytes = 2 * plane_bytes;
  const std::int64_t chunks = small ? 2 : 8, blocks_per_chunk = 16, num_blocks = 2 * chunks * blocks_per_chunk;
  const std::int64_t stride = shape.layers_in_block ? layers * page_bytes : page_bytes;
  std::byte* const memory = backend.allocate(static_cast<std::size_t>(num_blocks * layers * page_bytes));
  std::vector<std::byte*> bases;
  for (std::int64_t l = 0; l < layers; ++l)
    bases.push_back(memory + l * (shape.layers_in_block ? page_bytes : num_blocks * page_bytes));
  PagedKvLayout paged = PagedKvLayout::opaque(bases, num_blocks, page_bytes, stride);
  if (!shape.opaque) {
    const std::int64_t row = head_dim * element_bytes, token = heads * row;
    paged = {{}, num_blocks, block_tokens, heads, head_dim, element_bytes};
    for (std::byte* base : bases)
      paged.layers.push_back({base, {{0, stride, token, row, element_bytes}, {plane_bytes, stride, token, row, element_bytes}}});
  }
  const std::int64_t chunk_tokens = shape.opaque ? blocks_per_chunk : blocks_per_chunk * block_tokens;
  const SlotLayout slot = SlotLayout::make(paged, chunk_tokens).value();
  const auto rank_bytes = static_cast<std::uint64_t>(slot.rank_bytes);
  const std::uint64_t image = image_bytes(rank_bytes), arena_bytes = image * static_cast<std::uint64_t>(chunks);
  std::byte* const arena = backend.allocate_arena(arena_bytes);
  auto made = backend.make(paged, slot, arena, arena_bytes, {});
  check(made.ok() ? Status() : made.status(), "make");

  CopyJob job{.id = 1};
  for (std::int64_t c = 0; c < chunks; ++c) {
    job.items.push_back({.slot_offset = image * static_cast<std::uint64_t>(c),
                         .generation = 1,
                         .tokens = static_cast<std::uint32_t>(chunk_tokens),
                         .block_begin = static_cast<std::uint32_t>(c * blocks_per_chunk)});
    begin_slot(arena + job.items.back().slot_offset, {}, {}, rank_bytes, 1, 1);
    // Every other block, so that no two are neighbours.
    for (std::int64_t b = 0; b < blocks_per_chunk; ++b) job.block_ids.push_back(2 * (c * blocks_per_chunk + b));
    std::byte* const payload = arena + job.items.back().slot_offset + kPageBytes;
    for (std::uint64_t i = 0; i < rank_bytes; ++i)
      payload[i] = static_cast<std::byte>((i * 2654435761u) >> 24 ^ static_cast<unsigned>(c));
  }
  const std::vector<std::byte> before(arena, arena + arena_bytes);
  std::vector<double> rates[2];
  for (int round = 0; round < 5; ++round) {
    for (const CopyDirection direction : {CopyDirection::kScatter, CopyDirection::kGather}) {
      job.direction = direction;
      if (direction == CopyDirection::kGather) {
        for (const CopyItem& item : job.items) std::memset(arena + item.slot_offset + kPageBytes, 0, rank_bytes);
      }
      const CopyDone done = run(**made, job);
      rates[direction == CopyDirection::kGather].push_back(static_cast<double>(done.bytes) / std::max(done.seconds, 1e-9) / 1e9);
    }
    for (const CopyItem& item : job.items) {
      const std::uint64_t at = item.slot_offset + kPageBytes;
      check(std::memcmp(arena + at, before.data() + at, rank_bytes) == 0 ? "" : "a round trip changed bytes", shape.name);
    }
  }
  made->reset();
  backend.release_arena(arena);
  backend.release_all();
  for (auto& r : rates) std::ranges::sort(r);
  std::printf("GB/s (%s arena) %-34s gather %6.2f  scatter %6.2f   (median of 5, %.0f MB a job, by device events)\n",
              backend.host_memory(), shape.name, rates[1][2], rates[0][2],
              static_cast<double>(chunks) * static_cast<double>(rank_bytes) / 1e6);
}

}  // namespace

int main(int argc, char** argv) {
  const bool small = argc > 1 && std::strcmp(argv[1], "--small") == 0;
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
  for (const bool registered : {false, true}) {
    GpuBackend backend(registered);
    check_bytes(backend);
    check_order(backend);
    for (const Shape& shape :
         {Shape{"[layer][block][plane][token][head]", false, false}, Shape{"[block][layer][plane][token][head]", true, false},
          Shape{"opaque [layer][block][page]", false, true}, Shape{"opaque [block][layer][page]", true, true}}) {
      measure(backend, shape, small);
    }
  }
#ifdef LMCN_FAKE_CUDART
  std::printf("gpu_check: passed on the fake runtime; says nothing about a GPU\n");
#else
  std::printf("gpu_check: proven\n");
#endif
  return 0;
}
