// Where an element lies in paged memory and in a slot, and which bytes may move together: the one place where index arithmetic
// lives. Host and device code use it unchanged; everything below is inline and reads no global state.
//
// Arithmetic is signed 64-bit and cannot overflow for a layout that passed PagedKvLayout::validate() and an item that passed
// CopyGeometry::check_job(): both bound every product and sum that is formed here.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "lmcn/kv_layout.hpp"
#include "lmcn/paged_copy.hpp"

#if defined(__CUDACC__)
#define LMCN_HD __host__ __device__ __forceinline__
#else
#define LMCN_HD inline
#endif

namespace lmcn {

/// The largest unit of a plane whose bytes are contiguous on both sides.
enum class RunLevel : std::uint8_t {
  kElement,  // dim stride != element size (K transposed inside a block)
  kRow,      // one head of one token
  kToken,    // all heads of one token
  kBlock,    // all tokens of one block; adjacent blocks make longer runs
};

/// One plane of one layer, resolved for address arithmetic. Plain data.
struct PlaneGeometry {
  std::byte* base = nullptr;                             // engine memory: layer base + plane offset
  std::int64_t block = 0, token = 0, head = 0, dim = 0;  // byte strides
  std::int64_t slot = 0;                                 // of the plane in one rank's part of a slot, bytes
  RunLevel level = RunLevel::kElement;
  bool interleaved = false;  // with the plane before it: one allocation for certain, so runs may go on across both
};

/// Counts shared by all planes.
struct PageCounts {
  std::int64_t num_blocks = 0, block_tokens = 0, heads = 0, head_dim = 0, element_bytes = 0;
  LMCN_HD std::int64_t row_bytes() const { return head_dim * element_bytes; }
  LMCN_HD std::int64_t token_bytes() const { return heads * row_bytes(); }
};

/// Position of a token of an item: which entry of the job's block_ids, and where in that block.
struct TokenPlace {
  std::int64_t block_index = 0, token_in_block = 0;
};
LMCN_HD TokenPlace place_of(const PageCounts& counts, const CopyItem& item, std::int64_t token_of_item) {
  const std::int64_t t = static_cast<std::int64_t>(item.token_in_block) + token_of_item;
  return {static_cast<std::int64_t>(item.block_begin) + t / counts.block_tokens, t % counts.block_tokens};
}

LMCN_HD std::byte* paged_address(const PlaneGeometry& plane, std::int64_t block_id, std::int64_t token_in_block, std::int64_t head,
                                 std::int64_t dim) {
  return plane.base + (block_id * plane.block + token_in_block * plane.token + head * plane.head + dim * plane.dim);
}

/// Bytes from the start of the rank's part of the slot.
LMCN_HD std::int64_t slot_offset(const PlaneGeometry& plane, const PageCounts& counts, std::int64_t token_of_chunk,
                                 std::int64_t head, std::int64_t dim) {
  return plane.slot + (token_of_chunk * counts.heads + head) * counts.row_bytes() + dim * counts.element_bytes;
}

/// The whole map in one call: (plane, token of item, head, dim) -> both addresses.
struct ElementPlace {
  std::byte* paged = nullptr;
  std::int64_t slot = 0;
};
LMCN_HD ElementPlace element_place(const PlaneGeometry& plane, const PageCounts& counts, const CopyItem& item,
                                   const std::int64_t* block_ids, std::int64_t token_of_item, std::int64_t head, std::int64_t dim) {
  const TokenPlace at = place_of(counts, item, token_of_item);
  return {paged_address(plane, block_ids[at.block_index], at.token_in_block, head, dim),
          slot_offset(plane, counts, static_cast<std::int64_t>(item.first_token) + token_of_item, head, dim)};
}

/// One axis of a RunGroup: `count` steps, each moving both sides by its stride.
struct RunAxis {
  std::int64_t count = 1, paged = 0, slot = 0;
};

/// outer.count x inner.count runs of `bytes` contiguous bytes. A single run has both counts 1.
struct RunGroup {
  std::byte* paged = nullptr;
  std::int64_t slot = 0;
  std::int64_t bytes = 0;
  RunAxis outer, inner;
  LMCN_HD bool contiguous() const { return outer.count == 1 && inner.count == 1; }
};

/// The runs of `tokens` tokens of one block, for kElement of one head, else of all heads. `at`: of the first of them.
LMCN_HD RunGroup runs_from(const PlaneGeometry& plane, const PageCounts& counts, const ElementPlace& at, std::int64_t tokens) {
  const std::int64_t token_bytes = counts.token_bytes();
  RunGroup group{at.paged, at.slot, 0, {}, {}};
  switch (plane.level) {
    case RunLevel::kBlock:
      group.bytes = tokens * token_bytes;
      break;
    case RunLevel::kToken:
      group.bytes = token_bytes;
      group.inner = {tokens, plane.token, token_bytes};
      break;
    case RunLevel::kRow:
      group.bytes = counts.row_bytes();
      group.outer = {tokens, plane.token, token_bytes};
      group.inner = {counts.heads, plane.head, counts.row_bytes()};
      break;
    case RunLevel::kElement:
      group.bytes = counts.element_bytes;
      group.outer = {tokens, plane.token, token_bytes};
      group.inner = {counts.head_dim, plane.dim, counts.element_bytes};
      break;
  }
  return group;
}

/// The same of tokens [token_of_item, token_of_item + tokens) of an item, which lie in one block.
LMCN_HD RunGroup block_runs(const PlaneGeometry& plane, const PageCounts& counts, const CopyItem& item,
                            const std::int64_t* block_ids, std::int64_t token_of_item, std::int64_t tokens, std::int64_t head) {
  return runs_from(plane, counts, element_place(plane, counts, item, block_ids, token_of_item, head, 0), tokens);
}

/// Calls emit(const RunGroup&) for planes [plane_begin, plane_end) of an item, in slot order, each byte exactly once.
/// Single runs that continue each other on both sides are joined: neighbouring block ids, and planes or layers that are
/// interleaved in one allocation. Runs of separate allocations are never joined, even when their addresses touch.
template <class Emit>
void for_each_run(const PlaneGeometry* planes, const PageCounts& counts, const CopyItem& item, const std::int64_t* block_ids,
                  std::size_t plane_begin, std::size_t plane_end, Emit&& emit) {
  RunGroup pending;
  const auto flush = [&] {
    if (pending.bytes > 0) emit(static_cast<const RunGroup&>(pending));
    pending.bytes = 0;
  };
  for (std::size_t p = plane_begin; p < plane_end; ++p) {
    const PlaneGeometry& plane = planes[p];
    if (!plane.interleaved) flush();
    const std::int64_t heads = plane.level == RunLevel::kElement ? counts.heads : 1;
    for (std::int64_t token = 0; token < item.tokens;) {
      const std::int64_t in_block = place_of(counts, item, token).token_in_block;
      const std::int64_t tokens = std::min(counts.block_tokens - in_block, static_cast<std::int64_t>(item.tokens) - token);
      for (std::int64_t head = 0; head < heads; ++head) {
        const RunGroup group = block_runs(plane, counts, item, block_ids, token, tokens, head);
        if (!group.contiguous()) {
          flush();
          emit(group);
        } else if (pending.bytes > 0 && pending.paged + pending.bytes == group.paged &&
                   pending.slot + pending.bytes == group.slot) {
          pending.bytes += group.bytes;
        } else {
          flush();
          pending = group;
        }
      }
      token += tokens;
    }
  }
  flush();
}

}  // namespace lmcn
