// From files to the device: O_DIRECT through host memory, beside GPUDirect Storage where its plugin is built.
#include <cstdio>
#include <string>

#include "lmcn/device_load.hpp"
#include "rig.hpp"

namespace lmcn::gpu_bench {

void measure_storage(const Options& options, Lines& lines) {
  if (options.folder.empty()) return;
  GdsProbeOptions probe_options{.directory = options.folder, .device = kDevice};
  if (options.small) probe_options.bytes = 4 << 20;
  std::string lacks = "not built here";
#ifdef LMCN_BENCH_PLUGIN
  const std::string libraries[] = {LMCN_BENCH_RAPIDS_LOGGER, LMCN_BENCH_KVIKIO};
  const Result<const LmcnGdsPlugin*> plugin = load_gds_plugin(LMCN_BENCH_PLUGIN, libraries);
  if (plugin.ok()) {
    probe_options.plugin = plugin.value();
  } else {
    lacks = plugin.status().message();
  }
#endif
  const Result<GdsProbe> probe = probe_gds(probe_options);
  check(probe.ok() ? Status() : probe.status(), "probe of " + options.folder);
  const auto write = [&](const std::string& way, double gb_s, const std::string& note) {
    lines.write("storage", {Lines::text("way", way), Lines::number("gb_s", gb_s), Lines::text("note", note)});
    std::printf("storage  %-32s %8.2f GB/s  %s\n", way.c_str(), gb_s, note.c_str());
  };
  write("O_DIRECT and host memory", probe->host_read, "");
  if (probe->gds_read > 0) {
    write("kvikio, " + probe->mode, probe->gds_read, probe->reason);
  } else {
    lines.write("path missing", {Lines::text("path", "GPUDirect Storage"),
                                 Lines::text("why", probe_options.plugin == nullptr ? lacks : probe->reason)});
  }
}

}  // namespace lmcn::gpu_bench
