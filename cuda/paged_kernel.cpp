#include "paged_kernel.hpp"

#include <algorithm>
#include <bit>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_error.hpp"
#include "paged_copy.cuh"
#include "plan_ring.hpp"

namespace lmcn {
namespace {

// Vectors of a unit for one thread, at least, before a further thread block shares the unit.
constexpr std::int64_t kMinVectorsOfThread = 16;
constexpr std::int64_t kMaxBlocksOfUnit = 64;
constexpr std::uint32_t kWholeUnit = 1u << 31;

/// The widest vectors that every run of the plane is made of, whatever tokens an item has.
std::uint32_t vector_bytes_of(const PlaneGeometry& plane, const PageCounts& counts) {
  auto bits = static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(plane.base)) | kMaxVectorBytes;
  const auto divides = [&](std::int64_t bytes) { bits |= static_cast<std::uint64_t>(bytes); };
  divides(plane.slot);
  divides(counts.token_bytes());
  divides(plane.block);
  divides(plane.token);
  if (plane.level == RunLevel::kRow || plane.level == RunLevel::kElement) {
    divides(counts.row_bytes());
    divides(plane.head);
  }
  if (plane.level == RunLevel::kElement) {
    divides(counts.element_bytes);
    divides(plane.dim);
  }
  return 1u << std::countr_zero(bits);
}

/// Vectors of a unit of `tokens` tokens (kElement: of one head).
std::int64_t unit_vectors(const KernelPlane& plane, const PageCounts& counts, std::int64_t tokens) {
  const std::int64_t bytes = plane.geometry.level == RunLevel::kElement ? counts.row_bytes() : counts.token_bytes();
  return tokens * bytes / plane.vector_bytes;
}

Result<KernelPlane> kernel_plane(const CopyGeometry& geometry, std::size_t index) {
  const PageCounts& counts = geometry.counts();
  KernelPlane plane{geometry.planes()[index], 0, Divisor::of(kWholeUnit), Divisor::of(kWholeUnit)};
  plane.vector_bytes = vector_bytes_of(plane.geometry, counts);
  if (const std::int64_t vectors = unit_vectors(plane, counts, counts.block_tokens); vectors >= kMaxUnitVectors) {
    return Status(Code::kUnsupported, "plane " + std::to_string(index) + ": a block has " + std::to_string(vectors) +
                                          " vectors of " + std::to_string(plane.vector_bytes) +
                                          " bytes, the copy kernels take less than " + std::to_string(kMaxUnitVectors));
  }
  // Each is below 2^31, as the unit is.
  const auto vectors_in = [&](std::int64_t bytes) { return static_cast<std::uint32_t>(bytes / plane.vector_bytes); };
  switch (plane.geometry.level) {
    case RunLevel::kBlock:
      break;
    case RunLevel::kToken:
      plane.vectors_per_run = Divisor::of(vectors_in(counts.token_bytes()));
      break;
    case RunLevel::kRow:
      plane.vectors_per_run = Divisor::of(vectors_in(counts.row_bytes()));
      plane.runs_per_outer = Divisor::of(static_cast<std::uint32_t>(counts.heads));
      break;
    case RunLevel::kElement:
      plane.vectors_per_run = Divisor::of(vectors_in(counts.element_bytes));
      plane.runs_per_outer = Divisor::of(static_cast<std::uint32_t>(counts.head_dim));
      break;
  }
  return plane;
}

Status out_of_bounds(const std::string& field, std::uint64_t value, const std::string& right) {
  return {Code::kInvalidArgument, field + " is " + std::to_string(value) + ", must be " + right};
}

std::uint64_t pieces_of(const PageCounts& counts, const CopyItem& item) {
  return static_cast<std::uint64_t>(place_of(counts, item, item.tokens - std::int64_t{1}).block_index) - item.block_begin + 1;
}

/// The pieces of several items, one after another.
class Pieces {
 public:
  Pieces(const PageCounts& counts, const CopyJob& job, std::span<const std::uint32_t> items, std::span<std::byte* const> parts)
      : counts_(counts), job_(job), items_(items), parts_(parts) {}

  /// REQUIRES: there is one more.
  KernelPiece next() {
    const CopyItem& item = job_.items[items_[at_]];
    const TokenPlace place = place_of(counts_, item, token_);
    const std::int64_t tokens = std::min(counts_.block_tokens - place.token_in_block, item.tokens - token_);
    const KernelPiece piece{.rank_part = parts_[at_],
                            .block_id = job_.block_ids[static_cast<std::size_t>(place.block_index)],
                            .token_of_chunk = item.first_token + static_cast<std::uint32_t>(token_),
                            .token_in_block = static_cast<std::uint32_t>(place.token_in_block),
                            .tokens = static_cast<std::uint32_t>(tokens)};
    token_ += tokens;
    if (token_ == item.tokens) {
      token_ = 0;
      ++at_;
    }
    return piece;
  }

 private:
  const PageCounts& counts_;
  const CopyJob& job_;
  std::span<const std::uint32_t> items_;
  std::span<std::byte* const> parts_;
  std::size_t at_ = 0;
  std::int64_t token_ = 0;  // of the item
};

struct LaunchShape {
  dim3 grid;
  unsigned threads = 0;
};
/// As many thread blocks as there are units, and more where units are large; never more than `max_ctas`. Small units get few
/// threads, so that none idles.
LaunchShape shape_of(std::uint32_t units, std::int64_t vectors, unsigned max_ctas) {
  constexpr std::int64_t kWarp = 32;
  const std::int64_t wanted = (vectors + kVectorsInFlight * kWarp - 1) / (kVectorsInFlight * kWarp) * kWarp;
  const std::int64_t threads = std::clamp(wanted, kWarp, std::int64_t{kMaxCopyThreads});
  const unsigned x = std::min(units, max_ctas);
  const std::int64_t shared = std::clamp(vectors / (threads * kMinVectorsOfThread), std::int64_t{1}, kMaxBlocksOfUnit);
  const unsigned z = static_cast<unsigned>(std::min(shared, std::int64_t{max_ctas / x}));
  return {dim3(x, 1, z), static_cast<unsigned>(threads)};
}

}  // namespace

/// The planes on the device, and a copy here.
struct PlaneTable {
  ~PlaneTable() {
    if (device != nullptr) static_cast<void>(cudaFree(device));  // nobody is left to tell
  }
  /// REQUIRES: the device is current; called once.
  Status upload();
  /// One past the last plane of [begin, end) up to which all have the vectors of plane `begin`.
  std::size_t end_of_equal(std::size_t begin, std::size_t end) const {
    std::size_t equal = begin + 1;
    while (equal < end && planes[equal].vector_bytes == planes[begin].vector_bytes) ++equal;
    return equal;
  }

  std::vector<KernelPlane> planes;
  KernelPlane* device = nullptr;
};

// On a stream of its own: a plain cudaMemcpy may return before the bytes have arrived, and non-blocking streams do not wait for it.
Status PlaneTable::upload() {
  const std::size_t bytes = planes.size() * sizeof(KernelPlane);
  LMCN_RETURN_IF_ERROR(cuda_check(cudaMalloc(reinterpret_cast<void**>(&device), bytes), "cudaMalloc"));
  cudaStream_t stream = nullptr;
  LMCN_RETURN_IF_ERROR(cuda_check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"));
  Status status = cuda_check(cudaMemcpyAsync(device, planes.data(), bytes, cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
  if (status.ok()) status = cuda_check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  static_cast<void>(cudaStreamDestroy(stream));
  return status;
}

PagedKernel::PagedKernel(const CopyGeometry& geometry, std::size_t plan_bytes)
    : geometry_(geometry), plan_bytes_(plan_bytes), table_(std::make_unique<PlaneTable>()) {
  for (auto& ring : rings_) ring = std::make_unique<PlanRing>();
}

PagedKernel::~PagedKernel() {
  // First: the launches that have not run read the table.
  for (auto& ring : rings_) ring.reset();
}

Result<std::unique_ptr<PagedKernel>> PagedKernel::make(const CopyGeometry& geometry, int device, std::size_t plan_bytes) {
  if (plan_bytes < sizeof(KernelPiece)) {
    return out_of_bounds("plan_bytes", plan_bytes, "at least " + std::to_string(sizeof(KernelPiece)));
  }
  std::unique_ptr<PagedKernel> made(new PagedKernel(geometry, plan_bytes));
  PlaneTable& table = *made->table_;
  for (std::size_t p = 0; p < geometry.planes().size(); ++p) {
    Result<KernelPlane> plane = kernel_plane(geometry, p);
    if (!plane.ok()) return plane.status();
    table.planes.push_back(*plane);
  }
  DeviceGuard guard(device);
  LMCN_RETURN_IF_ERROR(guard.status());
  LMCN_RETURN_IF_ERROR(table.upload());
  for (auto& ring : made->rings_) LMCN_RETURN_IF_ERROR(ring->create(plan_bytes));
  return made;
}

Status PagedKernel::launch(const CopyJob& job, CopyDirection direction, std::span<const std::uint32_t> items,
                           std::span<std::byte* const> rank_parts, std::size_t plane_begin, std::size_t plane_end,
                           cudaStream_t stream, unsigned max_ctas) {
  const std::size_t planes = geometry_.planes().size();
  if (plane_end > planes) return out_of_bounds("plane_end", plane_end, "at most " + std::to_string(planes));
  if (plane_begin > plane_end) return out_of_bounds("plane_begin", plane_begin, "at most plane_end, " + std::to_string(plane_end));
  if (max_ctas == 0) return out_of_bounds("max_ctas", max_ctas, "at least 1");
  if (rank_parts.size() != items.size()) {
    return out_of_bounds("number of rank_parts", rank_parts.size(), "that of items, " + std::to_string(items.size()));
  }
  const PageCounts& counts = geometry_.counts();
  std::uint64_t left = 0;
  std::int64_t longest_tokens = 0;
  for (std::size_t i = 0; i < items.size(); ++i) {
    const std::string at = std::string("[") + std::to_string(i) + "]";
    if (items[i] >= job.items.size()) return out_of_bounds("items" + at, items[i], "below " + std::to_string(job.items.size()));
    const auto address = reinterpret_cast<std::uintptr_t>(rank_parts[i]);
    if (address == 0 || address % kMaxVectorBytes != 0) {
      return out_of_bounds("rank_parts" + at, address, "an address that is a multiple of " + std::to_string(kMaxVectorBytes));
    }
    left += pieces_of(counts, job.items[items[i]]);
    longest_tokens = std::max<std::int64_t>(longest_tokens, job.items[items[i]].tokens);
  }
  if (left == 0 || plane_begin == plane_end) return {};

  // Units are counted in 31 bits.
  const std::uint64_t most =
      std::max<std::uint64_t>(1, std::min<std::uint64_t>(plan_bytes_ / sizeof(KernelPiece), INT32_MAX / (plane_end - plane_begin)));
  const std::int64_t unit_tokens = std::min(counts.block_tokens, longest_tokens);
  Pieces pieces(counts, job, items, rank_parts);
  PlanRing& ring = *rings_[direction == CopyDirection::kGather ? 0 : 1];
  std::lock_guard lock(ring.mutex());
  while (left > 0) {
    const auto count = static_cast<std::uint32_t>(std::min(left, most));
    PlanRing::Slice slice;
    LMCN_RETURN_IF_ERROR(ring.take(count * sizeof(KernelPiece), slice));
    auto* const plan_pieces = reinterpret_cast<KernelPiece*>(slice.host);
    for (std::uint32_t i = 0; i < count; ++i) plan_pieces[i] = pieces.next();
    Status launched;
    // One launch, but for layouts whose planes take vectors of different widths: then one for each row of equal planes.
    for (std::size_t begin = plane_begin; launched.ok() && begin < plane_end;) {
      const std::size_t end = table_->end_of_equal(begin, plane_end);
      const auto planes_now = static_cast<std::uint32_t>(end - begin), units = count * planes_now;
      std::int64_t vectors = 1;
      for (std::size_t p = begin; p < end; ++p) vectors = std::max(vectors, unit_vectors(table_->planes[p], counts, unit_tokens));
      const LaunchShape shape = shape_of(units, vectors, max_ctas);
      const KernelPlan plan{.planes = table_->device + begin,
                            .pieces = reinterpret_cast<const KernelPiece*>(slice.device),
                            .vector_bytes = table_->planes[begin].vector_bytes,
                            .plane_count = Divisor::of(planes_now),
                            .units_per_block = units / shape.grid.x,
                            .blocks_with_one_more = units % shape.grid.x,
                            .counts = counts};
      launched = cuda_check(enqueue_paged_copy(plan, direction, shape.grid, shape.threads, stream), "launch of paged_copy");
      begin = end;
    }
    LMCN_RETURN_IF_ERROR(ring.keep(stream));
    LMCN_RETURN_IF_ERROR(launched);
    left -= count;
  }
  return {};
}

void PagedKernel::drained(cudaStream_t stream) {
  for (auto& ring : rings_) {
    std::lock_guard lock(ring->mutex());
    ring->drained(stream);
  }
}

}  // namespace lmcn
