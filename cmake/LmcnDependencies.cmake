# Static third-party libraries, so that the wheel bundles no .so: liburing, xxHash (header only), libcrypto (low-level SHA256_*:
# 35 KB in a shared object; the EVP ones would pull in the providers, 3.8 MB).
function(lmcn_static_library target archive header hint)
  find_library(LMCN_LIB_${target} NAMES ${archive})
  find_path(LMCN_INC_${target} NAMES ${header})
  if(NOT LMCN_LIB_${target} OR NOT LMCN_INC_${target})
    message(FATAL_ERROR "lmcache-native needs ${archive} and <${header}>: ${hint}")
  endif()
  add_library(lmcn::${target} UNKNOWN IMPORTED GLOBAL)
  set_target_properties(lmcn::${target} PROPERTIES IMPORTED_LOCATION "${LMCN_LIB_${target}}"
                                                   INTERFACE_INCLUDE_DIRECTORIES "${LMCN_INC_${target}}")
endfunction()

if(NOT LMCN_GPU_ONLY)
  lmcn_static_library(liburing liburing.a liburing.h "apt-get install liburing-dev")
  lmcn_static_library(crypto libcrypto.a openssl/sha.h "apt-get install libssl-dev")
endif()

find_path(LMCN_INC_xxhash NAMES xxhash.h)
if(NOT LMCN_INC_xxhash)
  message(STATUS "xxHash: no <xxhash.h> in the system, the copy in third_party is used")
  set(LMCN_INC_xxhash "${CMAKE_CURRENT_SOURCE_DIR}/third_party/xxhash")
endif()
add_library(lmcn_xxhash INTERFACE)
target_include_directories(lmcn_xxhash SYSTEM INTERFACE "${LMCN_INC_xxhash}")
target_compile_definitions(lmcn_xxhash INTERFACE XXH_INLINE_ALL)
add_library(lmcn::xxhash ALIAS lmcn_xxhash)
