// What a build without CUDA answers; gds/cuda_stage.cpp has the other answer.
#include "copy/device_load_stage.hpp"

#if !LMCN_WITH_CUDA

namespace lmcn {

Result<std::unique_ptr<DeviceStage>> make_cuda_stage(const CopyGeometry*, const PagedKvLayout*, const StageOptions&, int) {
  return Status(Code::kUnavailable, "built without CUDA (LMCN_CUDA=" LMCN_BUILD_CUDA_CHOICE ")");
}

}  // namespace lmcn

#endif
