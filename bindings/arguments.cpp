#include "arguments.hpp"

#include <cmath>
#include <limits>
#include <string>
#include <type_traits>

#include "bindings.hpp"
#include "status.hpp"

namespace lmcn::python {
namespace {

using nb::dlpack::dtype_code;

constexpr const char* kTokensWanted =
    "list[int], tuple[int, ...] or a 1-D contiguous int32 or int64 CPU buffer (numpy, torch, array, memoryview)";

std::string dtype_name(nb::dlpack::dtype dtype) {
  const char* kind = "other";
  switch (static_cast<dtype_code>(dtype.code)) {
    case dtype_code::Int:
      kind = "int";
      break;
    case dtype_code::UInt:
      kind = "uint";
      break;
    case dtype_code::Float:
      kind = "float";
      break;
    case dtype_code::Bfloat:
      kind = "bfloat";
      break;
    case dtype_code::Complex:
      kind = "complex";
      break;
    case dtype_code::Bool:
      return "bool";
    default:
      break;
  }
  return kind + std::to_string(dtype.bits);
}

template <class Array>
bool on_cpu(const Array& array) noexcept {
  return array.device_type() == nb::device::cpu::value || array.device_type() == nb::device::cuda_host::value;
}

template <class Array>
bool contiguous(const Array& array) noexcept {
  if (array.size() <= 1) return true;
  std::int64_t expected = 1;
  for (std::size_t i = array.ndim(); i-- > 0;) {
    if (array.shape(i) != 1 && array.stride(i) != expected) return false;
    expected *= static_cast<std::int64_t>(array.shape(i));
  }
  return true;
}

/// Why `array` is not a flat array of integers, or empty.
std::string flat_objection(const nb::ndarray<nb::ro>& array) {
  if (!on_cpu(array)) return "memory of device type " + std::to_string(array.device_type()) + " (copy it to the CPU first)";
  if (array.ndim() != 1) return std::to_string(array.ndim()) + " dimensions";
  if (!contiguous(array)) return "stride of " + std::to_string(array.stride(0)) + " elements (make it contiguous first)";
  if (array.size() != 0 && reinterpret_cast<std::uintptr_t>(array.data()) % array.itemsize() != 0) return "misaligned memory";
  return {};
}

[[noreturn]] void reject_tokens(const std::string& got) {
  throw_invalid(std::string("tokens: ") + kTokensWanted + " expected, got " + got);
}

[[noreturn]] void reject_token(std::size_t position, const std::string& why) {
  throw_invalid("tokens[" + std::to_string(position) + "]: " + why);
}

/// The int of an object that is not exactly an int: an int subclass or something with __index__, but no bool.
nb::object token_index(const nb::object& object, std::size_t position) {
  if (PyBool_Check(object.ptr())) reject_token(position, "a token id expected, got bool");
  nb::object index = nb::steal(PyNumber_Index(object.ptr()));
  if (!index.is_valid()) {
    PyErr_Clear();
    reject_token(position, "a token id (int) expected, got " + python_type_name(object));
  }
  return index;
}

/// An integer of any type up to 64 bits.
struct Integer {
  bool negative = false;
  std::int64_t low = 0;    // when negative
  std::uint64_t high = 0;  // when not
};

template <class T>
bool fits(const Integer& value) noexcept {
  if (value.negative) return std::is_signed_v<T> && value.low >= static_cast<std::int64_t>(std::numeric_limits<T>::min());
  return value.high <= static_cast<std::uint64_t>(std::numeric_limits<T>::max());
}

template <class T>
T checked(const Integer& value, const char* name, std::size_t position) {
  if (!fits<T>(value)) {
    throw_invalid(std::string(name) + "[" + std::to_string(position) + "]: " + std::to_string(std::numeric_limits<T>::min()) +
                  ".." + std::to_string(std::numeric_limits<T>::max()) + " expected, got " +
                  (value.negative ? std::to_string(value.low) : std::to_string(value.high)));
  }
  return value.negative ? static_cast<T>(value.low) : static_cast<T>(value.high);
}

Integer python_integer(nb::handle object, const char* name, std::size_t position) {
  auto reject = [&](const char* what) {
    PyErr_Clear();
    throw_invalid(std::string(name) + "[" + std::to_string(position) + "]: " + what + ", got " +
                  nb::cast<std::string>(nb::repr(object)));
  };
  if (PyBool_Check(object.ptr())) reject("an int expected");
  nb::object index = nb::steal(PyNumber_Index(object.ptr()));
  if (!index.is_valid()) reject("an int expected");
  int overflow = 0;
  long long low = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow < 0) reject("at least -2**63 expected");
  if (overflow == 0) return low < 0 ? Integer{true, low, 0} : Integer{false, 0, static_cast<std::uint64_t>(low)};
  unsigned long long high = PyLong_AsUnsignedLongLong(index.ptr());
  if (PyErr_Occurred() != nullptr) reject("less than 2**64 expected");
  return {false, 0, high};
}

template <class T, class Item>
void append_items(std::span<const Item> items, const char* name, std::vector<T>& out) {
  for (std::size_t i = 0; i < items.size(); ++i) {
    if constexpr (std::is_signed_v<Item>) {
      const std::int64_t v = items[i];
      out.push_back(checked<T>(v < 0 ? Integer{true, v, 0} : Integer{false, 0, static_cast<std::uint64_t>(v)}, name, i));
    } else {
      out.push_back(checked<T>(Integer{false, 0, items[i]}, name, i));
    }
  }
}

template <class Item>
std::span<const Item> items_of(const nb::ndarray<nb::ro>& array) noexcept {
  return {static_cast<const Item*>(array.data()), array.size()};
}

nb::object array_of(const char* typecode, const void* data, std::size_t bytes) {
  static PyObject* const array_class = nb::object(nb::module_::import_("array").attr("array")).release().ptr();
  return nb::handle(array_class)(typecode, nb::bytes(data, bytes));
}

template <class Array>
Array buffer_of(nb::handle object, const char* name, const char* wanted) {
  Array array;
  if (!nb::try_cast(object, array, false)) {
    throw_invalid(std::string(name) + ": " + wanted + " expected, got " + python_type_name(object));
  }
  if (!on_cpu(array)) {
    throw_invalid(std::string(name) + ": CPU memory expected, got device type " + std::to_string(array.device_type()));
  }
  if (!contiguous(array)) throw_invalid(std::string(name) + ": C-contiguous memory expected (make it contiguous first)");
  return array;
}

}  // namespace

std::string python_type_name(nb::handle object) {
  nb::object type = nb::borrow(object.type());
  std::string module = nb::cast<std::string>(nb::str(type.attr("__module__")));
  std::string name = nb::cast<std::string>(nb::str(type.attr("__qualname__")));
  return module == "builtins" ? name : module + "." + name;
}

ChunkKey chunk_key(nb::bytes bytes, const char* name) {
  ChunkKey key;
  if (bytes.size() != key.bytes.size()) {
    throw_invalid(std::string(name) + ": 32 bytes expected, got " + std::to_string(bytes.size()));
  }
  std::memcpy(key.bytes.data(), bytes.c_str(), key.bytes.size());
  return key;
}

NamespaceId namespace_id(nb::bytes bytes, const char* name) {
  return NamespaceId{chunk_key(bytes, name).bytes};
}

std::chrono::milliseconds milliseconds(double seconds, const char* name) {
  constexpr double kMostSeconds = 1e9;
  if (!(seconds >= 0)) throw_invalid(std::string(name) + ": seconds >= 0 expected, got " + std::to_string(seconds));
  return std::chrono::milliseconds(static_cast<std::int64_t>(std::ceil(std::min(seconds, kMostSeconds) * 1e3)));
}

std::span<const std::byte> byte_span(nb::handle bytes) noexcept {
  return {reinterpret_cast<const std::byte*>(PyBytes_AsString(bytes.ptr())), static_cast<std::size_t>(PyBytes_Size(bytes.ptr()))};
}

TokenArgument::TokenArgument(nb::handle tokens) {
  if (PyList_Check(tokens.ptr())) {
    take_items(tokens, PyList_GetItem, static_cast<std::size_t>(PyList_Size(tokens.ptr())));
  } else if (PyTuple_Check(tokens.ptr())) {
    take_items(tokens, PyTuple_GetItem, static_cast<std::size_t>(PyTuple_Size(tokens.ptr())));
  } else {
    take_buffer(tokens);
  }
}

void TokenArgument::take_items(nb::handle sequence, PyObject* (*item)(PyObject*, Py_ssize_t), std::size_t count) {
  copy_.reset(new std::int32_t[count]);
  for (std::size_t i = 0; i < count; ++i) {
    PyObject* object = item(sequence.ptr(), static_cast<Py_ssize_t>(i));
    if (object == nullptr) throw nb::python_error();  // the list shrank under an __index__
    nb::object index;                                 // keeps the value of a slow conversion alive
    if (!PyLong_CheckExact(object)) {
      index = token_index(nb::borrow(object), i);
      object = index.ptr();
    }
    const long value = PyLong_AsLong(object);
    if (value < INT32_MIN || value > INT32_MAX || (value == -1 && PyErr_Occurred() != nullptr)) {
      PyErr_Clear();
      reject_token(i, "a token id within int32 expected, got " + nb::cast<std::string>(nb::str(nb::handle(object))));
    }
    copy_[i] = static_cast<std::int32_t>(value);
  }
  span_ = std::span<const std::int32_t>(copy_.get(), count);
}

void TokenArgument::take_buffer(nb::handle tokens) {
  if (!nb::try_cast(tokens, buffer_, false)) reject_tokens(python_type_name(tokens));
  const std::string dtype = dtype_name(buffer_.dtype());
  if (dtype != "int32" && dtype != "int64") reject_tokens(python_type_name(tokens) + " of " + dtype);
  if (std::string why = flat_objection(buffer_); !why.empty())
    reject_tokens(python_type_name(tokens) + " of " + dtype + " with " + why);
  if (dtype == "int32") {
    span_ = items_of<std::int32_t>(buffer_);
  } else {
    span_ = items_of<std::int64_t>(buffer_);
  }
}

KeysArgument::KeysArgument(nb::handle keys, const char* name) {
  if (nb::isinstance<ChunkKeys>(keys)) {
    const ChunkKeys& native = *nb::inst_ptr<ChunkKeys>(keys);
    shared_ = native.storage;
    span_ = native.span();
    return;
  }
  const ByteStringsArgument strings(keys, name);
  copy_.reserve(strings.spans().size());
  for (std::span<const std::byte> bytes : strings.spans()) {
    ChunkKey key;
    if (bytes.size() != key.bytes.size()) {
      throw_invalid(std::string(name) + "[" + std::to_string(copy_.size()) + "]: 32 bytes expected, got " +
                    std::to_string(bytes.size()));
    }
    std::memcpy(key.bytes.data(), bytes.data(), key.bytes.size());
    copy_.push_back(key);
  }
  span_ = copy_;
}

ByteStringsArgument::ByteStringsArgument(nb::handle sequence, const char* name) {
  auto reject = [&](const std::string& got) { throw_invalid(std::string(name) + ": a sequence of bytes expected, got " + got); };
  if (PyBytes_Check(sequence.ptr()) || PyUnicode_Check(sequence.ptr())) reject(python_type_name(sequence));
  keep_alive_ = nb::steal(PySequence_Tuple(sequence.ptr()));
  if (!keep_alive_.is_valid()) {
    PyErr_Clear();
    reject(python_type_name(sequence));
  }
  const auto count = static_cast<std::size_t>(PyTuple_Size(keep_alive_.ptr()));
  spans_.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    PyObject* item = PyTuple_GetItem(keep_alive_.ptr(), static_cast<Py_ssize_t>(i));
    if (!PyBytes_Check(item))
      throw_invalid(std::string(name) + "[" + std::to_string(i) + "]: bytes expected, got " + python_type_name(item));
    spans_.push_back(byte_span(item));
  }
}

std::vector<std::string_view> ByteStringsArgument::views() const {
  std::vector<std::string_view> out;
  out.reserve(spans_.size());
  for (std::span<const std::byte> s : spans_) out.emplace_back(reinterpret_cast<const char*>(s.data()), s.size());
  return out;
}

template <class T>
std::vector<T> integers(nb::handle values, const char* name) {
  std::vector<T> out;
  if (PyList_Check(values.ptr()) || PyTuple_Check(values.ptr())) {
    nb::object items = nb::steal(PySequence_Tuple(values.ptr()));
    if (!items.is_valid()) throw nb::python_error();
    const auto count = static_cast<std::size_t>(PyTuple_Size(items.ptr()));
    out.reserve(count);
    for (std::size_t i = 0; i < count; ++i) {
      out.push_back(checked<T>(python_integer(PyTuple_GetItem(items.ptr(), static_cast<Py_ssize_t>(i)), name, i), name, i));
    }
    return out;
  }
  auto reject = [&](const std::string& got) {
    throw_invalid(std::string(name) +
                  ": list[int], tuple[int, ...] or a 1-D contiguous CPU buffer of (u)int32 or (u)int64 expected, got " + got);
  };
  nb::ndarray<nb::ro> buffer;
  if (!nb::try_cast(values, buffer, false)) reject(python_type_name(values));
  const std::string dtype = dtype_name(buffer.dtype());
  if (std::string why = flat_objection(buffer); !why.empty()) reject(python_type_name(values) + " of " + dtype + " with " + why);
  out.reserve(buffer.size());
  if (dtype == "int32") {
    append_items(items_of<std::int32_t>(buffer), name, out);
  } else if (dtype == "uint32") {
    append_items(items_of<std::uint32_t>(buffer), name, out);
  } else if (dtype == "int64") {
    append_items(items_of<std::int64_t>(buffer), name, out);
  } else if (dtype == "uint64") {
    append_items(items_of<std::uint64_t>(buffer), name, out);
  } else {
    reject(python_type_name(values) + " of " + dtype);
  }
  return out;
}
template std::vector<std::int32_t> integers(nb::handle, const char*);
template std::vector<std::uint32_t> integers(nb::handle, const char*);
template std::vector<std::uint64_t> integers(nb::handle, const char*);
template std::vector<std::int64_t> integers(nb::handle, const char*);

template <class T>
std::vector<T> of_length(nb::handle values, const char* name, const char* other, std::size_t count) {
  std::vector<T> out = integers<T>(values, name);
  if (out.size() != count) {
    throw_invalid(std::string(name) + ": as many as " + other + " (" + std::to_string(count) + ") expected, got " +
                  std::to_string(out.size()));
  }
  return out;
}
template std::vector<std::uint32_t> of_length(nb::handle, const char*, const char*, std::size_t);
template std::vector<std::uint64_t> of_length(nb::handle, const char*, const char*, std::size_t);

nb::ndarray<nb::ro> readable_buffer(nb::handle object, const char* name) {
  return buffer_of<nb::ndarray<nb::ro>>(object, name, "a contiguous CPU buffer (bytes, numpy, torch, array, memoryview)");
}

nb::ndarray<> writable_buffer(nb::handle object, const char* name) {
  return buffer_of<nb::ndarray<>>(object, name, "a writable contiguous CPU buffer (bytearray, numpy, torch, array, memoryview)");
}

std::span<const std::byte> contiguous_bytes(const nb::ndarray<nb::ro>& buffer) noexcept {
  return {static_cast<const std::byte*>(buffer.data()), buffer.nbytes()};
}

std::span<std::byte> contiguous_bytes(const nb::ndarray<>& buffer) noexcept {
  return {static_cast<std::byte*>(buffer.data()), buffer.nbytes()};
}

nb::object to_array(const char* typecode, std::span<const std::uint32_t> values) {
  return array_of(typecode, values.data(), values.size_bytes());
}

nb::object to_array(const char* typecode, std::span<const std::uint64_t> values) {
  return array_of(typecode, values.data(), values.size_bytes());
}

}  // namespace lmcn::python
