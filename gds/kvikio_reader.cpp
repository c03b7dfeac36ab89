// liblmcn_gds.so: gds_plugin.h on kvikio. Exceptions end here.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <kvikio/buffer.hpp>
#include <kvikio/compat_mode_manager.hpp>
#include <kvikio/file_handle.hpp>
#include <kvikio/shim/cufile.hpp>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "copy/gds_plugin.h"

struct LmcnGdsReader {
  explicit LmcnGdsReader(const LmcnGdsOptions& asked) : options(asked), threads(asked.threads) {}

  std::shared_ptr<kvikio::FileHandle> find(std::uint32_t file) {
    std::lock_guard lock(mutex);
    const auto found = files.find(file);
    if (found == files.end()) throw std::logic_error("file " + std::to_string(file) + " is not open");
    return found->second;
  }

  const LmcnGdsOptions options;
  kvikio::ThreadPool threads;  // ours: kvikio's own is shared with whoever else uses kvikio in this process
  std::mutex mutex;
  std::map<std::uint32_t, std::shared_ptr<kvikio::FileHandle>> files;
  std::uint32_t next_file = 0;
  std::byte* registered = nullptr;
  std::uint64_t registered_bytes = 0;
};

namespace {

template <class Work>
int guarded(LmcnGdsError error, Work&& work) {
  const char* text = "unknown exception";
  std::string kept;
  try {
    work();
    return 0;
  } catch (const std::exception& e) {
    kept = e.what();
    text = kept.c_str();
  } catch (...) {
  }
  if (error.bytes > 0) std::snprintf(error.text, error.bytes, "%s", text);
  return 1;
}

/// A function of the cuFile library, or null. The library stays loaded: kvikio uses it.
template <class Function>
Function* cufile_function(const char* name) {
  static void* const library = ::dlopen("libcufile.so.0", RTLD_NOW | RTLD_LOCAL);
  return library == nullptr ? nullptr : reinterpret_cast<Function*>(::dlsym(library, name));
}

/// Without this cuFile copies through host memory where it can do nothing better, and does not say so. It has no effect once the
/// driver is open: state() therefore asks what holds.
void refuse_cufile_compat() {
  if (auto* const set = cufile_function<decltype(cuFileSetParameterBool)>("cuFileSetParameterBool")) {
    static_cast<void>(set(CUFILE_PARAM_PROPERTIES_ALLOW_COMPAT_MODE, false));
  }
}

void say(LmcnGdsState* state, bool compat, const std::string& reason) {
  state->compat = compat ? 1 : 0;
  std::snprintf(state->reason, sizeof state->reason, "%s", reason.c_str());
}

int make(const LmcnGdsOptions* options, LmcnGdsReader** reader, LmcnGdsError error) {
  return guarded(error, [&] {
    if (options->allow_compat == 0) {
      refuse_cufile_compat();
      if (!kvikio::is_cufile_library_available()) throw std::runtime_error("libcufile.so.0 cannot be loaded");
    }
    *reader = new LmcnGdsReader(*options);
  });
}

void destroy(LmcnGdsReader* reader) {
  if (reader->registered != nullptr) {
    char text[256];
    if (guarded({text, sizeof text}, [&] { kvikio::buffer_deregister(reader->registered); }) != 0) {
      std::fprintf(stderr, "lmcache-native: cuFileBufDeregister: %s\n", text);
    }
  }
  delete reader;
}

int register_memory(LmcnGdsReader* reader, void* base, std::uint64_t bytes, LmcnGdsError error) {
  return guarded(error, [&] {
    if (reader->options.allow_compat != 0) return;
    kvikio::buffer_register(base, bytes);
    reader->registered = static_cast<std::byte*>(base);
    reader->registered_bytes = bytes;
  });
}

int open(LmcnGdsReader* reader, int fd, int writable, std::uint32_t* file, LmcnGdsError error) {
  return guarded(error, [&] {
    // By way of the descriptor: what is at the path may be another file by now.
    const std::string path = "/proc/self/fd/" + std::to_string(fd);
    const kvikio::CompatMode mode = reader->options.allow_compat != 0 ? kvikio::CompatMode::ON : kvikio::CompatMode::OFF;
    auto handle = std::make_shared<kvikio::FileHandle>(path, writable != 0 ? "r+" : "r", kvikio::FileHandle::m644, mode);
    std::lock_guard lock(reader->mutex);
    *file = reader->next_file++;
    reader->files.emplace(*file, std::move(handle));
  });
}

void close(LmcnGdsReader* reader, std::uint32_t file) {
  std::shared_ptr<kvikio::FileHandle> closed;
  std::lock_guard lock(reader->mutex);
  if (const auto found = reader->files.find(file); found != reader->files.end()) {
    closed = std::move(found->second);
    reader->files.erase(found);
  }
}

int state(LmcnGdsReader* reader, std::uint32_t file, LmcnGdsState* state, LmcnGdsError error) {
  return guarded(error, [&] {
    if (reader->find(file)->get_compat_mode_manager().is_compat_mode_preferred()) {
      return say(state, true, "kvikio's compatibility mode");
    }
    bool compat_allowed = true;
    auto* const get = cufile_function<decltype(cuFileGetParameterBool)>("cuFileGetParameterBool");
    const bool known = get != nullptr && get(CUFILE_PARAM_PROPERTIES_ALLOW_COMPAT_MODE, &compat_allowed).err == CU_FILE_SUCCESS;
    CUfileDrvProps_t properties{};
    const bool told = kvikio::cuFileAPI::instance().DriverGetProperties(&properties).err == CU_FILE_SUCCESS;
    const bool nvidia_fs = told && properties.nvfs.major_version != 0;
    const bool p2p = told && (properties.fflags & (1u << CU_FILE_P2P_SUPPORTED)) != 0;
    std::string how = nvidia_fs ? "nvidia-fs " + std::to_string(properties.nvfs.major_version) + "." +
                                      std::to_string(properties.nvfs.minor_version)
                      : p2p     ? "PCI P2PDMA"
                                : "neither nvidia-fs nor PCI P2PDMA";
    if (known && !compat_allowed) return say(state, false, "cuFile without its compatibility mode, " + how);
    // Somebody in this process opened cuFile's driver before us: a file may be served through host memory without a word.
    say(state, true, "cuFile was opened with its compatibility mode allowed (" + how + "); set CUFILE_ALLOW_COMPAT_MODE=false");
  });
}

/// `move` gives the bytes that it moved. One that returned has ended, however few they are. One that threw may not have: cuFile
/// takes a large read apart, and says of no error that the other parts have ended.
template <class Move>
int transfer(LmcnGdsReader* reader, std::uint32_t file, const char* what, std::uint64_t bytes, LmcnGdsError error, Move&& move) {
  bool under_way = false;
  const int failed = guarded(error, [&] {
    const std::shared_ptr<kvikio::FileHandle> handle = reader->find(file);
    under_way = true;
    const std::size_t done = move(*handle);
    under_way = false;
    if (done != bytes)
      throw std::runtime_error(std::string(what) + ": " + std::to_string(done) + " of " + std::to_string(bytes) + " bytes");
  });
  return failed == 0 ? LMCN_GDS_OK : under_way ? LMCN_GDS_LOST : LMCN_GDS_FAILED;
}

bool is_registered(const LmcnGdsReader& reader, const void* memory, std::uint64_t bytes) {
  const auto* const at = static_cast<const std::byte*>(memory);
  return reader.registered != nullptr && at >= reader.registered && at + bytes <= reader.registered + reader.registered_bytes;
}

// Registered memory is named by its base and an offset: cuFile takes a pointer into it for memory that is not registered, and
// copies. Other memory goes as one task (kvikio would make many) and without the threshold below which kvikio reads through host
// memory. Nothing is ordered after the null stream: staging memory is written by nobody else.
int read(LmcnGdsReader* reader, std::uint32_t file, std::uint64_t offset, void* memory, std::uint64_t bytes, LmcnGdsError error) {
  return transfer(reader, file, "read", bytes, error, [&](kvikio::FileHandle& handle) {
    if (!is_registered(*reader, memory, bytes)) return handle.pread(memory, bytes, offset, bytes, 0, false, &reader->threads).get();
    const auto at = static_cast<std::size_t>(static_cast<std::byte*>(memory) - reader->registered);
    return handle.read(reader->registered, bytes, offset, at, false);
  });
}

int write(LmcnGdsReader* reader, std::uint32_t file, std::uint64_t offset, const void* memory, std::uint64_t bytes,
          LmcnGdsError error) {
  return transfer(reader, file, "write", bytes, error, [&](kvikio::FileHandle& handle) {
    if (!is_registered(*reader, memory, bytes))
      return handle.pwrite(memory, bytes, offset, bytes, 0, false, &reader->threads).get();
    const auto at = static_cast<std::size_t>(static_cast<const std::byte*>(memory) - reader->registered);
    return handle.write(reader->registered, bytes, offset, at, false);
  });
}

constexpr LmcnGdsPlugin kPlugin{
    LMCN_GDS_PLUGIN_ABI, LMCN_BUILD_VERSION, LMCN_KVIKIO_VERSION, make, destroy, register_memory, open, close, state, read, write};

}  // namespace

extern "C" __attribute__((visibility("default"))) const LmcnGdsPlugin* lmcn_gds_plugin(void) {
  return &kPlugin;
}
