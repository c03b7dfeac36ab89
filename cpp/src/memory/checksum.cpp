#include "memory/checksum.hpp"

#include <xxhash.h>

namespace lmcn {

std::uint64_t detail::checksum64_baseline(const std::byte* data, std::size_t bytes) noexcept {
  return XXH3_64bits(data, bytes);
}

std::uint64_t checksum64(const std::byte* data, std::size_t bytes) noexcept {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") != 0;
  if (has_avx2) return detail::checksum64_avx2(data, bytes);
#endif
  return detail::checksum64_baseline(data, bytes);
}

}  // namespace lmcn
