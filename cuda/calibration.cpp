#include "calibration.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>

#include "cuda_error.hpp"
#include "memory/slot_image.hpp"
#include "per_process.hpp"

namespace lmcn {
namespace {

using Clock = std::chrono::steady_clock;

// Beyond this a copy engine is at its best and a kernel only in the model's way.
constexpr std::int64_t kLongRunBytes = 256 * 1024;
// A turn: enough to show a rate, short enough for a dozen of them. A call for each run costs some 3 us.
constexpr std::int64_t kMostBytes = 16 << 20;
constexpr std::int64_t kMostRuns = 512;
constexpr std::int64_t kMostScratchBytes = 64 << 20;
constexpr std::size_t kMostTurns = 5;
// Within this of the fastest, the path that leaves the multiprocessors alone is the better one.
constexpr double kAsGood = 0.95;
// Planes keep their alignment up to this.
constexpr std::int64_t kAlign = 512;

std::int64_t round_up(std::int64_t value) {
  return (value + kAlign - 1) / kAlign * kAlign;
}

struct DeviceFree {
  void operator()(std::byte* memory) const { static_cast<void>(cudaFree(memory)); }
};
struct HostFree {
  void operator()(std::byte* memory) const { static_cast<void>(cudaFreeHost(memory)); }
};
struct StreamDestroy {
  void operator()(cudaStream_t stream) const { static_cast<void>(cudaStreamDestroy(stream)); }
};
struct EventDestroy {
  void operator()(cudaEvent_t event) const { static_cast<void>(cudaEventDestroy(event)); }
};
using Stream = std::unique_ptr<CUstream_st, StreamDestroy>;
using Event = std::unique_ptr<CUevent_st, EventDestroy>;

struct Runs {
  std::int64_t count = 0, bytes = 0;
};
Runs runs_of(const CopyGeometry& geometry, const CopyJob& job) {
  Runs runs;
  geometry.for_each_run(job, job.items[0], 0, geometry.planes().size(), [&](const RunGroup& group) {
    const std::int64_t here = group.outer.count * group.inner.count;
    runs.count += here;
    runs.bytes += here * group.bytes;
  });
  return runs;
}

/// One chunk of `tokens` tokens in every other block, so that neighbours are not joined.
CopyJob chunk_job(const PagedKvLayout& paged, std::int64_t tokens) {
  CopyJob job;
  job.items.push_back({.tokens = static_cast<std::uint32_t>(tokens)});
  for (std::int64_t token = 0; token < tokens; token += paged.block_tokens) {
    job.block_ids.push_back(2 * static_cast<std::int64_t>(job.block_ids.size()));
  }
  return job;
}

/// A plane's strides when there are only `blocks` blocks, and its extent: what lies outside of all blocks moves closer.
struct PlaneShape {
  PlaneStrides strides;
  std::int64_t extent = 0;
};
PlaneShape shape_of(const PagedKvLayout& paged, PlaneStrides s, std::int64_t blocks) {
  struct Axis {
    std::int64_t count, *stride;
  };
  std::array<Axis, 4> axes{{{paged.head_dim, &s.dim}, {paged.heads, &s.head}, {paged.block_tokens, &s.token}, {blocks, &s.block}}};
  if (paged.num_blocks == 1) s.block = paged.block_tokens * paged.token_bytes();
  std::ranges::stable_sort(axes, {}, [](const Axis& axis) { return *axis.stride; });
  std::int64_t extent = paged.element_bytes;
  bool beyond_blocks = false;
  for (const Axis& axis : axes) {
    if (axis.count == 1) continue;
    if (beyond_blocks) *axis.stride = round_up(extent) + *axis.stride % kAlign;
    beyond_blocks = beyond_blocks || axis.stride == &s.block;
    extent += (axis.count - 1) * *axis.stride;
  }
  return {s, extent};
}

/// A layout with the strides of `paged`, for `blocks` blocks of its first `layers` layers. Planes whose blocks lie within each
/// other's (all of a block in one place) keep their distance; the others stand one after the other. Addresses are from 0.
struct Scaled {
  PagedKvLayout paged;
  std::int64_t bytes = 0;
};
Scaled scaled(const PagedKvLayout& paged, std::size_t layers, std::int64_t blocks) {
  struct Plane {
    std::size_t layer = 0, plane = 0;
    std::int64_t address = 0;
    PlaneShape shape;
  };
  std::vector<Plane> planes;
  for (std::size_t l = 0; l < layers; ++l) {
    for (std::size_t p = 0; p < paged.layers[l].planes.size(); ++p) {
      const PlaneStrides& strides = paged.layers[l].planes[p];
      planes.push_back(
          {l, p, reinterpret_cast<std::intptr_t>(paged.layers[l].base) + strides.offset, shape_of(paged, strides, blocks)});
    }
  }
  std::ranges::sort(planes, {}, &Plane::address);
  Scaled scaled{paged, 0};
  scaled.paged.layers.resize(layers);
  scaled.paged.num_blocks = blocks;
  std::int64_t group_address = 0, group_begin = 0, group_end = 0, group_block = -1;
  for (const Plane& plane : planes) {
    const std::int64_t block = plane.shape.strides.block;
    if (block != group_block || plane.address - group_address >= block) {
      group_address = plane.address;
      group_begin = round_up(group_end) + plane.address % kAlign;
      group_block = block;
    }
    PlaneStrides& strides = scaled.paged.layers[plane.layer].planes[plane.plane];
    strides = plane.shape.strides;
    strides.offset = group_begin + (plane.address - group_address);
    group_end = std::max(group_end, strides.offset + plane.shape.extent);
  }
  scaled.bytes = group_end;
  return scaled;
}

bool stopped(const MeasureLimits& limits) {
  return limits.stop != nullptr && limits.stop->load(std::memory_order_acquire);
}

class Bench {
 public:
  /// kResourceExhausted, kIoError, kUnsupported.
  Status set_up(const PagedKvLayout& paged, const SlotLayout& slot, int device);
  Status add(PathKind kind);
  /// One turn of a path: seconds. kDeadlineExceeded, kAborted, kUnavailable: copies may still be under way.
  Result<double> turn(std::size_t path, CopyDirection direction, const MeasureLimits& limits);
  double bytes() const { return bytes_; }

 private:
  /// `failed`, once nothing is under way; kUnavailable: that cannot be known.
  Status ended(Status failed) const {
    const Status drained = drain(stream_.get());
    return drained.code() == Code::kUnavailable ? drained : failed;
  }
  std::unique_ptr<std::byte, DeviceFree> pages_;
  std::unique_ptr<std::byte, HostFree> arena_;
  Stream stream_;
  Event begin_, end_;
  std::unique_ptr<CopyGeometry> geometry_;
  std::unique_ptr<PathMaker> maker_;
  std::vector<std::unique_ptr<CopyPath>> paths_;  // before what they use
  CopyJob job_;
  std::byte* part_ = nullptr;
  std::byte* mapped_part_ = nullptr;
  double bytes_ = 0;
};

Status Bench::set_up(const PagedKvLayout& paged, const SlotLayout& slot, int device) {
  // How much of a chunk: fewer tokens first, because fewer layers can make runs shorter than they are.
  std::int64_t tokens = slot.chunk_tokens;
  std::size_t layers = paged.layers.size();
  Scaled pages;
  Result<SlotLayout> part = slot;
  for (;;) {
    job_ = chunk_job(paged, tokens);
    pages = scaled(paged, layers, 2 * static_cast<std::int64_t>(job_.block_ids.size()));
    part = SlotLayout::make(pages.paged, tokens);
    if (!part.ok()) return part.status();
    for (PagedLayer& layer : pages.paged.layers) layer.base = reinterpret_cast<std::byte*>(kPageBytes);  // never touched
    Result<CopyGeometry> made = CopyGeometry::make(pages.paged, *part, reinterpret_cast<std::byte*>(kPageBytes),
                                                   image_bytes(static_cast<std::uint64_t>(part->rank_bytes)), 0);
    if (!made.ok()) return made.status();
    const Runs runs = runs_of(*made, job_);
    if (runs.bytes <= kMostBytes && runs.count <= kMostRuns && pages.bytes <= kMostScratchBytes) break;
    if (tokens > paged.block_tokens) {
      tokens = std::max(tokens / 2, paged.block_tokens);
    } else if (layers > 1) {
      layers = (layers + 1) / 2;
    } else if (pages.bytes <= kMostScratchBytes) {
      break;  // a block of a layer is the least there is
    } else {
      return {Code::kUnsupported, "two blocks of a layer take " + std::to_string(pages.bytes) + " bytes"};
    }
  }
  const std::uint64_t arena_bytes = image_bytes(static_cast<std::uint64_t>(part->rank_bytes));
  void* memory = nullptr;
  LMCN_RETURN_IF_ERROR(
      cuda_check(cudaMalloc(&memory, static_cast<std::size_t>(pages.bytes)), "cudaMalloc", Code::kResourceExhausted));
  pages_.reset(static_cast<std::byte*>(memory));
  LMCN_RETURN_IF_ERROR(cuda_check(cudaHostAlloc(&memory, arena_bytes, cudaHostAllocPortable | cudaHostAllocMapped), "cudaHostAlloc",
                                  Code::kResourceExhausted));
  arena_.reset(static_cast<std::byte*>(memory));
  for (PagedLayer& layer : pages.paged.layers) layer.base = pages_.get();
  Result<CopyGeometry> made = CopyGeometry::make(pages.paged, *part, arena_.get(), arena_bytes, 0);
  if (!made.ok()) return made.status();
  geometry_ = std::make_unique<CopyGeometry>(std::move(made).value());
  LMCN_RETURN_IF_ERROR(geometry_->check_job(job_));
  maker_ = std::make_unique<PathMaker>(*geometry_, device, nullptr);
  bytes_ = static_cast<double>(geometry_->job_bytes(job_));
  part_ = geometry_->rank_part(job_.items[0]);
  LMCN_RETURN_IF_ERROR(cuda_check(cudaHostGetDevicePointer(&memory, part_, 0), "cudaHostGetDevicePointer"));
  mapped_part_ = static_cast<std::byte*>(memory);
  std::memset(arena_.get(), 0, arena_bytes);

  cudaStream_t stream = nullptr;
  LMCN_RETURN_IF_ERROR(cuda_check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"));
  stream_.reset(stream);
  for (Event* event : {&begin_, &end_}) {
    cudaEvent_t created = nullptr;
    LMCN_RETURN_IF_ERROR(cuda_check(cudaEventCreateWithFlags(&created, cudaEventDefault), "cudaEventCreateWithFlags"));
    event->reset(created);
  }
  LMCN_RETURN_IF_ERROR(
      cuda_check(cudaMemsetAsync(pages_.get(), 0, static_cast<std::size_t>(pages.bytes), stream), "cudaMemsetAsync"));
  return {};
}

Status Bench::add(PathKind kind) {
  Result<std::unique_ptr<CopyPath>> path = maker_->make(kind);
  if (!path.ok()) return path.status();
  paths_.push_back(std::move(path).value());
  return {};
}

Result<double> Bench::turn(std::size_t index, CopyDirection direction, const MeasureLimits& limits) {
  if (stopped(limits)) return Status(Code::kAborted, "the process ends");
  CopyPath& path = *paths_[index];
  job_.direction = direction;
  const std::uint32_t item = 0;
  std::byte* const part = path.needs_mapped() ? mapped_part_ : part_;
  Status status = cuda_check(cudaEventRecord(begin_.get(), stream_.get()), "cudaEventRecord");
  if (status.ok()) status = path.enqueue({job_, {&item, 1}, {&part, 1}, 0, geometry_->planes().size()}, stream_.get());
  if (status.ok()) status = cuda_check(cudaEventRecord(end_.get(), stream_.get()), "cudaEventRecord");
  if (!status.ok()) return ended(std::move(status));
  const Clock::time_point late = Clock::now() + limits.turn;
  cudaError_t error = cudaErrorNotReady;
  while ((error = cudaEventQuery(end_.get())) == cudaErrorNotReady) {
    if (stopped(limits)) return Status(Code::kAborted, "the process ends");
    if (Clock::now() >= late) {
      return Status(Code::kDeadlineExceeded, "copies have not ended within " + std::to_string(limits.turn.count()) + " ms");
    }
    std::this_thread::yield();
  }
  status = cuda_check(error, "cudaEventQuery");
  if (!status.ok()) return ended(std::move(status));
  float milliseconds = 0;
  status = cuda_check(cudaEventElapsedTime(&milliseconds, begin_.get(), end_.get()), "cudaEventElapsedTime");
  if (!status.ok()) return status;
  return std::max(static_cast<double>(milliseconds), 1e-4) / 1e3;
}

/// Of turn().
bool may_run_on(const Status& status) {
  return status.code() == Code::kDeadlineExceeded || status.code() == Code::kAborted || status.code() == Code::kUnavailable;
}

double median(std::vector<double>& values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::ranges::nth_element(values, middle);
  return *middle;
}

}  // namespace

std::vector<PathKind> candidates_of(const CopyGeometry& geometry) {
  // Runs of one block: neighbouring blocks are seldom neighbours in a request.
  CopyJob job;
  job.items.push_back({.tokens = static_cast<std::uint32_t>(geometry.counts().block_tokens)});
  job.block_ids = {0};
  const Runs runs = runs_of(geometry, job);
  if (runs.bytes >= runs.count * kLongRunBytes) return {PathKind::kBatch, PathKind::kMemcpy};
  return {kAllPaths.begin(), kAllPaths.end()};
}

Calibration measure_paths(const PagedKvLayout& paged, const SlotLayout& slot, int device, std::span<const PathKind> candidates,
                          const MeasureLimits& limits) {
  Calibration calibration;
  const auto bench = std::make_shared<Bench>();
  if (Status status = bench->set_up(paged, slot, device); !status.ok()) {
    calibration.notes.push_back("nothing measured: " + status.message());
    return calibration;
  }
  struct Measured {
    PathKind kind{};
    std::vector<double> seconds[2];
    Status failure;
  };
  std::vector<Measured> measured;
  for (const PathKind kind : candidates) {
    if (Status status = bench->add(kind); status.ok()) {
      measured.push_back({kind, {}, {}});
    } else {
      calibration.notes.push_back(std::string(path_name(kind)) + ": " + status.message());
    }
  }
  // Before turn 1 everything is done once: a path's first use may load a module, and pays for that alone.
  Clock::time_point deadline{};
  for (std::size_t turn = 0; turn <= kMostTurns; ++turn) {
    if (turn == 1) deadline = Clock::now() + limits.budget;
    if (turn > 1 && Clock::now() >= deadline) break;
    for (std::size_t i = 0; i < measured.size(); ++i) {
      Measured& path = measured[i];
      for (const CopyDirection direction : {CopyDirection::kGather, CopyDirection::kScatter}) {
        if (!path.failure.ok()) continue;
        Result<double> seconds = bench->turn(i, direction, limits);
        if (may_run_on(seconds.status())) {
          keep_for_ever(bench);
          calibration.notes.push_back("nothing measured: " + std::string(path_name(path.kind)) + ": " + seconds.status().message());
          return calibration;
        }
        if (!seconds.ok()) path.failure = seconds.status();
        if (seconds.ok() && turn > 0) path.seconds[static_cast<std::size_t>(direction)].push_back(*seconds);
      }
    }
  }
  for (Measured& path : measured) {
    if (!path.failure.ok()) {
      calibration.notes.push_back(std::string(path_name(path.kind)) + ": " + path.failure.message());
      continue;
    }
    PathRate rate{path.kind};
    rate.gather_gb_s = bench->bytes() / median(path.seconds[0]) / 1e9;
    rate.scatter_gb_s = bench->bytes() / median(path.seconds[1]) / 1e9;
    calibration.rates.push_back(rate);
  }
  return calibration;
}

std::optional<PathKind> fastest(const Calibration& calibration, CopyDirection direction) {
  double best = 0;
  for (const PathRate& rate : calibration.rates) best = std::max(best, rate.of(direction));
  std::optional<PathKind> choice;
  for (const PathRate& rate : calibration.rates) {
    if (rate.of(direction) >= kAsGood * best && (!choice || rate.path < *choice)) choice = rate.path;
  }
  return choice;
}

std::string describe(const Calibration& calibration, CopyDirection direction) {
  std::string text;
  for (const PathRate& rate : calibration.rates) {
    char entry[64];
    std::snprintf(entry, sizeof entry, "%s%s %.1f", text.empty() ? "" : ", ", path_name(rate.path), rate.of(direction));
    text += entry;
  }
  return text;
}

}  // namespace lmcn
