#include "lmcn/device_load.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>

#include "arguments.hpp"
#include "bindings.hpp"
#include "copy/gds_plugin.h"
#include "status.hpp"

namespace lmcn::python {
namespace {

/// Destroyed loader first (waits for reads under way, without the GIL), then the owner of the paged memory.
struct LoaderObject {
  nb::object owner;
  std::unique_ptr<DeviceLoader> loader;

  LoaderObject() = default;
  LoaderObject(LoaderObject&&) noexcept = default;
  ~LoaderObject() {
    if (loader == nullptr) return;
    nb::gil_scoped_release release;
    loader.reset();
  }
};

template <class Work>
auto without_gil(const LoaderObject& self, Work work) {
  nb::gil_scoped_release release;
  return work(*self.loader);
}

LoaderObject make(const PagedKvLayout& paged, const SlotLayout& slot, const DeviceLoaderOptions& options, nb::object owner) {
  LoaderObject object;
  object.owner = std::move(owner);
  auto made = [&] {
    nb::gil_scoped_release release;
    return make_device_loader(paged, slot, options);
  }();
  object.loader = take(std::move(made));
  return object;
}

LoaderObject host(const PagedKvLayout& paged, const SlotLayout& slot, std::uint32_t rank, std::uint32_t rank_count,
                  std::uint64_t buffer_bytes, unsigned in_flight, unsigned files, nb::object owner) {
  DeviceLoaderOptions options;
  options.rank = rank;
  options.rank_count = rank_count;
  options.buffer_bytes = buffer_bytes;
  options.in_flight = in_flight;
  options.files = files;
  return make(paged, slot, options, std::move(owner));
}

LoaderObject cuda(const PagedKvLayout& paged, const SlotLayout& slot, int device, const std::string& plugin, std::uint32_t rank,
                  std::uint32_t rank_count, std::uint64_t buffer_bytes, unsigned in_flight, unsigned files, bool allow_compat,
                  nb::object owner) {
  DeviceLoaderOptions options;
  options.device = device;
  options.rank = rank;
  options.rank_count = rank_count;
  options.buffer_bytes = buffer_bytes;
  options.in_flight = in_flight;
  options.files = files;
  if (!plugin.empty()) options.plugin = take(load_gds_plugin(plugin));
  options.allow_compat = allow_compat;
  return make(paged, slot, options, std::move(owner));
}

void submit(const LoaderObject& self, std::uint64_t id, const std::vector<std::string>& files, nb::handle file_indexes,
            nb::handle offsets_object, nb::handle image_bytes, nb::handle keys, nb::bytes ns, nb::handle region_sequences,
            nb::handle first_tokens, nb::handle tokens, nb::handle block_begin, nb::handle block_ids, nb::handle token_in_block,
            std::uint64_t stream, double timeout_s) {
  const auto offsets = integers<std::uint64_t>(offsets_object, "offsets");
  const std::size_t count = offsets.size();
  const auto file = of_length<std::uint32_t>(file_indexes, "file_indexes", "offsets", count);
  const auto bytes = of_length<std::uint64_t>(image_bytes, "image_bytes", "offsets", count);
  const auto sequence = of_length<std::uint64_t>(region_sequences, "region_sequences", "offsets", count);
  const auto first = of_length<std::uint32_t>(first_tokens, "first_tokens", "offsets", count);
  const auto length = of_length<std::uint32_t>(tokens, "tokens", "offsets", count);
  const auto begin = of_length<std::uint32_t>(block_begin, "block_begin", "offsets", count);
  const auto within = of_length<std::uint32_t>(token_in_block, "token_in_block", "offsets", count);
  const KeysArgument key(keys, "keys");
  if (key.span().size() != count) {
    throw_invalid("keys: as many as offsets (" + std::to_string(count) + ") expected, got " + std::to_string(key.span().size()));
  }
  DeviceLoadJob job;
  job.id = id;
  job.stream = stream;
  const NamespaceId native_ns = namespace_id(ns, "namespace");
  job.items.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    if (file[i] >= files.size()) {
      throw_invalid("file_indexes[" + std::to_string(i) + "] is " + std::to_string(file[i]) + ", must be less than " +
                    std::to_string(files.size()));
    }
    job.items.push_back(
        {files[file[i]], offsets[i], bytes[i], key.span()[i], native_ns, sequence[i], first[i], length[i], begin[i], within[i]});
  }
  job.block_ids = integers<std::int64_t>(block_ids, "block_ids");
  job.deadline = std::chrono::steady_clock::now() + milliseconds(timeout_s, "timeout_s");
  throw_if_error(without_gil(self, [&](DeviceLoader& loader) { return loader.submit(std::move(job)); }));
}

// As of a copier: a job that may write pages for ever is never polled, and who asks in vain must hear of it.
std::vector<DeviceLoadDone> poll(const LoaderObject& self) {
  Status lost;
  std::vector<DeviceLoadDone> done = without_gil(self, [&](DeviceLoader& loader) {
    std::vector<DeviceLoadDone> ended = loader.poll();
    if (ended.empty()) lost = loader.lost();
    return ended;
  });
  throw_if_error(lost);
  return done;
}

void init_done(nb::module_& module) {
  nb::class_<DeviceLoadDone>(module, "DeviceLoadDone", "How one job of a DeviceLoader ended.")
      .def_ro("id", &DeviceLoadDone::id)
      .def_ro("ok", &DeviceLoadDone::ok)
      .def_ro("bytes", &DeviceLoadDone::bytes, "Bytes of pages written.")
      .def_ro("seconds", &DeviceLoadDone::seconds, "From the start of the first record to the end of the last.")
      .def_prop_ro(
          "failed_items",
          [](const DeviceLoadDone& done) {
            std::vector<std::uint32_t> items;
            for (const DeviceLoadFailure& failure : done.failed) items.push_back(failure.item);
            return items;
          },
          "Indexes into the job's records.")
      .def_prop_ro(
          "bad_items",
          [](const DeviceLoadDone& done) {
            std::vector<std::uint32_t> items;
            for (const DeviceLoadFailure& failure : done.failed) {
              const Code code = failure.status.code();
              if (code == Code::kCorruption || code == Code::kFormatVersion) items.push_back(failure.item);
            }
            return items;
          },
          "Those of failed_items whose record does not hold; what else failed says nothing of the record.")
      .def_prop_ro(
          "message",
          [](const DeviceLoadDone& done) { return done.failed.empty() ? std::string() : done.failed.front().status.to_string(); },
          "Why the first of them failed.");
}

std::string load_plugin(const std::string& path) {
  const LmcnGdsPlugin* const plugin = [&] {
    nb::gil_scoped_release release;
    return take(load_gds_plugin(path));
  }();
  return plugin->kvikio;
}

nb::dict probe(const std::string& directory, const std::string& plugin, int device, std::uint64_t bytes, unsigned in_flight,
               bool measure_without_gds) {
  GdsProbeOptions options;
  options.directory = directory;
  options.device = device;
  options.bytes = bytes;
  options.in_flight = in_flight;
  options.measure_without_gds = measure_without_gds;
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
  init_done(module);
  module.def(
      "load_gds_plugin", load_plugin, nb::arg("path"),
      "Opens liblmcn_gds.so, once in a process, and returns the version of kvikio that it was built for. What it needs is loaded\n"
      "before (libkvikio.load_library()). Unavailable says what is missing. lmcache_native.gds does both.");
  module.def(
      "probe_gds", probe, nb::arg("directory"), nb::kw_only(), nb::arg("plugin") = "", nb::arg("device") = -1,
      nb::arg("bytes") = std::uint64_t{256} << 20, nb::arg("in_flight") = 8u, nb::arg("measure_without_gds") = true,
      nb::sig("def probe_gds(directory: str, *, plugin: str = '', device: int = -1, bytes: int = 268435456, "
              "in_flight: int = 8, measure_without_gds: bool = True) -> dict[str, str | float | bool]"),
      "Writes and reads a private scratch file in `directory`, which is removed, by O_DIRECT and, with `plugin`, by kvikio: mode\n"
      "(gds, compat, none), reason, gds_read, gds_write, host_read, host_write (10^9 bytes per second; 0: not measured), use_gds\n"
      "(whether GDS is real and reads faster). measure_without_gds=False: nothing is written where GDS is not real. IoError: the\n"
      "directory cannot hold the file.");
  nb::class_<LoaderObject>(module, "DeviceLoader",
                           "Brings records of the NVMe log into an engine's paged memory without a slot: file, staging memory, "
                           "verified there, pages.\n"
                           "Thread-safe; submit() and poll() wait for no I/O. Nothing of a record reaches a page before all of "
                           "what was read of it was verified.\n"
                           "Dropping it waits for reads under way.")
      .def_static("host", host, nb::arg("paged"), nb::arg("slot"), nb::kw_only(), nb::arg("rank") = 0, nb::arg("rank_count") = 1,
                  nb::arg("buffer_bytes") = DeviceLoaderOptions{}.buffer_bytes,
                  nb::arg("in_flight") = DeviceLoaderOptions{}.in_flight, nb::arg("files") = DeviceLoaderOptions{}.files,
                  nb::arg("owner") = nb::none(),
                  nb::sig("def host(paged: PagedKvLayout, slot: SlotLayout, *, rank: int = 0, rank_count: int = 1, buffer_bytes: "
                          "int = 268435456, in_flight: int = 8, files: int = 1, owner: object = None) -> DeviceLoader"),
                  "For paged memory that this process can address. buffer_bytes: staging memory. in_flight: records read at once. "
                  "files: how many\n"
                  "files records lie in; each has its share of the reads at once, so that one on a silent drive holds up no other. "
                  "owner: any object\n"
                  "to keep alive with the loader (the tensors behind `paged`).")
      .def_static(
          "cuda", cuda, nb::arg("paged"), nb::arg("slot"), nb::kw_only(), nb::arg("device") = 0, nb::arg("plugin") = "",
          nb::arg("rank") = 0, nb::arg("rank_count") = 1, nb::arg("buffer_bytes") = DeviceLoaderOptions{}.buffer_bytes,
          nb::arg("in_flight") = DeviceLoaderOptions{}.in_flight, nb::arg("files") = DeviceLoaderOptions{}.files,
          nb::arg("allow_compat") = false, nb::arg("owner") = nb::none(),
          nb::sig("def cuda(paged: PagedKvLayout, slot: SlotLayout, *, device: int = 0, plugin: str = '', rank: int "
                  "= 0, rank_count: int = 1, buffer_bytes: int = 268435456, in_flight: int = 8, files: int = 1, allow_compat: "
                  "bool = False, "
                  "owner: object = None) -> DeviceLoader"),
          "For paged memory on a CUDA device. plugin: path of liblmcn_gds.so, for GPUDirect Storage; else through host memory. "
          "allow_compat: "
          "whether kvikio\n"
          "without GDS will do. Unavailable: no CUDA, or no GDS. ResourceExhausted: no memory for staging on the device.")
      .def("submit", submit, nb::arg("id"), nb::arg("files"), nb::arg("file_indexes").none(), nb::arg("offsets").none(),
           nb::arg("image_bytes").none(), nb::arg("keys").none(), nb::arg("namespace"), nb::arg("region_sequences").none(),
           nb::arg("first_tokens").none(), nb::arg("tokens").none(), nb::arg("block_begin").none(), nb::arg("block_ids").none(),
           nb::arg("token_in_block").none(), nb::arg("stream") = 0, nb::arg("timeout_s") = 30.0,
           nb::sig("def submit(self, id: int, files: list[str], file_indexes: lmcache_native._types.IntArray, offsets: "
                   "lmcache_native._types.IntArray, image_bytes: lmcache_native._types.IntArray, keys: "
                   "lmcache_native._types.Keys, namespace: bytes, region_sequences: lmcache_native._types.IntArray, first_tokens: "
                   "lmcache_native._types.IntArray, tokens: lmcache_native._types.IntArray, block_begin: "
                   "lmcache_native._types.IntArray, block_ids: lmcache_native._types.IntArray, token_in_block: "
                   "lmcache_native._types.IntArray, stream: int = 0, timeout_s: float = 30.0) -> None"),
           "Starts one job, item i of which is the record at offsets[i] of files[file_indexes[i]], as Store.locate() gives it; the "
           "other arguments\n"
           "as in PagedCopier.submit(). Items not verified within timeout_s fail. InvalidArgument, and nothing loaded, when "
           "something is out of bounds.")
      .def("poll", poll,
           "Jobs that ended since the last call, each exactly once. Unavailable, when there are none: a CUDA device answers "
           "nothing but "
           "errors, and\n"
           "loads that it may still execute will never end.")
      .def(
          "wait",
          [](const LoaderObject& self, nb::handle ids, double timeout_s) {
            const auto jobs = integers<std::uint64_t>(ids, "ids");
            const auto deadline = milliseconds(timeout_s, "timeout_s");
            throw_if_error(without_gil(self, [&](DeviceLoader& loader) { return loader.wait(jobs, deadline); }));
          },
          nb::arg("ids").none(), nb::arg("timeout_s") = 30.0,
          nb::sig("def wait(self, ids: lmcache_native._types.IntArray, timeout_s: float = 30.0) -> None"),
          "Waits, without the GIL, until none of the jobs is under way; results still come through poll(). DeadlineExceeded.")
      .def(
          "cancel",
          [](const LoaderObject& self, nb::handle ids) {
            const auto jobs = integers<std::uint64_t>(ids, "ids");
            without_gil(self, [&](DeviceLoader& loader) { loader.cancel(jobs); });
          },
          nb::arg("ids").none(), nb::sig("def cancel(self, ids: lmcache_native._types.IntArray) -> None"),
          "Items not yet verified fail soon; returns at once. Each job still comes through poll() once, after which nothing of it "
          "is written any more.")
      .def(
          "notes", [](const LoaderObject& self) { return without_gil(self, [](DeviceLoader& loader) { return loader.notes(); }); },
          "Lines for the log since the last call: that GDS failed and was given up.")
      .def_prop_ro(
          "name", [](const LoaderObject& self) { return self.loader->name(); },
          "Of all paths, the one furthest from GDS: 'gds', 'gds-compat' or 'host'; 'none' while nothing was read and it is not "
          "known.")
      .def_prop_ro(
          "paths",
          [](const LoaderObject& self) {
            nb::dict paths;
            for (const DeviceLoadPath& path : without_gil(self, [](DeviceLoader& loader) { return loader.paths(); })) {
              paths[nb::str(path.path.c_str())] = nb::make_tuple(path.name, path.reason);
            }
            return paths;
          },
          nb::sig("def paths(self) -> dict[str, tuple[str, str]]"),
          "What last read each file: (name as above, how that is known or why it is not GDS), by path. As cuFile says for the "
          "file.")
      .def_prop_ro(
          "gds_given_up",
          [](const LoaderObject& self) { return without_gil(self, [](DeviceLoader& loader) { return loader.gds_given_up(); }); },
          "It reads through host memory now, though it was made to do better.");
}

}  // namespace lmcn::python
