#include <utility>

#include "copy_paths.hpp"
#include "paged_kernel.hpp"

namespace lmcn {
namespace {

// Enough loads under way for a PCIe 5 link, and few enough that the model keeps its multiprocessors.
constexpr unsigned kThreadBlocks = 12;

class KernelPath final : public CopyPath {
 public:
  explicit KernelPath(std::shared_ptr<PagedKernel> kernel) : kernel_(std::move(kernel)) {}
  PathKind kind() const noexcept override { return PathKind::kKernel; }
  std::size_t max_items() const noexcept override { return 32; }
  bool needs_mapped() const noexcept override { return true; }
  void drained(cudaStream_t stream) override { kernel_->drained(stream); }
  Status enqueue(const PathTask& task, cudaStream_t stream) override {
    return kernel_->launch(task.job, task.job.direction, task.items, task.rank_parts, task.plane_begin, task.plane_end, stream,
                           kThreadBlocks);
  }

 private:
  const std::shared_ptr<PagedKernel> kernel_;
};

}  // namespace

Result<std::unique_ptr<CopyPath>> make_kernel_path(std::shared_ptr<PagedKernel> kernel) {
  return std::unique_ptr<CopyPath>(std::make_unique<KernelPath>(std::move(kernel)));
}

}  // namespace lmcn
