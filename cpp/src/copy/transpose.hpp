// Transposed copies of small elements: K pages that hold [dim][token] against slots that hold [token][dim].
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace lmcn {

/// A matrix of elements that lie next to each other in a row; rows are `pitch` bytes apart.
template <class Byte>
struct ElementRows {
  Byte* first;
  std::int64_t pitch;
};

/// to[c][r] = from[r][c] for r < rows, c < columns, element by element.
template <std::size_t kBytes>
void transpose_each(ElementRows<std::byte> to, ElementRows<const std::byte> from, std::int64_t rows,
                    std::int64_t columns) noexcept {
  constexpr auto kStep = static_cast<std::int64_t>(kBytes);
  for (std::int64_t c = 0; c < columns; ++c)
    for (std::int64_t r = 0; r < rows; ++r)
      std::memcpy(to.first + c * to.pitch + r * kStep, from.first + r * from.pitch + c * kStep, kBytes);
}

#if defined(__x86_64__)
template <std::size_t kBytes>
void interleave(__m128i a, __m128i b, __m128i& low, __m128i& high) noexcept {
  if constexpr (kBytes == 1) low = _mm_unpacklo_epi8(a, b), high = _mm_unpackhi_epi8(a, b);
  if constexpr (kBytes == 2) low = _mm_unpacklo_epi16(a, b), high = _mm_unpackhi_epi16(a, b);
  if constexpr (kBytes == 4) low = _mm_unpacklo_epi32(a, b), high = _mm_unpackhi_epi32(a, b);
  if constexpr (kBytes == 8) low = _mm_unpacklo_epi64(a, b), high = _mm_unpackhi_epi64(a, b);
}

// A square of 16-byte rows. Interleaving row i with row i + n/2, log2(n) times, transposes it.
template <std::size_t kBytes>
void transpose_tile(std::byte* to, std::int64_t to_pitch, const std::byte* from, std::int64_t from_pitch) noexcept {
  constexpr std::size_t kSide = 16 / kBytes;
  __m128i rows[kSide], next[kSide];
  for (std::size_t i = 0; i < kSide; ++i) {
    rows[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + static_cast<std::int64_t>(i) * from_pitch));
  }
  for (std::size_t stage = 1; stage < kSide; stage *= 2) {
    for (std::size_t i = 0; i < kSide / 2; ++i) {
      interleave<kBytes>(rows[i], rows[i + kSide / 2], next[2 * i], next[2 * i + 1]);
    }
    for (std::size_t i = 0; i < kSide; ++i) rows[i] = next[i];
  }
  for (std::size_t i = 0; i < kSide; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + static_cast<std::int64_t>(i) * to_pitch), rows[i]);
  }
}

template <std::size_t kBytes>
void transpose(ElementRows<std::byte> to, ElementRows<const std::byte> from, std::int64_t rows, std::int64_t columns) noexcept {
  constexpr auto kStep = static_cast<std::int64_t>(kBytes);
  constexpr std::int64_t kSide = 16 / kStep;
  const std::int64_t whole_rows = rows / kSide * kSide, whole_columns = columns / kSide * kSide;
  for (std::int64_t c = 0; c < whole_columns; c += kSide) {
    for (std::int64_t r = 0; r < whole_rows; r += kSide) {
      transpose_tile<kBytes>(to.first + c * to.pitch + r * kStep, to.pitch, from.first + r * from.pitch + c * kStep, from.pitch);
    }
  }
  // What is left: the last rows of all columns, and the last columns of the whole rows.
  transpose_each<kBytes>({to.first + whole_rows * kStep, to.pitch}, {from.first + whole_rows * from.pitch, from.pitch},
                         rows - whole_rows, columns);
  transpose_each<kBytes>({to.first + whole_columns * to.pitch, to.pitch}, {from.first + whole_columns * kStep, from.pitch},
                         whole_rows, columns - whole_columns);
}
#else
template <std::size_t kBytes>
void transpose(ElementRows<std::byte> to, ElementRows<const std::byte> from, std::int64_t rows, std::int64_t columns) noexcept {
  transpose_each<kBytes>(to, from, rows, columns);
}
#endif

}  // namespace lmcn
