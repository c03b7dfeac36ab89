#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "copy_paths.hpp"
#include "cuda_error.hpp"
#include "paged_kernel.hpp"
#include "row_copy.hpp"

namespace lmcn {
namespace {

// The kernel moves bytes within device memory, where a few more thread blocks end it sooner.
constexpr unsigned kThreadBlocks = 32;
// Taken from what the engine left free, for each direction.
constexpr std::uint64_t kMostStagingBytes = std::uint64_t{64} << 20;
constexpr std::uint64_t kMostBuffers = 8;

// Buffers are used again by the next task: the stream's order keeps the two apart.
class StagedPath final : public CopyPath {
 public:
  StagedPath(const CopyGeometry& geometry, RowCopy rows, std::shared_ptr<PagedKernel> kernel, std::byte* staging,
             std::size_t buffers)
      : geometry_(geometry), rows_(rows), kernel_(std::move(kernel)), staging_(staging), buffers_(buffers) {}
  ~StagedPath() override { static_cast<void>(cudaFree(staging_)); }  // teardown: nobody is left to tell
  PathKind kind() const noexcept override { return PathKind::kStaged; }
  std::size_t max_items() const noexcept override { return buffers_; }
  bool needs_mapped() const noexcept override { return false; }
  void drained(cudaStream_t stream) override { kernel_->drained(stream); }

  Status enqueue(const PathTask& task, cudaStream_t stream) override {
    std::vector<std::byte*> parts;
    for (std::size_t k = 0; k < task.items.size(); ++k) parts.push_back(staging_ + k * geometry_.rank_bytes());
    const auto launch = [&] {
      return kernel_->launch(task.job, task.job.direction, task.items, parts, task.plane_begin, task.plane_end, stream,
                             kThreadBlocks);
    };
    if (task.job.direction == CopyDirection::kGather) LMCN_RETURN_IF_ERROR(launch());
    for (std::size_t k = 0; k < task.items.size(); ++k) LMCN_RETURN_IF_ERROR(copy_part(task, k, parts[k], stream));
    if (task.job.direction == CopyDirection::kScatter) LMCN_RETURN_IF_ERROR(launch());
    return {};
  }

 private:
  /// The item's bytes only: gaps and other items' tokens in the slot are not ours. Pieces that touch are one copy, the whole item
  /// where it is a whole chunk without gaps; pieces at one distance are rows of one.
  Status copy_part(const PathTask& task, std::size_t k, std::byte* part, cudaStream_t stream) const {
    const CopyItem& item = task.job.items[task.items[k]];
    const std::int64_t token_bytes = geometry_.counts().token_bytes(), bytes = item.tokens * token_bytes;
    Rows rows;
    std::int64_t begin = 0;  // of `rows` in the part
    const auto flush = [&]() -> Status {
      if (rows.bytes == 0) return {};
      rows.host = task.rank_parts[k] + begin;
      rows.device = part + begin;
      rows.device_pitch = rows.host_pitch;
      return rows_.enqueue(rows, task.job.direction, stream);
    };
    for (std::size_t p = task.plane_begin; p < task.plane_end; ++p) {
      const std::int64_t at = geometry_.planes()[p].slot + item.first_token * token_bytes;
      const std::int64_t last = begin + (rows.count - 1) * rows.host_pitch;
      if (rows.bytes > 0 && rows.count == 1 && at == begin + rows.bytes) {
        rows.bytes += bytes;
      } else if (rows.bytes == bytes && (rows.count == 1 ? at > begin : at - last == rows.host_pitch)) {
        rows.host_pitch = at - last;
        ++rows.count;
      } else {
        LMCN_RETURN_IF_ERROR(flush());
        rows = {.bytes = bytes};
        begin = at;
      }
    }
    return flush();
  }

  const CopyGeometry& geometry_;
  const RowCopy rows_;
  const std::shared_ptr<PagedKernel> kernel_;
  std::byte* const staging_;
  const std::size_t buffers_;
};

}  // namespace

Result<std::unique_ptr<CopyPath>> make_staged_path(const CopyGeometry& geometry, int device, const HostRegistration* registration,
                                                   std::shared_ptr<PagedKernel> kernel) {
  if (geometry.rank_bytes() > kMostStagingBytes) {
    return Status(Code::kResourceExhausted, "a rank's part of a slot is " + std::to_string(geometry.rank_bytes()) +
                                                " bytes, staging memory is at most " + std::to_string(kMostStagingBytes));
  }
  Result<RowCopy> rows = RowCopy::make(device, registration);
  if (!rows.ok()) return rows.status();
  const auto buffers =
      static_cast<std::size_t>(std::clamp(kMostStagingBytes / geometry.rank_bytes(), std::uint64_t{1}, kMostBuffers));
  void* staging = nullptr;
  if (Status status = cuda_check(cudaMalloc(&staging, buffers * geometry.rank_bytes()), "cudaMalloc", Code::kResourceExhausted);
      !status.ok()) {
    return status;
  }
  return std::unique_ptr<CopyPath>(
      std::make_unique<StagedPath>(geometry, *rows, std::move(kernel), static_cast<std::byte*>(staging), buffers));
}

}  // namespace lmcn
