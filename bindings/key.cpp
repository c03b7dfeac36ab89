#include "lmcn/key.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <new>

#include "arguments.hpp"
#include "bindings.hpp"
#include "status.hpp"

namespace lmcn::python {
namespace {

constexpr std::size_t kKeyBytes = sizeof(ChunkKey);

nb::bytes to_bytes(const ChunkKey& key) {
  return nb::bytes(key.bytes.data(), key.bytes.size());
}

nb::bytes all_bytes(const ChunkKeys& keys) {
  return nb::bytes(keys.span().data(), keys.size * kKeyBytes);
}

ChunkKeys from_bytes(nb::bytes data) {
  if (data.size() % kKeyBytes != 0) throw_invalid("data: a multiple of 32 bytes expected, got " + std::to_string(data.size()));
  std::vector<ChunkKey> keys(data.size() / kKeyBytes);
  if (!keys.empty()) std::memcpy(keys.data(), data.c_str(), data.size());
  return ChunkKeys::own(std::move(keys));
}

nb::bytes item(const ChunkKeys& keys, Py_ssize_t index) {
  const auto size = static_cast<Py_ssize_t>(keys.size);
  if (index < 0) index += size;
  if (index < 0 || index >= size) throw nb::index_error("ChunkKeys index out of range");
  return to_bytes(keys.span()[static_cast<std::size_t>(index)]);
}

ChunkKeys slice(const ChunkKeys& keys, const nb::slice& range) {
  const auto [start, stop, step, length] = range.compute(keys.size);
  (void)stop;
  if (step == 1) return {keys.storage, keys.begin + static_cast<std::size_t>(start), length};
  std::vector<ChunkKey> out(length);
  for (std::size_t i = 0; i < length; ++i)
    out[i] = keys.span()[static_cast<std::size_t>(start + static_cast<Py_ssize_t>(i) * step)];
  return ChunkKeys::own(std::move(out));
}

nb::object iterate(const ChunkKeys& keys) {
  nb::list items;
  for (const ChunkKey& key : keys.span()) items.append(to_bytes(key));
  return nb::iter(items);
}

nb::dict array_interface(const ChunkKeys& keys) {
  static constexpr std::byte kNothing{};
  const void* data = keys.size == 0 ? static_cast<const void*>(&kNothing) : keys.span().data();
  nb::dict out;
  out["shape"] = nb::make_tuple(keys.size, kKeyBytes);
  out["typestr"] = "|u1";
  out["data"] = nb::make_tuple(reinterpret_cast<std::uintptr_t>(data), true);
  out["version"] = 3;
  return out;
}

using KeyView = nb::ndarray<nb::memview, nb::ro, std::uint8_t, nb::ndim<2>, nb::c_contig>;

KeyView view(nb::pointer_and_handle<ChunkKeys> self) {
  static constexpr std::byte kNothing{};
  const ChunkKeys& keys = *self.p;
  const void* data = keys.size == 0 ? static_cast<const void*>(&kNothing) : keys.span().data();
  return KeyView(data, {keys.size, kKeyBytes}, self.h);
}

std::string representation(const ChunkKeys& keys) {
  std::string out = "ChunkKeys(" + std::to_string(keys.size);
  if (keys.size > 0) out += ": " + keys.span()[0].to_hex().substr(0, 16);
  if (keys.size > 1) out += "..." + keys.span()[keys.size - 1].to_hex().substr(0, 16);
  return out + ")";
}

}  // namespace

void init_key(nb::module_& module) {
  nb::class_<ChunkKeys>(
      module, "ChunkKeys",
      "Immutable array of n 32-byte chunk keys, n x 32 bytes of memory. Slices with step 1 share it. Thread-safe; picklable.\n"
      "numpy.asarray(keys) is a read-only uint8 array of shape (n, 32) on the same memory.")
      .def_static("from_bytes", from_bytes, nb::arg("data"),
                  "Keys from n*32 bytes, copied. InvalidArgument when the length is no multiple of 32.")
      .def("tobytes", all_bytes, "The n*32 bytes, copied.")
      .def("view", view, nb::sig("def view(self) -> memoryview"),
           "Read-only memoryview of shape (n, 32), format 'B', on the keys' own memory, which it keeps alive.")
      .def("__len__", [](const ChunkKeys& keys) { return keys.size; })
      .def("__getitem__", item, nb::arg("index"))
      .def("__getitem__", slice, nb::arg("index"))
      .def("__iter__", iterate, nb::sig("def __iter__(self) -> collections.abc.Iterator[bytes]"))
      .def(
          "__eq__",
          [](const ChunkKeys& a, nb::handle other) -> nb::object {
            if (!nb::isinstance<ChunkKeys>(other)) return nb::borrow(Py_NotImplemented);
            const ChunkKeys& b = *nb::inst_ptr<ChunkKeys>(other);
            return nb::bool_(std::ranges::equal(a.span(), b.span()));
          },
          nb::arg("other"), nb::sig("def __eq__(self, other: object, /) -> bool"))
      .def("__hash__", [](const ChunkKeys& keys) { return nb::hash(all_bytes(keys)); })
      .def("__repr__", representation)
      .def("__getstate__", all_bytes)
      .def("__setstate__", [](ChunkKeys& self, nb::bytes state) { new (&self) ChunkKeys(from_bytes(state)); })
      .def_prop_ro("__array_interface__", array_interface, nb::sig("def __array_interface__(self) -> dict[str, object]"),
                   "For numpy: shape (n, 32), uint8, read-only.");
}

}  // namespace lmcn::python
