/* What liblmcn_gds.so (gds/) exports: one function that returns one table. Plain C, so that nothing of C++ (exceptions, type
 * information, the layout of std::string) crosses between libraries. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { LMCN_GDS_PLUGIN_ABI = 2 };

typedef struct LmcnGdsReader LmcnGdsReader;

typedef struct LmcnGdsOptions {
  uint32_t threads;      /* reads at once */
  uint32_t allow_compat; /* 0: real GPUDirect Storage or nothing */
} LmcnGdsOptions;

typedef struct LmcnGdsState {
  uint32_t compat;  /* 1: kvikio or cuFile copies through host memory */
  char reason[256]; /* how that is known, or what is missing */
} LmcnGdsState;

/* Where an error text goes: NUL-terminated, cut to `bytes`. */
typedef struct LmcnGdsError {
  char* text;
  size_t bytes;
} LmcnGdsError;

/* What read() and write() return. */
enum {
  LMCN_GDS_OK = 0,
  LMCN_GDS_FAILED = 1, /* and nothing of it moves any more */
  LMCN_GDS_LOST = 2    /* failed, and `memory` may still be written (read) by the device: cuFile says of no error that it is not */
};

/* Functions return 0, or non-zero with the error's text. All but make() and destroy() may be called on several threads at once. */
typedef struct LmcnGdsPlugin {
  uint32_t abi;        /* LMCN_GDS_PLUGIN_ABI */
  const char* version; /* of lmcache-native */
  const char* kvikio;  /* that it was built for */
  int (*make)(const LmcnGdsOptions* options, LmcnGdsReader** reader, LmcnGdsError error);
  /* REQUIRES: no call under way, every file closed. Memory that is registered is deregistered. */
  void (*destroy)(LmcnGdsReader* reader);
  /* Device memory from one cudaMalloc, whole; not in compatibility mode. Once. */
  int (*register_memory)(LmcnGdsReader* reader, void* base, uint64_t bytes, LmcnGdsError error);
  /* The file that descriptor `fd` of this process is open on; `fd` may be closed afterwards. */
  int (*open)(LmcnGdsReader* reader, int fd, int writable, uint32_t* file, LmcnGdsError error);
  void (*close)(LmcnGdsReader* reader, uint32_t file);
  /* Of an open file. */
  int (*state)(LmcnGdsReader* reader, uint32_t file, LmcnGdsState* state, LmcnGdsError error);
  /* All of `bytes` or an error; waits. `memory`: of a device (its primary context current on this thread) or of the host. */
  int (*read)(LmcnGdsReader* reader, uint32_t file, uint64_t offset, void* memory, uint64_t bytes, LmcnGdsError error);
  int (*write)(LmcnGdsReader* reader, uint32_t file, uint64_t offset, const void* memory, uint64_t bytes, LmcnGdsError error);
} LmcnGdsPlugin;

/* const LmcnGdsPlugin* lmcn_gds_plugin(void); */
#define LMCN_GDS_PLUGIN_SYMBOL "lmcn_gds_plugin"

#ifdef __cplusplus
}
#endif
