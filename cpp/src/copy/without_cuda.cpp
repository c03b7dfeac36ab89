// What a build without CUDA answers; cuda/ has the other answers.
#if !LMCN_WITH_CUDA

#include "lmcn/paged_copy.hpp"
#include "lmcn/version.hpp"

namespace lmcn {
namespace {
constexpr const char* kWithoutCuda = "built without CUDA (LMCN_CUDA=" LMCN_BUILD_CUDA_CHOICE ")";
}

Result<std::unique_ptr<PagedCopier>> make_cuda_copier(const PagedKvLayout&, const SlotLayout&, std::byte*, std::uint64_t,
                                                      const CopierOptions&, int) {
  return Status(Code::kUnavailable, kWithoutCuda);
}

Result<bool> prepare_cuda_copier(const PagedKvLayout&, const SlotLayout&, int, std::chrono::milliseconds) {
  return Status(Code::kUnavailable, kWithoutCuda);
}

CudaStatus cuda_status() {
  CudaStatus status;
  status.message = kWithoutCuda;
  return status;
}

}  // namespace lmcn

#endif
