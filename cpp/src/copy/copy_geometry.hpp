// A paged layout and a slot layout, checked against each other and resolved for copying. Immutable, thread-safe.
#pragma once

#include <cstdint>
#include <vector>

#include "copy/paged_address.hpp"
#include "lmcn/kv_layout.hpp"
#include "lmcn/paged_copy.hpp"
#include "lmcn/status.hpp"

namespace lmcn {

class CopyGeometry {
 public:
  /// kInvalidArgument: `paged` is not valid, `slot` is not SlotLayout::make(paged, slot.chunk_tokens), rank >= 64, no arena.
  static Result<CopyGeometry> make(const PagedKvLayout& paged, const SlotLayout& slot, std::byte* arena_base,
                                   std::uint64_t arena_bytes, std::uint32_t rank, bool replicated = false);

  /// Everything that can be known before a byte moves: block ids, token ranges, places of slots. kInvalidArgument.
  Status check_job(const CopyJob& job) const;

  const PageCounts& counts() const noexcept { return counts_; }
  /// [layer][plane], in slot order.
  const std::vector<PlaneGeometry>& planes() const noexcept { return planes_; }
  std::size_t layers() const noexcept { return first_plane_.size() - 1; }
  /// Planes of layer l: [first_plane(l), first_plane(l + 1)).
  std::size_t first_plane(std::size_t layer) const noexcept { return first_plane_[layer]; }
  /// kInvalidArgument: more than layers().
  Status check_layers(std::uint32_t layers) const;
  std::uint32_t rank() const noexcept { return rank_; }
  /// CopierOptions::replicated: the part is not the rank's own, slots have one.
  bool replicated() const noexcept { return replicated_; }
  std::uint32_t part() const noexcept { return replicated_ ? 0 : rank_; }
  std::uint64_t rank_bytes() const noexcept { return rank_bytes_; }
  std::byte* image(const CopyItem& item) const noexcept { return arena_base_ + item.slot_offset; }
  /// The part of the slot that this rank copies. Inside the arena for an item that passed check_job().
  std::byte* rank_part(const CopyItem& item) const noexcept;
  /// Payload bytes of an item: all layers and planes.
  std::uint64_t item_bytes(const CopyItem& item) const noexcept;
  std::uint64_t job_bytes(const CopyJob& job) const noexcept;

  /// paged_address.hpp's for_each_run over planes [plane_begin, plane_end) of an item.
  template <class Emit>
  void for_each_run(const CopyJob& job, const CopyItem& item, std::size_t plane_begin, std::size_t plane_end, Emit&& emit) const {
    lmcn::for_each_run(planes_.data(), counts_, item, job.block_ids.data(), plane_begin, plane_end, static_cast<Emit&&>(emit));
  }

 private:
  CopyGeometry() = default;
  Status check_item(const CopyJob& job, std::size_t index) const;

  PageCounts counts_;
  std::vector<PlaneGeometry> planes_;
  std::vector<std::size_t> first_plane_;  // of each layer, and one past the last plane
  std::int64_t chunk_tokens_ = 0;
  std::uint64_t rank_bytes_ = 0;
  std::uint32_t rank_ = 0;
  bool replicated_ = false;
  std::byte* arena_base_ = nullptr;
  std::uint64_t arena_bytes_ = 0;
};

}  // namespace lmcn
