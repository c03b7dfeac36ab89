#include "copy/copy_geometry.hpp"

#include <string>
#include <unordered_map>

#include "memory/slot_image.hpp"

namespace lmcn {
namespace {

RunLevel level_of(const PageCounts& counts, const PlaneStrides& s) {
  if (counts.head_dim != 1 && s.dim != counts.element_bytes) return RunLevel::kElement;
  if (counts.heads != 1 && s.head != counts.row_bytes()) return RunLevel::kRow;
  if (counts.block_tokens != 1 && s.token != counts.token_bytes()) return RunLevel::kToken;
  return RunLevel::kBlock;
}

// First and one-past-last address of a plane over all blocks; validate() has proven that they fit.
struct Span {
  std::uintptr_t begin = 0, end = 0;
};
Span span_of(const PageCounts& counts, const PlaneGeometry& plane) {
  const std::int64_t extent = (counts.num_blocks - 1) * plane.block + (counts.block_tokens - 1) * plane.token +
                              (counts.heads - 1) * plane.head + (counts.head_dim - 1) * plane.dim + counts.element_bytes;
  const auto begin = reinterpret_cast<std::uintptr_t>(plane.base);
  return {begin, begin + static_cast<std::uintptr_t>(extent)};
}

Status wrong(const CopyJob& job, std::size_t index, const std::string& what) {
  return {Code::kInvalidArgument, "job " + std::to_string(job.id) + " item " + std::to_string(index) + ": " + what};
}

}  // namespace

Result<CopyGeometry> CopyGeometry::make(const PagedKvLayout& paged, const SlotLayout& slot, std::byte* arena_base,
                                        std::uint64_t arena_bytes, std::uint32_t rank, bool replicated) {
  Result<SlotLayout> expected = SlotLayout::make(paged, slot.chunk_tokens);
  if (!expected.ok()) return expected.status();
  if (slot.plane_bytes != expected->plane_bytes || slot.rank_bytes != expected->rank_bytes ||
      slot.layer_offset != expected->layer_offset) {
    return Status(Code::kInvalidArgument,
                  "the slot layout (" + std::to_string(slot.layer_offset.size()) + " layers, plane_bytes " +
                      std::to_string(slot.plane_bytes) + ", rank_bytes " + std::to_string(slot.rank_bytes) +
                      ") is not that of the paged layout (" + std::to_string(expected->layer_offset.size()) +
                      " layers, plane_bytes " + std::to_string(expected->plane_bytes) + ", rank_bytes " +
                      std::to_string(expected->rank_bytes) + "): use SlotLayout::make(paged, chunk_tokens)");
  }
  if (rank >= kMaxRanks) {
    return Status(Code::kInvalidArgument, "rank is " + std::to_string(rank) + ", must be < " + std::to_string(kMaxRanks));
  }
  if (arena_base == nullptr) return Status(Code::kInvalidArgument, "arena_base is null, must be the mapped arena");

  CopyGeometry geometry;
  geometry.counts_ = {paged.num_blocks, paged.block_tokens, paged.heads, paged.head_dim, paged.element_bytes};
  geometry.chunk_tokens_ = slot.chunk_tokens;
  geometry.rank_bytes_ = static_cast<std::uint64_t>(slot.rank_bytes);
  geometry.rank_ = rank;
  geometry.replicated_ = replicated;
  geometry.arena_base_ = arena_base;
  geometry.arena_bytes_ = arena_bytes;
  for (std::size_t l = 0; l < paged.layers.size(); ++l) {
    const PagedLayer& layer = paged.layers[l];
    geometry.first_plane_.push_back(geometry.planes_.size());
    for (std::size_t p = 0; p < layer.planes.size(); ++p) {
      const PlaneStrides& s = layer.planes[p];
      PlaneGeometry plane{
          reinterpret_cast<std::byte*>(reinterpret_cast<std::uintptr_t>(layer.base) + static_cast<std::uintptr_t>(s.offset)),
          // Strides of axes with one step are never taken; zero keeps them out of every product.
          paged.num_blocks > 1 ? s.block : 0, paged.block_tokens > 1 ? s.token : 0, paged.heads > 1 ? s.head : 0,
          paged.head_dim > 1 ? s.dim : 0, slot.layer_offset[l] + static_cast<std::int64_t>(p) * slot.plane_bytes,
          level_of(geometry.counts_, s), false};
      if (!geometry.planes_.empty()) {
        const Span before = span_of(geometry.counts_, geometry.planes_.back()), here = span_of(geometry.counts_, plane);
        plane.interleaved = before.begin < here.end && here.begin < before.end;
      }
      geometry.planes_.push_back(plane);
    }
  }
  geometry.first_plane_.push_back(geometry.planes_.size());
  return geometry;
}

Status CopyGeometry::check_layers(std::uint32_t layers) const {
  if (layers <= this->layers()) return {};
  return {Code::kInvalidArgument, "layers is " + std::to_string(layers) + ", must be at most " + std::to_string(this->layers())};
}

Status CopyGeometry::check_job(const CopyJob& job) const {
  if (job.layer_by_layer && job.direction != CopyDirection::kScatter) {
    return {Code::kInvalidArgument, "job " + std::to_string(job.id) + ": layer_by_layer is for loads, this is a store"};
  }
  if (replicated_ && rank_ != 0 && job.direction == CopyDirection::kGather) {
    return {Code::kInvalidArgument, "job " + std::to_string(job.id) + ": rank " + std::to_string(rank_) +
                                        " stores nothing: all ranks hold the same KV, and rank 0 stores it"};
  }
  for (std::size_t i = 0; i < job.block_ids.size(); ++i) {
    const std::int64_t id = job.block_ids[i];
    if (id < 0 || id >= counts_.num_blocks) {
      return {Code::kInvalidArgument, "job " + std::to_string(job.id) + ": block_ids[" + std::to_string(i) + "] is " +
                                          std::to_string(id) + ", must be in 0.." + std::to_string(counts_.num_blocks - 1)};
    }
  }
  std::unordered_map<std::uint64_t, std::uint32_t> generations;
  for (std::size_t i = 0; i < job.items.size(); ++i) {
    LMCN_RETURN_IF_ERROR(check_item(job, i));
    const auto [known, added] = generations.emplace(job.items[i].slot_offset, job.items[i].generation);
    if (!added && known->second != job.items[i].generation) {
      return wrong(job, i,
                   "generation is " + std::to_string(job.items[i].generation) + ", an earlier item of the same slot has " +
                       std::to_string(known->second));
    }
  }
  return {};
}

Status CopyGeometry::check_item(const CopyJob& job, std::size_t index) const {
  const CopyItem& item = job.items[index];
  if (item.tokens == 0) return wrong(job, index, "tokens is 0, must be >= 1");
  if (const std::int64_t end = static_cast<std::int64_t>(item.first_token) + item.tokens; end > chunk_tokens_) {
    return wrong(job, index, "first_token + tokens is " + std::to_string(end) + ", a chunk has " + std::to_string(chunk_tokens_));
  }
  if (item.token_in_block >= counts_.block_tokens) {
    return wrong(job, index,
                 "token_in_block is " + std::to_string(item.token_in_block) + ", a block has " +
                     std::to_string(counts_.block_tokens) + " tokens");
  }
  const auto needed = static_cast<std::uint64_t>(place_of(counts_, item, item.tokens - std::int64_t{1}).block_index) + 1;
  if (needed > job.block_ids.size()) {
    return wrong(job, index,
                 "its tokens reach block_ids[" + std::to_string(needed - 1) + "], the job has " +
                     std::to_string(job.block_ids.size()) + " block ids");
  }
  if (item.slot_offset % kPageBytes != 0) {
    return wrong(job, index, "slot_offset is " + std::to_string(item.slot_offset) + ", must be a multiple of 4096");
  }
  std::uint64_t image = 0;
  if (__builtin_mul_overflow(rank_bytes_, std::uint64_t{part()} + 1, &image) || __builtin_add_overflow(image, kPageBytes, &image) ||
      image > arena_bytes_ || item.slot_offset > arena_bytes_ - image) {
    return wrong(job, index,
                 "slot_offset is " + std::to_string(item.slot_offset) + ", a slot of " + std::to_string(image) +
                     " bytes up to rank " + std::to_string(part()) + "'s end must lie inside the arena of " +
                     std::to_string(arena_bytes_));
  }
  return {};
}

std::byte* CopyGeometry::rank_part(const CopyItem& item) const noexcept {
  return image(item) + kPageBytes + part() * rank_bytes_;
}

std::uint64_t CopyGeometry::item_bytes(const CopyItem& item) const noexcept {
  return static_cast<std::uint64_t>(counts_.token_bytes()) * item.tokens * planes_.size();
}

std::uint64_t CopyGeometry::job_bytes(const CopyJob& job) const noexcept {
  std::uint64_t bytes = 0;
  for (const CopyItem& item : job.items) bytes += item_bytes(item);
  return bytes;
}

}  // namespace lmcn
