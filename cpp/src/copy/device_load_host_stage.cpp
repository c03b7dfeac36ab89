// Staging in host memory: for pages in host memory, and for what is tested without a device.
#include <algorithm>
#include <new>
#include <string>
#include <utility>

#include "copy/byte_copy.hpp"
#include "copy/device_load_stage.hpp"
#include "memory/checksum.hpp"
#include "memory/slot_image.hpp"

namespace lmcn {
namespace {

struct FreePages {
  void operator()(std::byte* p) const noexcept { ::operator delete[](p, std::align_val_t{kPageBytes}); }
};
using Pages = std::unique_ptr<std::byte[], FreePages>;

class HostLane final : public DeviceStageLane {
 public:
  HostLane(const CopyGeometry* geometry, std::byte* memory) : geometry_(geometry), memory_(memory) {}

  Status attach() override { return {}; }
  std::byte* memory() noexcept override { return memory_; }
  bool broken() const noexcept override { return false; }
  Status stranded() const override { return {}; }
  Result<std::byte*> host_memory() override { return memory_; }
  Status upload(std::uint64_t) override { return {}; }
  Status download(std::uint64_t) override { return {}; }

  Status verify(const StagedSegments& segments) override {
    for (std::size_t i = 0; i < segments.checksums.size(); ++i) {
      const std::uint64_t begin = i * segments.segment_bytes;
      const std::uint64_t bytes = std::min<std::uint64_t>(segments.segment_bytes, segments.bytes - begin);
      if (checksum64(memory_ + begin, bytes) != segments.checksums[i]) return segment_differs(segments.first + i);
    }
    return {};
  }

  Status scatter(const CopyJob& job, std::uint32_t item, std::uint64_t rank_part, const StreamMark*) override {
    geometry_->for_each_run(job, job.items[item], 0, geometry_->planes().size(),
                            [&](const RunGroup& group) { copy_group(group, memory_ + rank_part, CopyDirection::kScatter, false); });
    return {};
  }

 private:
  const CopyGeometry* geometry_;
  std::byte* memory_;
};

class HostStage final : public DeviceStage {
 public:
  HostStage(const CopyGeometry* geometry, const StageOptions& options, Pages memory)
      : geometry_(geometry), options_(options), memory_(std::move(memory)) {}

  std::byte* base() noexcept override { return memory_.get(); }
  std::uint64_t bytes() const noexcept override { return options_.lane_bytes * options_.lanes; }
  std::unique_ptr<DeviceStageLane> make_lane(unsigned index) override {
    return std::make_unique<HostLane>(geometry_, memory_.get() + index * options_.lane_bytes);
  }
  Status on_device(const std::function<Status()>& work) override { return work(); }
  Result<std::shared_ptr<const StreamMark>> mark(std::uint64_t) override { return std::shared_ptr<const StreamMark>(); }

 private:
  const CopyGeometry* geometry_;
  const StageOptions options_;
  Pages memory_;
};

}  // namespace

Result<std::unique_ptr<DeviceStage>> make_host_stage(const CopyGeometry* geometry, const StageOptions& options) {
  const std::uint64_t bytes = options.lane_bytes * options.lanes;
  Pages memory(static_cast<std::byte*>(::operator new[](bytes, std::align_val_t{kPageBytes}, std::nothrow)));
  if (!memory) return Status(Code::kResourceExhausted, "no " + std::to_string(bytes) + " bytes of host memory for staging");
  return std::unique_ptr<DeviceStage>(std::make_unique<HostStage>(geometry, options, std::move(memory)));
}

Result<std::unique_ptr<DeviceStage>> make_stage(const CopyGeometry* geometry, const PagedKvLayout* paged,
                                                const StageOptions& options, int device) {
  return device < 0 ? make_host_stage(geometry, options) : make_cuda_stage(geometry, paged, options, device);
}

}  // namespace lmcn
