#include "batch_copy.hpp"

#include <string>

#include "cuda_error.hpp"

namespace lmcn {
namespace {

// cuda.h has these from 12.8 on; the layout is that of the functions' version and does not change.
enum SourceOrder : int { kStreamOrder = 1, kAnyOrder = 3 };  // CU_MEMCPY_SRC_ACCESS_ORDER_*
constexpr unsigned kPreferOverlapWithCompute = 1;            // CU_MEMCPY_FLAG_*
struct Location {
  int type = 0, id = 0;
};
struct Attributes {
  int source_order = 0;
  Location source_hint, destination_hint;  // of managed memory only
  unsigned flags = 0;
};
static_assert(sizeof(Attributes) == 24);

using Batch12080 = int (*)(std::uint64_t* to, std::uint64_t* from, std::size_t* bytes, std::size_t count, Attributes* attributes,
                           std::size_t* attribute_begin, std::size_t attribute_count, std::size_t* failed, cudaStream_t stream);
using Batch13000 = int (*)(std::uint64_t* to, std::uint64_t* from, std::size_t* bytes, std::size_t count, Attributes* attributes,
                           std::size_t* attribute_begin, std::size_t attribute_count, cudaStream_t stream);

}  // namespace

#if CUDART_VERSION >= 12050
Result<BatchCopy> BatchCopy::look_up() {
  Status last;
  for (const unsigned version : {13000u, 12080u}) {
    BatchCopy batch;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    // An older driver answers with an error to a version that it does not know.
    last = cuda_check(
        cudaGetDriverEntryPointByVersion("cuMemcpyBatchAsync", &batch.function_, version, cudaEnableLegacyStream, &found),
        "cudaGetDriverEntryPointByVersion", Code::kUnavailable);
    if (!last.ok()) continue;
    batch.reports_index_ = version == 12080;
    if (found == cudaDriverEntryPointSuccess && batch.function_ != nullptr) return batch;
  }
  if (!last.ok()) return last;
  return Status(Code::kUnavailable, "the driver has no cuMemcpyBatchAsync (it came with CUDA 12.8)");
}
#else
Result<BatchCopy> BatchCopy::look_up() {
  return Status(Code::kUnavailable, "built with CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
                                        std::to_string(CUDART_VERSION % 1000 / 10) +
                                        ", must be 12.5 or later to look up cuMemcpyBatchAsync");
}
#endif

Status BatchCopy::enqueue(std::span<const std::uint64_t> to, std::span<const std::uint64_t> from,
                          std::span<const std::size_t> bytes, CopyDirection direction, cudaStream_t stream) const {
  const std::size_t count = to.size();
  if (from.size() != count || bytes.size() != count || count > kMaxCopies) {
    return {Code::kInvalidArgument, "a batch of " + std::to_string(count) + " destinations, " + std::to_string(from.size()) +
                                        " sources and " + std::to_string(bytes.size()) +
                                        " sizes: as many of each expected, at most " + std::to_string(kMaxCopies)};
  }
  if (count == 0) return {};
  if (stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread) {
    return {Code::kUnsupported, "cuMemcpyBatchAsync: a default stream, must be a stream that was created"};
  }
  // Paged memory is written by what the stream waits for, so it is read in stream order. Slots are read whenever the driver likes:
  // nothing on the stream writes one that is being loaded, and it stays as it is until the job has ended.
  Attributes attributes{direction == CopyDirection::kGather ? kStreamOrder : kAnyOrder, {}, {}, kPreferOverlapWithCompute};
  std::size_t begin = 0;
  auto* const destinations = const_cast<std::uint64_t*>(to.data());  // the driver only reads them
  auto* const sources = const_cast<std::uint64_t*>(from.data());
  auto* const sizes = const_cast<std::size_t*>(bytes.data());
  int error = 0;
  if (reports_index_) {
    std::size_t failed = 0;
    error = reinterpret_cast<Batch12080>(function_)(destinations, sources, sizes, count, &attributes, &begin, 1, &failed, stream);
  } else {
    error = reinterpret_cast<Batch13000>(function_)(destinations, sources, sizes, count, &attributes, &begin, 1, stream);
  }
  return cuda_check(static_cast<cudaError_t>(error), "cuMemcpyBatchAsync");  // the numbers of driver and runtime are the same
}

}  // namespace lmcn
