// PagedCopier on CUDA: one lane for each direction, so that loads do not queue behind stores, each with the path that is the
// fastest.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "calibration.hpp"
#include "calibration_cache.hpp"
#include "copy/copy_geometry.hpp"
#include "copy/job_board.hpp"
#include "copy_lane.hpp"
#include "copy_path.hpp"
#include "cuda_error.hpp"
#include "host_registration.hpp"
#include "lmcn/paged_copy.hpp"

namespace lmcn {
namespace {

// For repeating what was measured once, engines wait for it at start.
constexpr std::chrono::milliseconds kCalibrationBudget{40};

constexpr std::array kDirections{CopyDirection::kGather, CopyDirection::kScatter};

/// LMCN_COPY_PATH; nullopt: auto.
Result<std::optional<PathKind>> asked_path() {
  const char* const asked = std::getenv("LMCN_COPY_PATH");
  if (asked == nullptr || *asked == '\0' || std::string_view(asked) == "auto") return std::optional<PathKind>();
  if (const std::optional<PathKind> path = path_of(asked)) return path;
  return Status(Code::kInvalidArgument,
                "LMCN_COPY_PATH is \"" + std::string(asked) + "\", must be auto, memcpy, batch, kernel or staged");
}

/// On a thread of its own, with the device current there: whose thread this is keeps its device.
template <class Work>
Status on_device(int device, Work work) {
  Status status;
  std::thread([&] {
    status = begin_cuda_thread(device, Code::kUnavailable);
    if (status.ok()) status = work();
  }).join();
  return status;
}

/// The first and the last byte of each plane.
Status check_memory(const CopyGeometry& geometry, int device) {
  const PageCounts& counts = geometry.counts();
  for (std::size_t l = 0; l < geometry.layers(); ++l) {
    for (std::size_t p = geometry.first_plane(l); p < geometry.first_plane(l + 1); ++p) {
      const PlaneGeometry& plane = geometry.planes()[p];
      std::byte* const last =
          paged_address(plane, counts.num_blocks - 1, counts.block_tokens - 1, counts.heads - 1, counts.head_dim - 1) +
          (counts.element_bytes - 1);
      for (const std::byte* const address : {static_cast<const std::byte*>(plane.base), static_cast<const std::byte*>(last)}) {
        cudaPointerAttributes attributes{};
        LMCN_RETURN_IF_ERROR(cuda_check(cudaPointerGetAttributes(&attributes, address), "cudaPointerGetAttributes"));
        const bool ours =
            attributes.type == cudaMemoryTypeManaged || (attributes.type == cudaMemoryTypeDevice && attributes.device == device);
        if (ours) continue;
        return {Code::kInvalidArgument, "the " + std::string(address == last ? "last" : "first") + " byte of layers[" +
                                            std::to_string(l) + "].planes[" + std::to_string(p - geometry.first_plane(l)) +
                                            "] is memory of type " + std::to_string(static_cast<int>(attributes.type)) +
                                            " on device " + std::to_string(attributes.device) +
                                            ", must be device or managed memory of device " + std::to_string(device)};
      }
    }
  }
  return {};
}

class CudaCopier final : public PagedCopier {
 public:
  CudaCopier(CopyGeometry geometry, int device)
      : geometry_(std::move(geometry)),
        device_(device),
        gather_(geometry_, board_, events_, device),
        scatter_(geometry_, board_, events_, device) {}

  Status start(const PagedKvLayout& paged, const SlotLayout& slot, std::byte* arena_base, std::uint64_t arena_bytes,
               const CopierOptions& options, std::optional<PathKind> asked) {
    LanePaths paths[2];
    LMCN_RETURN_IF_ERROR(on_device(device_, [&]() -> Status {
      LMCN_RETURN_IF_ERROR(check_memory(geometry_, device_));
      const Calibration calibration =
          asked ? Calibration() : calibrate(paged, slot);  // before registering, which takes the driver's time
      registration_ = HostRegistration::of(arena_base, arena_bytes, device_, {.slot_bytes = options.slot_bytes});
      return asked ? make_paths(paths, *asked) : choose_paths(paths, calibration);
    }));
    name_ = std::string("cuda-") + paths[0].chosen->name();
    if (paths[0].chosen->kind() != paths[1].chosen->kind()) name_ += std::string("+") + paths[1].chosen->name();
    LMCN_RETURN_IF_ERROR(gather_.start(std::move(paths[0])));
    return scatter_.start(std::move(paths[1]));
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
  std::string name() const override { return name_; }
  std::string details() const override {
    std::string text = choice_ + "; arena " + registration_->describe();
    const std::uint64_t slow = gather_.items_in_other_memory() + scatter_.items_in_other_memory();
    if (slow > 0) text += "; " + std::to_string(slow) + " items copied by memcpy for want of registered memory";
    return text;
  }

 private:
  /// The path for a direction and what it needs beside it. kUnavailable and the like: not here.
  Status make_path(PathMaker& maker, PathKind kind, LanePaths& paths) {
    Result<std::unique_ptr<CopyPath>> chosen = maker.make(kind);
    if (!chosen.ok()) return {chosen.status().code(), std::string(path_name(kind)) + ": " + chosen.status().message()};
    paths.chosen = std::move(chosen).value();
    if (!paths.chosen->needs_mapped()) return {};
    Result<std::unique_ptr<CopyPath>> any = maker.make(PathKind::kMemcpy);
    if (!any.ok()) return any.status();
    paths.any_memory = std::move(any).value();
    paths.registration = registration_.get();
    return {};
  }

  Status make_paths(LanePaths (&paths)[2], PathKind kind) {
    PathMaker maker(geometry_, device_, registration_.get());
    for (LanePaths& lane : paths) LMCN_RETURN_IF_ERROR(make_path(maker, kind, lane));
    choice_ = std::string(path_name(kind)) + " as LMCN_COPY_PATH asks";
    return {};
  }

  Status choose_paths(LanePaths (&paths)[2], const Calibration& calibration) {
    PathMaker maker(geometry_, device_, registration_.get());
    for (const CopyDirection direction : kDirections) {
      LanePaths& lane = paths[static_cast<std::size_t>(direction)];
      const PathKind kind = fastest(calibration, direction).value_or(PathKind::kMemcpy);
      Status made = make_path(maker, kind, lane);
      if (!made.ok() && kind != PathKind::kMemcpy) {
        notes_ += "; " + made.message();
        made = make_path(maker, PathKind::kMemcpy, lane);
      }
      LMCN_RETURN_IF_ERROR(made);
      const std::string rates = describe(calibration, direction);
      choice_ += std::string(choice_.empty() ? "" : "; ") + (direction == CopyDirection::kGather ? "stores" : "loads") + " by " +
                 lane.chosen->name() + (rates.empty() ? "" : " (GB/s: " + rates + ")");
    }
    choice_ += notes_;
    return {};
  }

  Calibration calibrate(const PagedKvLayout& paged, const SlotLayout& slot) {
    const Result<CalibrationKey> key = CalibrationKey::of(geometry_, slot.chunk_tokens, device_);
    const Result<CalibrationCache> cache = CalibrationCache::open();
    const Status no_cache = !key.ok() ? key.status() : cache.status();
    if (no_cache.ok()) {
      if (std::optional<Calibration> known = cache->load(*key)) {
        notes_ += "; measured earlier: " + cache->path_of(*key);
        return *std::move(known);
      }
    }
    const std::vector<PathKind> candidates = candidates_of(geometry_);
    Calibration measured = measure_paths(paged, slot, device_, candidates, kCalibrationBudget);
    for (const std::string& note : measured.notes) notes_ += "; " + note;
    Status kept = no_cache;
    // What failed today, for want of memory perhaps, is tried again by the next process.
    const bool complete = measured.notes.empty() && measured.rates.size() == candidates.size();
    if (kept.ok() && complete) kept = cache->store(*key, measured);
    if (!kept.ok()) notes_ += "; not kept: " + kept.message();
    return measured;
  }

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
  std::shared_ptr<HostRegistration> registration_;
  std::string name_, choice_, notes_;
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

}  // namespace

Result<std::unique_ptr<PagedCopier>> make_cuda_copier(const PagedKvLayout& paged, const SlotLayout& slot, std::byte* arena_base,
                                                      std::uint64_t arena_bytes, const CopierOptions& options, int device) {
  Result<CopyGeometry> geometry = CopyGeometry::make(paged, slot, arena_base, arena_bytes, options.rank, options.replicated);
  if (!geometry.ok()) return geometry.status();
  if (Status status = check_device(device); !status.ok()) return status;
  const Result<std::optional<PathKind>> asked = asked_path();
  if (!asked.ok()) return asked.status();
  auto copier = std::make_unique<CudaCopier>(std::move(geometry).value(), device);
  if (Status status = copier->start(paged, slot, arena_base, arena_bytes, options, *asked); !status.ok()) return status;
  return std::unique_ptr<PagedCopier>(std::move(copier));
}

}  // namespace lmcn
