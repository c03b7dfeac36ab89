// Shared by the binding files: one init function per public header, and the objects Python holds.
//
// The GIL is released around native work, with one exception: calls that touch memory for about a microsecond (a Request's
// single lookups, the methods of leases) keep it, because getting it back can cost a 5 ms switch interval.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "lmcn/attach.hpp"
#include "lmcn/key.hpp"
#include "lmcn/paged_copy.hpp"
#include "lmcn/status.hpp"
#include "lmcn/store.hpp"

namespace lmcn::python {

namespace nb = nanobind;

void init_status(nb::module_& module);
void init_version(nb::module_& module);
void init_key(nb::module_& module);
void init_chunk_hasher(nb::module_& module);
void init_kv_layout(nb::module_& module);
void init_store(nb::module_& module);
void init_store_leases(nb::module_& module);
void init_store_request(nb::module_& module);
void init_attach(nb::module_& module);
void init_paged_copy(nb::module_& module);
void init_device_load(nb::module_& module);
void init_inspect(nb::module_& module);

nb::dict stats_dict(const StoreStats& stats);

/// Keys as Python holds them: an immutable array, slices of which share memory.
struct ChunkKeys {
  std::shared_ptr<const std::vector<ChunkKey>> storage;
  std::size_t begin = 0;
  std::size_t size = 0;

  static ChunkKeys own(std::vector<ChunkKey> keys) {
    ChunkKeys out;
    out.size = keys.size();
    out.storage = std::make_shared<const std::vector<ChunkKey>>(std::move(keys));
    return out;
  }
  std::span<const ChunkKey> span() const noexcept { return {storage->data() + begin, size}; }
};

/// The store is shared by the objects that must not outlive it, so a lease keeps the arena mapped after Store.close().
/// The last owner lets it go with the GIL held (the deleter gives it up for the time close() takes).
struct StoreObject {
  std::shared_ptr<TieredStore> store;
  std::uint32_t rank_count = 1;
  std::uint32_t part_count = 1;
  std::shared_ptr<TieredStore> get() const;  // throws Unavailable when closed
};

// In each of these `store` comes first: it is destroyed last.
struct WriteLeaseObject {
  std::shared_ptr<TieredStore> store;
  WriteLease lease;
  std::uint32_t part_count = 1;
};

struct ReadLeaseObject {
  std::shared_ptr<TieredStore> store;
  ReadLease lease;
};

struct RequestObject {
  std::shared_ptr<TieredStore> store;
  std::unique_ptr<Request> request;
};

struct AttachmentObject {
  std::shared_ptr<ArenaAttachment> attachment;
  const std::shared_ptr<ArenaAttachment>& get() const;  // throws Unavailable when closed
};

}  // namespace lmcn::python
