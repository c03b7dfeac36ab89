// PagedCopier on cudaMemcpyAsync and cudaMemcpy2DAsync: one lane for each direction, so that loads do not queue behind stores.
#include <cuda_runtime_api.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "copy/copy_geometry.hpp"
#include "copy/job_board.hpp"
#include "copy_lane.hpp"
#include "cuda_error.hpp"
#include "lmcn/paged_copy.hpp"

namespace lmcn {
namespace {

class MemcpyCopier final : public PagedCopier {
 public:
  MemcpyCopier(CopyGeometry geometry, int device)
      : geometry_(std::move(geometry)),
        device_(device),
        gather_(geometry_, board_, events_, device),
        scatter_(geometry_, board_, events_, device) {}

  Status start(const std::function<Status()>& check) {
    LMCN_RETURN_IF_ERROR(gather_.start(check));
    return scatter_.start(check);
  }

  Status submit(CopyJob job) override {
    LMCN_RETURN_IF_ERROR(geometry_.check_job(job));
    LMCN_RETURN_IF_ERROR(board_.begin(job.id));
    auto accepted = std::make_unique<CudaJob>(geometry_, std::move(job));
    // From here on a CUDA error is the job's: its result and its rank words say so.
    accepted->ready = record_ready(*accepted);
    CopyLane& lane = accepted->job.direction == CopyDirection::kGather ? gather_ : scatter_;
    lane.push(std::move(accepted));
    return {};
  }

  std::vector<CopyDone> poll() override { return board_.poll(); }
  Status wait(std::span<const std::uint64_t> ids, std::chrono::milliseconds timeout) override { return board_.wait(ids, timeout); }
  Status wait_layers(std::uint64_t id, std::uint32_t layers, std::chrono::milliseconds timeout, std::uint64_t stream) override {
    LMCN_RETURN_IF_ERROR(geometry_.check_layers(layers));
    const auto waiting = reinterpret_cast<cudaStream_t>(static_cast<std::uintptr_t>(stream));
    if (!is_default(waiting)) return scatter_.wait_layers(id, layers, timeout, waiting);
    DeviceGuard guard(device_);
    LMCN_RETURN_IF_ERROR(guard.status());
    return scatter_.wait_layers(id, layers, timeout, waiting);
  }
  void cancel(std::span<const std::uint64_t> ids) override {
    gather_.cancel(ids);
    scatter_.cancel(ids);
  }
  std::string name() const override { return "cuda-memcpy"; }

 private:
  /// Those mean another stream on each device.
  static bool is_default(cudaStream_t stream) {
    return stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
  }

  /// Marks, on the engine's stream, the point the copies must wait for: after the writes a store reads, after the reads a load
  /// overwrites.
  Status record_ready(CudaJob& job) {
    if (!events_.take(job.events)) {
      DeviceGuard guard(device_);
      LMCN_RETURN_IF_ERROR(guard.status());
      LMCN_RETURN_IF_ERROR(events_.create());
      if (!events_.take(job.events)) return {Code::kResourceExhausted, "every CUDA event is in use"};
    }
    const auto stream = reinterpret_cast<cudaStream_t>(static_cast<std::uintptr_t>(job.job.stream));
    if (!is_default(stream)) {
      return cuda_check(cudaEventRecord(job.events.ready, stream), "cudaEventRecord");
    }
    DeviceGuard guard(device_);
    LMCN_RETURN_IF_ERROR(guard.status());
    return cuda_check(cudaEventRecord(job.events.ready, stream), "cudaEventRecord");
  }

  const CopyGeometry geometry_;
  const int device_;
  JobBoard board_;
  EventPool events_;
  CopyLane gather_, scatter_;  // last: their threads use all of the above
};

Status check_device(int device) {
  int devices = 0;
  LMCN_RETURN_IF_ERROR(cuda_check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount", Code::kUnavailable));
  if (devices == 0) return {Code::kUnavailable, "no CUDA device"};
  if (device < 0 || device >= devices) {
    return {Code::kInvalidArgument, "device is " + std::to_string(device) + ", must be in 0.." + std::to_string(devices - 1)};
  }
  return {};
}

Status check_memory(const PagedKvLayout& paged, int device) {
  for (std::size_t l = 0; l < paged.layers.size(); ++l) {
    cudaPointerAttributes attributes{};
    LMCN_RETURN_IF_ERROR(cuda_check(cudaPointerGetAttributes(&attributes, paged.layers[l].base), "cudaPointerGetAttributes"));
    const bool ours =
        attributes.type == cudaMemoryTypeManaged || (attributes.type == cudaMemoryTypeDevice && attributes.device == device);
    if (!ours) {
      return {Code::kInvalidArgument, "layers[" + std::to_string(l) + "].base is memory of type " +
                                          std::to_string(static_cast<int>(attributes.type)) + " on device " +
                                          std::to_string(attributes.device) + ", must be device or managed memory of device " +
                                          std::to_string(device)};
    }
  }
  return {};
}

}  // namespace

Result<std::unique_ptr<PagedCopier>> make_cuda_copier(const PagedKvLayout& paged, const SlotLayout& slot, std::byte* arena_base,
                                                      std::uint64_t arena_bytes, const CopierOptions& options, int device) {
  Result<CopyGeometry> geometry = CopyGeometry::make(paged, slot, arena_base, arena_bytes, options.rank);
  if (!geometry.ok()) return geometry.status();
  if (Status status = check_device(device); !status.ok()) return status;
  auto copier = std::make_unique<MemcpyCopier>(std::move(geometry).value(), device);
  if (Status status = copier->start([&] { return check_memory(paged, device); }); !status.ok()) return status;
  return std::unique_ptr<PagedCopier>(std::move(copier));
}

}  // namespace lmcn
