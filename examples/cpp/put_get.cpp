// The store alone, in a C++ program: chunks of a prompt are put under keys made from its tokens, and come back from NVMe in the
// next life of the program. usage: put_get DIRECTORY   (run it twice)
#include <cstdio>
#include <cstring>
#include <numeric>
#include <vector>

#include "lmcn/chunk_hasher.hpp"
#include "lmcn/store.hpp"

namespace {

constexpr std::uint64_t kChunkBytes = 1 << 20;

int fail(const lmcn::Status& status) {
  std::fprintf(stderr, "%s\n", status.to_string().c_str());
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s DIRECTORY\n", argv[0]);
    return 2;
  }
  lmcn::StoreOptions options;
  options.host_bytes = 64 << 20;
  options.max_payload_bytes = kChunkBytes;
  options.directories = {argv[1]};
  options.nvme_bytes = 256 << 20;
  auto store = lmcn::TieredStore::open(options);
  if (!store.ok()) return fail(store.status());

  // Everything that must match before bytes may be shared goes into the namespace.
  const lmcn::NamespaceId ns = lmcn::make_namespace("dtype=bf16\nmodel=example\n");
  const auto hasher = lmcn::ChunkHasher::create(ns, 256);
  if (!hasher.ok()) return fail(hasher.status());
  std::vector<std::int32_t> tokens(1024);
  std::iota(tokens.begin(), tokens.end(), 0);
  std::vector<lmcn::ChunkKey> keys;
  if (const lmcn::Status hashed = hasher->hash(std::span<const std::int32_t>(tokens), {}, nullptr, keys); !hashed.ok()) {
    return fail(hashed);
  }

  const lmcn::PrefixHit found = (*store)->lookup(keys);
  std::printf("%zu chunks, found %u: %u in host memory, %u on NVMe\n", keys.size(), found.hit, found.host, found.nvme);

  auto lease = (*store)->reserve(ns, std::span(keys).subspan(found.hit), kChunkBytes);
  if (!lease.ok()) return fail(lease.status());
  for (std::size_t i = 0; i < lease->slots().size(); ++i) {
    std::memset(lease->payload(i), static_cast<int>(found.hit + i), kChunkBytes);  // your KV
    lease->mark_filled(i);
  }
  std::printf("stored %u\n", lease->commit());

  auto read = (*store)->acquire(ns, keys, std::chrono::seconds(10));
  if (!read.ok()) return fail(read.status());
  for (std::size_t i = 0; i < read->slots().size(); ++i) {
    if (read->payload(i)[0] != static_cast<std::byte>(i))
      return fail({lmcn::Code::kInternal, "chunk " + std::to_string(i) + " is wrong"});
  }
  std::printf("read %zu, all right\n", read->slots().size());
  read->release();
  if (const lmcn::Status closed = (*store)->close(std::chrono::seconds(10)); !closed.ok()) return fail(closed);
  return 0;
}
