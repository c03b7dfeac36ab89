// Moving the bytes of a RunGroup on the host.
#pragma once

#include <cstddef>
#include <cstdint>

#include "copy/paged_address.hpp"

namespace lmcn {

/// memcpy with stores that bypass the cache where the processor has them. Call fence_non_temporal() on the same thread before
/// anything else may rely on the bytes.
void copy_non_temporal(std::byte* to, const std::byte* from, std::size_t bytes) noexcept;
void fence_non_temporal() noexcept;
/// "avx512" | "avx2" | "sse2" | "memcpy"
const char* non_temporal_path() noexcept;

/// Copies one group between paged memory and the rank's part of a slot. `non_temporal` concerns stores to the slot only:
/// paged memory is about to be read by the model.
void copy_group(const RunGroup& group, std::byte* rank_part, CopyDirection direction, bool non_temporal) noexcept;

}  // namespace lmcn
