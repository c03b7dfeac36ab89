// load_gds_plugin().
#include "copy/gds_plugin.h"

#include <dlfcn.h>

#include <mutex>
#include <string>

#include "lmcn/device_load.hpp"
#include "lmcn/version.hpp"

namespace lmcn {
namespace {

Result<void*> load(const std::string& path) {
  // RTLD_LOCAL: what it brings along binds nobody else's symbols; a library that names it as needed still finds it by its SONAME.
  void* const library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* const why = ::dlerror();
    return Status(Code::kUnavailable, std::string("GPUDirect Storage: ") + (why != nullptr ? why : path.c_str()));
  }
  return library;
}

Result<const LmcnGdsPlugin*> load_plugin(const std::string& path, std::span<const std::string> libraries) {
  for (const std::string& needed : libraries) {
    if (Result<void*> loaded = load(needed); !loaded.ok()) return loaded.status();
  }
  Result<void*> library = load(path);
  if (!library.ok()) return library.status();
  using Entry = const LmcnGdsPlugin* (*)();
  const auto entry = reinterpret_cast<Entry>(::dlsym(*library, LMCN_GDS_PLUGIN_SYMBOL));
  if (entry == nullptr) return Status(Code::kUnavailable, path + " has no " LMCN_GDS_PLUGIN_SYMBOL ": it is another library");
  const LmcnGdsPlugin* const plugin = entry();
  const std::string version = build_info().version;
  if (plugin->abi != LMCN_GDS_PLUGIN_ABI || version != plugin->version) {
    return Status(Code::kUnavailable, path + " is of lmcache-native " + plugin->version + " (interface " +
                                          std::to_string(plugin->abi) + "), this is " + version + " (interface " +
                                          std::to_string(LMCN_GDS_PLUGIN_ABI) + "): install both from one build");
  }
  return plugin;
}

}  // namespace

Result<const LmcnGdsPlugin*> load_gds_plugin(const std::string& path, std::span<const std::string> libraries) {
  static std::mutex mutex;
  static const LmcnGdsPlugin* loaded = nullptr;
  std::lock_guard lock(mutex);
  if (loaded != nullptr) return loaded;
  Result<const LmcnGdsPlugin*> plugin = load_plugin(path, libraries);
  if (plugin.ok()) loaded = *plugin;
  return plugin;
}

}  // namespace lmcn
