#include "copier_suite.hpp"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string_view>
#include <utility>

#include "memory/slot_image.hpp"

namespace lmcn::copier_suite {
namespace {

constexpr std::byte kCanary{0xA5};

std::string differs(const std::string& where, std::size_t at, std::byte have, std::byte want) {
  return where + " byte " + std::to_string(at) + " is " + std::to_string(std::to_integer<int>(have)) + ", expected " +
         std::to_string(std::to_integer<int>(want));
}

}  // namespace

std::byte* Backend::allocate_arena(std::size_t bytes) {
  return static_cast<std::byte*>(std::aligned_alloc(kPageBytes, bytes));
}
void Backend::release_arena(std::byte* arena) {
  std::free(arena);
}

const char* order_name(Order order) {
  switch (order) {
    case Order::kPlanesApart:
      return "PlanesApart";
    case Order::kPlanesOuter:
      return "PlanesOuter";
    case Order::kBlocksOuter:
      return "BlocksOuter";
    case Order::kHeadsOuter:
      return "HeadsOuter";
    case Order::kTransposedKeys:
      return "TransposedKeys";
    case Order::kLayersInBlock:
      return "LayersInBlock";
    case Order::kPadded:
      return "Padded";
    case Order::kLBNHC:
      return "LBNHC";
    case Order::kLBHNC:
      return "LBHNC";
    case Order::kLHBNC:
      return "LHBNC";
    case Order::kBLHNC:
      return "BLHNC";
    case Order::kBLNHC:
      return "BLNHC";
    case Order::kBHLNC:
      return "BHLNC";
    case Order::kOpaque:
      return "Opaque";
    case Order::kOpaqueInBlock:
      return "OpaqueInBlock";
  }
  return "?";
}

std::string Case::name() const {
  return std::string(order_name(order)) + "_L" + std::to_string(layers) + "_P" + std::to_string(planes) + "_B" +
         std::to_string(block_tokens) + "_H" + std::to_string(heads) + "_D" + std::to_string(head_dim) + "_E" +
         std::to_string(element_bytes) + "_C" + std::to_string(chunk_tokens) + "_T" + std::to_string(options.threads) +
         (misalignment == 0 ? "" : "_M" + std::to_string(misalignment)) + (options.non_temporal_bytes == 0 ? "_stream" : "");
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  const auto add = [&](Case c) {
    c.options.rank = 1;
    c.options.threads = cases.size() % 3 == 0 ? 3 : 1;
    c.options.non_temporal_bytes = cases.size() % 2 == 0 ? 0 : INT64_MAX;
    cases.push_back(c);
  };
  for (const Order order : {Order::kPlanesApart, Order::kPlanesOuter, Order::kBlocksOuter, Order::kHeadsOuter,
                            Order::kTransposedKeys, Order::kLayersInBlock, Order::kPadded}) {
    for (const std::int64_t planes : {1, 2}) {
      for (const std::int64_t block_tokens : {1, 16, 17, 128}) {
        for (const std::int64_t element_bytes : {1, 2, 4, 8}) {
          Case c{.order = order, .layers = 3, .planes = planes, .block_tokens = block_tokens, .element_bytes = element_bytes};
          c.chunk_tokens = block_tokens == 1 ? 7 : 2 * block_tokens + 3;
          add(c);
        }
      }
      add({.order = order, .layers = 1, .planes = planes, .block_tokens = 16, .heads = 1, .head_dim = 1, .chunk_tokens = 5});
      add({.order = order, .planes = planes, .block_tokens = 5, .heads = 3, .head_dim = 7, .element_bytes = 4, .chunk_tokens = 1});
      // Layer parts of >= 64 KiB are 4 KiB-aligned in the slot.
      add({.order = order,
           .planes = planes,
           .block_tokens = 16,
           .heads = 5,
           .head_dim = 64,
           .element_bytes = 2,
           .chunk_tokens = 131});
    }
  }
  for (const Order order : {Order::kLBNHC, Order::kLBHNC, Order::kLHBNC, Order::kBLHNC, Order::kBLNHC, Order::kBHLNC}) {
    for (const std::int64_t element_bytes : {1, 2, 4}) {
      add({.order = order, .layers = 3, .block_tokens = 16, .element_bytes = element_bytes, .chunk_tokens = 21});
    }
    add({.order = order, .layers = 3, .block_tokens = 1, .head_dim = 16, .chunk_tokens = 7});
    add({.order = order, .layers = 1, .block_tokens = 64, .heads = 1, .head_dim = 8, .element_bytes = 1, .chunk_tokens = 70});
    add({.order = order, .block_tokens = 5, .heads = 3, .head_dim = 7, .element_bytes = 4, .chunk_tokens = 9, .misalignment = 4});
    add({.order = order, .block_tokens = 4, .heads = 1, .head_dim = 16, .chunk_tokens = 10, .misalignment = 2});
  }
  // SGLang's token slots; the largest pages; MLA's 576 elements, block outermost too; bases that no wide load may be used on.
  add({.order = Order::kPlanesApart, .block_tokens = 1, .heads = 3, .head_dim = 64, .chunk_tokens = 70});
  add({.order = Order::kPlanesApart, .layers = 1, .block_tokens = 256, .heads = 1, .head_dim = 4, .chunk_tokens = 261});
  for (const Order order : {Order::kBlocksOuter, Order::kLayersInBlock}) {
    add({.order = order, .planes = 1, .block_tokens = 4, .heads = 1, .head_dim = 576, .chunk_tokens = 10});
  }
  for (const Order order : {Order::kPlanesApart, Order::kPlanesOuter, Order::kBlocksOuter, Order::kHeadsOuter,
                            Order::kTransposedKeys, Order::kLayersInBlock, Order::kPadded}) {
    for (const std::int64_t misalignment : {1, 8}) {
      add({.order = order,
           .layers = 1,
           .block_tokens = 4,
           .head_dim = 16,
           .element_bytes = std::min<std::int64_t>(misalignment, 4),
           .chunk_tokens = 10,
           .misalignment = misalignment});
    }
  }
  for (const Order order : {Order::kOpaque, Order::kOpaqueInBlock}) {
    add({.order = order,
         .layers = 3,
         .planes = 1,
         .block_tokens = 1,
         .heads = 1,
         .head_dim = 1040,
         .element_bytes = 1,
         .chunk_tokens = 3,
         .misalignment = 3});
  }
  for (const Order order : {Order::kOpaque, Order::kOpaqueInBlock}) {
    for (const std::int64_t page_bytes : {1, 48, 4096, 8209}) {
      for (const std::int64_t blocks : {1, 3, 8}) {
        add({.order = order,
             .layers = 3,
             .planes = 1,
             .block_tokens = 1,
             .heads = 1,
             .head_dim = page_bytes,
             .element_bytes = 1,
             .chunk_tokens = blocks});
      }
    }
  }
  // Transposed in tiles of 16 bytes with rows and columns left over.
  for (const std::int64_t element_bytes : {1, 2, 4, 8}) {
    for (const std::int64_t head_dim : {16, 37}) {
      for (const std::int64_t block_tokens : {32, 35}) {
        add({.order = Order::kTransposedKeys,
             .block_tokens = block_tokens,
             .heads = 2,
             .head_dim = head_dim,
             .element_bytes = element_bytes,
             .chunk_tokens = 2 * block_tokens + 7});
      }
    }
  }
  // Large enough for the host copier to share an item among threads.
  add({.order = Order::kBlocksOuter, .block_tokens = 16, .heads = 8, .head_dim = 64, .element_bytes = 2, .chunk_tokens = 256});
  cases.back().options.threads = 3;
  return cases;
}

PagedModel::PagedModel(Backend& backend, const Case& c, std::int64_t num_blocks)
    : backend_(backend), case_(c), num_blocks_(num_blocks) {
  walk();
  for (const auto& bytes : mirror_) memory_.push_back(backend_.allocate(bytes.size()));
  describe();
}

PagedModel::Place& PagedModel::place(std::int64_t layer, std::int64_t plane, std::int64_t block, std::int64_t token,
                                     std::int64_t head, std::int64_t dim) {
  std::int64_t i = layer;
  i = i * case_.planes + plane;
  i = i * num_blocks_ + block;
  i = i * case_.block_tokens + token;
  i = i * case_.heads + head;
  i = i * case_.head_dim + dim;
  return places_.at(static_cast<std::size_t>(i));
}

namespace {

// The axes of orders that are a plain nesting, outermost first: layer, block, plane, token, head, dim. "": another kind.
const char* axes_of(Order order) {
  switch (order) {
    case Order::kPlanesApart:
    case Order::kPlanesOuter:
      return "lpbthd";
    case Order::kBlocksOuter:
    case Order::kOpaque:
      return "lbpthd";
    case Order::kHeadsOuter:
      return "lbphtd";
    case Order::kLayersInBlock:
    case Order::kOpaqueInBlock:
      return "blpthd";
    case Order::kLBNHC:
      return "lbthpd";
    case Order::kLBHNC:
      return "lbhtpd";
    case Order::kLHBNC:
      return "lhbtpd";
    case Order::kBLHNC:
      return "blhtpd";
    case Order::kBLNHC:
      return "blthpd";
    case Order::kBHLNC:
      return "bhltpd";
    case Order::kTransposedKeys:
    case Order::kPadded:
      return "";
  }
  return "";
}

// How many of the leading axes are allocations of their own.
std::size_t axes_apart(Order order) {
  switch (order) {
    case Order::kPlanesApart:
      return 2;
    case Order::kPlanesOuter:
    case Order::kBlocksOuter:
    case Order::kHeadsOuter:
    case Order::kOpaque:
      return 1;
    default:
      return 0;
  }
}

}  // namespace

// Walks each allocation from its first byte to its last, in the order its layout is defined by.
void PagedModel::walk() {
  const Case& c = case_;
  places_.resize(static_cast<std::size_t>(c.layers * c.planes * num_blocks_ * c.block_tokens * c.heads * c.head_dim));
  std::size_t allocation = 0;
  auto cursor = static_cast<std::size_t>(c.misalignment);
  const auto element = [&](std::int64_t l, std::int64_t p, std::int64_t b, std::int64_t t, std::int64_t h, std::int64_t d) {
    place(l, p, b, t, h, d) = {allocation, cursor};
    cursor += static_cast<std::size_t>(c.element_bytes);
  };
  const auto end_allocation = [&] {
    mirror_.emplace_back(cursor);
    ++allocation;
    cursor = static_cast<std::size_t>(c.misalignment);
  };
  if (const std::string axes = axes_of(c.order); !axes.empty()) {
    constexpr std::string_view kAxes = "lpbthd";
    const std::array<std::int64_t, 6> counts{c.layers, c.planes, num_blocks_, c.block_tokens, c.heads, c.head_dim};
    std::array<std::int64_t, 6> at{};
    const auto nest = [&](const auto& self, std::size_t depth) -> void {
      if (depth == axes.size()) return element(at[0], at[1], at[2], at[3], at[4], at[5]);
      const std::size_t axis = kAxes.find(axes[depth]);
      for (at[axis] = 0; at[axis] < counts[axis]; ++at[axis]) self(self, depth + 1);
      if (depth == axes_apart(c.order)) end_allocation();
    };
    nest(nest, 0);
    return;
  }
  for (std::int64_t l = 0; l < c.layers; ++l, end_allocation()) {
    for (std::int64_t b = 0; b < num_blocks_; ++b) {
      if (c.order == Order::kTransposedKeys) {
        for (std::int64_t h = 0; h < c.heads; ++h) {
          for (std::int64_t d = 0; d < c.head_dim; ++d)
            for (std::int64_t t = 0; t < c.block_tokens; ++t) element(l, 0, b, t, h, d);
          if (c.planes == 2)
            for (std::int64_t t = 0; t < c.block_tokens; ++t)
              for (std::int64_t d = 0; d < c.head_dim; ++d) element(l, 1, b, t, h, d);
        }
      } else {  // kPadded
        for (std::int64_t p = 0; p < c.planes; ++p)
          for (std::int64_t t = 0; t < c.block_tokens; ++t, cursor += 8)
            for (std::int64_t h = 0; h < c.heads; ++h, cursor += 16)
              for (std::int64_t d = 0; d < c.head_dim; ++d) element(l, p, b, t, h, d);
        cursor += 24;
      }
    }
  }
}

// Strides are distances in the map. An axis of one step has none: its stride must not matter.
void PagedModel::describe() {
  const Case& c = case_;
  const auto address = [&](std::int64_t l, std::int64_t p, std::int64_t b, std::int64_t t, std::int64_t h, std::int64_t d) {
    const Place& at = place(l, p, b, t, h, d);
    return reinterpret_cast<std::intptr_t>(memory_[at.allocation] + at.offset);
  };
  layout_.num_blocks = num_blocks_;
  layout_.block_tokens = c.block_tokens;
  layout_.heads = c.heads;
  layout_.head_dim = c.head_dim;
  layout_.element_bytes = c.element_bytes;
  constexpr std::int64_t kNone = 1'234'567;
  std::vector<std::byte*> bases;
  for (std::int64_t l = 0; l < c.layers; ++l) {
    PagedLayer layer;
    const Place& first = place(l, 0, 0, 0, 0, 0);
    layer.base = memory_[first.allocation] + first.offset;
    bases.push_back(layer.base);
    for (std::int64_t p = 0; p < c.planes; ++p) {
      const std::intptr_t origin = address(l, p, 0, 0, 0, 0);
      layer.planes.push_back({.offset = origin - reinterpret_cast<std::intptr_t>(layer.base),
                              .block = num_blocks_ > 1 ? address(l, p, 1, 0, 0, 0) - origin : kNone,
                              .token = c.block_tokens > 1 ? address(l, p, 0, 1, 0, 0) - origin : kNone,
                              .head = c.heads > 1 ? address(l, p, 0, 0, 1, 0) - origin : kNone,
                              .dim = c.head_dim > 1 ? address(l, p, 0, 0, 0, 1) - origin : kNone});
    }
    layout_.layers.push_back(layer);
  }
  if (c.order == Order::kOpaque || c.order == Order::kOpaqueInBlock) {
    layout_ = PagedKvLayout::opaque(bases, num_blocks_, c.head_dim, layout_.layers[0].planes[0].block);
  }
}

void PagedModel::fill_random(std::mt19937_64& random) {
  for (auto& bytes : mirror_)
    for (std::byte& b : bytes) b = static_cast<std::byte>(random() >> 56);
}

void PagedModel::fill(std::byte value) {
  for (auto& bytes : mirror_) std::ranges::fill(bytes, value);
}

std::byte& PagedModel::at(std::int64_t layer, std::int64_t plane, std::int64_t block, std::int64_t token, std::int64_t head,
                          std::int64_t dim, std::int64_t byte) {
  const Place& p = place(layer, plane, block, token, head, dim);
  return mirror_[p.allocation][p.offset + static_cast<std::size_t>(byte)];
}

void PagedModel::upload() {
  for (std::size_t i = 0; i < mirror_.size(); ++i) backend_.upload(memory_[i], mirror_[i].data(), mirror_[i].size());
}

void PagedModel::scribble(std::byte value) {
  for (std::size_t i = 0; i < mirror_.size(); ++i) {
    const std::vector<std::byte> bytes(mirror_[i].size(), value);
    backend_.upload(memory_[i], bytes.data(), bytes.size());
  }
}

std::string PagedModel::compare() {
  for (std::size_t i = 0; i < mirror_.size(); ++i) {
    std::vector<std::byte> have(mirror_[i].size());
    backend_.download(have.data(), memory_[i], have.size());
    if (have == mirror_[i]) continue;
    const auto at = static_cast<std::size_t>(std::ranges::mismatch(have, mirror_[i]).in1 - have.begin());
    return differs("paged allocation " + std::to_string(i), at, have[at], mirror_[i][at]);
  }
  return "";
}

ArenaModel::ArenaModel(Backend& backend, const Case& c, const SlotLayout& slot, std::size_t slots)
    : backend_(backend),
      case_(c),
      rank_bytes_(static_cast<std::uint64_t>(slot.rank_bytes)),
      image_bytes_(lmcn::image_bytes(kRanks * rank_bytes_)),
      bytes_(image_bytes_ * slots),
      base_(backend.allocate_arena(bytes_)) {
  std::memset(base_, std::to_integer<int>(kCanary), bytes_);
  for (std::size_t s = 0; s < slots; ++s) begin_slot(image(s), {}, {}, kRanks * rank_bytes_, kRanks, generation(s));
  std::size_t cursor = 0;
  const auto layer_bytes = static_cast<std::size_t>(c.planes * c.chunk_tokens * c.heads * c.head_dim * c.element_bytes);
  for (std::int64_t l = 0; l < c.layers; ++l) {
    if (layer_bytes >= 64 * 1024) cursor = (cursor + 4095) / 4096 * 4096;
    for (std::int64_t i = 0; i < c.planes * c.chunk_tokens * c.heads * c.head_dim; ++i) {
      places_.push_back(cursor);
      cursor += static_cast<std::size_t>(c.element_bytes);
    }
  }
  expect_unchanged();
}

ArenaModel::~ArenaModel() {
  backend_.release_arena(base_);
}

void ArenaModel::expect_unchanged() {
  expectation_.assign(base_, base_ + bytes_);
}

std::byte& ArenaModel::expected(std::size_t slot, std::uint32_t rank, std::int64_t layer, std::int64_t plane, std::int64_t token,
                                std::int64_t head, std::int64_t dim, std::int64_t byte) {
  const Case& c = case_;
  const std::int64_t element = (((layer * c.planes + plane) * c.chunk_tokens + token) * c.heads + head) * c.head_dim + dim;
  return expectation_.at(offset(slot) + kPageBytes + rank * rank_bytes_ + places_.at(static_cast<std::size_t>(element)) +
                         static_cast<std::size_t>(byte));
}

std::string ArenaModel::compare() const {
  for (std::size_t slot = 0; slot * image_bytes_ < bytes_; ++slot) {
    for (const auto& [begin, end] : {std::pair{std::size_t{0}, offsetof(SlotHeader, rank)}, std::pair{kPageBytes, image_bytes_}}) {
      const std::byte* const have = base_ + offset(slot) + begin;
      const std::byte* const want = expectation_.data() + offset(slot) + begin;
      if (std::memcmp(have, want, end - begin) == 0) continue;
      const auto at = static_cast<std::size_t>(std::mismatch(have, have + (end - begin), want).first - have);
      return differs("slot " + std::to_string(slot), begin + at, have[at], want[at]);
    }
  }
  return "";
}

JobPlan plan_job(const Case& c, std::mt19937_64& random) {
  JobPlan plan;
  const auto chunk = static_cast<std::uint32_t>(c.chunk_tokens);
  const auto block = static_cast<std::uint32_t>(c.block_tokens);
  const auto add = [&](std::size_t slot, std::uint32_t first, std::uint32_t tokens, std::uint32_t in_block) {
    CopyItem item{.slot_offset = slot, .generation = ArenaModel::generation(slot), .first_token = first, .tokens = tokens};
    item.block_begin = static_cast<std::uint32_t>(plan.num_blocks);
    item.token_in_block = in_block % block;
    plan.num_blocks += (item.token_in_block + tokens + block - 1) / block;
    plan.items.push_back(item);  // slot_offset: the slot's index for now
  };
  add(0, 0, chunk, block / 2);
  add(1, 0, chunk, 0);
  if (chunk >= 3) {
    add(2, 1, chunk - 2, block - 1);  // neither its first nor its last token
    add(3, chunk / 2, chunk - chunk / 2, static_cast<std::uint32_t>(random() % block));
    add(3, 0, chunk / 2, 1);
  }
  plan.slots = chunk >= 3 ? 4 : 2;
  // Pairs of neighbours in random order: some runs can be joined, some not.
  std::vector<std::int64_t> pairs(static_cast<std::size_t>(plan.num_blocks / 2 + 2));
  std::iota(pairs.begin(), pairs.end(), 0);
  std::shuffle(pairs.begin(), pairs.end(), random);
  for (const std::int64_t pair : pairs) plan.block_ids.insert(plan.block_ids.end(), {2 * pair, 2 * pair + 1});
  plan.block_ids.resize(static_cast<std::size_t>(plan.num_blocks));
  plan.num_blocks = 2 * static_cast<std::int64_t>(pairs.size());
  return plan;
}

namespace {

template <class F>
void for_each_byte(const Case& c, const JobPlan& plan, F&& f) {
  for (const CopyItem& item : plan.items)
    for (std::int64_t l = 0; l < c.layers; ++l)
      for (std::int64_t p = 0; p < c.planes; ++p) {
        std::size_t block_index = item.block_begin;
        std::int64_t in_block = item.token_in_block;
        for (std::int64_t t = 0; t < item.tokens; ++t) {
          for (std::int64_t h = 0; h < c.heads; ++h)
            for (std::int64_t d = 0; d < c.head_dim; ++d)
              for (std::int64_t b = 0; b < c.element_bytes; ++b)
                f(item, l, p, plan.block_ids[block_index], in_block, t + item.first_token, h, d, b);
          if (++in_block == c.block_tokens) {
            in_block = 0;
            ++block_index;
          }
        }
      }
}

std::string run_job(PagedCopier& copier, const CopyJob& job, std::uint64_t bytes) {
  if (const Status status = copier.submit(job); !status.ok()) return "submit: " + status.to_string();
  const std::uint64_t ids[] = {job.id};
  if (const Status status = copier.wait(ids, std::chrono::minutes(1)); !status.ok()) return "wait: " + status.to_string();
  const std::vector<CopyDone> done = copier.poll();
  if (done.size() != 1 || done[0].id != job.id) return "poll() returned " + std::to_string(done.size()) + " results";
  if (!done[0].ok || !done[0].failed_items.empty()) return "job failed: " + done[0].message;
  if (done[0].bytes != bytes) return "bytes is " + std::to_string(done[0].bytes) + ", expected " + std::to_string(bytes);
  if (done[0].seconds < 0) return "seconds is negative";
  return "";
}

}  // namespace

std::string run_case(Backend& backend, const Case& c, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  const JobPlan plan = plan_job(c, random);
  PagedModel paged(backend, c, plan.num_blocks), other(backend, c, plan.num_blocks);
  const Result<SlotLayout> slot = SlotLayout::make(paged.layout(), c.chunk_tokens);
  if (!slot.ok()) return "SlotLayout::make: " + slot.status().to_string();
  ArenaModel arena(backend, c, *slot, plan.slots);
  Result<std::unique_ptr<PagedCopier>> copier = backend.make(paged.layout(), *slot, arena.base(), arena.bytes(), c.options);
  if (!copier.ok()) return "make: " + copier.status().to_string();
  Result<std::unique_ptr<PagedCopier>> other_copier = backend.make(other.layout(), *slot, arena.base(), arena.bytes(), c.options);
  if (!other_copier.ok()) return "make: " + other_copier.status().to_string();

  paged.fill_random(random);
  paged.upload();
  constexpr std::byte kBefore{0x5C};
  other.fill(kBefore);
  other.upload();
  CopyJob job{.id = 1, .direction = CopyDirection::kGather, .items = plan.items, .block_ids = plan.block_ids, .stream = 0};
  for (CopyItem& item : job.items) item.slot_offset = arena.offset(item.slot_offset);
  std::uint64_t bytes = 0;
  for_each_byte(c, plan, [&](const CopyItem& item, auto l, auto p, auto block, auto in_block, auto token, auto h, auto d, auto b) {
    const std::byte value = paged.at(l, p, block, in_block, h, d, b);
    arena.expected(item.slot_offset, c.options.rank, l, p, token, h, d, b) = value;
    other.at(l, p, block, in_block, h, d, b) = value;
    ++bytes;
  });

  if (const std::string error = run_job(**copier, job, bytes); !error.empty()) return "gather: " + error;
  if (const std::string error = arena.compare(); !error.empty()) return "gather: " + error;
  if (const std::string error = paged.compare(); !error.empty()) return "gather changed its source: " + error;
  for (std::size_t s = 0; s < plan.slots; ++s) {
    for (std::uint32_t rank = 0; rank < ArenaModel::kRanks; ++rank) {
      const RankState want = rank == c.options.rank ? RankState::kOk : RankState::kEmpty;
      if (rank_state(arena.image(s), rank, ArenaModel::generation(s)) != want)
        return "rank word " + std::to_string(rank) + " is wrong";
    }
  }

  job.id = 2;
  job.direction = CopyDirection::kScatter;
  if (const std::string error = run_job(**other_copier, job, bytes); !error.empty()) return "scatter: " + error;
  if (const std::string error = other.compare(); !error.empty()) return "scatter: " + error;
  if (const std::string error = arena.compare(); !error.empty()) return "scatter changed its source: " + error;
  for (std::size_t s = 0; s < plan.slots; ++s) {
    if (loads_done(arena.image(s), c.options.rank) != 1) return "loads_done of slot " + std::to_string(s) + " is not 1";
  }

  job.id = 3;
  job.layer_by_layer = true;
  other.scribble(kBefore);
  if (const std::string error = run_job(**other_copier, job, bytes); !error.empty()) return "scatter layer by layer: " + error;
  if (const std::string error = other.compare(); !error.empty()) return "scatter layer by layer: " + error;
  if (const std::string error = arena.compare(); !error.empty()) return "scatter layer by layer changed its source: " + error;
  for (std::size_t s = 0; s < plan.slots; ++s) {
    if (loads_done(arena.image(s), c.options.rank) != 2) return "loads_done of slot " + std::to_string(s) + " is not 2";
  }
  return "";
}

}  // namespace lmcn::copier_suite
