#include <utility>

#include "copy_paths.hpp"
#include "row_copy.hpp"

namespace lmcn {
namespace {

class MemcpyPath final : public CopyPath {
 public:
  MemcpyPath(const CopyGeometry& geometry, RowCopy rows) : geometry_(geometry), rows_(rows) {}
  PathKind kind() const noexcept override { return PathKind::kMemcpy; }
  std::size_t max_items() const noexcept override { return 1; }  // a call may hold this thread: a cancelled job ends soon
  bool needs_mapped() const noexcept override { return false; }

  Status enqueue(const PathTask& task, cudaStream_t stream) override {
    Status status;
    for (std::size_t k = 0; k < task.items.size(); ++k) {
      geometry_.for_each_run(task.job, task.job.items[task.items[k]], task.plane_begin, task.plane_end, [&](const RunGroup& group) {
        if (status.ok()) status = copy_group(group, task.rank_parts[k], task.job.direction, stream);
      });
    }
    return status;
  }

 private:
  Status copy_group(const RunGroup& group, std::byte* rank_part, CopyDirection direction, cudaStream_t stream) const {
    RunAxis rows = group.inner, loop = group.outer;
    if (loop.count > rows.count) std::swap(rows, loop);
    for (std::int64_t l = 0; l < loop.count; ++l) {
      LMCN_RETURN_IF_ERROR(rows_.enqueue({.host = rank_part + group.slot + l * loop.slot,
                                          .device = group.paged + l * loop.paged,
                                          .bytes = group.bytes,
                                          .count = rows.count,
                                          .host_pitch = rows.slot,
                                          .device_pitch = rows.paged},
                                         direction, stream));
    }
    return {};
  }

  const CopyGeometry& geometry_;
  const RowCopy rows_;
};

}  // namespace

Result<std::unique_ptr<CopyPath>> make_memcpy_path(const CopyGeometry& geometry, int device, const HostRegistration* registration) {
  Result<RowCopy> rows = RowCopy::make(device, registration);
  if (!rows.ok()) return rows.status();
  return std::unique_ptr<CopyPath>(std::make_unique<MemcpyPath>(geometry, *rows));
}

}  // namespace lmcn
