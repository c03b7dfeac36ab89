// XXH3-64 with the widest vectors this CPU has (the build itself targets the baseline).
#pragma once

#include <cstddef>
#include <cstdint>

namespace lmcn {

/// Same value on every CPU. Thread-safe.
std::uint64_t checksum64(const std::byte* data, std::size_t bytes) noexcept;

namespace detail {
std::uint64_t checksum64_baseline(const std::byte* data, std::size_t bytes) noexcept;
#if defined(__x86_64__)
/// REQUIRES: the CPU has AVX2.
std::uint64_t checksum64_avx2(const std::byte* data, std::size_t bytes) noexcept;
#endif
}  // namespace detail

}  // namespace lmcn
