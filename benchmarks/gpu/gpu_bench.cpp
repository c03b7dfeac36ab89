// Measures the CUDA copier on this machine's GPU: ceilings, each path a copy can take and the calibrated choice beside plain
// cudaMemcpyAsync, the kernels alone, and files of DIR to the device.
//   gpu_bench --out FILE [--path DIR] [--small]     0: FILE has a JSON object a line. 1: an error or wrong bytes. 77: no GPU here.
// GB are 1e9 bytes; seconds are of device events around all that a job enqueues, medians of 7. benchmarks/gpu/report.py judges.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "lmcn/version.hpp"
#include "rig.hpp"

namespace lmcn::gpu_bench {
namespace {

using Clock = std::chrono::steady_clock;

double rate(std::int64_t bytes, const std::vector<double>& seconds) {
  return static_cast<double>(bytes) / median(seconds) / 1e9;
}

std::vector<double> repeat(const Options& options, const std::function<double()>& once) {
  std::vector<double> seconds;
  static_cast<void>(once());  // pages, clocks and caches
  for (int round = 0; round < options.rounds; ++round) seconds.push_back(once());
  return seconds;
}

const char* direction_name(CopyDirection direction) {
  return direction == CopyDirection::kGather ? "gather" : "scatter";
}

/// Submits and waits. Device seconds; `wall` gets the caller's.
double run(PagedCopier& copier, CopyJob job, double& wall) {
  const std::uint64_t ids[] = {job.id};
  const auto begin = Clock::now();
  check(copier.submit(std::move(job)), "submit");
  check(copier.wait(ids, std::chrono::minutes(1)), "wait");
  wall = std::chrono::duration<double>(Clock::now() - begin).count();
  const std::vector<CopyDone> done = copier.poll();
  check(done.size() == 1 && done[0].ok ? Status() : Status(Code::kInternal, done.empty() ? "no result" : done[0].message), "job");
  return std::max(done[0].seconds, 1e-9);
}

void measure_copier(const Options& options, Lines& lines, Rig& rig, const std::string& path) {
  CopierOptions copier_options;
  copier_options.slot_bytes = image_bytes(rig.rank_bytes);
  auto made = make_cuda_copier(rig.paged, rig.slot, rig.arena, rig.arena_bytes, copier_options, kDevice);
  const std::vector<Lines::Field> shape = {Lines::text("path", path), Lines::number("run_bytes", rig.run_bytes),
                                           Lines::number("runs", rig.runs)};
  if (!made.ok()) {
    std::vector<Lines::Field> fields = shape;
    fields.push_back(Lines::text("why", made.status().to_string()));
    lines.write("path missing", fields);
    return;
  }
  PagedCopier& copier = **made;
  // Scatter first: what the gathers bring is then the work of both.
  for (const CopyDirection direction : {CopyDirection::kScatter, CopyDirection::kGather}) {
    if (direction == CopyDirection::kGather) rig.clear_slots();
    std::vector<double> walls;
    const std::vector<double> seconds = repeat(options, [&] {
      double wall = 0;
      const double device = run(copier, rig.job(1, direction), wall);
      walls.push_back(wall);
      return device;
    });
    if (direction == CopyDirection::kGather) rig.check_slots(path);
    std::vector<Lines::Field> fields = shape;
    fields.push_back(Lines::text("direction", direction_name(direction)));
    fields.push_back(Lines::number("gb_s", rate(rig.bytes(), seconds)));
    fields.push_back(Lines::number("wall_us", median(walls) * 1e6));
    fields.push_back(Lines::numbers("seconds", seconds));
    fields.push_back(Lines::text("copier", copier.name()));
    fields.push_back(Lines::text("details", copier.details()));
    lines.write("copy", fields);
    std::printf("%-8s %-7s %7lld B x %5lld  %8.2f GB/s  %10.0f us  %s\n", path.c_str(), direction_name(direction),
                static_cast<long long>(rig.run_bytes), static_cast<long long>(rig.runs), rate(rig.bytes(), seconds),
                median(walls) * 1e6, copier.name().c_str());
  }
}

/// What anybody would write: one cudaMemcpyAsync a run, on one stream, pinned memory.
void measure_plain(const Options& options, Lines& lines, const Rig& rig) {
  const Stream stream;
  for (const CopyDirection direction : {CopyDirection::kScatter, CopyDirection::kGather}) {
    const bool gather = direction == CopyDirection::kGather;
    const std::vector<double> seconds = repeat(options, [&] {
      return stream.seconds([&] {
        for (std::int64_t l = 0; l < rig.layers; ++l) {
          for (std::int64_t i = 0; i < rig.blocks; ++i) {
            CHECK_CUDA(cudaMemcpyAsync(gather ? rig.stored(l, i) : rig.page(l, i), gather ? rig.page(l, i) : rig.stored(l, i),
                                       static_cast<std::size_t>(rig.run_bytes),
                                       gather ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice, stream.get()));
          }
        }
      });
    });
    lines.write("copy", {Lines::text("path", "plain cudaMemcpyAsync"), Lines::number("run_bytes", rig.run_bytes),
                         Lines::number("runs", rig.runs), Lines::text("direction", direction_name(direction)),
                         Lines::number("gb_s", rate(rig.bytes(), seconds)), Lines::numbers("seconds", seconds)});
  }
}

void set_path(const char* name) {
  check(setenv("LMCN_COPY_PATH", name, 1) == 0 ? Status() : Status(Code::kInternal, "setenv"), "LMCN_COPY_PATH");
}

void write_head(Lines& lines, const Options& options) {
  cudaDeviceProp properties{};
  CHECK_CUDA(cudaSetDevice(kDevice));
  CHECK_CUDA(cudaGetDeviceProperties(&properties, kDevice));
  int runtime = 0, driver = 0;
#ifndef LMCN_FAKE_CUDART
  CHECK_CUDA(cudaRuntimeGetVersion(&runtime));
  CHECK_CUDA(cudaDriverGetVersion(&driver));
#endif
  lines.write("device", {Lines::text("name", properties.name),
                         Lines::text("capability", std::to_string(properties.major) + "." + std::to_string(properties.minor)),
                         Lines::number("multiprocessors", std::int64_t{properties.multiProcessorCount}),
                         Lines::number("memory_bytes", static_cast<std::int64_t>(properties.totalGlobalMem)),
                         Lines::number("cuda_runtime", std::int64_t{runtime}), Lines::number("cuda_driver", std::int64_t{driver}),
                         Lines::number("rounds", std::int64_t{options.rounds})});
  std::printf("device %d: %s\n", kDevice, properties.name);
}

}  // namespace

void measure_ceilings(const Options& options, Lines& lines) {
  const std::size_t bytes = std::size_t{options.small ? 1u : 256u} << 20;
  const DeviceMemory device(bytes), other(bytes);
  auto* const host = static_cast<std::byte*>(std::aligned_alloc(kPageBytes, bytes));
  std::memset(host, 1, bytes);
  CHECK_CUDA(cudaHostRegister(host, bytes, cudaHostRegisterDefault));
  const Stream stream;
  const auto measure = [&](const char* name, void* to, const void* from, cudaMemcpyKind kind) {
    const std::vector<double> seconds =
        repeat(options, [&] { return stream.seconds([&] { CHECK_CUDA(cudaMemcpyAsync(to, from, bytes, kind, stream.get())); }); });
    const double gb_s = rate(static_cast<std::int64_t>(bytes), seconds);
    lines.write("ceiling", {Lines::text("name", name), Lines::number("bytes", static_cast<std::int64_t>(bytes)),
                            Lines::number("gb_s", gb_s), Lines::numbers("seconds", seconds)});
    std::printf("ceiling %-16s %8.2f GB/s\n", name, gb_s);
  };
  measure("host to device", device.get(), host, cudaMemcpyHostToDevice);
  measure("device to host", host, device.get(), cudaMemcpyDeviceToHost);
#ifndef LMCN_FAKE_CUDART
  measure("device to device", other.get(), device.get(), cudaMemcpyDeviceToDevice);
#endif
  CHECK_CUDA(cudaHostUnregister(host));
  std::free(host);
}

void measure_paths(const Options& options, Lines& lines) {
  for (const auto& [run_bytes, runs] : shapes(options)) {
    Rig rig(run_bytes, runs);
    measure_plain(options, lines, rig);
    for (const PathKind kind : kAllPaths) {
      set_path(path_name(kind));
      measure_copier(options, lines, rig, path_name(kind));
    }
    set_path("auto");
    measure_copier(options, lines, rig, "auto");
  }
}

namespace {

int run_all(const Options& options, const char* out) {
  const CudaStatus status = cuda_status();
  if (status.devices == 0) {
    std::printf("gpu_bench: NO GPU HERE, NOTHING MEASURED: %s\n", status.message.c_str());
    return 77;
  }
  std::FILE* const file = std::fopen(out, "w");
  check(file != nullptr ? Status() : Status::from_errno(errno, out), "--out");
  Lines lines(file);
  write_head(lines, options);
  measure_ceilings(options, lines);
  measure_paths(options, lines);
  measure_kernels(options, lines);
  measure_storage(options, lines);
  lines.write("end", {});
  std::fclose(file);
  return 0;
}

}  // namespace
}  // namespace lmcn::gpu_bench

int main(int argc, char** argv) {
  lmcn::gpu_bench::Options options;
  const char* out = nullptr;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--small") == 0) {
      options.small = true;
      options.rounds = 3;
    } else if (std::strcmp(argv[i], "--out") == 0 && i + 1 < argc) {
      out = argv[++i];
    } else if (std::strcmp(argv[i], "--path") == 0 && i + 1 < argc) {
      options.folder = argv[++i];
    } else {
      std::fprintf(stderr, "gpu_bench: %s: must be --out FILE, --path DIR or --small\n", argv[i]);
      return 2;
    }
  }
  if (out == nullptr) {
    std::fprintf(stderr, "gpu_bench: --out FILE is missing\n");
    return 2;
  }
  return lmcn::gpu_bench::run_all(options, out);
}
