#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstring>
#include <memory>

#include "arguments.hpp"
#include "bindings.hpp"
#include "lmcn/store.hpp"
#include "status.hpp"

namespace lmcn::python {
namespace {

template <class Lease>
std::size_t checked_index(const Lease& lease, std::size_t index) {
  if (index >= lease.slots().size()) {
    throw_invalid("index: " +
                  (lease.empty() ? std::string("the lease has ended or holds no slots")
                                 : "less than " + std::to_string(lease.slots().size()) + " expected") +
                  ", got " + std::to_string(index));
  }
  return index;
}

template <class Object>
nb::object slot_offsets(const Object& self) {
  std::vector<std::uint64_t> offsets;
  offsets.reserve(self.lease.slots().size());
  for (const SlotRef& slot : self.lease.slots()) offsets.push_back(slot.offset);
  return to_array("Q", offsets);
}

template <class Object>
nb::object generations(const Object& self) {
  std::vector<std::uint32_t> out;
  out.reserve(self.lease.slots().size());
  for (const SlotRef& slot : self.lease.slots()) out.push_back(slot.generation);
  return to_array("I", out);
}

template <class Object>
std::size_t length(const Object& self) {
  return self.lease.slots().size();
}

using WritableView = nb::ndarray<nb::memview, std::uint8_t, nb::ndim<1>, nb::c_contig>;
using ReadableView = nb::ndarray<nb::memview, nb::ro, std::uint8_t, nb::ndim<1>, nb::c_contig>;

WritableView writable_payload(nb::pointer_and_handle<WriteLeaseObject> self, std::size_t index) {
  checked_index(self.p->lease, index);
  return WritableView(self.p->lease.payload(index), {static_cast<std::size_t>(self.p->lease.payload_bytes())}, self.h);
}

ReadableView readable_payload(nb::pointer_and_handle<ReadLeaseObject> self, std::size_t index) {
  checked_index(self.p->lease, index);
  const std::span<const std::byte> payload = self.p->lease.payload(index);
  return ReadableView(payload.data(), {payload.size()}, self.h);
}

void fill(WriteLeaseObject& self, std::size_t index, nb::handle data) {
  checked_index(self.lease, index);
  const nb::ndarray<nb::ro> buffer = readable_buffer(data, "data");
  const std::span<const std::byte> source = contiguous_bytes(buffer);
  if (source.size() != self.lease.payload_bytes()) {
    throw_invalid("data: " + std::to_string(self.lease.payload_bytes()) + " bytes expected, got " + std::to_string(source.size()));
  }
  std::byte* target = self.lease.payload(index);
  nb::gil_scoped_release release;
  std::memcpy(target, source.data(), source.size());
}

void copy_to(const ReadLeaseObject& self, std::size_t index, nb::handle out) {
  checked_index(self.lease, index);
  const nb::ndarray<> buffer = writable_buffer(out, "out");
  const std::span<std::byte> target = contiguous_bytes(buffer);
  const std::span<const std::byte> source = self.lease.payload(index);
  if (target.size() != source.size()) {
    throw_invalid("out: " + std::to_string(source.size()) + " bytes expected, got " + std::to_string(target.size()));
  }
  nb::gil_scoped_release release;
  std::memcpy(target.data(), source.data(), source.size());
}

nb::object tobytes(const ReadLeaseObject& self, std::size_t index) {
  checked_index(self.lease, index);
  const std::span<const std::byte> source = self.lease.payload(index);
  nb::object out = nb::steal(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(source.size())));
  if (!out.is_valid()) throw nb::python_error();
  char* target = PyBytes_AsString(out.ptr());  // nobody else has seen the object yet
  {
    nb::gil_scoped_release release;
    std::memcpy(target, source.data(), source.size());
  }
  return out;
}

/// Any contiguous buffer as bytes. The capsule holds the buffer's export, so that its owner can neither resize nor drop it.
ReadableView byte_view(nb::handle data) {
  auto buffer = std::make_unique<nb::ndarray<nb::ro>>(readable_buffer(data, "data"));
  static constexpr std::byte kNothing{};
  const std::span<const std::byte> bytes = contiguous_bytes(*buffer);
  nb::capsule owner(buffer.release(), [](void* pointer) noexcept { delete static_cast<nb::ndarray<nb::ro>*>(pointer); });
  return ReadableView(bytes.empty() ? &kNothing : bytes.data(), {bytes.size()}, owner);
}

constexpr const char* kExitSignature =
    "def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: types.TracebackType | None, /) "
    "-> None";

void init_write_lease(nb::module_& module) {
  nb::class_<WriteLeaseObject>(
      module, "WriteLease",
      "Right to fill slots. As a context manager, or when it is dropped, it aborts unless commit() ran: nothing becomes visible.\n"
      "Keeps the store's arena alive. One thread at a time.")
      .def("__len__", length<WriteLeaseObject>)
      .def_prop_ro(
          "positions", [](const WriteLeaseObject& self) { return to_array("I", self.lease.positions()); },
          nb::sig("def positions(self) -> array.array[int]"), "uint32 per slot: which of the reserved keys it is for, ascending.")
      .def("slot_offsets", slot_offsets<WriteLeaseObject>, nb::sig("def slot_offsets(self) -> array.array[int]"),
           "uint64 per slot: its offset in the arena, in bytes. Picklable; PagedCopier.submit takes it as it is.")
      .def("generations", generations<WriteLeaseObject>, nb::sig("def generations(self) -> array.array[int]"),
           "uint32 per slot: its generation. Picklable.")
      .def_prop_ro(
          "payload_bytes", [](const WriteLeaseObject& self) { return self.lease.payload_bytes(); },
          "Bytes of each slot's payload, all parts.")
      .def("payload", writable_payload, nb::arg("index"), nb::sig("def payload(self, index: int) -> memoryview"),
           "Writable memoryview (payload_bytes,) of slot `index`, in the arena itself. It keeps the lease object alive, but must "
           "not be written\n"
           "after commit() or abort().")
      .def("fill", fill, nb::arg("index"), nb::arg("data").none(),
           nb::sig("def fill(self, index: int, data: lmcache_native._types.ByteBuffer) -> None"),
           "Copies a contiguous buffer of exactly payload_bytes into slot `index`, without the GIL.")
      .def(
          "mark_filled",
          [](WriteLeaseObject& self, std::size_t index, std::uint32_t rank) {
            checked_index(self.lease, index);
            if (rank >= self.part_count) {
              throw_invalid("rank: less than " + std::to_string(self.part_count) + " expected, got " + std::to_string(rank));
            }
            self.lease.mark_filled(index, rank);
          },
          nb::arg("index"), nb::arg("rank") = 0,
          "Says that this process filled the rank's part of slot `index`. Workers' copiers say so themselves.")
      .def(
          "commit", [](WriteLeaseObject& self) { return self.lease.commit(); },
          "Publishes every slot whose parts are all filled, drops the others, returns how many were published. The lease is empty "
          "afterwards.")
      .def(
          "abort", [](WriteLeaseObject& self) { self.lease.abort(); }, "Drops all slots. Idempotent.")
      .def(
          "__enter__", [](nb::handle self) { return nb::borrow(self); }, nb::sig("def __enter__(self) -> WriteLease"))
      .def("__exit__", [](WriteLeaseObject& self, const nb::args&) { self.lease.abort(); }, nb::sig(kExitSignature));
}

void init_read_lease(nb::module_& module) {
  nb::class_<ReadLeaseObject>(module, "ReadLease",
                              "Right to read slots: while it lives they are neither evicted nor reused. Ends with release(), as a "
                              "context manager, or when it is\n"
                              "dropped. Keeps the store's arena alive. One thread at a time.")
      .def("__len__", length<ReadLeaseObject>)
      .def("slot_offsets", slot_offsets<ReadLeaseObject>, nb::sig("def slot_offsets(self) -> array.array[int]"),
           "uint64 per slot: its offset in the arena, in bytes. Picklable; PagedCopier.submit takes it as it is.")
      .def("generations", generations<ReadLeaseObject>, nb::sig("def generations(self) -> array.array[int]"),
           "uint32 per slot: its generation. Picklable.")
      .def("payload", readable_payload, nb::arg("index"), nb::sig("def payload(self, index: int) -> memoryview"),
           "Read-only memoryview of slot `index`'s payload, in the arena itself. It keeps the lease object alive; after release() "
           "its bytes may\n"
           "become another chunk's.")
      .def("copy_to", copy_to, nb::arg("index"), nb::arg("out").none(),
           nb::sig("def copy_to(self, index: int, out: lmcache_native._types.ByteBuffer) -> None"),
           "Copies slot `index`'s payload into a writable contiguous buffer of exactly its size, without the GIL.")
      .def("tobytes", tobytes, nb::arg("index"), nb::sig("def tobytes(self, index: int) -> bytes"),
           "A copy of slot `index`'s payload.")
      .def(
          "release", [](ReadLeaseObject& self) { self.lease.release(); }, "Ends the lease. Idempotent.")
      .def(
          "__enter__", [](nb::handle self) { return nb::borrow(self); }, nb::sig("def __enter__(self) -> ReadLease"))
      .def("__exit__", [](ReadLeaseObject& self, const nb::args&) { self.lease.release(); }, nb::sig(kExitSignature));
}

}  // namespace

void init_store_leases(nb::module_& module) {
  init_write_lease(module);
  init_read_lease(module);
  module.def(
      "byte_view", byte_view, nb::arg("data").none(),
      nb::sig("def byte_view(data: lmcache_native._types.ByteBuffer) -> memoryview"),
      "Read-only memoryview of shape (nbytes,), format 'B', on any contiguous CPU buffer or DLPack object, which it keeps alive.");
}

}  // namespace lmcn::python
