#include "lmcn/chunk_hasher.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>

#include <new>
#include <optional>

#include "arguments.hpp"
#include "bindings.hpp"
#include "status.hpp"

namespace lmcn::python {
namespace {

ChunkKeys hash(const ChunkHasher& hasher, nb::handle tokens, nb::handle extra_keys, std::optional<nb::bytes> parent) {
  const TokenArgument token_argument(tokens);
  std::optional<ByteStringsArgument> extra_argument;
  if (!extra_keys.is_none()) extra_argument.emplace(extra_keys, "extra_keys");
  std::optional<ChunkKey> parent_key;
  if (parent) parent_key = chunk_key(*parent, "parent");

  std::vector<ChunkKey> keys;
  Status status;
  {
    nb::gil_scoped_release release;
    std::vector<std::string_view> extra;
    if (extra_argument) extra = extra_argument->views();
    status = std::visit([&](auto span) { return hasher.hash(span, extra, parent_key ? &*parent_key : nullptr, keys); },
                        token_argument.span());
  }
  throw_if_error(std::move(status));
  return ChunkKeys::own(std::move(keys));
}

nb::bytes to_bytes(const std::array<std::uint8_t, 32>& bytes) {
  return nb::bytes(bytes.data(), bytes.size());
}

nb::bytes step(const ChunkHasher& hasher, nb::bytes parent, nb::handle tokens, nb::bytes extra) {
  const ChunkKey parent_key = chunk_key(parent, "parent");
  const TokenArgument argument(tokens);
  const std::span<const std::byte> extra_bytes = byte_span(extra);
  const std::string_view suffix(reinterpret_cast<const char*>(extra_bytes.data()), extra_bytes.size());
  auto key = std::visit([&](auto span) { return Result<ChunkKey>(hasher.step(parent_key, span, suffix)); }, argument.span());
  return to_bytes(take(std::move(key)).bytes);
}

}  // namespace

void init_chunk_hasher(nb::module_& module) {
  module.def(
      "make_namespace", [](std::string_view description) { return to_bytes(make_namespace(description).bytes); },
      nb::arg("description"),
      "Namespace (32 bytes) of a canonical description: 'name=value\\n' lines sorted by name. lmcache_native.describe_namespace "
      "makes one.");

  nb::class_<ChunkHasher>(module, "ChunkHasher",
                          "Tokens to chunk keys: a SHA-256 chain over whole chunks of `chunk_tokens` tokens.\n\n"
                          "key[i] = SHA256(key[i-1] || tokens as int32 little-endian || extra[i] || u32 token count || u32 extra "
                          "bytes), key[-1] = SHA256(namespace).\n"
                          "Immutable; may be shared between threads.")
      .def(
          "__init__",
          [](ChunkHasher* self, nb::bytes ns, std::int64_t chunk_tokens) {
            if (chunk_tokens < 1 || chunk_tokens > UINT32_MAX) {
              throw_invalid("chunk_tokens: 1.." + std::to_string(UINT32_MAX) + " expected, got " + std::to_string(chunk_tokens));
            }
            new (self)
                ChunkHasher(take(ChunkHasher::create(namespace_id(ns, "namespace"), static_cast<std::uint32_t>(chunk_tokens))));
          },
          nb::arg("namespace"), nb::arg("chunk_tokens") = 256,
          "namespace: 32 bytes of make_namespace(). InvalidArgument when chunk_tokens < 1.")
      .def_prop_ro("chunk_tokens", &ChunkHasher::chunk_tokens, "Tokens per chunk.")
      .def_prop_ro(
          "root", [](const ChunkHasher& hasher) { return to_bytes(hasher.root().bytes); },
          "key[-1], the parent of a prompt's first chunk: 32 bytes.")
      .def(
          "hash", hash, nb::arg("tokens").none(), nb::arg("extra_keys") = nb::none(), nb::arg("parent") = nb::none(),
          nb::sig(
              "def hash(self, tokens: lmcache_native._types.TokenArray, extra_keys: collections.abc.Sequence[bytes] | None = None, "
              "parent: bytes | None = None) -> ChunkKeys"),
          "Keys of all whole chunks of `tokens`; a tail shorter than a chunk is ignored.\n\n"
          "tokens: list[int], tuple[int, ...] or a 1-D contiguous int32/int64 CPU buffer or DLPack object (numpy, torch, array, "
          "memoryview),\n"
          "which is read in place: it must not change during the call. int64 and int32 give the same keys.\n"
          "extra_keys: one bytes object per whole chunk (LoRA, multimodal hashes, salts). parent: the key before the first chunk.\n"
          "InvalidArgument names the position of a token outside int32, or the type that was given. Releases the GIL while "
          "hashing.")
      .def("step", step, nb::arg("parent"), nb::arg("tokens").none(), nb::arg("extra") = nb::bytes("", 0),
           nb::sig("def step(self, parent: bytes, tokens: lmcache_native._types.TokenArray, extra: bytes = b'') -> bytes"),
           "One step of the chain: the 32-byte key of a chunk of any number of tokens after `parent` (root: at the start of a "
           "prompt).\n"
           "So a tail shorter than chunk_tokens has a key of its own, by its tokens and their count; of chunk_tokens tokens it is "
           "what hash()\n"
           "gives. tokens, extra: as of hash(). Keeps the GIL.");

  nb::class_<KeyDeriver>(
      module, "KeyDeriver",
      "Engine key (a block hash) to chunk key: SHA256(namespace || u32 length || engine key). Immutable; thread-safe.")
      .def(
          "__init__", [](KeyDeriver* self, nb::bytes ns) { new (self) KeyDeriver(namespace_id(ns, "namespace")); },
          nb::arg("namespace"))
      .def(
          "derive", [](const KeyDeriver& deriver, nb::bytes key) { return to_bytes(deriver.derive(byte_span(key)).bytes); },
          nb::arg("engine_key"), "The 32-byte chunk key.")
      .def(
          "derive_all",
          [](const KeyDeriver& deriver, nb::handle engine_keys) {
            const ByteStringsArgument keys(engine_keys, "engine_keys");
            std::vector<ChunkKey> out;
            {
              nb::gil_scoped_release release;
              out.reserve(keys.spans().size());
              for (std::span<const std::byte> key : keys.spans()) out.push_back(deriver.derive(key));
            }
            return ChunkKeys::own(std::move(out));
          },
          nb::arg("engine_keys").none(), nb::sig("def derive_all(self, engine_keys: collections.abc.Sequence[bytes]) -> ChunkKeys"),
          "Chunk keys of many engine keys. Releases the GIL.");
}

}  // namespace lmcn::python
