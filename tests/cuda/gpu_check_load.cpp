// The parts of gpu_check in which time matters: who waits for whom, and slots that change hands.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <latch>
#include <random>
#include <thread>

#include "gpu_check.hpp"
#include "memory/slot_image.hpp"

namespace lmcn::gpu_check {
namespace {

/// An engine's pages, opaque ones, and an arena of slots of one rank, with a copier between them.
struct World {
  World(GpuBackend& memory, std::size_t layer_count, std::int64_t block_count, std::size_t page, std::int64_t chunk_blocks,
        std::size_t slot_count)
      : backend(memory), layers(layer_count), page_bytes(page) {
    for (std::size_t l = 0; l < layers; ++l) bases.push_back(backend.allocate(page * static_cast<std::size_t>(block_count)));
    const auto stride = static_cast<std::int64_t>(page);
    const PagedKvLayout paged = PagedKvLayout::opaque(bases, block_count, stride, stride);
    slot = SlotLayout::make(paged, chunk_blocks).value();
    rank_bytes = static_cast<std::uint64_t>(slot.rank_bytes);
    arena_bytes = image_bytes(rank_bytes) * slot_count;
    arena = backend.allocate_arena(arena_bytes);
    auto made = backend.make(paged, slot, arena, arena_bytes, {});
    check(made.ok() ? Status() : made.status(), "make");
    copier = std::move(made).value();
  }
  ~World() {
    copier.reset();
    backend.release_arena(arena);
    backend.release_all();
  }
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  std::uint64_t offset(std::size_t slot_index) const { return image_bytes(rank_bytes) * slot_index; }
  std::byte* image(std::size_t slot_index) const { return arena + offset(slot_index); }
  std::byte* page(std::size_t layer, std::int64_t block) const {
    return bases[layer] + static_cast<std::size_t>(block) * page_bytes;
  }
  /// The copy of block `index` of the chunk in slot `slot_index`.
  std::byte* stored(std::size_t slot_index, std::size_t layer, std::size_t index) const {
    return image(slot_index) + kPageBytes + static_cast<std::size_t>(slot.layer_offset[layer]) + index * page_bytes;
  }
  void begin(std::size_t slot_index, std::uint32_t generation) const {
    begin_slot(image(slot_index), {}, {}, rank_bytes, 1, generation);
  }
  CopyJob job(std::uint64_t id, CopyDirection direction, std::size_t slot_index, std::uint32_t generation,
              std::vector<std::int64_t> blocks, cudaStream_t stream) const {
    CopyJob made{.id = id, .direction = direction, .stream = reinterpret_cast<std::uint64_t>(stream)};
    made.items.push_back(
        {.slot_offset = offset(slot_index), .generation = generation, .tokens = static_cast<std::uint32_t>(blocks.size())});
    made.block_ids = std::move(blocks);
    return made;
  }
  void wait(std::uint64_t id) const {
    const std::uint64_t ids[] = {id};
    check(copier->wait(ids, std::chrono::minutes(2)), "wait");
  }
  bool ended_within(std::uint64_t id, std::chrono::milliseconds time) const {
    const std::uint64_t ids[] = {id};
    return copier->wait(ids, time).ok();
  }

  GpuBackend& backend;
  const std::size_t layers, page_bytes;
  std::vector<std::byte*> bases;
  SlotLayout slot;
  std::uint64_t rank_bytes = 0, arena_bytes = 0;
  std::byte* arena = nullptr;
  std::unique_ptr<PagedCopier> copier;
};

/// Host memory that copies of an engine's stream may use without holding their caller.
class Pinned {
 public:
  explicit Pinned(std::size_t bytes) : bytes_((bytes + kPageBytes - 1) / kPageBytes * kPageBytes) {
    memory_ = static_cast<std::byte*>(std::aligned_alloc(kPageBytes, bytes_));
    CHECK_CUDA(cudaHostRegister(memory_, bytes_, cudaHostRegisterDefault));
  }
  ~Pinned() {
    CHECK_CUDA(cudaHostUnregister(memory_));
    std::free(memory_);
  }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;
  std::byte* data() { return memory_; }

 private:
  const std::size_t bytes_;
  std::byte* memory_ = nullptr;
};

bool all_are(const std::byte* memory, std::size_t bytes, std::byte value) {
  return std::all_of(memory, memory + bytes, [value](std::byte b) { return b == value; });
}

/// Holds back what is put on `stream` until opened.
void put_gate(std::latch& gate, cudaStream_t stream) {
  CHECK_CUDA(cudaLaunchHostFunc(stream, [](void* g) { static_cast<std::latch*>(g)->wait(); }, &gate));
}

// Time in which a copier that does not wait would copy; one that waits cannot end.
constexpr std::chrono::milliseconds kEarly{20};

void end_well(World& world, std::uint64_t id, const char* what) {
  world.wait(id);
  const std::vector<CopyDone> done = world.copier->poll();
  check(done.size() == 1 && done[0].id == id ? "" : "poll() did not return the job", what);
  check(done[0].ok ? "" : done[0].message, what);
}

// The engine writes its page behind a gate: a gather that does not wait stores the bytes from before.
void gather_waits(World& world, cudaStream_t stream, std::uint32_t generation) {
  world.begin(0, generation);
  for (std::size_t l = 0; l < world.layers; ++l) CHECK_CUDA(cudaMemset(world.page(l, 0), 1, world.page_bytes));
  CHECK_CUDA(cudaStreamSynchronize(nullptr));
  std::latch gate(1);
  put_gate(gate, stream);
  for (std::size_t l = 0; l < world.layers; ++l) CHECK_CUDA(cudaMemsetAsync(world.page(l, 0), 2, world.page_bytes, stream));
  check(world.copier->submit(world.job(1, CopyDirection::kGather, 0, generation, {0}, stream)), "submit");
  const bool early = world.ended_within(1, kEarly);
  gate.count_down();
  check(early ? "a gather ended before the engine's stream reached it" : "", "order");
  end_well(world, 1, "gather behind the engine's writes");
  for (std::size_t l = 0; l < world.layers; ++l) {
    check(all_are(world.stored(0, l, 0), world.page_bytes, std::byte{2}) ? "" : "a gather holds bytes older than the engine's",
          "order");
  }
}

// The engine reads its page behind a gate: a scatter that does not wait overwrites what it reads.
void scatter_waits(World& world, cudaStream_t stream, std::uint32_t generation, Pinned& read) {
  world.begin(1, generation);
  for (std::size_t l = 0; l < world.layers; ++l) {
    std::memset(world.stored(1, l, 0), 3, world.page_bytes);
    CHECK_CUDA(cudaMemset(world.page(l, 1), 1, world.page_bytes));
  }
  CHECK_CUDA(cudaStreamSynchronize(nullptr));
  std::latch gate(1);
  put_gate(gate, stream);
  CHECK_CUDA(cudaMemcpyAsync(read.data(), world.page(0, 1), world.page_bytes, cudaMemcpyDeviceToHost, stream));
  check(world.copier->submit(world.job(2, CopyDirection::kScatter, 1, generation, {1}, stream)), "submit");
  const bool early = world.ended_within(2, kEarly);
  gate.count_down();
  check(early ? "a scatter ended before the engine's stream reached it" : "", "order");
  end_well(world, 2, "scatter behind the engine's reads");
  CHECK_CUDA(cudaStreamSynchronize(stream));
  check(all_are(read.data(), world.page_bytes, std::byte{1}) ? "" : "a scatter overwrote what the engine still read", "order");
}

// The engine's stream reads each layer after wait_layers(), the host waits for nothing before the end.
void layers_wait(World& world, cudaStream_t stream, std::uint32_t generation, Pinned& read) {
  const auto value = static_cast<std::byte>(generation % 200 + 4);
  world.begin(1, generation);
  for (std::size_t l = 0; l < world.layers; ++l)
    std::memset(world.stored(1, l, 0), std::to_integer<int>(value) + static_cast<int>(l), world.page_bytes);
  CopyJob job = world.job(3, CopyDirection::kScatter, 1, generation, {1}, stream);
  job.layer_by_layer = true;
  check(world.copier->submit(std::move(job)), "submit");
  for (std::size_t l = 0; l < world.layers; ++l) {
    check(world.copier->wait_layers(3, static_cast<std::uint32_t>(l + 1), std::chrono::minutes(2),
                                    reinterpret_cast<std::uint64_t>(stream)),
          "wait_layers");
    CHECK_CUDA(
        cudaMemcpyAsync(read.data() + l * world.page_bytes, world.page(l, 1), world.page_bytes, cudaMemcpyDeviceToHost, stream));
  }
  CHECK_CUDA(cudaStreamSynchronize(stream));
  for (std::size_t l = 0; l < world.layers; ++l) {
    const auto expected = static_cast<std::byte>(std::to_integer<int>(value) + static_cast<int>(l));
    check(all_are(read.data() + l * world.page_bytes, world.page_bytes, expected)
              ? ""
              : "layer " + std::to_string(l) + " was read before it was in place",
          "order");
  }
  end_well(world, 3, "scatter layer by layer");
}

// ---- slots that change hands -------------------------------------------------------------------------------------------

constexpr std::size_t kThreads = 4, kSlotsOfThread = 3, kChunkBlocks = 4, kBlocksOfThread = 16;

struct Counts {
  std::atomic<std::uint64_t> jobs{0}, stored{0}, cancelled{0}, refused{0}, loaded{0};
};

/// One thread's part: its own stream, blocks and slots; the copier is everybody's.
class Client {
 public:
  Client(World& world, std::size_t index, Counts& counts)
      : world_(world),
        first_slot_(index * kSlotsOfThread),
        first_block_(static_cast<std::int64_t>(index * kBlocksOfThread)),
        next_id_(1 + (std::uint64_t{index} << 32)),
        counts_(counts),
        random_(77 + index),
        read_(world.layers * kChunkBlocks * world.page_bytes) {}

  void run(int rounds) {
    CHECK_CUDA(cudaSetDevice(kDevice));
    CHECK_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    for (int round = 0; round < rounds; ++round) turn(first_slot_ + random_() % kSlotsOfThread);
    CHECK_CUDA(cudaStreamSynchronize(stream_));
    CHECK_CUDA(cudaStreamDestroy(stream_));
  }

 private:
  /// The slot is given a new generation, filled, loaded elsewhere, and a job of its life before comes late.
  void turn(std::size_t slot) {
    const std::uint32_t generation = ++generation_;
    world_.begin(slot, generation);
    const std::vector<std::int64_t> from = some_blocks();
    const auto value = static_cast<int>(random_() % 200);
    for (std::size_t l = 0; l < world_.layers; ++l) {
      for (std::size_t i = 0; i < from.size(); ++i)
        CHECK_CUDA(cudaMemsetAsync(world_.page(l, from[i]), byte_of(value, l, i), world_.page_bytes, stream_));
    }
    const std::uint64_t store = submit(CopyDirection::kGather, slot, generation, from);
    if (random_() % 8 == 0) {
      const std::uint64_t ids[] = {store};
      world_.copier->cancel(ids);
    }
    world_.wait(store);
    const RankState state = rank_state(world_.image(slot), 0, generation);
    check(state == RankState::kEmpty ? "a gather ended without its rank's word" : "", "reuse");
    if (state != RankState::kOk) {
      ++counts_.cancelled;
      return;
    }
    ++counts_.stored;
    for (std::size_t l = 0; l < world_.layers; ++l) {
      for (std::size_t i = 0; i < from.size(); ++i)
        expect(world_.stored(slot, l, i), byte_of(value, l, i), "a slot holds bytes of another store");
    }
    come_late(slot, generation, from);
    load(slot, generation, value);
  }

  void come_late(std::size_t slot, std::uint32_t generation, const std::vector<std::int64_t>& blocks) {
    if (random_() % 4 != 0) return;
    std::memcpy(read_.data(), world_.image(slot) + kPageBytes, world_.page_bytes);
    const std::vector<std::int64_t> other(blocks.rbegin(), blocks.rend());
    const std::uint64_t late = submit(CopyDirection::kGather, slot, generation - 1, other);
    world_.wait(late);
    check(std::memcmp(read_.data(), world_.image(slot) + kPageBytes, world_.page_bytes) == 0
              ? ""
              : "a job of the slot's life before wrote into it",
          "reuse");
    check(rank_state(world_.image(slot), 0, generation) == RankState::kOk ? "" : "a late job changed the rank's word", "reuse");
    ++counts_.refused;
  }

  void load(std::size_t slot, std::uint32_t generation, int value) {
    const std::vector<std::int64_t> to = some_blocks();
    for (std::size_t l = 0; l < world_.layers; ++l) {
      for (const std::int64_t block : to) CHECK_CUDA(cudaMemsetAsync(world_.page(l, block), 0xEE, world_.page_bytes, stream_));
    }
    const std::uint32_t before = loads_done(world_.image(slot), 0);
    world_.wait(submit(CopyDirection::kScatter, slot, generation, to));
    check(loads_done(world_.image(slot), 0) == before + 1 ? "" : "a load was not counted", "reuse");
    for (std::size_t l = 0; l < world_.layers; ++l) {
      for (std::size_t i = 0; i < to.size(); ++i)
        CHECK_CUDA(cudaMemcpyAsync(at(l, i), world_.page(l, to[i]), world_.page_bytes, cudaMemcpyDeviceToHost, stream_));
    }
    CHECK_CUDA(cudaStreamSynchronize(stream_));
    for (std::size_t l = 0; l < world_.layers; ++l) {
      for (std::size_t i = 0; i < to.size(); ++i) expect(at(l, i), byte_of(value, l, i), "a load brought other bytes");
    }
    ++counts_.loaded;
  }

  std::uint64_t submit(CopyDirection direction, std::size_t slot, std::uint32_t generation, std::vector<std::int64_t> blocks) {
    const std::uint64_t id = next_id_++;
    check(world_.copier->submit(world_.job(id, direction, slot, generation, std::move(blocks), stream_)), "submit");
    ++counts_.jobs;
    return id;
  }
  std::vector<std::int64_t> some_blocks() {
    std::vector<std::int64_t> blocks(kBlocksOfThread);
    for (std::size_t i = 0; i < blocks.size(); ++i) blocks[i] = first_block_ + static_cast<std::int64_t>(i);
    std::ranges::shuffle(blocks, random_);
    blocks.resize(kChunkBlocks);
    return blocks;
  }
  std::byte* at(std::size_t layer, std::size_t index) { return read_.data() + (layer * kChunkBlocks + index) * world_.page_bytes; }
  static int byte_of(int value, std::size_t layer, std::size_t index) {
    return (value + 13 * static_cast<int>(layer) + 5 * static_cast<int>(index)) & 0xFF;
  }
  void expect(const std::byte* memory, int value, const char* otherwise) {
    check(all_are(memory, world_.page_bytes, static_cast<std::byte>(value)) ? "" : otherwise, "reuse");
  }

  World& world_;
  const std::size_t first_slot_;
  const std::int64_t first_block_;
  std::uint64_t next_id_;
  Counts& counts_;
  std::mt19937_64 random_;
  Pinned read_;
  cudaStream_t stream_ = nullptr;
  std::uint32_t generation_ = 1;
};

}  // namespace

void check_order(GpuBackend& backend, int rounds) {
  World world(backend, 3, 2, 1 << 20, 1, 2);
  Pinned read(world.layers * world.page_bytes);
  cudaStream_t engine = nullptr;
  CHECK_CUDA(cudaStreamCreateWithFlags(&engine, cudaStreamNonBlocking));
  for (int round = 0; round < rounds; ++round) {
    for (const cudaStream_t stream : {engine, cudaStream_t{nullptr}}) {
      const auto generation = static_cast<std::uint32_t>(3 * round + 1);
      gather_waits(world, stream, generation);
      scatter_waits(world, stream, generation + 1, read);
      layers_wait(world, stream, generation + 2, read);
    }
  }
  CHECK_CUDA(cudaStreamDestroy(engine));
  std::printf("  order: %d times each: a gather waited for the engine's writes, a scatter for its reads, the engine for layers\n",
              2 * rounds);
}

void check_reuse(GpuBackend& backend, int rounds) {
  World world(backend, 2, kThreads * kBlocksOfThread, 96 * 1024, kChunkBlocks, kThreads * kSlotsOfThread);
  Counts counts;
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < kThreads; ++i)
    threads.emplace_back([&world, &counts, i, rounds] { Client(world, i, counts).run(rounds); });
  for (std::thread& thread : threads) thread.join();
  std::uint64_t good = 0, bad = 0;
  for (const CopyDone& done : world.copier->poll()) ++(done.ok ? good : bad);
  check(good + bad == counts.jobs ? "" : "not every job has one result", "reuse");
  check(good == counts.stored + counts.loaded ? "" : "results and rank words differ", "reuse");
  check(counts.refused > 0 && counts.stored > 0 ? "" : "nothing happened", "reuse");
  std::printf("  reuse: %zu threads: %llu stores and %llu loads right, %llu cancelled, %llu late ones refused\n", kThreads,
              static_cast<unsigned long long>(counts.stored), static_cast<unsigned long long>(counts.loaded),
              static_cast<unsigned long long>(counts.cancelled), static_cast<unsigned long long>(counts.refused));
}

}  // namespace lmcn::gpu_check
