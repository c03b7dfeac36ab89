// The one translation unit that is compiled for AVX2. Everything xxhash.h pulls in comes first, so that nothing with external
// linkage (no inline function of the C++ library) is compiled for a CPU that may not be the one we run on.
#include "memory/checksum.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
#define XXH_VECTOR 2  // XXH_AVX2; the name is defined by the header itself
#include <xxhash.h>
static_assert(XXH_VECTOR == XXH_AVX2);

std::uint64_t lmcn::detail::checksum64_avx2(const std::byte* data, std::size_t bytes) noexcept {
  return XXH3_64bits(data, bytes);
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
