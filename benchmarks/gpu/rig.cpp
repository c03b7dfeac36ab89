#include "rig.hpp"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>

namespace lmcn::gpu_bench {
namespace {

constexpr std::int64_t kChunkBlocks = 16;

std::byte value_of(std::int64_t layer, std::int64_t index) {
  return static_cast<std::byte>((layer * 31 + index * 7 + index / 251) & 0xFF);
}

}  // namespace

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "gpu_bench: FAILED: %s: %s (%d)\n", what, cudaGetErrorString(error), static_cast<int>(error));
  std::exit(1);
}
void check(const Status& status, const std::string& what) {
  if (status.ok()) return;
  std::fprintf(stderr, "gpu_bench: FAILED: %s: %s\n", what.c_str(), status.to_string().c_str());
  std::exit(1);
}

Lines::Field Lines::text(const std::string& name, const std::string& value) {
  std::string quoted = "\"";
  for (const char letter : value) {
    if (letter == '"' || letter == '\\') quoted += '\\';
    quoted += static_cast<unsigned char>(letter) < ' ' ? ' ' : letter;
  }
  return {name, quoted + "\""};
}
Lines::Field Lines::number(const std::string& name, double value) {
  char shown[32];
  std::snprintf(shown, sizeof(shown), "%.6g", value);
  return {name, shown};
}
Lines::Field Lines::number(const std::string& name, std::int64_t value) {
  return {name, std::to_string(value)};
}
Lines::Field Lines::numbers(const std::string& name, const std::vector<double>& values) {
  std::string list = "[";
  for (const double value : values) list += (list.size() > 1 ? ", " : "") + number("", value).second;
  return {name, list + "]"};
}
void Lines::write(const std::string& kind, const std::vector<Field>& fields) {
  std::string line = "{\"kind\": \"" + kind + "\"";
  for (const auto& [name, value] : fields) line += ", \"" + name + "\": " + value;
  std::fprintf(file_, "%s}\n", line.c_str());
  std::fflush(file_);
}

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values.at(values.size() / 2);
}

double Stream::seconds(const std::function<void()>& enqueue) const {
  cudaEvent_t begin = nullptr, end = nullptr;
  CHECK_CUDA(cudaEventCreateWithFlags(&begin, cudaEventDefault));
  CHECK_CUDA(cudaEventCreateWithFlags(&end, cudaEventDefault));
  CHECK_CUDA(cudaEventRecord(begin, stream_));
  enqueue();
  CHECK_CUDA(cudaEventRecord(end, stream_));
  CHECK_CUDA(cudaStreamSynchronize(stream_));
  float milliseconds = 0;
  CHECK_CUDA(cudaEventElapsedTime(&milliseconds, begin, end));
  CHECK_CUDA(cudaEventDestroy(begin));
  CHECK_CUDA(cudaEventDestroy(end));
  return std::max(static_cast<double>(milliseconds), 1e-6) / 1e3;
}

Rig::Rig(std::int64_t bytes_of_run, std::int64_t count)
    : run_bytes(bytes_of_run), runs(count), layers(count >= 16 * kChunkBlocks ? 16 : 1), blocks(count / layers) {
  const std::int64_t every_other = 2 * blocks;
  memory_ = std::make_unique<DeviceMemory>(static_cast<std::size_t>(layers * every_other * run_bytes));
  std::vector<std::byte*> bases;
  for (std::int64_t l = 0; l < layers; ++l) bases.push_back(memory_->get() + l * every_other * run_bytes);
  paged = PagedKvLayout::opaque(bases, every_other, run_bytes, run_bytes);
  slot = SlotLayout::make(paged, kChunkBlocks).value();
  rank_bytes = static_cast<std::uint64_t>(slot.rank_bytes);
  const std::uint64_t image = image_bytes(rank_bytes);
  const std::int64_t chunks = blocks / kChunkBlocks;
  arena_bytes = image * static_cast<std::uint64_t>(chunks);
  arena = static_cast<std::byte*>(std::aligned_alloc(kPageBytes, arena_bytes));
  std::memset(arena, 0, arena_bytes);
  registration = HostRegistration::of(arena, arena_bytes, kDevice, {.slot_bytes = image});
  check(registration->wait_ended(std::chrono::minutes(2)), "registering the arena");
  check(registration->progress().failure, "registering the arena");
  for (std::int64_t c = 0; c < chunks; ++c) {
    items.push_back({.slot_offset = image * static_cast<std::uint64_t>(c),
                     .generation = 1,
                     .tokens = static_cast<std::uint32_t>(kChunkBlocks),
                     .block_begin = static_cast<std::uint32_t>(c * kChunkBlocks)});
    begin_slot(arena + items.back().slot_offset, {}, {}, rank_bytes, 1, 1);
  }
  // Every other block, in no order: 7919 is prime to the powers of two that `blocks` are.
  for (std::int64_t i = 0; i < blocks; ++i) block_ids.push_back(2 * ((i * 7919) % blocks));
  fill();
}

Rig::~Rig() {
  registration.reset();
  std::free(arena);
}

// The slots first, the pages from them by plain copies.
void Rig::fill() {
  for (std::int64_t l = 0; l < layers; ++l) {
    for (std::int64_t i = 0; i < blocks; ++i) {
      std::memset(stored(l, i), std::to_integer<int>(value_of(l, i)), static_cast<std::size_t>(run_bytes));
      CHECK_CUDA(cudaMemcpy(page(l, i), stored(l, i), static_cast<std::size_t>(run_bytes), cudaMemcpyHostToDevice));
    }
  }
}

std::byte* Rig::page(std::int64_t layer, std::int64_t index) const {
  return paged.layers[static_cast<std::size_t>(layer)].base + block_ids[static_cast<std::size_t>(index)] * run_bytes;
}
std::byte* Rig::stored(std::int64_t layer, std::int64_t index) const {
  return arena + items[static_cast<std::size_t>(index / kChunkBlocks)].slot_offset + kPageBytes +
         slot.layer_offset[static_cast<std::size_t>(layer)] + index % kChunkBlocks * run_bytes;
}

CopyJob Rig::job(std::uint64_t id, CopyDirection direction) const {
  CopyJob made{.id = id, .direction = direction};
  made.items = items;
  made.block_ids = block_ids;
  return made;
}

void Rig::clear_slots() {
  for (const CopyItem& item : items) std::memset(arena + item.slot_offset + kPageBytes, 0xA5, rank_bytes);
}

void Rig::check_slots(const std::string& what) const {
  for (std::int64_t l = 0; l < layers; ++l) {
    for (std::int64_t i = 0; i < blocks; ++i) {
      const std::byte* const bytes = stored(l, i);
      const bool right = bytes[0] == value_of(l, i) && std::memcmp(bytes, bytes + 1, static_cast<std::size_t>(run_bytes - 1)) == 0;
      check(right ? Status() : Status(Code::kCorruption, "a gather brought other bytes"), what);
    }
  }
}

std::vector<std::pair<std::int64_t, std::int64_t>> shapes(const Options& options) {
  if (options.small) return {{4096, 16}, {32 << 10, 256}};
  std::vector<std::pair<std::int64_t, std::int64_t>> all;
  for (const std::int64_t run_bytes : {4 << 10, 16 << 10, 32 << 10, 64 << 10, 2 << 20}) {
    for (const std::int64_t runs : {16, 256, 1024, 4096, 16384}) {
      if (run_bytes * runs <= std::int64_t{1} << 30) all.emplace_back(run_bytes, runs);
    }
  }
  return all;
}

}  // namespace lmcn::gpu_bench
