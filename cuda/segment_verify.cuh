// The kernel that takes the checksums of slot images in the device's memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace lmcn {

inline constexpr std::uint32_t kSegmentMatches = 1, kSegmentDiffers = 2;
inline constexpr std::size_t kVerifyHeaderBytes = 4096;

/// One image. All addresses are the device's and multiples of 16.
struct VerifyTask {
  const std::byte* header = nullptr;   // kVerifyHeaderBytes, copied to header_copy
  const std::byte* payload = nullptr;  // payload_bytes
  const std::uint64_t* table = nullptr;
  std::byte* header_copy = nullptr;
  std::uint32_t* results = nullptr;  // one word per segment: kSegmentMatches or kSegmentDiffers
  std::uint64_t payload_bytes = 0;
  std::uint64_t segment_bytes = 0;  // a multiple of 16
};

/// Enqueues one launch over tasks[0..images), each of at most `segments` segments. REQUIRES: 1 <= images <= 65535, segments >= 1.
cudaError_t enqueue_segment_verify(const VerifyTask* tasks, unsigned images, unsigned segments, cudaStream_t stream);

}  // namespace lmcn
