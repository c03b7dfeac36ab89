// The CUDA copier as a C library for gpu_check_torch.py and torch_baseline.py, which a machine without our build requirements (and
// so without the Python package) can run. Test code: no stability, one job at a time.
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>

#include "copy_path.hpp"
#include "lmcn/paged_copy.hpp"
#include "lmcn/version.hpp"
#include "memory/slot_image.hpp"
#ifdef LMCN_FAKE_CUDART
#include "fake_cudart.hpp"
#endif

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

using namespace lmcn;

struct Copier {
  SlotLayout slot;
  std::unique_ptr<PagedCopier> copier;
};

void say(const std::string& text, char* out, std::size_t bytes) {
  const std::size_t length = std::min(text.size(), bytes - 1);
  std::memcpy(out, text.data(), length);
  out[length] = '\0';
}

}  // namespace

/// Devices, or -1 with the reason.
EXPORTED int lmcn_c_devices(char* message, std::size_t message_bytes) {
  const CudaStatus status = cuda_status();
  say(status.message, message, message_bytes);
  return status.error == 0 ? status.devices : -1;
}

/// The values of LMCN_COPY_PATH that force a path, with commas between them.
EXPORTED void lmcn_c_paths(char* names, std::size_t bytes) {
  std::string all;
  for (const PathKind kind : kAllPaths) {
    if (!all.empty()) all += ',';
    all += path_name(kind);
  }
  say(all, names, bytes);
}

/// `numbers`: layers, planes, num_blocks, block_tokens, heads, head_dim, element_bytes, chunk_tokens; then per layer its base and
/// per plane offset, block, token, head, dim. nullptr: `message` says why.
EXPORTED void* lmcn_c_make(const std::int64_t* numbers, std::byte* arena, std::uint64_t arena_bytes, int device, char* message,
                           std::size_t message_bytes) {
  const std::int64_t layers = numbers[0], planes = numbers[1];
  PagedKvLayout paged{{}, numbers[2], numbers[3], numbers[4], numbers[5], numbers[6]};
  const std::int64_t* next = numbers + 8;
  for (std::int64_t l = 0; l < layers; ++l) {
    PagedLayer layer{reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(*next++)), {}};
    for (std::int64_t p = 0; p < planes; ++p, next += 5) layer.planes.push_back({next[0], next[1], next[2], next[3], next[4]});
    paged.layers.push_back(std::move(layer));
  }
  Result<SlotLayout> slot = SlotLayout::make(paged, numbers[7]);
  if (!slot.ok()) return say(slot.status().to_string(), message, message_bytes), nullptr;
  auto made = make_cuda_copier(paged, *slot, arena, arena_bytes, {}, device);
  if (!made.ok()) return say(made.status().to_string(), message, message_bytes), nullptr;
  return new Copier{*slot, std::move(made).value()};
}

EXPORTED void lmcn_c_free(void* copier) {
  delete static_cast<Copier*>(copier);
}
EXPORTED void lmcn_c_name(void* copier, char* name, std::size_t bytes) {
  say(static_cast<Copier*>(copier)->copier->name(), name, bytes);
}
EXPORTED std::int64_t lmcn_c_rank_bytes(void* copier) {
  return static_cast<Copier*>(copier)->slot.rank_bytes;
}
EXPORTED std::int64_t lmcn_c_layer_offset(void* copier, std::int64_t layer) {
  return static_cast<Copier*>(copier)->slot.layer_offset.at(static_cast<std::size_t>(layer));
}
EXPORTED std::uint64_t lmcn_c_image_bytes(std::uint64_t payload_bytes) {
  return image_bytes(payload_bytes);
}
EXPORTED void lmcn_c_begin_slot(std::byte* image, std::uint64_t payload_bytes, std::uint32_t generation) {
  begin_slot(image, {}, {}, payload_bytes, 1, generation);
}

/// One item of `tokens` tokens from the first of the slot at `slot_offset`, beginning `token_in_block` tokens into the first block.
/// 0, or 1 with the reason.
EXPORTED int lmcn_c_copy(void* copier, int scatter, std::uint64_t slot_offset, std::uint32_t generation, std::uint32_t tokens,
                         std::uint32_t token_in_block, const std::int64_t* block_ids, std::uint64_t blocks, std::uint64_t stream,
                         char* message, std::size_t message_bytes) {
  PagedCopier& paged = *static_cast<Copier*>(copier)->copier;
  CopyJob job{.id = 1, .direction = scatter != 0 ? CopyDirection::kScatter : CopyDirection::kGather, .stream = stream};
  job.items.push_back({.slot_offset = slot_offset, .generation = generation, .tokens = tokens, .token_in_block = token_in_block});
  job.block_ids.assign(block_ids, block_ids + blocks);
  const std::uint64_t ids[] = {1};
  Status status = paged.submit(std::move(job));
  if (status.ok()) status = paged.wait(ids, std::chrono::minutes(1));
  if (!status.ok()) return say(status.to_string(), message, message_bytes), 1;
  const std::vector<CopyDone> done = paged.poll();
  if (done.size() == 1 && done[0].ok) return 0;
  return say(done.empty() ? "no result" : done[0].message, message, message_bytes), 1;
}

#ifdef LMCN_FAKE_CUDART
/// Memory of the fake device 0.
EXPORTED std::byte* lmcn_c_fake_allocate(std::uint64_t bytes) {
  return fake_cuda::allocate(bytes, 0);
}
EXPORTED void lmcn_c_fake_release(std::byte* memory) {
  fake_cuda::release(memory);
}
#endif
