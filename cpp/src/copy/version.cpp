#include "lmcn/version.hpp"

#include <openssl/opensslv.h>
#include <xxhash.h>

#include "memory/slot_image.hpp"

// LMCN_BUILD_*: compile definitions of this file (cpp/CMakeLists.txt).
namespace lmcn {

BuildInfo build_info() {
  BuildInfo info;
  info.version = LMCN_BUILD_VERSION;
  info.compiler = LMCN_BUILD_COMPILER;
  info.build_type = LMCN_BUILD_TYPE;
  info.cuda_choice = LMCN_BUILD_CUDA_CHOICE;
  info.cuda = LMCN_WITH_CUDA;
  info.cuda_toolkit = LMCN_BUILD_CUDA_TOOLKIT;
  info.cuda_archs = LMCN_BUILD_CUDA_ARCHS;
  info.liburing = LMCN_BUILD_LIBURING;
  info.xxhash =
      std::to_string(XXH_VERSION_MAJOR) + "." + std::to_string(XXH_VERSION_MINOR) + "." + std::to_string(XXH_VERSION_RELEASE);
  info.openssl = OPENSSL_VERSION_STR;
  info.format_version = static_cast<int>(kFormatVersion);
  return info;
}

}  // namespace lmcn
