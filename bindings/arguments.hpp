// Python arguments -> native values. Everything here REQUIRES the GIL; what it returns may be used without it.
// A wrong value raises InvalidArgument naming the argument, what it was and what would be right.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <variant>
#include <vector>

#include "lmcn/key.hpp"

namespace lmcn::python {

namespace nb = nanobind;

/// "list", "numpy.ndarray", ...
std::string python_type_name(nb::handle object);

ChunkKey chunk_key(nb::bytes bytes, const char* name);
NamespaceId namespace_id(nb::bytes bytes, const char* name);

/// Seconds to milliseconds, rounded up; >= 0; infinity is about 31 years.
std::chrono::milliseconds milliseconds(double seconds, const char* name);

/// The bytes of a bytes object: valid while the object lives.
std::span<const std::byte> byte_span(nb::handle bytes) noexcept;

/// Tokens of a list, a tuple (copied) or a 1-D contiguous int32/int64 CPU buffer or DLPack object (not copied, kept alive).
class TokenArgument {
 public:
  explicit TokenArgument(nb::handle tokens);
  std::variant<std::span<const std::int32_t>, std::span<const std::int64_t>> span() const noexcept { return span_; }

 private:
  void take_items(nb::handle sequence, PyObject* (*item)(PyObject*, Py_ssize_t), std::size_t count);
  void take_buffer(nb::handle tokens);

  nb::ndarray<nb::ro> buffer_;
  std::unique_ptr<std::int32_t[]> copy_;
  std::variant<std::span<const std::int32_t>, std::span<const std::int64_t>> span_;
};

/// ChunkKeys (shared, not copied) or a sequence of 32-byte bytes objects (copied).
class KeysArgument {
 public:
  KeysArgument(nb::handle keys, const char* name);
  std::span<const ChunkKey> span() const noexcept { return span_; }

 private:
  std::shared_ptr<const std::vector<ChunkKey>> shared_;
  std::vector<ChunkKey> copy_;
  std::span<const ChunkKey> span_;
};

/// A sequence of bytes objects of any length, not copied: a tuple of our own keeps them alive.
class ByteStringsArgument {
 public:
  ByteStringsArgument(nb::handle sequence, const char* name);
  const std::vector<std::span<const std::byte>>& spans() const noexcept { return spans_; }
  std::vector<std::string_view> views() const;

 private:
  nb::object keep_alive_;
  std::vector<std::span<const std::byte>> spans_;
};

/// Integers of a list, a tuple or a 1-D contiguous buffer of (u)int32 or (u)int64, each within T's range.
template <class T>
std::vector<T> integers(nb::handle values, const char* name);
extern template std::vector<std::int32_t> integers(nb::handle, const char*);
extern template std::vector<std::uint32_t> integers(nb::handle, const char*);
extern template std::vector<std::uint64_t> integers(nb::handle, const char*);
extern template std::vector<std::int64_t> integers(nb::handle, const char*);

/// The same, `count` of them: as many as `other` has.
template <class T>
std::vector<T> of_length(nb::handle values, const char* name, const char* other, std::size_t count);
extern template std::vector<std::uint32_t> of_length(nb::handle, const char*, const char*, std::size_t);
extern template std::vector<std::uint64_t> of_length(nb::handle, const char*, const char*, std::size_t);

/// The bytes of any contiguous CPU buffer or DLPack object, whatever its dtype.
std::span<const std::byte> contiguous_bytes(const nb::ndarray<nb::ro>& buffer) noexcept;
std::span<std::byte> contiguous_bytes(const nb::ndarray<>& buffer) noexcept;
nb::ndarray<nb::ro> readable_buffer(nb::handle object, const char* name);
nb::ndarray<> writable_buffer(nb::handle object, const char* name);

/// array.array(typecode) holding a copy of `values`: compact, indexable, picklable.
nb::object to_array(const char* typecode, std::span<const std::uint32_t> values);
nb::object to_array(const char* typecode, std::span<const std::uint64_t> values);

}  // namespace lmcn::python
