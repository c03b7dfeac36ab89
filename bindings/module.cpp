#include <nanobind/nanobind.h>

#include "bindings.hpp"

NB_MODULE(_native, module) {
  using namespace lmcn::python;
  module.doc() = "lmcache-native's C++ core. Import lmcache_native, which re-exports all of it.";
  init_status(module);
  init_version(module);
  init_key(module);
  init_chunk_hasher(module);
  init_kv_layout(module);
  init_store_leases(module);
  init_store_request(module);
  init_store(module);
  init_attach(module);
  init_paged_copy(module);
  init_device_load(module);
  init_inspect(module);
}
