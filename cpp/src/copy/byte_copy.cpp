#include "copy/byte_copy.hpp"

#include <cstring>

#include "copy/transpose.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lmcn {
namespace {

// Below this a run's unaligned head and tail cost more than the cache gains.
constexpr std::int64_t kMinNonTemporalRunBytes = 512;

#if defined(__x86_64__)
// `to` is 64-byte aligned, `bytes` a multiple of 64.
using StreamLines = void (*)(std::byte* to, const std::byte* from, std::size_t bytes);

__attribute__((target("avx512f"))) void stream_avx512(std::byte* to, const std::byte* from, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
}

__attribute__((target("avx2"))) void stream_avx2(std::byte* to, const std::byte* from, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
  }
}

void stream_sse2(std::byte* to, const std::byte* from, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
}

struct StreamPath {
  const char* name;
  StreamLines lines;
};
const StreamPath& stream_path() {
  static const StreamPath path = __builtin_cpu_supports("avx512f") ? StreamPath{"avx512", stream_avx512}
                                 : __builtin_cpu_supports("avx2")  ? StreamPath{"avx2", stream_avx2}
                                                                   : StreamPath{"sse2", stream_sse2};
  return path;
}
#endif

struct Copy {
  std::byte* to;
  const std::byte* from;
  RunAxis outer, inner;  // here .paged is the stride of `from` and .slot that of `to`
};

template <std::size_t kBytes>
void copy_elements(const Copy& c) {
  constexpr auto kStep = static_cast<std::int64_t>(kBytes);
  if (c.outer.paged == kStep && c.inner.slot == kStep) {
    return transpose<kBytes>({c.to, c.outer.slot}, {c.from, c.inner.paged}, c.inner.count, c.outer.count);
  }
  if (c.outer.slot == kStep && c.inner.paged == kStep) {
    return transpose<kBytes>({c.to, c.inner.slot}, {c.from, c.outer.paged}, c.outer.count, c.inner.count);
  }
  for (std::int64_t o = 0; o < c.outer.count; ++o) {
    std::byte* to = c.to + o * c.outer.slot;
    const std::byte* from = c.from + o * c.outer.paged;
    for (std::int64_t i = 0; i < c.inner.count; ++i) std::memcpy(to + i * c.inner.slot, from + i * c.inner.paged, kBytes);
  }
}

void copy_runs(const Copy& c, std::size_t bytes, bool non_temporal) {
  for (std::int64_t o = 0; o < c.outer.count; ++o) {
    std::byte* to = c.to + o * c.outer.slot;
    const std::byte* from = c.from + o * c.outer.paged;
    for (std::int64_t i = 0; i < c.inner.count; ++i) {
      if (non_temporal) {
        copy_non_temporal(to + i * c.inner.slot, from + i * c.inner.paged, bytes);
      } else {
        std::memcpy(to + i * c.inner.slot, from + i * c.inner.paged, bytes);
      }
    }
  }
}

}  // namespace

#if defined(__x86_64__)
void copy_non_temporal(std::byte* to, const std::byte* from, std::size_t bytes) noexcept {
  const std::size_t head = (64 - reinterpret_cast<std::uintptr_t>(to) % 64) % 64;
  if (bytes < head + 64) {
    std::memcpy(to, from, bytes);
    return;
  }
  const std::size_t lines = (bytes - head) / 64 * 64;
  std::memcpy(to, from, head);
  stream_path().lines(to + head, from + head, lines);
  std::memcpy(to + head + lines, from + head + lines, bytes - head - lines);
}
void fence_non_temporal() noexcept {
  _mm_sfence();
}
const char* non_temporal_path() noexcept {
  return stream_path().name;
}
#else
void copy_non_temporal(std::byte* to, const std::byte* from, std::size_t bytes) noexcept {
  std::memcpy(to, from, bytes);
}
void fence_non_temporal() noexcept {}
const char* non_temporal_path() noexcept {
  return "memcpy";
}
#endif

void copy_group(const RunGroup& group, std::byte* rank_part, CopyDirection direction, bool non_temporal) noexcept {
  Copy copy{rank_part + group.slot, group.paged, group.outer, group.inner};
  if (direction == CopyDirection::kScatter) {
    copy = {group.paged,
            rank_part + group.slot,
            {group.outer.count, group.outer.slot, group.outer.paged},
            {group.inner.count, group.inner.slot, group.inner.paged}};
    non_temporal = false;
  }
  switch (group.bytes) {
    case 1:
      return copy_elements<1>(copy);
    case 2:
      return copy_elements<2>(copy);
    case 4:
      return copy_elements<4>(copy);
    case 8:
      return copy_elements<8>(copy);
    default:
      return copy_runs(copy, static_cast<std::size_t>(group.bytes), non_temporal && group.bytes >= kMinNonTemporalRunBytes);
  }
}

}  // namespace lmcn
