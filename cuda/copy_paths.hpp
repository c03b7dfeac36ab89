// The four paths, one file each: copy_path_memcpy.cpp, copy_path_batch.cpp, copy_path_kernel.cpp, copy_path_staged.cpp.
// Made through PathMaker.
#pragma once

#include <memory>

#include "copy_path.hpp"

namespace lmcn {

Result<std::unique_ptr<CopyPath>> make_memcpy_path(const CopyGeometry& geometry, int device, const HostRegistration* registration);
/// kUnavailable: this driver has no cuMemcpyBatchAsync.
Result<std::unique_ptr<CopyPath>> make_batch_path(const CopyGeometry& geometry);
Result<std::unique_ptr<CopyPath>> make_kernel_path(std::shared_ptr<PagedKernel> kernel);
/// kResourceExhausted: no device memory for staging.
Result<std::unique_ptr<CopyPath>> make_staged_path(const CopyGeometry& geometry, int device, const HostRegistration* registration,
                                                   std::shared_ptr<PagedKernel> kernel);

}  // namespace lmcn
