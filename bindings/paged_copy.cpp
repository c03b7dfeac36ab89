#include "lmcn/paged_copy.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <string>

#include "arguments.hpp"
#include "bindings.hpp"
#include "status.hpp"

namespace lmcn::python {
namespace {

/// Destroyed copier first (waits for its jobs, without the GIL), then the arena and the owner of the paged memory.
struct CopierObject {
  nb::object owner;
  std::shared_ptr<TieredStore> store;
  std::shared_ptr<ArenaAttachment> attachment;
  std::unique_ptr<PagedCopier> copier;

  CopierObject() = default;
  CopierObject(CopierObject&&) noexcept = default;
  ~CopierObject() {
    if (copier == nullptr) return;
    nb::gil_scoped_release release;
    copier.reset();
  }
};

template <class Work>
auto without_gil(const CopierObject& self, Work work) {
  nb::gil_scoped_release release;
  return work(*self.copier);
}

/// Either a Store or an ArenaAttachment.
struct Arena {
  CopierObject copier;
  std::byte* base = nullptr;
  std::uint64_t bytes = 0;
};

Arena arena_of(nb::handle object, nb::object owner) {
  Arena arena;
  arena.copier.owner = std::move(owner);
  if (nb::isinstance<StoreObject>(object)) {
    arena.copier.store = nb::inst_ptr<StoreObject>(object)->get();
    arena.base = arena.copier.store->arena_base();
    arena.bytes = arena.copier.store->arena_bytes();
  } else if (nb::isinstance<AttachmentObject>(object)) {
    arena.copier.attachment = nb::inst_ptr<AttachmentObject>(object)->get();
    arena.base = arena.copier.attachment->base();
    arena.bytes = arena.copier.attachment->bytes();
  } else {
    throw_invalid("arena: a Store or an ArenaAttachment expected, got " + python_type_name(object));
  }
  return arena;
}

CopierObject host(nb::handle arena_object, const PagedKvLayout& paged, const SlotLayout& slot, std::uint32_t rank, unsigned threads,
                  std::int64_t non_temporal_bytes, bool replicated, nb::object owner) {
  Arena arena = arena_of(arena_object, std::move(owner));
  CopierOptions options;
  options.rank = rank;
  options.threads = threads;
  options.replicated = replicated;
  options.non_temporal_bytes = non_temporal_bytes;
  auto made = [&] {
    nb::gil_scoped_release release;
    return make_host_copier(paged, slot, arena.base, arena.bytes, options);
  }();
  arena.copier.copier = take(std::move(made));
  return std::move(arena.copier);
}

CopierObject cuda(nb::handle arena_object, const PagedKvLayout& paged, const SlotLayout& slot, std::uint32_t rank, int device,
                  std::uint64_t slot_bytes, bool replicated, nb::object owner) {
  Arena arena = arena_of(arena_object, std::move(owner));
  CopierOptions options;
  options.rank = rank;
  options.slot_bytes = slot_bytes;
  options.replicated = replicated;
  auto made = [&] {
    nb::gil_scoped_release release;
    return make_cuda_copier(paged, slot, arena.base, arena.bytes, options, device);
  }();
  arena.copier.copier = take_cuda(std::move(made));
  return std::move(arena.copier);
}

CopyDirection copy_direction(nb::handle direction) {
  if (nb::isinstance<CopyDirection>(direction)) return nb::cast<CopyDirection>(direction);
  std::string text = PyUnicode_Check(direction.ptr()) ? nb::cast<std::string>(direction) : "";
  if (text == "store") return CopyDirection::kGather;
  if (text == "load") return CopyDirection::kScatter;
  throw_invalid("direction: 'store', 'load' or a CopyDirection expected, got " + nb::cast<std::string>(nb::repr(direction)));
}

template <class T>
std::vector<T> of_length(nb::handle values, const char* name, std::size_t count) {
  std::vector<T> out = integers<T>(values, name);
  if (out.size() != count) {
    throw_invalid(std::string(name) + ": as many as slot_offsets (" + std::to_string(count) + ") expected, got " +
                  std::to_string(out.size()));
  }
  return out;
}

template <class T>
std::vector<T> of_length_or_zeros(nb::handle values, const char* name, std::size_t count) {
  return values.is_none() ? std::vector<T>(count, T{0}) : of_length<T>(values, name, count);
}

void submit(const CopierObject& self, std::uint64_t id, nb::handle direction, nb::handle slot_offsets, nb::handle generations,
            nb::handle first_tokens, nb::handle tokens, nb::handle block_begin, nb::handle block_ids, nb::handle token_in_block,
            std::uint64_t stream, bool layer_by_layer) {
  CopyJob job;
  job.id = id;
  job.direction = copy_direction(direction);
  job.stream = stream;
  job.layer_by_layer = layer_by_layer;
  const auto offsets = integers<std::uint64_t>(slot_offsets, "slot_offsets");
  const std::size_t count = offsets.size();
  const auto generation = of_length<std::uint32_t>(generations, "generations", count);
  const auto first = of_length_or_zeros<std::uint32_t>(first_tokens, "first_tokens", count);
  const auto length = of_length<std::uint32_t>(tokens, "tokens", count);
  const auto begin = of_length<std::uint32_t>(block_begin, "block_begin", count);
  const auto within = of_length_or_zeros<std::uint32_t>(token_in_block, "token_in_block", count);
  job.items.reserve(count);
  for (std::size_t i = 0; i < count; ++i)
    job.items.push_back({offsets[i], generation[i], first[i], length[i], begin[i], within[i]});
  job.block_ids = integers<std::int64_t>(block_ids, "block_ids");
  throw_if_error(without_gil(self, [&](PagedCopier& copier) { return copier.submit(std::move(job)); }));
}

void init_copy_done(nb::module_& module) {
  nb::enum_<CopyDirection>(module, "CopyDirection")
      .value("GATHER", CopyDirection::kGather, "Paged memory to slot: 'store'.")
      .value("SCATTER", CopyDirection::kScatter, "Slot to paged memory: 'load'.");
  nb::class_<CopyDone>(module, "CopyDone", "How one job of a PagedCopier ended.")
      .def_ro("id", &CopyDone::id)
      .def_ro("ok", &CopyDone::ok)
      .def_ro("bytes", &CopyDone::bytes, "Bytes copied.")
      .def_ro("seconds", &CopyDone::seconds, "From start of copying to end.")
      .def_ro("failed_items", &CopyDone::failed_items, "Indexes into the job's slots.")
      .def_ro("message", &CopyDone::message, "Why, when not ok.")
      .def("__repr__", [](const CopyDone& done) {
        return "CopyDone(id=" + std::to_string(done.id) + ", " + (done.ok ? std::string("ok") : "failed: " + done.message) + ", " +
               std::to_string(done.bytes) + " bytes)";
      });
}

}  // namespace

void init_paged_copy(nb::module_& module) {
  init_copy_done(module);
  nb::class_<CopierObject>(module, "PagedCopier",
                           "Moves bytes between an engine's paged memory and slots. Thread-safe; submit() and poll() never wait "
                           "for a copy. After a job it writes its\n"
                           "rank's word into each slot: that is what publishing trusts. Dropping it waits for the jobs under way.")
      .def_static(
          "host", host, nb::arg("arena").none(), nb::arg("paged"), nb::arg("slot"), nb::kw_only(), nb::arg("rank") = 0,
          nb::arg("threads") = 1, nb::arg("non_temporal_bytes") = CopierOptions{}.non_temporal_bytes, nb::arg("replicated") = false,
          nb::arg("owner") = nb::none(),
          nb::sig("def host(arena: Store | ArenaAttachment, paged: PagedKvLayout, slot: SlotLayout, *, rank: int = 0, "
                  "threads: int = 1, "
                  "non_temporal_bytes: int = 262144, replicated: bool = False, owner: object = None) -> PagedCopier"),
          "Copier for paged memory that this process can address. threads: copy threads. non_temporal_bytes: gathers of "
          "jobs at least this large\n"
          "bypass the cache. replicated: as the store's; loads then read the one part, and a store by another rank than 0 is "
          "InvalidArgument.\n"
          "owner: any object to keep alive with the copier (the tensors behind `paged`).")
      .def_static(
          "cuda", cuda, nb::arg("arena").none(), nb::arg("paged"), nb::arg("slot"), nb::kw_only(), nb::arg("rank") = 0,
          nb::arg("device") = 0, nb::arg("slot_bytes") = 0, nb::arg("replicated") = false, nb::arg("owner") = nb::none(),
          nb::sig(
              "def cuda(arena: Store | ArenaAttachment, paged: PagedKvLayout, slot: SlotLayout, *, rank: int = 0, device: int = 0, "
              "slot_bytes: int = 0, replicated: bool = False, owner: object = None) -> PagedCopier"),
          "Copier for paged memory on a CUDA device, ordered by events. How bytes move is measured once (see `details`), unless "
          "LMCN_COPY_PATH is\n"
          "memcpy, batch, kernel or staged. slot_bytes: of a slot image, if known: the arena is registered with CUDA in pieces "
          "that hold "
          "whole slots.\n"
          "replicated: as host()'s.\n"
          "CudaUnavailable when built without CUDA or without driver or device. InvalidArgument: `paged` is not memory of the "
          "device, or "
          "LMCN_COPY_PATH\n"
          "has another value.")
      .def(
          "submit", submit, nb::arg("id"), nb::arg("direction").none(), nb::arg("slot_offsets").none(),
          nb::arg("generations").none(), nb::arg("first_tokens").none(), nb::arg("tokens").none(), nb::arg("block_begin").none(),
          nb::arg("block_ids").none(), nb::arg("token_in_block") = nb::none(), nb::arg("stream") = 0,
          nb::arg("layer_by_layer") = false,
          nb::sig("def submit(self, id: int, direction: typing.Literal['store', 'load'] | CopyDirection, slot_offsets: "
                  "lmcache_native._types.IntArray, "
                  "generations: lmcache_native._types.IntArray, first_tokens: lmcache_native._types.IntArray | None, "
                  "tokens: lmcache_native._types.IntArray, block_begin: lmcache_native._types.IntArray, block_ids: "
                  "lmcache_native._types.IntArray, "
                  "token_in_block: lmcache_native._types.IntArray | None = None, stream: int = 0, layer_by_layer: bool = False) -> "
                  "None"),
          "Starts one job, item i of which copies tokens[i] tokens (opaque layouts: blocks) from first_tokens[i] of the chunk in "
          "the slot at\n"
          "slot_offsets[i]; block_ids[block_begin[i]] is the engine block that holds the first of them, token_in_block[i] its "
          "place there.\n"
          "None: zeros. id: unique among unfinished jobs. stream: the cudaStream_t to order after (0: legacy default). Sequences "
          "or 1-D integer\n"
          "buffers. layer_by_layer (loads only): layer after layer of all items, for wait_layers(). InvalidArgument, and nothing "
          "copied, when\n"
          "something is out of bounds.")
      .def(
          "poll", [](const CopierObject& self) { return without_gil(self, [](PagedCopier& copier) { return copier.poll(); }); },
          "Jobs that ended since the last call, each exactly once.")
      .def(
          "wait",
          [](const CopierObject& self, nb::handle ids, double timeout_s) {
            const auto jobs = integers<std::uint64_t>(ids, "ids");
            const auto deadline = milliseconds(timeout_s, "timeout_s");
            throw_if_error(without_gil(self, [&](PagedCopier& copier) { return copier.wait(jobs, deadline); }));
          },
          nb::arg("ids").none(), nb::arg("timeout_s") = 30.0,
          nb::sig("def wait(self, ids: lmcache_native._types.IntArray, timeout_s: float = 30.0) -> None"),
          "Waits, without the GIL, until none of the jobs is under way; results still come through poll(). DeadlineExceeded.")
      .def(
          "wait_layers",
          [](const CopierObject& self, std::uint64_t id, std::uint32_t layers, double timeout_s, std::uint64_t stream) {
            const auto deadline = milliseconds(timeout_s, "timeout_s");
            throw_if_error(
                without_gil(self, [&](PagedCopier& copier) { return copier.wait_layers(id, layers, deadline, stream); }));
          },
          nb::arg("id"), nb::arg("layers"), nb::arg("timeout_s") = 30.0, nb::arg("stream") = 0,
          "Of a job submitted with layer_by_layer: the leading `layers` layers of all its items are in place. On the host waits "
          "for "
          "that, without\n"
          "the GIL; with CUDA makes `stream` (a cudaStream_t; 0: legacy default) wait for it, and this thread only until the "
          "copies "
          "have been\n"
          "handed to the device. Returns at once for a job that ended well. Aborted: the job failed (its CopyDone says more; it "
          "may "
          "write until\n"
          "it is polled). DeadlineExceeded; NotFound: no such job; InvalidArgument: not layer by layer, or too many layers.")
      .def(
          "cancel",
          [](const CopierObject& self, nb::handle ids) {
            const auto jobs = integers<std::uint64_t>(ids, "ids");
            without_gil(self, [&](PagedCopier& copier) { copier.cancel(jobs); });
          },
          nb::arg("ids").none(), nb::sig("def cancel(self, ids: lmcache_native._types.IntArray) -> None"),
          "Makes the jobs end soon, and returns at once: items not yet started fail, with 'cancelled' in CopyDone.message. Each "
          "job "
          "still comes\n"
          "through poll() once, after which nothing of it is written any more. Unknown and ended ids are ignored.")
      .def_prop_ro(
          "name", [](const CopierObject& self) { return self.copier->name(); },
          "'host', or 'cuda-' and 'memcpy', 'batch', 'kernel' or 'staged': for stores and loads, joined by '+' where they differ.")
      .def_prop_ro(
          "details",
          [](const CopierObject& self) { return without_gil(self, [](PagedCopier& copier) { return copier.details(); }); },
          "For a log, in one line: why these paths (the GB/s of each that was measured), what fell back and why, how much of the "
          "arena is registered\n"
          "with CUDA by now. '' when there is nothing to say.");
}

}  // namespace lmcn::python
