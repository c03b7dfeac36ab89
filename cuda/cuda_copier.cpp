// PagedCopier on CUDA: one lane for each direction, so that loads do not queue behind stores, each with the path that is the
// fastest.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "calibration.hpp"
#include "copy/copy_geometry.hpp"
#include "copy/job_board.hpp"
#include "copy/process_copier.hpp"
#include "copy_lane.hpp"
#include "copy_path.hpp"
#include "cuda_error.hpp"
#include "host_registration.hpp"
#include "lmcn/paged_copy.hpp"
#include "measurement.hpp"
#include "memory/slot_image.hpp"
#include "per_process.hpp"

namespace lmcn {
namespace {

constexpr std::array kDirections{CopyDirection::kGather, CopyDirection::kScatter};

/// LMCN_COPY_PATH; nullopt: auto.
Result<std::optional<PathKind>> asked_path() {
  const char* const asked = std::getenv("LMCN_COPY_PATH");
  if (asked == nullptr || *asked == '\0' || std::string_view(asked) == "auto") return std::optional<PathKind>();
  if (const std::optional<PathKind> path = path_of(asked)) return path;
  return Status(Code::kInvalidArgument,
                "LMCN_COPY_PATH is \"" + std::string(asked) + "\", must be auto, memcpy, batch, kernel or staged");
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
  CudaCopier(CopyGeometry geometry, int device, const CopierOptions& options)
      : geometry_(std::move(geometry)), device_(device), arena_owner_(options.arena_owner) {
    for (auto& lane : lanes_) lane = std::make_unique<CopyLane>(geometry_, board_, *events_, device, options.lost_after);
  }

  // What there is of the device is given back by a thread that has it current, whoever's thread this is.
  ~CudaCopier() override {
    static_cast<void>(on_cuda_thread(device_, [this](const Status&) {
      for (const auto& lane : lanes_) lane->stop();
      const auto lost = [&](Code code) {
        return std::ranges::any_of(lanes_, [&](const auto& lane) { return lane->lost().code() == code; });
      };
      if (lost(Code::kUnavailable)) keep_for_ever(std::move(registration_));
      if (lost(Code::kUnavailable) || lost(Code::kIoError)) keep_for_ever(std::move(arena_owner_));
      maker_.reset();
      registration_.reset();
      for (auto& lane : lanes_) lane.reset();
      events_.reset();
    }));
  }

  Status start(const PagedKvLayout& paged, const SlotLayout& slot, std::byte* arena_base, std::uint64_t arena_bytes,
               const CopierOptions& options, std::optional<PathKind> asked) {
    LanePaths paths[2];
    Status status;
    static_cast<void>(on_cuda_thread(device_, [&](const Status& begun) {
      status = begun;
      if (status.ok()) status = check_memory(geometry_, device_);
      if (!status.ok()) return;
      if (!asked) measurement_ = Measurement::of(paged, slot, geometry_, device_);
      registration_ = HostRegistration::of(arena_base, arena_bytes, device_, {.slot_bytes = options.slot_bytes});
      maker_.emplace(geometry_, device_, registration_.get());
      for (const CopyDirection direction : kDirections) {
        if (status.ok()) status = first_paths(direction, asked, paths[static_cast<std::size_t>(direction)]);
      }
    }));
    LMCN_RETURN_IF_ERROR(status);
    for (const CopyDirection direction : kDirections) {
      LaterPaths later;
      if (choice(direction).empty()) later = [this, direction](LanePaths& other) { return later_paths(direction, other); };
      LMCN_RETURN_IF_ERROR(lane(direction).start(std::move(paths[static_cast<std::size_t>(direction)]), std::move(later)));
    }
    return {};
  }

  Status submit(CopyJob job) override {
    LMCN_RETURN_IF_ERROR(board_.stranded());
    LMCN_RETURN_IF_ERROR(geometry_.check_job(job));
    LMCN_RETURN_IF_ERROR(board_.begin(job.id));
    auto accepted = std::make_unique<CudaJob>(geometry_, std::move(job));
    // From here on a CUDA error is the job's: its result and its rank words say so.
    accepted->ready = record_ready(*accepted);
    CopyLane& pushed_to = lane(accepted->job.direction);
    pushed_to.push(std::move(accepted));
    return {};
  }

  std::vector<CopyDone> poll() override { return board_.poll(); }
  Status wait(std::span<const std::uint64_t> ids, std::chrono::milliseconds timeout) override { return board_.wait(ids, timeout); }
  Status wait_layers(std::uint64_t id, std::uint32_t layers, std::chrono::milliseconds timeout, std::uint64_t stream) override {
    LMCN_RETURN_IF_ERROR(geometry_.check_layers(layers));
    const auto waiting = reinterpret_cast<cudaStream_t>(static_cast<std::uintptr_t>(stream));
    if (!is_default(waiting)) return lane(CopyDirection::kScatter).wait_layers(id, layers, timeout, waiting);
    DeviceGuard guard(device_);
    LMCN_RETURN_IF_ERROR(guard.status());
    return lane(CopyDirection::kScatter).wait_layers(id, layers, timeout, waiting);
  }
  void cancel(std::span<const std::uint64_t> ids) override {
    for (const auto& lane : lanes_) lane->cancel(ids);
  }
  Status lost() const override { return board_.stranded(); }
  std::string name() const override {
    const PathKind stores = lanes_[0]->path(), loads = lanes_[1]->path();
    return std::string("cuda-") + path_name(stores) + (stores == loads ? "" : std::string("+") + path_name(loads));
  }
  std::string details() const override {
    std::string text = choice(CopyDirection::kGather), loads = choice(CopyDirection::kScatter);
    if (text.empty()) text = "memcpy until the paths are measured";
    if (loads.empty()) loads = "memcpy until the paths are measured";
    if (text != loads) text += "; " + loads;
    {
      std::lock_guard lock(mutex_);
      text += notes_;
    }
    text += "; arena " + registration_->describe();
    const std::uint64_t slow = lanes_[0]->items_in_other_memory() + lanes_[1]->items_in_other_memory();
    if (slow > 0) text += "; " + std::to_string(slow) + " items copied by memcpy for want of registered memory";
    for (const auto& lane : lanes_) text += lane->failures();
    return text;
  }

 private:
  CopyLane& lane(CopyDirection direction) { return *lanes_[static_cast<std::size_t>(direction)]; }
  std::string choice(CopyDirection direction) const {
    std::lock_guard lock(mutex_);
    return choices_[static_cast<std::size_t>(direction)];
  }

  /// Once, though it is of both directions. REQUIRES: mutex_ held.
  void note(const Status& why) {
    if (notes_.find("; " + why.message()) == std::string::npos) notes_ += "; " + why.message();
  }

  /// The path for a direction and what it needs beside it. kUnavailable and the like: not here. REQUIRES: mutex_ held.
  Status make_path(PathKind kind, LanePaths& paths) {
    paths = {};
    Result<std::unique_ptr<CopyPath>> chosen = maker_->make(kind);
    if (!chosen.ok()) return {chosen.status().code(), std::string(path_name(kind)) + ": " + chosen.status().message()};
    paths.chosen = std::move(chosen).value();
    if (!paths.chosen->needs_mapped()) return {};
    Result<std::unique_ptr<CopyPath>> any = maker_->make(PathKind::kMemcpy);
    if (!any.ok()) return any.status();
    paths.any_memory = std::move(any).value();
    paths.registration = registration_.get();
    return {};
  }

  Status first_paths(CopyDirection direction, std::optional<PathKind> asked, LanePaths& paths) {
    if (!asked && measurement_->ended()) return choose_paths(direction, paths);
    std::lock_guard lock(mutex_);
    if (asked) choices_[static_cast<std::size_t>(direction)] = std::string(path_name(*asked)) + " as LMCN_COPY_PATH asks";
    return make_path(asked.value_or(PathKind::kMemcpy), paths);
  }

  /// REQUIRES: the measurement has ended.
  Status choose_paths(CopyDirection direction, LanePaths& paths) {
    const Calibration& calibration = measurement_->calibration();
    std::lock_guard lock(mutex_);
    const PathKind kind = fastest(calibration, direction).value_or(PathKind::kMemcpy);
    Status made = make_path(kind, paths);
    if (!made.ok() && kind != PathKind::kMemcpy) {
      note(made);
      made = make_path(PathKind::kMemcpy, paths);
    }
    LMCN_RETURN_IF_ERROR(made);
    const std::string rates = describe(calibration, direction);
    choices_[static_cast<std::size_t>(direction)] = (direction == CopyDirection::kGather ? "stores by " : "loads by ") +
                                                    std::string(paths.chosen->name()) +
                                                    (rates.empty() ? "" : " (GB/s: " + rates + ")");
    if (!std::exchange(noted_, true)) notes_ += measurement_->notes();
    return {};
  }

  /// LaterPaths of a lane that began before the measurement ended.
  bool later_paths(CopyDirection direction, LanePaths& other) {
    if (!measurement_->ended()) return false;
    if (const Status chosen = choose_paths(direction, other); !chosen.ok()) {
      other = {};
      std::lock_guard lock(mutex_);
      choices_[static_cast<std::size_t>(direction)] = direction == CopyDirection::kGather ? "stores by memcpy" : "loads by memcpy";
      note(chosen);
    }
    return true;
  }

  /// Those mean another stream on each device.
  static bool is_default(cudaStream_t stream) {
    return stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
  }

  /// Marks, on the engine's stream, the point the copies must wait for: after the writes a store reads, after the reads a load
  /// overwrites.
  Status record_ready(CudaJob& job) {
    if (!events_->take(job.events)) {
      DeviceGuard guard(device_);
      LMCN_RETURN_IF_ERROR(guard.status());
      LMCN_RETURN_IF_ERROR(events_->create());
      if (!events_->take(job.events)) return {Code::kResourceExhausted, "every CUDA event is in use"};
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
  std::shared_ptr<const void> arena_owner_;
  std::shared_ptr<HostRegistration> registration_;
  std::shared_ptr<const Measurement> measurement_;  // null: LMCN_COPY_PATH says the path
  JobBoard board_;
  std::unique_ptr<EventPool> events_ = std::make_unique<EventPool>();
  std::array<std::unique_ptr<CopyLane>, 2> lanes_;  // by direction

  mutable std::mutex mutex_;
  std::optional<PathMaker> maker_;
  std::string choices_[2], notes_;  // a choice of "": none yet
  bool noted_ = false;
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
  auto copier = std::make_unique<CudaCopier>(std::move(geometry).value(), device, options);
  if (Status status = copier->start(paged, slot, arena_base, arena_bytes, options, *asked); !status.ok()) return status;
  return of_this_process(std::move(copier));
}

Result<bool> prepare_cuda_copier(const PagedKvLayout& paged, const SlotLayout& slot, int device, std::chrono::milliseconds wait) {
  const Result<std::optional<PathKind>> asked = asked_path();
  if (!asked.ok()) return asked.status();
  if (asked->has_value()) return true;
  if (slot.rank_bytes <= 0) return Status(Code::kInvalidArgument, "rank_bytes is " + std::to_string(slot.rank_bytes));
  // An arena of one slot, anywhere: of slots the measurement knows their layout only.
  const Result<CopyGeometry> geometry = CopyGeometry::make(paged, slot, reinterpret_cast<std::byte*>(kPageBytes),
                                                           image_bytes(static_cast<std::uint64_t>(slot.rank_bytes)), 0);
  if (!geometry.ok()) return geometry.status();
  if (Status status = check_device(device); !status.ok()) return status;
  std::shared_ptr<const Measurement> measurement;
  const Status begun = on_cuda_thread(device, [&](const Status& current) {
    if (current.ok()) measurement = Measurement::of(paged, slot, *geometry, device);
  });
  if (!begun.ok()) return begun;
  return measurement->wait(wait);
}

}  // namespace lmcn
