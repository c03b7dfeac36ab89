// Staging in device memory: checksums by the kernel of segment_verify.cuh, pages by PagedKernel. Part of lmcn_cuda, not of the
// plugin.
#include <cuda_runtime_api.h>

#include <chrono>
#include <cstring>
#include <string>
#include <utility>

#include "copy/device_load_stage.hpp"
#include "cuda_error.hpp"
#include "memory/slot_image.hpp"
#include "paged_kernel.hpp"
#include "segment_verify.cuh"

namespace lmcn {
namespace {

// For one record: its copies need no more to be faster than a drive, and the model keeps its multiprocessors.
constexpr unsigned kThreadBlocks = 8;

class CudaMark final : public StreamMark {
 public:
  explicit CudaMark(cudaEvent_t event) : event_(event) {}
  // The device keeps what it still needs of an event. Nobody is left to tell of an error.
  ~CudaMark() override {
    if (cudaEventDestroy(event_) != cudaSuccess) static_cast<void>(cudaGetLastError());
  }
  cudaEvent_t event() const noexcept { return event_; }

 private:
  const cudaEvent_t event_;
};

/// What the kernel reads and writes of one record, in mapped host memory.
struct alignas(64) VerifyBlock {
  VerifyTask task;
  alignas(64) std::byte header[kVerifyHeaderBytes];  // not used here: the host has checked it
  std::byte header_copy[kVerifyHeaderBytes];
  std::uint64_t table[kMaxSegments];
  std::uint32_t results[kMaxSegments];
};

class CudaLane final : public DeviceStageLane {
 public:
  CudaLane(const CopyGeometry* geometry, PagedKernel* kernel, int device, std::byte* memory, const StageOptions& options)
      : geometry_(geometry),
        kernel_(kernel),
        device_(device),
        memory_(memory),
        bytes_(options.lane_bytes),
        lost_after_(options.lost_after) {}

  ~CudaLane() override {
    // Memory that a device may still write stays mapped.
    const bool ended = stream_ == nullptr || (broken_.ok() && drain(stream_, lost_after_).ok());
    if (stream_ != nullptr) static_cast<void>(cudaStreamDestroy(stream_));
    if (ended_ != nullptr) static_cast<void>(cudaEventDestroy(ended_));
    if (ended && block_ != nullptr) static_cast<void>(cudaFreeHost(block_));
    if (ended && host_ != nullptr) static_cast<void>(cudaFreeHost(host_));
    static_cast<void>(cudaGetLastError());
  }

  Status attach() override {
    LMCN_RETURN_IF_ERROR(begin_cuda_thread(device_, Code::kUnavailable));
    LMCN_RETURN_IF_ERROR(cuda_check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"));
    // Blocking: a lane that waits costs no processor.
    LMCN_RETURN_IF_ERROR(
        cuda_check(cudaEventCreateWithFlags(&ended_, cudaEventDisableTiming | cudaEventBlockingSync), "cudaEventCreateWithFlags"));
    void* mapped = nullptr;
    LMCN_RETURN_IF_ERROR(cuda_check(cudaHostAlloc(&mapped, sizeof(VerifyBlock), cudaHostAllocMapped), "cudaHostAlloc"));
    block_ = static_cast<VerifyBlock*>(mapped);
    std::memset(mapped, 0, sizeof(VerifyBlock));
    void* on_device = nullptr;
    LMCN_RETURN_IF_ERROR(cuda_check(cudaHostGetDevicePointer(&on_device, mapped, 0), "cudaHostGetDevicePointer"));
    device_block_ = static_cast<VerifyBlock*>(on_device);
    return {};
  }

  std::byte* memory() noexcept override { return memory_; }
  bool broken() const noexcept override { return !broken_.ok(); }
  Status stranded() const override { return broken_.code() == Code::kUnavailable ? broken_ : Status(); }

  Result<std::byte*> host_memory() override {
    if (host_ == nullptr) {
      void* pinned = nullptr;
      if (Status status = cuda_check(cudaHostAlloc(&pinned, bytes_, cudaHostAllocDefault), "cudaHostAlloc"); !status.ok()) {
        return status;
      }
      host_ = static_cast<std::byte*>(pinned);
    }
    return host_;
  }

  Status upload(std::uint64_t bytes) override {
    LMCN_RETURN_IF_ERROR(broken_);
    return wait(cuda_check(cudaMemcpyAsync(memory_, host_, bytes, cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync"));
  }
  Status download(std::uint64_t bytes) override {
    LMCN_RETURN_IF_ERROR(broken_);
    return wait(cuda_check(cudaMemcpyAsync(host_, memory_, bytes, cudaMemcpyDeviceToHost, stream_), "cudaMemcpyAsync"));
  }

  Status verify(const StagedSegments& segments) override {
    LMCN_RETURN_IF_ERROR(broken_);
    const std::size_t count = segments.checksums.size();
    VerifyBlock& block = *block_;
    std::memcpy(block.table, segments.checksums.data(), segments.checksums.size_bytes());
    std::memset(block.results, 0, sizeof block.results);
    block.task = {.header = device_block_->header,
                  .payload = memory_,
                  .table = device_block_->table,
                  .header_copy = device_block_->header_copy,
                  .results = device_block_->results,
                  .payload_bytes = segments.bytes,
                  .segment_bytes = segments.segment_bytes};
    const Status launched = cuda_check(enqueue_segment_verify(&device_block_->task, 1, static_cast<unsigned>(count), stream_),
                                       "launch of verify_segments");
    LMCN_RETURN_IF_ERROR(wait(launched));
    for (std::size_t i = 0; i < count; ++i) {
      if (block.results[i] != kSegmentMatches) return segment_differs(segments.first + i);
    }
    return {};
  }

  Status scatter(const CopyJob& job, std::uint32_t item, std::uint64_t rank_part, const StreamMark* mark) override {
    LMCN_RETURN_IF_ERROR(broken_);
    const auto* const event = static_cast<const CudaMark*>(mark);
    LMCN_RETURN_IF_ERROR(cuda_check(cudaStreamWaitEvent(stream_, event->event(), 0), "cudaStreamWaitEvent"));
    std::byte* const part = memory_ + rank_part;
    const Status launched = kernel_->launch(job, CopyDirection::kScatter, std::span(&item, 1), std::span(&part, 1), 0,
                                            geometry_->planes().size(), stream_, kThreadBlocks);
    return wait(launched);
  }

 private:
  /// Until the stream has done all that it was told to, also after an error: a call that failed, `enqueued` too, may have started
  /// something. When that cannot be known the lane is used no more.
  Status wait(Status enqueued) {
    Status status = std::move(enqueued);
    if (status.ok()) status = cuda_check(cudaEventRecord(ended_, stream_), "cudaEventRecord");
    if (status.ok()) status = cuda_check(cudaEventSynchronize(ended_), "cudaEventSynchronize");
    if (status.ok()) return {};
    broken_ = drain(stream_, lost_after_);
    if (broken_.ok() && kernel_ != nullptr) kernel_->drained(stream_);
    return status;
  }

  const CopyGeometry* const geometry_;
  PagedKernel* const kernel_;
  const int device_;
  std::byte* const memory_;
  const std::uint64_t bytes_;
  const std::chrono::milliseconds lost_after_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t ended_ = nullptr;
  VerifyBlock *block_ = nullptr, *device_block_ = nullptr;  // the same bytes, by host and device addresses
  std::byte* host_ = nullptr;
  Status broken_;
};

class CudaStage final : public DeviceStage {
 public:
  CudaStage(const CopyGeometry* geometry, const StageOptions& options, int device)
      : geometry_(geometry), options_(options), device_(device) {}

  ~CudaStage() override {
    // Whoever ends a loader may have any device current, or none. Nobody is left to tell of an error.
    static_cast<void>(on_cuda_thread(device_, [this](const Status&) {
      kernel_.reset();
      if (memory_ != nullptr) static_cast<void>(cudaFree(memory_));
    }));
  }

  Status allocate() {
    DeviceGuard guard(device_, Code::kUnavailable);
    LMCN_RETURN_IF_ERROR(guard.status());
    void* memory = nullptr;
    LMCN_RETURN_IF_ERROR(cuda_check(cudaMalloc(&memory, bytes()), "cudaMalloc", Code::kResourceExhausted));
    memory_ = static_cast<std::byte*>(memory);
    if (geometry_ == nullptr) return {};
    Result<std::unique_ptr<PagedKernel>> kernel = PagedKernel::make(*geometry_, device_);
    if (!kernel.ok()) return kernel.status();
    kernel_ = std::move(kernel).value();
    return {};
  }

  std::byte* base() noexcept override { return memory_; }
  std::uint64_t bytes() const noexcept override { return options_.lane_bytes * options_.lanes; }
  std::unique_ptr<DeviceStageLane> make_lane(unsigned index) override {
    return std::make_unique<CudaLane>(geometry_, kernel_.get(), device_, memory_ + index * options_.lane_bytes, options_);
  }

  Status on_device(const std::function<Status()>& work) override {
    DeviceGuard guard(device_);
    LMCN_RETURN_IF_ERROR(guard.status());
    return work();
  }

  Result<std::shared_ptr<const StreamMark>> mark(std::uint64_t stream) override {
    DeviceGuard guard(device_);
    LMCN_RETURN_IF_ERROR(guard.status());
    cudaEvent_t event = nullptr;
    LMCN_RETURN_IF_ERROR(cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags"));
    auto mark = std::make_shared<const CudaMark>(event);
    const auto handle = reinterpret_cast<cudaStream_t>(static_cast<std::uintptr_t>(stream));
    LMCN_RETURN_IF_ERROR(cuda_check(cudaEventRecord(event, handle), "cudaEventRecord"));
    return std::shared_ptr<const StreamMark>(std::move(mark));
  }

 private:
  const CopyGeometry* const geometry_;
  const StageOptions options_;
  const int device_;
  std::byte* memory_ = nullptr;
  std::unique_ptr<PagedKernel> kernel_;
};

Status check_device(int device) {
  int devices = 0;
  LMCN_RETURN_IF_ERROR(cuda_check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount", Code::kUnavailable));
  if (device < devices) return {};
  return {Code::kUnavailable, "device is " + std::to_string(device) + ", there are " + std::to_string(devices) + " CUDA devices"};
}

Status check_memory(const PagedKvLayout& paged, int device) {
  for (std::size_t l = 0; l < paged.layers.size(); ++l) {
    cudaPointerAttributes found{};
    LMCN_RETURN_IF_ERROR(cuda_check(cudaPointerGetAttributes(&found, paged.layers[l].base), "cudaPointerGetAttributes"));
    if (found.type == cudaMemoryTypeManaged || (found.type == cudaMemoryTypeDevice && found.device == device)) continue;
    return {Code::kInvalidArgument, "layers[" + std::to_string(l) + "].base is memory of type " +
                                        std::to_string(static_cast<int>(found.type)) + " on device " +
                                        std::to_string(found.device) + ", must be device or managed memory of device " +
                                        std::to_string(device)};
  }
  return {};
}

}  // namespace

Result<std::unique_ptr<DeviceStage>> make_cuda_stage(const CopyGeometry* geometry, const PagedKvLayout* paged,
                                                     const StageOptions& options, int device) {
  LMCN_RETURN_IF_ERROR(check_device(device));
  {
    DeviceGuard guard(device, Code::kUnavailable);
    LMCN_RETURN_IF_ERROR(guard.status());
    if (paged != nullptr) LMCN_RETURN_IF_ERROR(check_memory(*paged, device));
  }
  auto stage = std::make_unique<CudaStage>(geometry, options, device);
  LMCN_RETURN_IF_ERROR(stage->allocate());
  return std::unique_ptr<DeviceStage>(std::move(stage));
}

}  // namespace lmcn
