#include "nvme/inspect.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "arguments.hpp"
#include "bindings.hpp"
#include "io/io_engine.hpp"
#include "status.hpp"

namespace lmcn::python {
namespace {

using nvme::Tally;

nb::dict to_dict(const Tally& tally) {
  nb::dict out;
  out["records"] = tally.records;
  out["bytes"] = tally.bytes;
  return out;
}

nb::list to_list(const std::vector<nvme::NamespaceReport>& namespaces) {
  nb::list out;
  for (const nvme::NamespaceReport& report : namespaces) {
    nb::dict one = to_dict(report.tally);
    one["namespace"] = report.ns.to_hex();
    out.append(one);
  }
  return out;
}

std::string hex(const nvme::Uuid& uuid) {
  std::string out;
  for (const std::uint8_t byte : uuid) {
    out.push_back("0123456789abcdef"[byte >> 4]);
    out.push_back("0123456789abcdef"[byte & 15]);
  }
  return out;
}

nb::dict to_dict(const nvme::RegionReport& region) {
  nb::dict out;
  out["region"] = region.region;
  out["state"] = region.state;
  out["sequence"] = region.sequence;
  out["epoch"] = region.epoch;
  out["opened_unix_s"] = region.opened_unix_s;
  out["records"] = region.records;
  out["live_bytes"] = region.live_bytes;
  out["dead_bytes"] = region.dead_bytes;
  return out;
}

nb::dict to_dict(const nvme::Inspection& found) {
  nb::dict out;
  out["path"] = found.path;
  out["uuid"] = hex(found.uuid);
  out["format_version"] = found.format_version;
  out["region_bytes"] = found.region_bytes;
  out["epoch"] = found.epoch;
  out["created_unix_s"] = found.created_unix_s;
  out["limit_bytes"] = found.limit_bytes;
  out["allocated_bytes"] = found.allocated_bytes;
  out["checkpoint_bytes"] = found.checkpoint_bytes;
  out["checkpoint_note"] = found.checkpoint_note;
  nb::dict totals;
  totals["records"] = found.totals.records;
  totals["first_bytes"] = found.totals.first_bytes;
  totals["reappended_bytes"] = found.totals.reappended_bytes;
  totals["since_unix_s"] = found.totals.since_unix_s;
  out["totals"] = totals;
  out["now_unix_s"] = found.now_unix_s;
  nb::list regions;
  for (const nvme::RegionReport& region : found.regions) regions.append(to_dict(region));
  out["regions"] = regions;
  out["records"] = found.live.records;
  out["live_bytes"] = found.live.bytes;
  out["dead_bytes"] = found.dead_bytes;
  nb::list hits;
  for (std::size_t i = 0; i < found.hits.size(); ++i) {
    nb::dict one = to_dict(found.hits[i]);
    one["from"] = i == 0 ? 0u : 1u << (i - 1);
    hits.append(one);
  }
  out["hits"] = hits;
  nb::list ages;
  for (std::size_t i = 0; i < found.ages.size(); ++i) {
    nb::dict one = to_dict(found.ages[i]);
    one["class"] = i > nvme::kAgeClasses_s.size() ? "unknown" : i == nvme::kAgeClasses_s.size() ? "older" : "below";
    one["below_s"] = i < nvme::kAgeClasses_s.size() ? nb::cast(nvme::kAgeClasses_s[i]) : nb::none();
    ages.append(one);
  }
  out["ages"] = ages;
  out["namespaces"] = to_list(found.namespaces);
  out["unreadable_headers"] = found.unreadable_headers;
  out["read_errors"] = found.read_errors;
  return out;
}

/// An I/O engine and the files, opened without the GIL; the engine goes last.
struct Opened {
  std::unique_ptr<io::IoEngine> engine;
  std::unique_ptr<nvme::StoreFiles> files;
};

Opened open(const std::string& path, nvme::Access access) {
  Opened out;
  out.engine = take(io::make_engine({.kind = io::EngineKind::kThreads, .threads = 8}));
  out.files = take(nvme::StoreFiles::open(path, access, *out.engine));
  return out;
}

nb::dict inspect_store(const std::string& path, bool namespaces) {
  nvme::Inspection found;
  {
    nb::gil_scoped_release release;
    const Opened opened = open(path, nvme::Access::kLook);
    found = take(opened.files->inspect(namespaces));
  }
  return to_dict(found);
}

nb::dict verify_store(const std::string& path, const std::optional<nb::callable>& progress) {
  nvme::VerifyReport report;
  std::unique_ptr<nb::python_error> raised;  // by a signal's handler or by `progress`; destroyed with the GIL
  {
    nb::gil_scoped_release release;
    const Opened opened = open(path, nvme::Access::kLook);
    report = take(opened.files->verify([&](const Tally& done, const Tally& total) {
      nb::gil_scoped_acquire acquire;
      try {
        if (PyErr_CheckSignals() != 0) throw nb::python_error();
        if (progress) (*progress)(done.records, total.records, done.bytes, total.bytes);
        return true;
      } catch (nb::python_error& error) {
        raised = std::make_unique<nb::python_error>(error);
        return false;
      }
    }));
  }
  if (raised) throw nb::python_error(*raised);
  nb::dict out;
  out["total"] = to_dict(report.total);
  out["verified"] = to_dict(report.verified);
  nb::list bad;
  for (const nvme::BadRecord& record : report.bad) {
    nb::dict one;
    one["key"] = record.key.to_hex();
    one["region"] = record.region;
    one["page"] = record.page;
    one["pages"] = record.pages;
    one["check"] = record.check;
    one["detail"] = record.detail;
    bad.append(one);
  }
  out["bad"] = bad;
  out["namespaces"] = to_list(report.namespaces);
  nb::list notes;
  for (const std::string& note : report.notes) notes.append(note);
  out["notes"] = notes;
  return out;
}

nb::dict clear_store(const std::string& path, std::optional<std::uint64_t> older_than_s, const std::optional<nb::bytes>& ns) {
  nvme::ClearRequest request;
  request.older_than_s = older_than_s;
  if (ns) request.ns = namespace_id(*ns, "namespace");
  nvme::ClearReport report;
  {
    nb::gil_scoped_release release;
    const Opened opened = open(path, nvme::Access::kChange);
    report = take(opened.files->clear(request));
  }
  nb::dict out = to_dict(report.cleared);
  out["regions_dropped"] = report.regions_dropped;
  out["regions_of_unknown_age"] = report.regions_of_unknown_age;
  out["unreadable_headers"] = report.unreadable_headers;
  out["unreadable_regions"] = report.unreadable_regions;
  out["read_errors"] = report.read_errors;
  out["freed_bytes"] = report.freed_bytes;
  return out;
}

}  // namespace

void init_inspect(nb::module_& module) {
  module.def("inspect_store", inspect_store, nb::arg("path"), nb::arg("namespaces") = false,
             nb::sig("def inspect_store(path: str, namespaces: bool = False) -> dict[str, typing.Any]"),
             "What a store directory that nobody has open holds. Writes nothing, reads no payload; with `namespaces` one page per "
             "record.\n"
             "Locked names the pid of whoever has it open; NotFound, InvalidArgument, FormatVersion, Corruption: not a store that "
             "can be read.\n"
             "Times are seconds since 1970, 0 where unknown.");
  module.def(
      "verify_store", verify_store, nb::arg("path"), nb::arg("progress") = nb::none(),
      nb::sig("def verify_store(path: str, progress: collections.abc.Callable[[int, int, int, int], None] | None = None) -> "
              "dict[str, typing.Any]"),
      "Reads every record of a store directory that nobody has open and checks it as a load would. Writes nothing. `bad` has "
      "what does not hold.\n"
      "progress(records, of_records, bytes, of_bytes): about ten times a second; what it raises, or a signal's handler, ends "
      "the call.\n"
      "Errors as of inspect_store().");
  module.def("clear_store", clear_store, nb::arg("path"), nb::kw_only(), nb::arg("older_than_s") = nb::none(),
             nb::arg("namespace") = nb::none(),
             nb::sig("def clear_store(path: str, *, older_than_s: int | None = None, namespace: bytes | None = None) -> dict[str, "
                     "typing.Any]"),
             "Takes records out of a store directory that nobody has open, for good: all of them, or those of regions opened at "
             "least older_than_s\n"
             "ago, or those of one namespace (32 bytes). Errors as of inspect_store(); after IoError call it again.");
}

}  // namespace lmcn::python
