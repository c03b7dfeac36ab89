#include "launch.cuh"
#include "segment_verify.cuh"
#include "xxh3.cuh"

namespace lmcn {
namespace {

constexpr unsigned kThreads = 256;
// Each thread adds up two lanes of one block.
constexpr unsigned kPairs = xxh3::kLanes / 2, kBlocksAtOnce = kThreads / kPairs;

/// The two lanes `pair` of a stripe.
struct PairSum {
  std::uint64_t even = 0, odd = 0;
  __device__ __forceinline__ void add(std::uint64_t even_value, std::uint64_t odd_value, std::uint64_t even_key,
                                      std::uint64_t odd_key) {
    even += xxh3::product_of(even_value, even_key) + odd_value;
    odd += xxh3::product_of(odd_value, odd_key) + even_value;
  }
};

/// What a block adds to a pair of lanes. `keys`: the secret from the pair's first word on.
__device__ __forceinline__ PairSum sum_stripes(const std::byte* block, unsigned pair, unsigned stripes, const std::uint64_t* keys) {
  PairSum sum;
#pragma unroll 8
  for (unsigned stripe = 0; stripe < stripes; ++stripe) {
    const auto* const from = reinterpret_cast<const ulonglong2*>(block + stripe * xxh3::kStripeBytes) + pair;
    const ulonglong2 value = load_once(from);
    sum.add(value.x, value.y, keys[stripe], keys[stripe + 1]);
  }
  return sum;
}

/// More than 240 bytes, by all threads of the block. The result is right in thread 0.
__device__ std::uint64_t hash_long(const std::byte* data, std::uint64_t bytes) {
  __shared__ std::uint64_t secret[xxh3::kSecretWords];
  __shared__ std::uint64_t sums[2][kBlocksAtOnce][xxh3::kLanes];
  __shared__ std::uint64_t last[xxh3::kLanes];
  const unsigned thread = threadIdx.x, pair = thread % kPairs, row = thread / kPairs;
  if (thread < xxh3::kSecretWords) secret[thread] = xxh3::kSecret[thread];
  __syncthreads();

  // After each whole block comes a scramble; the last block, of 0 to 15 stripes and the input's last 64 bytes, has none.
  const std::uint64_t whole_blocks = (bytes - 1) / xxh3::kBlockBytes;
  std::uint64_t lane_sum = xxh3::kInitialSums[thread % xxh3::kLanes];
  unsigned half = 0;  // threads of the chain may read one half while others write the other
  for (std::uint64_t first = 0; first <= whole_blocks; first += kBlocksAtOnce, half ^= 1) {
    if (const std::uint64_t block = first + row; block <= whole_blocks) {
      const bool whole = block < whole_blocks;
      const auto stripes =
          whole ? xxh3::kStripesPerBlock : static_cast<unsigned>((bytes - 1) % xxh3::kBlockBytes / xxh3::kStripeBytes);
      PairSum sum = sum_stripes(data + block * xxh3::kBlockBytes, pair, stripes, secret + 2 * pair);
      if (!whole) {
        const std::byte* const from = data + bytes - xxh3::kStripeBytes + 16 * pair;
        sum.add(xxh3::read<8>(from), xxh3::read<8>(from + 8), xxh3::secret_at(121 + 16 * pair), xxh3::secret_at(129 + 16 * pair));
      }
      sums[half][row][2 * pair] = sum.even;
      sums[half][row][2 * pair + 1] = sum.odd;
    }
    __syncthreads();
    if (thread < xxh3::kLanes) {
      for (std::uint64_t block = first; block < first + kBlocksAtOnce && block <= whole_blocks; ++block) {
        lane_sum += sums[half][block - first][thread];
        if (block < whole_blocks) lane_sum = xxh3::scramble(lane_sum, thread);
      }
    }
  }
  if (thread < xxh3::kLanes) last[thread] = lane_sum;
  __syncthreads();
  return thread == 0 ? xxh3::merge(last, bytes) : 0;
}

/// Block (x, y): segment x of image y.
__global__ void __launch_bounds__(kThreads) verify_segments(const VerifyTask* tasks) {
  const VerifyTask task = load(tasks + blockIdx.y);
  const std::uint64_t begin = blockIdx.x * task.segment_bytes;
  if (begin >= task.payload_bytes) return;  // the whole block
  if (blockIdx.x == 0) {
    const auto* const from = reinterpret_cast<const uint4*>(task.header);
    auto* const to = reinterpret_cast<uint4*>(task.header_copy);
    for (unsigned i = threadIdx.x; i < kVerifyHeaderBytes / sizeof(uint4); i += kThreads) store_once(to + i, load_once(from + i));
  }
  const std::byte* const data = task.payload + begin;
  const std::uint64_t left = task.payload_bytes - begin, bytes = left < task.segment_bytes ? left : task.segment_bytes;
  std::uint64_t hash = 0;
  if (bytes > xxh3::kLongestShortBytes) {
    hash = hash_long(data, bytes);
  } else if (threadIdx.x == 0) {
    hash = xxh3::hash_short(data, static_cast<unsigned>(bytes));
  }
  if (threadIdx.x == 0) store(task.results + blockIdx.x, hash == load(task.table + blockIdx.x) ? kSegmentMatches : kSegmentDiffers);
}

}  // namespace

cudaError_t enqueue_segment_verify(const VerifyTask* tasks, unsigned images, unsigned segments, cudaStream_t stream) {
  return launch<Threads::kInStep>(verify_segments, dim3(segments, images), dim3(kThreads), stream, tasks);
}

}  // namespace lmcn
