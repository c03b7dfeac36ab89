#include "lmcn/kv_layout.hpp"

#include <algorithm>
#include <array>
#include <string>

namespace lmcn {
namespace {

constexpr std::int64_t kSlotAlign = 4096;
constexpr std::int64_t kAlignedLayerBytes = 64 * 1024;

Status invalid(const std::string& field, const std::string& value, const std::string& right) {
  return {Code::kInvalidArgument, field + " is " + value + ", must be " + right};
}
Status invalid(const std::string& field, std::int64_t value, const std::string& right) {
  return invalid(field, std::to_string(value), right);
}

// false: the product or sum does not fit.
bool multiply(std::int64_t a, std::int64_t b, std::int64_t& out) {
  return !__builtin_mul_overflow(a, b, &out);
}
bool add(std::int64_t a, std::int64_t b, std::int64_t& out) {
  return !__builtin_add_overflow(a, b, &out);
}
bool round_up(std::int64_t value, std::int64_t& out) {
  if (!add(value, kSlotAlign - 1, out)) return false;
  out -= out % kSlotAlign;
  return true;
}

struct Axis {
  const char* name;
  std::int64_t count;
  std::int64_t stride;
};

// Strides must nest: sorted by size, each axis steps over all that lies below it. Then no two elements of a plane share a byte,
// and the extent (one past the last byte) is a plain sum.
Status check_nesting(const std::string& where, std::array<Axis, 4> axes, std::int64_t element_bytes, std::int64_t& extent) {
  std::stable_sort(axes.begin(), axes.end(), [](const Axis& a, const Axis& b) { return a.stride < b.stride; });
  extent = element_bytes;
  for (const Axis& axis : axes) {
    if (axis.count == 1) continue;
    if (axis.stride < extent) {
      return invalid(where + "." + axis.name, axis.stride,
                     ">= " + std::to_string(extent) + " bytes: elements of this plane would share bytes");
    }
    std::int64_t reach = 0;
    if (!multiply(axis.count - 1, axis.stride, reach) || !add(extent, reach, extent)) {
      return invalid(where + "." + axis.name, axis.stride, "small enough for the plane's extent to fit in 63 bits");
    }
  }
  return {};
}

Status check_plane(const PagedKvLayout& kv, std::size_t layer, std::size_t plane) {
  const PlaneStrides& s = kv.layers[layer].planes[plane];
  const std::string where = "layers[" + std::to_string(layer) + "].planes[" + std::to_string(plane) + "]";
  const bool rows = kv.head_dim == 1 || s.dim == kv.element_bytes;
  if (!rows && kv.element_bytes != 1 && kv.element_bytes != 2 && kv.element_bytes != 4 && kv.element_bytes != 8) {
    return {Code::kUnsupported, where + ".dim is " + std::to_string(s.dim) + " with element_bytes " +
                                    std::to_string(kv.element_bytes) +
                                    "; a dim stride other than element_bytes needs 1, 2, 4 or 8"};
  }
  std::int64_t extent = 0;
  LMCN_RETURN_IF_ERROR(check_nesting(where,
                                     {{{"dim", kv.head_dim, s.dim},
                                       {"head", kv.heads, s.head},
                                       {"token", kv.block_tokens, s.token},
                                       {"block", kv.num_blocks, s.block}}},
                                     kv.element_bytes, extent));
  const auto base = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(kv.layers[layer].base));
  std::int64_t begin = 0, end = 0;
  if (!add(base, s.offset, begin) || begin <= 0 || !add(begin, extent, end)) {
    return invalid(where + ".offset", s.offset, "such that base + offset + extent (" + std::to_string(extent) + ") is an address");
  }
  return {};
}

}  // namespace

PagedKvLayout PagedKvLayout::opaque(const std::vector<std::byte*>& bases, std::int64_t num_blocks, std::int64_t page_bytes,
                                    std::int64_t block_stride) {
  PagedKvLayout kv;
  kv.num_blocks = num_blocks;
  kv.block_tokens = 1;
  kv.heads = 1;
  kv.head_dim = page_bytes;
  kv.element_bytes = 1;
  const PlaneStrides page{.offset = 0, .block = block_stride, .token = page_bytes, .head = page_bytes, .dim = 1};
  for (std::byte* base : bases) kv.layers.push_back({base, {page}});
  return kv;
}

Status PagedKvLayout::validate() const {
  struct Count {
    const char* name;
    std::int64_t value;
  };
  for (const Count& count : {Count{"num_blocks", num_blocks}, Count{"block_tokens", block_tokens}, Count{"heads", heads},
                             Count{"head_dim", head_dim}, Count{"element_bytes", element_bytes}}) {
    if (count.value < 1) return invalid(count.name, count.value, ">= 1");
  }
  std::int64_t bytes = 0;
  if (!multiply(heads, head_dim, bytes) || !multiply(bytes, element_bytes, bytes) || !multiply(bytes, block_tokens, bytes)) {
    return invalid("block_tokens*heads*head_dim*element_bytes", "over 63 bits", "the bytes of one plane of one block");
  }
  if (layers.empty()) return invalid("layers", "empty", "one entry per layer");
  const std::size_t planes = layers.front().planes.size();
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const std::string where = "layers[" + std::to_string(l) + "]";
    const PagedLayer& layer = layers[l];
    if (layer.base == nullptr) return invalid(where + ".base", "null", "the address of the layer's paged memory");
    if (layer.planes.empty() || layer.planes.size() > 2) {
      return invalid(where + ".planes", static_cast<std::int64_t>(layer.planes.size()), "1 (MLA, opaque) or 2 (K and V) entries");
    }
    if (layer.planes.size() != planes) {
      return invalid(where + ".planes", static_cast<std::int64_t>(layer.planes.size()),
                     std::to_string(planes) + " as in layers[0]");
    }
    for (std::size_t p = 0; p < planes; ++p) LMCN_RETURN_IF_ERROR(check_plane(*this, l, p));
    if (planes == 2 && layer.planes[0].offset == layer.planes[1].offset) {
      return invalid(where + ".planes[1].offset", layer.planes[1].offset,
                     "other than that of planes[0]: K and V would share bytes");
    }
  }
  return {};
}

Result<SlotLayout> SlotLayout::make(const PagedKvLayout& paged, std::int64_t chunk_tokens) {
  LMCN_RETURN_IF_ERROR(paged.validate());
  return make(static_cast<std::int64_t>(paged.layers.size()), static_cast<std::int64_t>(paged.layers.front().planes.size()),
              paged.token_bytes(), chunk_tokens);
}

Result<SlotLayout> SlotLayout::make(std::int64_t layers, std::int64_t planes, std::int64_t token_bytes, std::int64_t chunk_tokens) {
  if (layers < 1) return invalid("layers", layers, ">= 1");
  if (planes < 1 || planes > 2) return invalid("planes", planes, "1 (MLA, opaque) or 2 (K and V)");
  if (token_bytes < 1) return invalid("token_bytes", token_bytes, ">= 1: heads*head_dim*element_bytes");
  if (chunk_tokens < 1 || chunk_tokens > INT32_MAX) return invalid("chunk_tokens", chunk_tokens, "in 1..2147483647");
  SlotLayout slot;
  slot.chunk_tokens = chunk_tokens;
  std::int64_t layer_bytes = 0, layer_step = 0, total = 0;
  bool fits = multiply(chunk_tokens, token_bytes, slot.plane_bytes) && multiply(slot.plane_bytes, planes, layer_bytes);
  layer_step = layer_bytes;
  if (fits && layer_bytes >= kAlignedLayerBytes) fits = round_up(layer_bytes, layer_step);
  if (!fits || !multiply(layers, layer_step, total) || !round_up(total, slot.rank_bytes)) {
    return invalid("layers*planes*chunk_tokens*token_bytes", "over 63 bits", "the bytes of one rank's part of a chunk");
  }
  slot.layer_offset.reserve(static_cast<std::size_t>(layers));
  for (std::int64_t l = 0; l < layers; ++l) slot.layer_offset.push_back(l * layer_step);
  return slot;
}

}  // namespace lmcn
