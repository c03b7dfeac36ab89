#include "lmcn/kv_layout.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <new>

#include "arguments.hpp"
#include "bindings.hpp"
#include "status.hpp"

namespace lmcn::python {
namespace {

std::byte* address(std::uint64_t value) {
  return reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(value));
}

PagedKvLayout checked(PagedKvLayout layout) {
  throw_if_error(layout.validate());
  return layout;
}

PagedKvLayout opaque(nb::handle bases, std::int64_t num_blocks, std::int64_t page_bytes, std::int64_t block_stride) {
  std::vector<std::byte*> addresses;
  for (std::uint64_t base : integers<std::uint64_t>(bases, "bases")) addresses.push_back(address(base));
  return checked(PagedKvLayout::opaque(addresses, num_blocks, page_bytes, block_stride));
}

PagedKvLayout strided(const std::vector<std::pair<std::uint64_t, std::vector<PlaneStrides>>>& layers, std::int64_t num_blocks,
                      std::int64_t block_tokens, std::int64_t heads, std::int64_t head_dim, std::int64_t element_bytes) {
  PagedKvLayout layout;
  for (const auto& [base, planes] : layers) layout.layers.push_back({address(base), planes});
  layout.num_blocks = num_blocks;
  layout.block_tokens = block_tokens;
  layout.heads = heads;
  layout.head_dim = head_dim;
  layout.element_bytes = element_bytes;
  return checked(std::move(layout));
}

}  // namespace

void init_kv_layout(nb::module_& module) {
  nb::class_<PlaneStrides>(
      module, "PlaneStrides",
      "Byte strides of one plane (K, V, or MLA's only one) of one layer: element (block b, token t, head h, dim d) lies at\n"
      "base + offset + b*block + t*token + h*head + d*dim.")
      .def(
          "__init__",
          [](PlaneStrides* self, std::int64_t offset, std::int64_t block, std::int64_t token, std::int64_t head, std::int64_t dim) {
            new (self) PlaneStrides{offset, block, token, head, dim};
          },
          nb::kw_only(), nb::arg("offset") = 0, nb::arg("block"), nb::arg("token"), nb::arg("head"), nb::arg("dim"))
      .def_ro("offset", &PlaneStrides::offset)
      .def_ro("block", &PlaneStrides::block)
      .def_ro("token", &PlaneStrides::token)
      .def_ro("head", &PlaneStrides::head)
      .def_ro("dim", &PlaneStrides::dim);

  nb::class_<PagedKvLayout>(
      module, "PagedKvLayout",
      "How one rank's paged KV cache lies in memory. Holds addresses, owns nothing: the memory must outlive every copier made\n"
      "with it (PagedCopier's `owner` can keep it alive).")
      .def_static("opaque", opaque, nb::arg("bases").none(), nb::arg("num_blocks"), nb::arg("page_bytes"), nb::arg("block_stride"),
                  nb::sig("def opaque(bases: lmcache_native._types.IntArray, num_blocks: int, page_bytes: int, block_stride: int) "
                          "-> PagedKvLayout"),
                  "Pages copied as they are: layer l's block b is the page_bytes bytes at address bases[l] + b*block_stride. A "
                  "'token' of such a\n"
                  "layout is a whole block. InvalidArgument when a size is not positive or pages overlap.")
      .def_static("strided", strided, nb::kw_only(), nb::arg("layers"), nb::arg("num_blocks"), nb::arg("block_tokens"),
                  nb::arg("heads"), nb::arg("head_dim"), nb::arg("element_bytes"),
                  nb::sig("def strided(*, layers: collections.abc.Sequence[tuple[int, collections.abc.Sequence[PlaneStrides]]], "
                          "num_blocks: int, "
                          "block_tokens: int, heads: int, head_dim: int, element_bytes: int) -> PagedKvLayout"),
                  "layers: per layer its base address and the strides of its 1 or 2 planes. heads: KV heads of this rank.\n"
                  "InvalidArgument names what is inconsistent.")
      .def_ro("num_blocks", &PagedKvLayout::num_blocks)
      .def_ro("block_tokens", &PagedKvLayout::block_tokens, "Tokens per block; 1 when opaque.")
      .def_ro("heads", &PagedKvLayout::heads)
      .def_ro("head_dim", &PagedKvLayout::head_dim)
      .def_ro("element_bytes", &PagedKvLayout::element_bytes)
      .def_prop_ro(
          "layers", [](const PagedKvLayout& layout) { return layout.layers.size(); }, "Number of layers.")
      .def_prop_ro("token_bytes", &PagedKvLayout::token_bytes, "Bytes of one token of one plane of one layer.");

  nb::class_<SlotLayout>(module, "SlotLayout",
                         "Where each layer's part begins in one rank's part of a slot: [layer][plane][token][head][dim], a layer 4 "
                         "KiB-aligned when it is\n"
                         ">= 64 KiB. One rank's part is a multiple of 4 KiB.")
      .def_static(
          "make", [](const PagedKvLayout& paged, std::int64_t chunk_tokens) { return take(SlotLayout::make(paged, chunk_tokens)); },
          nb::arg("paged"), nb::arg("chunk_tokens"), "chunk_tokens: tokens (opaque: blocks) per chunk. InvalidArgument when < 1.")
      .def_static(
          "from_sizes",
          [](std::int64_t layers, std::int64_t planes, std::int64_t token_bytes, std::int64_t chunk_tokens) {
            return take(SlotLayout::make(layers, planes, token_bytes, chunk_tokens));
          },
          nb::kw_only(), nb::arg("layers"), nb::arg("planes"), nb::arg("token_bytes"), nb::arg("chunk_tokens"),
          "The same from sizes alone, for the scheduler's side, which knows no addresses. token_bytes: of one plane of one layer.")
      .def_ro("layer_offset", &SlotLayout::layer_offset, "Bytes from the start of the rank's part, per layer.")
      .def_ro("chunk_tokens", &SlotLayout::chunk_tokens, "Tokens (opaque: blocks) per chunk.")
      .def_ro("plane_bytes", &SlotLayout::plane_bytes, "Bytes of one plane of one layer.")
      .def_ro("rank_bytes", &SlotLayout::rank_bytes, "Bytes of one rank's part; a slot's payload is rank_count times this.");
}

}  // namespace lmcn::python
