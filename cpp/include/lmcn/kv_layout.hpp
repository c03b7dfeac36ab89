// How KV lies in an engine's paged memory and in a slot. Pure data; shared by host and device code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "lmcn/status.hpp"

namespace lmcn {

/// Byte strides of one plane (K, V, or the single plane of MLA and of opaque pages) of one layer.
/// Address of element (block b, token t, head h, dim d):
///   base + offset + b*block + t*token + h*head + d*dim.
struct PlaneStrides {
  std::int64_t offset = 0;
  std::int64_t block = 0;
  std::int64_t token = 0;
  std::int64_t head = 0;
  std::int64_t dim = 0;
};

/// One layer's paged memory: `base` is an address in the engine's (host or device) memory, not owned.
struct PagedLayer {
  std::byte* base = nullptr;
  std::vector<PlaneStrides> planes;  // 1 or 2
};

/// An engine's paged KV cache as one rank sees it. All layers share counts; strides may differ per layer.
/// Opaque pages (layouts that are not strides) are the degenerate case block_tokens = heads = 1, one plane,
/// head_dim*element_bytes = page bytes: a "token" is then a whole block.
struct PagedKvLayout {
  std::vector<PagedLayer> layers;
  std::int64_t num_blocks = 0;
  std::int64_t block_tokens = 0;  // tokens per page/block
  std::int64_t heads = 0;         // KV heads of this rank
  std::int64_t head_dim = 0;
  std::int64_t element_bytes = 0;

  /// Opaque pages: layer l's block b occupies page_bytes bytes at bases[l] + b*block_stride.
  static PagedKvLayout opaque(const std::vector<std::byte*>& bases, std::int64_t num_blocks, std::int64_t page_bytes,
                              std::int64_t block_stride);

  /// Bytes of one token of one plane of one layer: heads*head_dim*element_bytes.
  std::int64_t token_bytes() const noexcept { return heads * head_dim * element_bytes; }
  Status validate() const;
};

/// Where each layer's part begins in one rank's part of a slot payload. Layout of bytes: [layer][plane][token][head][dim];
/// each layer's part is 4 KiB-aligned when it is >= 64 KiB, packed when smaller. The rank's part is a multiple of 4 KiB.
struct SlotLayout {
  std::vector<std::int64_t> layer_offset;  // bytes from the start of the rank's part
  std::int64_t chunk_tokens = 0;           // tokens (opaque: blocks) per chunk
  std::int64_t plane_bytes = 0;            // bytes of one plane of one layer: chunk_tokens*token_bytes
  std::int64_t rank_bytes = 0;             // one rank's part, 4 KiB multiple

  static Result<SlotLayout> make(const PagedKvLayout& paged, std::int64_t chunk_tokens);
  /// The same from sizes alone (the scheduler side knows no addresses).
  static Result<SlotLayout> make(std::int64_t layers, std::int64_t planes, std::int64_t token_bytes, std::int64_t chunk_tokens);
};

}  // namespace lmcn
