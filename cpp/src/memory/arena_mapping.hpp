// A shared mapping of a memfd at a 2 MiB-aligned address (only there can it be backed by huge pages).
#pragma once

#include <cstddef>
#include <cstdint>

#include "lmcn/status.hpp"

namespace lmcn {

inline constexpr std::uint64_t kHugePageBytes = 2ull << 20;

/// Read-write, shared, left out of core dumps. REQUIRES: bytes > 0. The caller unmaps [result, result + bytes).
/// No MADV_DONTFORK: a shared mapping has no copy-on-write for a fork to upset and its page tables are not copied.
Result<std::byte*> map_shared_aligned(int memfd, std::uint64_t bytes);

}  // namespace lmcn
