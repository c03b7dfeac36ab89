#include "lmcn/store.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <filesystem>
#include <new>
#include <optional>
#include <string>

#include "arguments.hpp"
#include "bindings.hpp"
#include "status.hpp"

namespace lmcn::python {

std::shared_ptr<TieredStore> StoreObject::get() const {
  if (store == nullptr) throw StatusError(Status(Code::kUnavailable, "the store is closed"));
  return store;
}

namespace {

/// Runs `work` on the open store without the GIL. The shared pointer outlives the released section on purpose: the store's
/// last owner must hold the GIL.
template <class Work>
auto without_gil(const StoreObject& self, Work work) {
  const std::shared_ptr<TieredStore> store = self.get();
  nb::gil_scoped_release release;
  return work(*store);
}

/// None, one path, or a sequence of paths.
std::vector<std::string> directories(nb::handle given) {
  std::vector<std::string> found;
  std::filesystem::path one;
  std::vector<std::filesystem::path> several;
  if (given.is_none()) return found;
  if (nb::try_cast(given, one)) {
    found.push_back(one.string());
  } else if (nb::try_cast(given, several)) {
    for (const std::filesystem::path& path : several) found.push_back(path.string());
  } else {
    throw StatusError(Status(Code::kInvalidArgument, "directory: must be a path, a sequence of paths, or None"));
  }
  return found;
}

void open(StoreObject* self, std::uint64_t host_bytes, nb::handle directory, std::uint64_t nvme_bytes, std::uint32_t rank_count,
          std::uint64_t max_payload_bytes, std::uint64_t region_bytes, std::string io_engine, std::string cache_policy,
          bool fail_when_locked, double lock_wait_s, unsigned populate_threads, double promotion_deadline_s,
          std::uint64_t promotion_budget_bytes, double request_ttl_s, nb::handle numa_nodes, bool hugetlb,
          nb::handle directory_bytes, std::uint64_t nvme_free_floor_bytes, std::uint64_t nvme_daily_bytes, std::string admission,
          std::string verify, double write_deadline_s, double nvme_io_timeout_s, bool allow_network_file_system, bool replicated) {
  StoreOptions options;
  options.host_bytes = host_bytes;
  options.directories = directories(directory);
  options.directory_bytes = integers<std::uint64_t>(directory_bytes, "directory_bytes");
  options.nvme_free_floor_bytes = nvme_free_floor_bytes;
  options.nvme_daily_bytes = nvme_daily_bytes;
  options.admission = std::move(admission);
  options.verify = std::move(verify);
  options.write_deadline = milliseconds(write_deadline_s, "write_deadline_s");
  options.nvme_bytes = nvme_bytes;
  options.rank_count = rank_count;
  options.max_payload_bytes = max_payload_bytes;
  options.region_bytes = region_bytes;
  options.io_engine = std::move(io_engine);
  options.cache_policy = std::move(cache_policy);
  options.fail_when_locked = fail_when_locked;
  options.lock_wait = milliseconds(lock_wait_s, "lock_wait_s");
  options.populate_threads = populate_threads;
  options.promotion_deadline = milliseconds(promotion_deadline_s, "promotion_deadline_s");
  options.promotion_budget_bytes = promotion_budget_bytes;
  options.request_ttl = milliseconds(request_ttl_s, "request_ttl_s");
  options.numa_nodes = integers<std::int32_t>(numa_nodes, "numa_nodes");
  options.hugetlb = hugetlb;
  options.nvme_io_timeout = milliseconds(nvme_io_timeout_s, "nvme_io_timeout_s");
  options.allow_network_file_system = allow_network_file_system;
  options.replicated = replicated;

  auto opened = [&] {
    nb::gil_scoped_release release;
    return TieredStore::open(options);
  }();
  new (self) StoreObject{std::shared_ptr<TieredStore>(take(std::move(opened)).release(),
                                                      [](TieredStore* store) {
                                                        nb::gil_scoped_release release;
                                                        delete store;
                                                      }),
                         rank_count, replicated ? 1 : rank_count};
}

WriteLeaseObject reserve(const StoreObject& self, const NamespaceId& ns, std::span<const ChunkKey> keys,
                         std::uint64_t payload_bytes, bool for_worker) {
  const std::shared_ptr<TieredStore> store = self.get();
  auto lease = [&] {
    nb::gil_scoped_release release;
    return store->reserve(ns, keys, payload_bytes, for_worker);
  }();
  return {store, take(std::move(lease)), self.part_count};
}

WriteLeaseObject reserve_keys(const StoreObject& self, nb::bytes ns, nb::handle keys, std::uint64_t payload_bytes,
                              bool for_worker) {
  const KeysArgument argument(keys, "keys");
  return reserve(self, namespace_id(ns, "namespace"), argument.span(), payload_bytes, for_worker);
}

WriteLeaseObject reserve_engine_keys(const StoreObject& self, nb::bytes ns, nb::handle engine_keys, std::uint64_t payload_bytes,
                                     bool for_worker) {
  const ByteStringsArgument argument(engine_keys, "engine_keys");
  const KeyDeriver deriver(namespace_id(ns, "namespace"));
  std::vector<ChunkKey> keys;
  {
    nb::gil_scoped_release release;
    keys.reserve(argument.spans().size());
    for (std::span<const std::byte> key : argument.spans()) keys.push_back(deriver.derive(key));
  }
  return reserve(self, deriver.ns(), keys, payload_bytes, for_worker);
}

RequestObject begin_request(const StoreObject& self, nb::bytes ns, std::uint64_t budget_bytes, double deadline_s, bool promote,
                            Priority priority) {
  const NamespaceId id = namespace_id(ns, "namespace");
  const RequestOptions options{budget_bytes, milliseconds(deadline_s, "promotion_deadline_s"), promote, priority};
  const std::shared_ptr<TieredStore> store = self.get();
  nb::gil_scoped_release release;
  return {store, store->begin_request(id, options)};
}

ReadLeaseObject acquire(const StoreObject& self, nb::bytes ns, nb::handle keys, double timeout_s) {
  const NamespaceId id = namespace_id(ns, "namespace");
  const KeysArgument argument(keys, "keys");
  const auto deadline = milliseconds(timeout_s, "timeout_s");
  const std::shared_ptr<TieredStore> store = self.get();
  auto lease = [&] {
    nb::gil_scoped_release release;
    return store->acquire(id, argument.span(), deadline);
  }();
  return {store, take(std::move(lease))};
}

nb::object lookup(const StoreObject& self, nb::handle keys) {
  static PyObject* const prefix_hit_class =
      nb::object(nb::module_::import_("lmcache_native._types").attr("PrefixHit")).release().ptr();
  const KeysArgument argument(keys, "keys");
  const PrefixHit hit = without_gil(self, [&](TieredStore& store) { return store.lookup(argument.span()); });
  return nb::handle(prefix_hit_class)(hit.hit, hit.host, hit.nvme);
}

void job_not_started(const StoreObject& self, std::uint32_t rank, nb::handle slot_offsets, nb::handle generations, bool load) {
  const auto offsets = integers<std::uint64_t>(slot_offsets, "slot_offsets");
  const auto generation = integers<std::uint32_t>(generations, "generations");
  if (generation.size() != offsets.size()) {
    throw StatusError(Status(Code::kInvalidArgument, "generations: as many as slot_offsets (" + std::to_string(offsets.size()) +
                                                         ") expected, got " + std::to_string(generation.size())));
  }
  std::vector<SlotRef> slots(offsets.size());
  for (std::size_t i = 0; i < slots.size(); ++i) slots[i] = {offsets[i], generation[i]};
  without_gil(self, [&](TieredStore& store) { store.job_not_started(rank, slots, load); });
}

void close(StoreObject& self, double timeout_s) {
  if (self.store == nullptr) return;
  const auto deadline = milliseconds(timeout_s, "timeout_s");
  // Closed for every other caller from here on; what they already run holds its own reference.
  const std::shared_ptr<TieredStore> store = std::exchange(self.store, nullptr);
  Status status;
  {
    nb::gil_scoped_release release;
    status = store->close(deadline);
  }
  throw_if_error(std::move(status));
}

void define_data_path(nb::class_<StoreObject>& store) {
  store
      .def("lookup", lookup, nb::arg("keys").none(),
           nb::sig("def lookup(self, keys: lmcache_native._types.Keys) -> lmcache_native._types.PrefixHit"),
           "How many leading keys are present: (hit, host, nvme), hit = host + nvme. Memory only; touches and pins nothing.")
      .def("reserve", reserve_keys, nb::arg("namespace"), nb::arg("keys").none(), nb::arg("payload_bytes"), nb::kw_only(),
           nb::arg("for_worker") = false,
           nb::sig("def reserve(self, namespace: bytes, keys: lmcache_native._types.Keys, payload_bytes: int, *, for_worker: bool "
                   "= False) -> WriteLease"),
           "Slots of payload_bytes (all ranks) for those of `keys` that are absent from host memory and not being stored; leading "
           "ones when not\n"
           "all fit. An empty lease when all are present. ResourceExhausted when none fits. for_worker: worker processes fill the "
           "slots\n"
           "(a dropped lease leaves them quarantined until every rank's word is there); otherwise payload(), fill() and "
           "mark_filled() do. Memory only.")
      .def("reserve_engine_keys", reserve_engine_keys, nb::arg("namespace"), nb::arg("engine_keys").none(),
           nb::arg("payload_bytes"), nb::kw_only(), nb::arg("for_worker") = false,
           nb::sig("def reserve_engine_keys(self, namespace: bytes, engine_keys: collections.abc.Sequence[bytes], payload_bytes: "
                   "int, *, for_worker: bool = False) -> WriteLease"),
           "reserve() by the engine's own keys, derived natively (KeyDeriver).")
      .def("begin_request", begin_request, nb::arg("namespace"), nb::kw_only(), nb::arg("promotion_budget_bytes") = 0,
           nb::arg("promotion_deadline_s") = 0.0, nb::arg("promote") = true, nb::arg("priority") = Priority::kNormal,
           "One engine request's lookups, promotions and pins. 0: the store's budget and deadline. promote false: what is on NVMe "
           "alone is a miss. priority: whose promotions are read first.")
      .def("acquire", acquire, nb::arg("namespace"), nb::arg("keys").none(), nb::arg("timeout_s") = 10.0,
           nb::sig("def acquire(self, namespace: bytes, keys: lmcache_native._types.Keys, timeout_s: float = 10.0) -> ReadLease"),
           "Promotes what is only on NVMe, waits at most timeout_s, and leases the leading part that could be had. NotFound when "
           "not even the\n"
           "first key could.")
      .def(
          "touch",
          [](const StoreObject& self, nb::handle keys) {
            const KeysArgument argument(keys, "keys");
            without_gil(self, [&](TieredStore& store) { store.touch(argument.span()); });
          },
          nb::arg("keys").none(), nb::sig("def touch(self, keys: lmcache_native._types.Keys) -> None"),
          "Marks the keys as recently used.")
      .def(
          "locate",
          [](const StoreObject& self, nb::handle keys) {
            const KeysArgument argument(keys, "keys");
            const std::vector<RecordPlace> places =
                without_gil(self, [&](TieredStore& store) { return store.locate(argument.span()); });
            nb::list found;
            for (const RecordPlace& p : places)
              found.append(nb::make_tuple(p.position, p.path, p.offset_bytes, p.image_bytes, p.region_sequence));
            return found;
          },
          nb::arg("keys").none(),
          nb::sig("def locate(self, keys: lmcache_native._types.Keys) -> list[tuple[int, int, int, int, int]]"),
          "Where those of `keys` that are on NVMe lie, for a reader of its own: (position in keys, index of the directory, byte "
          "offset in its\n"
          "data.000, bytes of the slot image, region sequence). Nothing holds them there: the reader checks the header's key, "
          "namespace and region\n"
          "sequence and the payload's checksums. Counts as a hit. Memory only.")
      .def(
          "count_writes",
          [](const StoreObject& self, std::uint32_t path, std::uint64_t written_bytes) {
            without_gil(self, [&](TieredStore& store) { store.count_writes(path, written_bytes); });
          },
          nb::arg("path"), nb::arg("written_bytes"),
          "Counts bytes that somebody else wrote to the drive of directory number `path` into the day's limit.")
      .def(
          "record_failed",
          [](const StoreObject& self, nb::bytes key, std::uint32_t path, std::uint64_t offset_bytes,
             std::uint64_t region_sequence) {
            const ChunkKey native = chunk_key(key, "key");
            RecordPlace place;
            place.path = path;
            place.offset_bytes = offset_bytes;
            place.region_sequence = region_sequence;
            without_gil(self, [&](TieredStore& store) { store.record_failed(native, place); });
          },
          nb::arg("key"), nb::arg("path"), nb::arg("offset_bytes"), nb::arg("region_sequence"),
          "For who read a record where locate() said and found that it does not hold: forgotten, unless another has taken its "
          "place since.")
      .def(
          "erase",
          [](const StoreObject& self, nb::bytes key) {
            const ChunkKey native = chunk_key(key, "key");
            return without_gil(self, [&](TieredStore& store) { return store.erase(native); });
          },
          nb::arg("key"), "Drops one chunk (32-byte key) from every tier. False: it was absent.")
      .def(
          "clear", [](const StoreObject& self) { without_gil(self, [](TieredStore& store) { store.clear(); }); },
          "Drops everything: at once in memory, on NVMe within milliseconds. Slots under leases stay until those end.");
}

void define_control(nb::class_<StoreObject>& store) {
  store
      .def(
          "serve",
          [](const StoreObject& self, const std::string& engine_id, std::uint64_t rank_bytes) {
            throw_if_error(without_gil(self, [&](TieredStore& native) { return native.serve(engine_id, rank_bytes); }));
          },
          nb::arg("engine_id"), nb::arg("rank_bytes"),
          "Lets worker processes attach to the arena (ArenaAttachment.attach) under engine_id. rank_bytes: one rank's part of a "
          "slot\n"
          "(SlotLayout.rank_bytes). Locked when a live process serves that id.")
      .def("job_not_started", job_not_started, nb::arg("rank"), nb::arg("slot_offsets").none(), nb::arg("generations").none(),
           nb::kw_only(), nb::arg("load"),
           nb::sig("def job_not_started(self, rank: int, slot_offsets: lmcache_native._types.IntArray, generations: "
                   "lmcache_native._types.IntArray, *, load: bool) -> None"),
           "For a worker that reports that it could not start a job on these slots, and so will never write its words: writes them "
           "for it,\n"
           "else the slots would stay quarantined for ever. Slots of another generation are passed over.")
      .def(
          "flush",
          [](const StoreObject& self, double timeout_s) {
            const auto deadline = milliseconds(timeout_s, "timeout_s");
            throw_if_error(without_gil(self, [&](TieredStore& native) { return native.flush(deadline); }));
          },
          nb::arg("timeout_s") = 60.0,
          "Waits until all committed chunks are on NVMe (or dropped) and synced. DeadlineExceeded names what is left.")
      .def("close", close, nb::arg("timeout_s") = 10.0,
           "Flushes for at most timeout_s, writes a checkpoint, unlocks the directory. Idempotent. Every later call raises "
           "Unavailable. Leases\n"
           "and requests that are still alive keep the arena mapped until they end.")
      .def_prop_ro(
          "closed", [](const StoreObject& self) { return self.store == nullptr; }, "True after close().")
      .def_ro("rank_count", &StoreObject::rank_count, "Ranks that read each slot.")
      .def_ro("part_count", &StoreObject::part_count,
              "Parts of a slot, each filled by the rank of its number: rank_count, or 1 in a store that is replicated.")
      .def_prop_ro(
          "event_fd", [](const StoreObject& self) { return self.get()->event_fd(); },
          "Descriptor (eventfd, non-blocking) that is readable after promotions ended; read 8 bytes to re-arm. Owned by the store.")
      .def_prop_ro(
          "arena_bytes", [](const StoreObject& self) { return self.get()->arena_bytes(); }, "Size of the host arena.")
      .def_prop_ro(
          "nvme_ready", [](const StoreObject& self) { return self.get()->nvme_ready(); }, "Whether the NVMe tier is in use.")
      .def_prop_ro(
          "nvme_warning", [](const StoreObject& self) { return self.get()->nvme_warning(); },
          "Empty, or one line: why NVMe is not used.")
      .def_prop_ro(
          "io_engine_note", [](const StoreObject& self) { return self.get()->io_engine_note(); }, "Which I/O engine runs, and why.")
      .def(
          "stats",
          [](const StoreObject& self) { return stats_dict(without_gil(self, [](TieredStore& native) { return native.stats(); })); },
          nb::sig("def stats(self) -> dict[str, int]"), "Counters since open and gauges of now, by the names of metrics.hpp.")
      .def(
          "watch_changes", [](const StoreObject& self) { without_gil(self, [](TieredStore& native) { native.watch_changes(); }); },
          "From now on take_changes() has something to give.")
      .def(
          "take_changes",
          [](const StoreObject& self) {
            nb::list out;
            for (const TierChange& change : without_gil(self, [](TieredStore& native) { return native.take_changes(); })) {
              out.append(nb::make_tuple(nb::bytes(reinterpret_cast<const char*>(change.key.bytes.data()), change.key.bytes.size()),
                                        change.tier, change.stored));
            }
            return out;
          },
          nb::sig("def take_changes(self) -> list[tuple[bytes, Tier, bool]]"),
          "(key, tier, stored) of each chunk that came into a tier, or (stored false) left it, since the last call, in order. At "
          "most a million\n"
          "are kept. clear() is not told, and drops what is pending.")
      .def(
          "latencies",
          [](const StoreObject& self) {
            return latencies_dict(without_gil(self, [](TieredStore& native) { return native.latencies(); }));
          },
          nb::sig("def latencies(self) -> dict[str, list[tuple[int, float]]]"),
          "Since open: promotion, read, verify, write_wait, write -> for each bucket of latency_bounds_s, and the one beyond the "
          "last,\n"
          "how many durations fell into it and their sum in seconds.")
      .def_prop_ro_static(
          "latency_bounds_s", [](nb::handle) { return latency_bounds(); },
          nb::sig("def latency_bounds_s(self, /) -> tuple[float, ...]"),
          "Inclusive upper bounds of the buckets of latencies(), in seconds.");
}

}  // namespace

void init_store(nb::module_& module) {
  nb::class_<StoreObject> store(
      module, "Store", nb::is_weak_referenceable(),
      "The three tiers' owner: index, host arena, NVMe log. Lives in the process that decides (vLLM's scheduler, your server).\n\n"
      "Any method may be called from any thread. lookup, reserve and leases touch memory only; what can wait takes timeout_s "
      "(seconds).\n"
      "A chunk can be looked up only after commit() found every rank's part filled.");
  store.def(
      "__init__", open, nb::kw_only(), nb::arg("host_bytes"), nb::arg("directory").none() = nb::none(), nb::arg("nvme_bytes") = 0,
      nb::arg("rank_count") = 1, nb::arg("max_payload_bytes") = 0, nb::arg("region_bytes") = 0, nb::arg("io_engine") = "auto",
      nb::arg("cache_policy") = "LRU", nb::arg("fail_when_locked") = false, nb::arg("lock_wait_s") = 10.0,
      nb::arg("populate_threads") = 2, nb::arg("promotion_deadline_s") = 10.0, nb::arg("promotion_budget_bytes") = 0,
      nb::arg("request_ttl_s") = 30.0, nb::arg("numa_nodes").none() = nb::make_tuple(), nb::arg("hugetlb") = false,
      nb::arg("directory_bytes").none() = nb::make_tuple(), nb::arg("nvme_free_floor_bytes") = StoreOptions{}.nvme_free_floor_bytes,
      nb::arg("nvme_daily_bytes") = 0, nb::arg("admission") = "auto", nb::arg("verify") = "nvme",
      nb::arg("write_deadline_s") = 10.0, nb::arg("nvme_io_timeout_s") = 30.0, nb::arg("allow_network_file_system") = false,
      nb::arg("replicated") = false,
      nb::sig(
          "def __init__(self, *, host_bytes: int, directory: lmcache_native._types.Directories = None, nvme_bytes: int = 0, "
          "rank_count: int = 1, max_payload_bytes: int = 0, region_bytes: int = 0, io_engine: str = 'auto', "
          "cache_policy: str = 'LRU', "
          "fail_when_locked: bool = False, lock_wait_s: float = 10.0, populate_threads: int = 2, promotion_deadline_s: "
          "float = 10.0, "
          "promotion_budget_bytes: int = 0, request_ttl_s: float = 30.0, numa_nodes: lmcache_native._types.IntArray = (), "
          "hugetlb: bool = False, directory_bytes: lmcache_native._types.IntArray = (), nvme_free_floor_bytes: int = 268435456, "
          "nvme_daily_bytes: int = 0, admission: str = 'auto', verify: str = 'nvme', write_deadline_s: float = 10.0, "
          "nvme_io_timeout_s: float = 30.0, allow_network_file_system: bool = False, replicated: bool = False) -> None"),
      "host_bytes: hard limit of the host arena, >= 4 MiB. directory, nvme_bytes: the NVMe tier, a path or up to seven that "
      "chunks are\n"
      "striped over, and the hard limit of all; without a directory the store is memory only. directory_bytes: the limit of each, "
      "else they\n"
      "share evenly. rank_count: ranks that fill and read each slot, 1..64. max_payload_bytes: largest chunk, all parts (0: "
      "64 MiB).\n"
      "region_bytes: 0 chooses from nvme_bytes. io_engine: auto | io_uring | threads. cache_policy: LRU | S3FIFO | LFU | FIFO | "
      "MRU.\n"
      "fail_when_locked: raise Locked when another process owns the directory after lock_wait_s. False: the store opens within a "
      "second\n"
      "with host memory only, and takes the directory over when its owner lets go (stats()['nvme_waiting'] is 1 until then).\n"
      "promotion_*, request_ttl_s: defaults of requests; budget 0: half of host_bytes. numa_nodes: where the arena's memory comes\n"
      "from: one node (while it has memory), several in turn, or the kernel's choice. hugetlb: the arena must be of reserved huge\n"
      "pages; ResourceExhausted says how many to reserve. False: huge pages where they can be had.\n"
      "nvme_free_floor_bytes: never taken of a file system. nvme_daily_bytes: hard limit of writes within 24 hours (0: the file "
      "systems'\n"
      "size). admission: auto | always | second_touch. verify: off | nvme | all. write_deadline_s: a chunk that waited longer for "
      "its\n"
      "write is given up. (lmcn/store.hpp says more.)\n"
      "nvme_io_timeout_s: a device that answers nothing for so long is quarantined. allow_network_file_system: directory may be "
      "on\n"
      "a network or cluster file system (docs/security.md lists them), where neither the lock nor what was synced is sure to "
      "hold.\n"
      "replicated: all ranks hold the same KV; a slot then has one part, which rank 0 alone fills and every rank reads.\n"
      "Raises InvalidArgument, ResourceExhausted, Unavailable, Locked, FormatVersion, IoError.");
  define_data_path(store);
  define_control(store);
}

}  // namespace lmcn::python
