#include <vector>

#include "batch_copy.hpp"
#include "copy_paths.hpp"

namespace lmcn {
namespace {

class BatchPath final : public CopyPath {
 public:
  BatchPath(const CopyGeometry& geometry, BatchCopy batch) : geometry_(geometry), batch_(batch) {}
  PathKind kind() const noexcept override { return PathKind::kBatch; }
  std::size_t max_items() const noexcept override { return 16; }
  // On platforms where its device address is another one the driver must be given that.
  bool needs_mapped() const noexcept override { return true; }

  Status enqueue(const PathTask& task, cudaStream_t stream) override {
    Status status;
    clear();
    for (std::size_t k = 0; k < task.items.size(); ++k) {
      geometry_.for_each_run(task.job, task.job.items[task.items[k]], task.plane_begin, task.plane_end, [&](const RunGroup& group) {
        if (status.ok()) status = add(group, task.rank_parts[k], task.job.direction, stream);
      });
    }
    if (!status.ok()) return status;
    return flush(task.job.direction, stream);
  }

 private:
  Status add(const RunGroup& group, std::byte* rank_part, CopyDirection direction, cudaStream_t stream) {
    const bool gather = direction == CopyDirection::kGather;
    for (std::int64_t o = 0; o < group.outer.count; ++o) {
      for (std::int64_t i = 0; i < group.inner.count; ++i) {
        const auto paged = reinterpret_cast<std::uint64_t>(group.paged + o * group.outer.paged + i * group.inner.paged);
        const auto slot = reinterpret_cast<std::uint64_t>(rank_part + group.slot + o * group.outer.slot + i * group.inner.slot);
        to_.push_back(gather ? slot : paged);
        from_.push_back(gather ? paged : slot);
        bytes_.push_back(static_cast<std::size_t>(group.bytes));
        if (to_.size() == BatchCopy::kMaxCopies) LMCN_RETURN_IF_ERROR(flush(direction, stream));
      }
    }
    return {};
  }
  Status flush(CopyDirection direction, cudaStream_t stream) {
    Status status = batch_.enqueue(to_, from_, bytes_, direction, stream);
    clear();
    return status;
  }
  void clear() {
    to_.clear();
    from_.clear();
    bytes_.clear();
  }

  const CopyGeometry& geometry_;
  const BatchCopy batch_;
  std::vector<std::uint64_t> to_, from_;
  std::vector<std::size_t> bytes_;
};

}  // namespace

Result<std::unique_ptr<CopyPath>> make_batch_path(const CopyGeometry& geometry) {
  Result<BatchCopy> batch = BatchCopy::look_up();
  if (!batch.ok()) return batch.status();
  return std::unique_ptr<CopyPath>(std::make_unique<BatchPath>(geometry, *batch));
}

}  // namespace lmcn
