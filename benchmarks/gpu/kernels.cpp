// The kernels alone: to and from staging memory on the device (what they can do), and to and from mapped host memory with few
// thread blocks (what they leave to the model).
#include <array>
#include <cstdio>
#include <numeric>

#include "copy/copy_geometry.hpp"
#include "paged_kernel.hpp"
#include "rig.hpp"

namespace lmcn::gpu_bench {
namespace {

void measure(const Options& options, Lines& lines, Rig& rig, unsigned max_ctas, bool in_host_memory) {
  auto geometry = CopyGeometry::make(rig.paged, rig.slot, rig.arena, rig.arena_bytes, 0);
  check(geometry.ok() ? Status() : geometry.status(), "geometry");
  auto kernel = PagedKernel::make(*geometry, kDevice);
  check(kernel.ok() ? Status() : kernel.status(), "kernel");
  const DeviceMemory staging(in_host_memory ? 16 : rig.rank_bytes * rig.items.size());
  std::vector<std::uint32_t> items(rig.items.size());
  std::iota(items.begin(), items.end(), 0u);
  std::vector<std::byte*> parts;
  for (std::size_t i = 0; i < items.size(); ++i) {
    std::byte* const in_slot = rig.arena + rig.items[i].slot_offset + kPageBytes;
    parts.push_back(in_host_memory ? rig.registration->device_address(in_slot, rig.rank_bytes)
                                   : staging.get() + i * rig.rank_bytes);
    check(parts.back() != nullptr ? Status() : Status(Code::kInternal, "a slot is not mapped"), "kernel");
  }
  const Stream stream;
  for (const CopyDirection direction : {CopyDirection::kGather, CopyDirection::kScatter}) {
    if (in_host_memory && direction == CopyDirection::kGather) rig.clear_slots();
    const CopyJob job = rig.job(1, direction);
    std::vector<double> seconds;
    for (int round = 0; round <= options.rounds; ++round) {
      const double took = stream.seconds([&] {
        check((*kernel)->launch(job, direction, items, parts, 0, geometry->planes().size(), stream.get(), max_ctas), "launch");
      });
      if (round > 0) seconds.push_back(took);
    }
    if (in_host_memory && direction == CopyDirection::kGather) rig.check_slots("kernel");
    const double gb_s = static_cast<double>(rig.bytes()) / median(seconds) / 1e9;
    const char* const name = direction == CopyDirection::kGather ? "gather" : "scatter";
    lines.write("kernel", {Lines::text("slot", in_host_memory ? "mapped host memory" : "device memory"),
                           Lines::number("max_ctas", std::int64_t{max_ctas}), Lines::number("run_bytes", rig.run_bytes),
                           Lines::number("runs", rig.runs), Lines::text("direction", name), Lines::number("gb_s", gb_s),
                           Lines::numbers("seconds", seconds)});
    std::printf("kernel   %-7s %7lld B x %5lld  %8.2f GB/s  <= %u CTAs, %s\n", name, static_cast<long long>(rig.run_bytes),
                static_cast<long long>(rig.runs), gb_s, max_ctas, in_host_memory ? "mapped host memory" : "device memory");
  }
}

}  // namespace

void measure_kernels(const Options& options, Lines& lines) {
  for (const auto& [run_bytes, runs] : shapes(options)) {
    const bool large = run_bytes * runs >= std::int64_t{16} << 20;  // small ones measure the launch
    if (!large && !options.small) continue;
    Rig rig(run_bytes, runs);
    for (const unsigned ctas : {4u, 8u, 12u}) measure(options, lines, rig, ctas, true);
    for (const unsigned ctas : {12u, 64u, 512u}) measure(options, lines, rig, ctas, false);
  }
}

}  // namespace lmcn::gpu_bench
