// Version and build facts.
#pragma once

#include <string>

namespace lmcn {

struct BuildInfo {
  std::string version;                    // "0.1.0"
  std::string compiler;                   // "GNU 12.2.0"
  std::string build_type;                 // "Release"
  std::string cuda_choice;                // "AUTO" | "ON" | "OFF": what LMCN_CUDA asked for
  bool cuda = false;                      // what the build chose
  std::string cuda_toolkit;               // "13.0.88", empty without CUDA
  std::string cuda_archs;                 // of the kernels; empty while there are none
  std::string liburing, xxhash, openssl;  // versions linked statically
  int format_version = 0;                 // of slot images and the region log
};

BuildInfo build_info();

struct CudaStatus {
  bool built = false;
  int devices = 0;
  int error = 0;  // cudaError_t of the probe; 35 = no driver
  std::string message;
};
CudaStatus cuda_status();

}  // namespace lmcn
