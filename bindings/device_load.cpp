#include "lmcn/device_load.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "bindings.hpp"
#include "copy/gds_plugin.h"
#include "status.hpp"

namespace lmcn::python {
namespace {

std::string load_plugin(const std::string& path) {
  const LmcnGdsPlugin* const plugin = [&] {
    nb::gil_scoped_release release;
    return take(load_gds_plugin(path));
  }();
  return plugin->kvikio;
}

nb::dict probe(const std::string& directory, const std::string& plugin, int device, std::uint64_t bytes, unsigned in_flight) {
  GdsProbeOptions options;
  options.directory = directory;
  options.device = device;
  options.bytes = bytes;
  options.in_flight = in_flight;
  const GdsProbe found = [&] {
    nb::gil_scoped_release release;
    if (!plugin.empty()) options.plugin = take(load_gds_plugin(plugin));
    return take(probe_gds(options));
  }();
  nb::dict out;
  out["mode"] = found.mode;
  out["reason"] = found.reason;
  out["gds_read"] = found.gds_read;
  out["gds_write"] = found.gds_write;
  out["host_read"] = found.host_read;
  out["host_write"] = found.host_write;
  out["use_gds"] = found.use_gds();
  return out;
}

}  // namespace

void init_device_load(nb::module_& module) {
  module.def(
      "load_gds_plugin", load_plugin, nb::arg("path"),
      "Opens liblmcn_gds.so, once in a process, and returns the version of kvikio that it was built for. What it needs is loaded\n"
      "before (libkvikio.load_library()). Unavailable says what is missing. lmcache_native.gds does both.");
  module.def(
      "probe_gds", probe, nb::arg("directory"), nb::kw_only(), nb::arg("plugin") = "", nb::arg("device") = -1,
      nb::arg("bytes") = std::uint64_t{256} << 20, nb::arg("in_flight") = 8u,
      nb::sig("def probe_gds(directory: str, *, plugin: str = '', device: int = -1, bytes: int = 268435456, "
              "in_flight: int = 8) -> dict[str, str | float | bool]"),
      "Writes and reads a private scratch file in `directory`, which is removed, by O_DIRECT and, with `plugin`, by kvikio: mode\n"
      "(gds, compat, none), reason, gds_read, gds_write, host_read, host_write (10^9 bytes per second; 0: not measured), use_gds\n"
      "(whether GDS is real and reads faster). IoError: the directory cannot hold the file.");
}

}  // namespace lmcn::python
