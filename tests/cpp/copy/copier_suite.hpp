// What every PagedCopier must do, whatever moves its bytes: shared by the host copier, the CUDA copier on a fake runtime and the
// CUDA copier on a real device (gpu_check). The oracle is nested loops over the definition of each layout and of the slot; it
// shares no arithmetic with the copiers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "lmcn/kv_layout.hpp"
#include "lmcn/paged_copy.hpp"

namespace lmcn::copier_suite {

/// Where paged memory lies and which copier serves it.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::byte* allocate(std::size_t bytes) = 0;  // lives until release_all()
  virtual void release_all() = 0;
  /// Memory of an arena, 4 KiB-aligned.
  virtual std::byte* allocate_arena(std::size_t bytes);
  virtual void release_arena(std::byte* arena);
  virtual void upload(std::byte* to, const std::byte* from, std::size_t bytes) = 0;
  virtual void download(std::byte* to, const std::byte* from, std::size_t bytes) = 0;
  /// Until all that the default stream was told to wait for is there.
  virtual void synchronize() {}
  virtual Result<std::unique_ptr<PagedCopier>> make(const PagedKvLayout& paged, const SlotLayout& slot, std::byte* arena,
                                                    std::uint64_t arena_bytes, const CopierOptions& options) = 0;
};
/// Defined by each test executable.
std::unique_ptr<Backend> make_backend();

/// Order of memory, outermost first.
enum class Order {
  kPlanesApart,     // K and V of a layer in allocations of their own: [block][token][head][dim]; SGLang, with its page size
  kPlanesOuter,     // [plane][block][token][head][dim]; FlashAttention NHD before vLLM packed K and V
  kBlocksOuter,     // [block][plane][token][head][dim]; FlashInfer NHD
  kHeadsOuter,      // [block][plane][head][token][dim]; FlashInfer HND
  kTransposedKeys,  // [block][head]{ K [dim][token], V [token][dim] }; vLLM's CPU kernels
  kLayersInBlock,   // [block][layer][plane][token][head][dim], all layers in one allocation
  kPadded,          // [block][plane][token][head][dim] with gaps after rows, tokens and blocks
  // vLLM's KVCacheLayout, all layers in one allocation: N is the token, C one head's K and then its V.
  kLBNHC,          // NHD
  kLBHNC,          // HND
  kLHBNC,          // a head's blocks side by side
  kBLHNC,          // block outermost, HND
  kBLNHC,          // block outermost, NHD
  kBHLNC,          // block outermost, then heads
  kOpaque,         // [block][page]
  kOpaqueInBlock,  // [block][layer][page]
};
constexpr Order kOrders[] = {Order::kPlanesApart,    Order::kPlanesOuter,   Order::kBlocksOuter,  Order::kHeadsOuter,
                             Order::kTransposedKeys, Order::kLayersInBlock, Order::kPadded,       Order::kLBNHC,
                             Order::kLBHNC,          Order::kLHBNC,         Order::kBLHNC,        Order::kBLNHC,
                             Order::kBHLNC,          Order::kOpaque,        Order::kOpaqueInBlock};
const char* order_name(Order order);

struct Case {
  Order order = Order::kBlocksOuter;
  std::int64_t layers = 2, planes = 2, block_tokens = 16, heads = 2, head_dim = 8, element_bytes = 2;
  std::int64_t chunk_tokens = 0;
  std::int64_t misalignment = 0;  // bytes before the first element of each allocation
  CopierOptions options = {};
  std::string name() const;
};
std::vector<Case> all_cases();

/// An engine's paged KV cache on a backend plus the map of every element in it, filled by walking memory in its order.
class PagedModel {
 public:
  PagedModel(Backend& backend, const Case& c, std::int64_t num_blocks);

  const PagedKvLayout& layout() const { return layout_; }
  /// Fills all memory, gaps too.
  void fill_random(std::mt19937_64& random);
  void fill(std::byte value);
  /// One byte of element (layer, plane, block, token, head, dim) in the mirror.
  std::byte& at(std::int64_t layer, std::int64_t plane, std::int64_t block, std::int64_t token, std::int64_t head, std::int64_t dim,
                std::int64_t byte);
  void upload();
  /// Overwrites the backend's memory, not the mirror.
  void scribble(std::byte value);
  /// "" or the first byte in which the backend's memory differs from the mirror.
  std::string compare();

 private:
  struct Place {
    std::size_t allocation = 0, offset = 0;
  };
  Place& place(std::int64_t layer, std::int64_t plane, std::int64_t block, std::int64_t token, std::int64_t head, std::int64_t dim);
  void walk();
  void describe();

  Backend& backend_;
  Case case_;
  std::int64_t num_blocks_;
  std::vector<Place> places_;
  std::vector<std::vector<std::byte>> mirror_;
  std::vector<std::byte*> memory_;
  PagedKvLayout layout_;
};

/// An arena of `slots` slot images for `c`, each begun with generation 100 + index; 3 ranks.
class ArenaModel {
 public:
  static constexpr std::uint32_t kRanks = 3;
  ArenaModel(Backend& backend, const Case& c, const SlotLayout& slot, std::size_t slots);
  ~ArenaModel();
  ArenaModel(const ArenaModel&) = delete;
  ArenaModel& operator=(const ArenaModel&) = delete;

  std::byte* base() { return base_; }
  std::uint64_t bytes() const { return bytes_; }
  std::uint64_t offset(std::size_t slot) const { return slot * image_bytes_; }
  std::byte* image(std::size_t slot) { return base_ + offset(slot); }
  static std::uint32_t generation(std::size_t slot) { return static_cast<std::uint32_t>(100 + slot); }
  /// Takes what is there now as the expectation.
  void expect_unchanged();
  /// One byte of the expectation: element (layer, plane, token of chunk, head, dim) of `rank`'s part.
  std::byte& expected(std::size_t slot, std::uint32_t rank, std::int64_t layer, std::int64_t plane, std::int64_t token,
                      std::int64_t head, std::int64_t dim, std::int64_t byte);
  /// "" or the first byte that differs; rank words are left out.
  std::string compare() const;

 private:
  Backend& backend_;
  Case case_;
  std::uint64_t rank_bytes_, image_bytes_, bytes_;
  std::byte* base_;
  std::vector<std::byte> expectation_;
  std::vector<std::size_t> places_;  // of elements in a rank's part, filled by walking the slot in its order
};

/// A job's items over slots, with disjoint random blocks. Whole chunks that begin mid-block, parts, and one slot in two items.
struct JobPlan {
  std::vector<CopyItem> items;
  std::vector<std::int64_t> block_ids;
  std::int64_t num_blocks = 0;
  std::size_t slots = 0;
};
JobPlan plan_job(const Case& c, std::mt19937_64& random);

/// Gather, compare every byte of the arena, scatter into other memory, compare every byte of that; scatter layer by layer, compare
/// again. "" when right.
std::string run_case(Backend& backend, const Case& c, std::uint64_t seed);

}  // namespace lmcn::copier_suite
