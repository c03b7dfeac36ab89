#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>

#include <utility>

#include "arguments.hpp"
#include "bindings.hpp"
#include "lmcn/store.hpp"
#include "status.hpp"

namespace lmcn::python {
namespace {

template <class Enum>
long value(Enum e) noexcept {
  return static_cast<long>(e);
}

Request& active(const RequestObject& self) {
  if (self.request == nullptr) throw StatusError(Status(Code::kAborted, "the request has ended"));
  return *self.request;
}

std::uint32_t prefetch(RequestObject& self, nb::handle keys) {
  const KeysArgument argument(keys, "keys");
  return active(self).prefetch(argument.span());
}

std::pair<std::uint32_t, long> lookup_prefix(RequestObject& self, nb::handle keys) {
  const KeysArgument argument(keys, "keys");
  const PrefixPresence found = active(self).lookup_prefix(argument.span());
  return {found.hits, value(found.next)};
}

std::pair<std::uint32_t, long> lookup_tiers(RequestObject& self, nb::handle keys) {
  const KeysArgument argument(keys, "keys");
  const PrefixPresence found = active(self).lookup_tiers(argument.span());
  return {found.hits, value(found.next)};
}

std::pair<std::uint32_t, std::uint32_t> count_sources(RequestObject& self, nb::handle keys) {
  const KeysArgument argument(keys, "keys");
  const SourceCount count = active(self).count_sources(argument.span());
  return {count.host, count.nvme};
}

ReadLeaseObject acquire(RequestObject& self, nb::handle keys, bool for_worker) {
  const KeysArgument argument(keys, "keys");
  return {self.store, take(active(self).acquire(argument.span(), for_worker))};
}

ReadLeaseObject acquire_engine_keys(RequestObject& self, nb::handle engine_keys, bool for_worker) {
  const ByteStringsArgument argument(engine_keys, "engine_keys");
  return {self.store, take(active(self).acquire_engine_keys(argument.spans(), for_worker))};
}

void end(RequestObject& self) {
  if (self.request == nullptr) return;
  self.request->end();
  self.request.reset();
}

}  // namespace

// The whole class keeps the GIL: its calls touch memory only, and the GIL is what makes "one thread at a time" hold.
void init_store_request(nb::module_& module) {
  nb::enum_<Presence>(module, "Presence", nb::is_arithmetic(), "What Request.lookup() returns, as int.")
      .value("MISS", Presence::kMiss, "Absent, or refused for this request.")
      .value("HIT", Presence::kHit, "In host memory, verified, pinned for this request.")
      .value("PENDING", Presence::kPending, "Being stored by someone; look again later.")
      .value("RETRY", Presence::kRetry, "Being promoted from NVMe for this request; look again later.");
  nb::enum_<Tier>(module, "Tier", nb::is_arithmetic(), "What Request.source() returns, as int.")
      .value("NONE", Tier::kNone)
      .value("HOST", Tier::kHost)
      .value("NVME", Tier::kNvme);

  nb::class_<RequestObject>(module, "Request",
                            "One engine request's view: key-by-key lookups with a memo, promotions within a budget, pins. Pins are "
                            "dropped by end(), when the\n"
                            "object is dropped, or after request_ttl_s without a lookup. Memory only: no call waits for I/O.")
      .def(
          "lookup", [](RequestObject& self, nb::bytes key) { return value(active(self).lookup(byte_span(key))); },
          nb::arg("engine_key"),
          "Presence (int) of an engine key. A promotion from NVMe starts on the first lookup; HIT only when read, verified and "
          "pinned.")
      .def(
          "lookup_key", [](RequestObject& self, nb::bytes key) { return value(active(self).lookup(chunk_key(key, "key"))); },
          nb::arg("key"), "Presence (int) of a 32-byte chunk key.")
      .def(
          "source", [](RequestObject& self, nb::bytes key) { return value(active(self).source(byte_span(key))); },
          nb::arg("engine_key"), "Tier (int) that the last HIT of this engine key came from; NVME after a promotion.")
      .def(
          "source_key", [](RequestObject& self, nb::bytes key) { return value(active(self).source(chunk_key(key, "key"))); },
          nb::arg("key"), "The same of a 32-byte chunk key.")
      .def("lookup_prefix", lookup_prefix, nb::arg("keys").none(),
           nb::sig("def lookup_prefix(self, keys: lmcache_native._types.Keys) -> tuple[int, int]"),
           "How many leading keys are HIT now, each looked up and pinned as by lookup_key(), and the Presence (int) of the first "
           "one that is\n"
           "not, which has been looked up too (HIT when all are). Cheap when repeated: 16,000 hits take about 0.1 ms.")
      .def("lookup_tiers", lookup_tiers, nb::arg("keys").none(),
           nb::sig("def lookup_tiers(self, keys: lmcache_native._types.Keys) -> tuple[int, int]"),
           "The same for who reads records itself (Store.locate): a key on NVMe alone is a hit as well, and not pinned. Of a "
           "request "
           "with promote=False.")
      .def("count_sources", count_sources, nb::arg("keys").none(),
           nb::sig("def count_sources(self, keys: lmcache_native._types.Keys) -> tuple[int, int]"),
           "How many of the keys' last HITs came from (host memory, NVMe).")
      .def("prefetch", prefetch, nb::arg("keys").none(), nb::sig("def prefetch(self, keys: lmcache_native._types.Keys) -> int"),
           "Starts promotion of all leading keys within the budget; returns the length of that prefix (what may become a hit).")
      .def("acquire", acquire, nb::arg("keys").none(), nb::kw_only(), nb::arg("for_worker") = false,
           nb::sig("def acquire(self, keys: lmcache_native._types.Keys, *, for_worker: bool = False) -> ReadLease"),
           "Lease of keys that are all hits now; NotFound names the first that is not in host memory. for_worker: the slots stay "
           "busy until every\n"
           "rank's scatter has ended, even when the lease is dropped before.")
      .def(
          "acquire_engine_keys", acquire_engine_keys, nb::arg("engine_keys").none(), nb::arg("for_worker") = false,
          nb::sig(
              "def acquire_engine_keys(self, engine_keys: collections.abc.Sequence[bytes], for_worker: bool = False) -> ReadLease"),
          "acquire() by the engine's own keys.")
      .def("end", end, "Drops the pins. Idempotent; every other call raises Aborted afterwards.");
}

}  // namespace lmcn::python
