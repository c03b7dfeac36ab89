#include "copy_path.hpp"

#include <algorithm>
#include <utility>

#include "copy_paths.hpp"
#include "paged_kernel.hpp"

namespace lmcn {

const char* path_name(PathKind kind) noexcept {
  switch (kind) {
    case PathKind::kBatch:
      return "batch";
    case PathKind::kMemcpy:
      return "memcpy";
    case PathKind::kStaged:
      return "staged";
    case PathKind::kKernel:
      return "kernel";
  }
  return "?";
}

std::optional<PathKind> path_of(std::string_view name) noexcept {
  const auto* const found = std::ranges::find_if(kAllPaths, [&](PathKind kind) { return path_name(kind) == name; });
  if (found == kAllPaths.end()) return std::nullopt;
  return *found;
}

Result<std::shared_ptr<PagedKernel>> PathMaker::kernel() {
  if (kernel_ == nullptr) {
    Result<std::unique_ptr<PagedKernel>> made = PagedKernel::make(geometry_, device_);
    if (!made.ok()) return made.status();
    kernel_ = std::move(made).value();
  }
  return kernel_;
}

Result<std::unique_ptr<CopyPath>> PathMaker::make(PathKind kind) {
  if (kind == PathKind::kMemcpy) return make_memcpy_path(geometry_, device_, registration_);
  if (kind == PathKind::kBatch) return make_batch_path(geometry_);
  Result<std::shared_ptr<PagedKernel>> shared = kernel();
  if (!shared.ok()) return shared.status();
  if (kind == PathKind::kKernel) return make_kernel_path(std::move(shared).value());
  return make_staged_path(geometry_, device_, registration_, std::move(shared).value());
}

}  // namespace lmcn
