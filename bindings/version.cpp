#include "lmcn/version.hpp"

#include "bindings.hpp"
#include "io/io_engine.hpp"
#include "status.hpp"

namespace lmcn::python {

void init_version(nb::module_& module) {
  module.def(
      "build_info",
      [] {
        const BuildInfo info = build_info();
        nb::dict out;
        out["version"] = info.version;
        out["compiler"] = info.compiler;
        out["build_type"] = info.build_type;
        out["cuda_choice"] = info.cuda_choice;
        out["cuda"] = info.cuda;
        out["cuda_toolkit"] = info.cuda_toolkit;
        out["cuda_archs"] = info.cuda_archs;
        out["liburing"] = info.liburing;
        out["xxhash"] = info.xxhash;
        out["openssl"] = info.openssl;
        out["format_version"] = info.format_version;
        return out;
      },
      nb::sig("def build_info() -> dict[str, str | int | bool]"),
      "How this extension was built: version, compiler, build_type, cuda_choice (what LMCN_CUDA asked for), cuda (what the build\n"
      "chose), cuda_toolkit, cuda_archs, liburing, xxhash, openssl (linked statically), format_version (of slots and the NVMe "
      "log).");
  module.def(
      "cuda_status",
      [] {
        CudaStatus status;
        {
          nb::gil_scoped_release release;
          status = cuda_status();
        }
        nb::dict out;
        out["built"] = status.built;
        out["devices"] = status.devices;
        out["error"] = status.error;
        out["message"] = status.message;
        return out;
      },
      nb::sig("def cuda_status() -> dict[str, str | int | bool]"),
      "Whether CUDA can be used here: built, devices, error (cudaError_t of the probe; 35: no driver), message. Never raises.");
  module.def(
      "io_engine_note",
      [] {
        std::string note;
        Status status;
        {
          nb::gil_scoped_release release;
          status = io::make_engine({}, &note).status();
        }
        throw_if_error(std::move(status));
        return note;
      },
      nb::sig("def io_engine_note() -> str"),
      "Which I/O engine a store opened here would get, and why: makes one, with a ring set up and tried where there is io_uring, "
      "and\n"
      "drops it. InvalidArgument: LMCN_IO_ENGINE is wrong. Unavailable: it asks for an engine that cannot be had.");
}

}  // namespace lmcn::python
