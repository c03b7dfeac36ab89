# LMCN_GDS=AUTO|ON|OFF -> LMCN_WITH_GDS and, with it, the targets lmcn_kvikio (headers, libkvikio.so) and lmcn_gds (liblmcn_gds.so, gds/).
#
# Everything comes from wheels (requirements-gds-build.txt): libkvikio, rapids_logger, and headers of CUDA and cuFile in
# site-packages/nvidia/cu13, of LMCN_GDS_PYTHON, else Python_EXECUTABLE, else python3. kvikio's own CMake package is not used: it needs
# CMake 4, a whole CUDA toolkit and a development link to libcufile, of which the wheels have none. What decides the ABI is read from
# its files, though: the definitions that its headers were compiled with.
#
# The plugin names libkvikio.so as needed and has no run path: Python's libkvikio.load_library() loads it (with what it needs) first.

set(LMCN_WITH_GDS OFF)
set(LMCN_GDS_LACKS "")
set(LMCN_KVIKIO_SERIES 26.10)  # libkvikio promises no ABI beyond it: its SONAME has no version
if(NOT LMCN_GDS MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "LMCN_GDS is \"${LMCN_GDS}\", must be AUTO, ON or OFF")
elseif(LMCN_GDS STREQUAL "OFF")
  set(LMCN_GDS_LACKS "as asked")
else()
  if(LMCN_GDS_PYTHON)
    set(python "${LMCN_GDS_PYTHON}")
  elseif(Python_EXECUTABLE)
    set(python "${Python_EXECUTABLE}")
  else()
    find_program(python NAMES python3 python NO_CACHE)  # searches only where the variable is not set, not even to nothing
  endif()
  set(found "")
  if(python)
    # Each on a line of its own, empty where there is none: nothing of the packages runs.
    execute_process(COMMAND "${python}" -c "
import importlib.util, pathlib
def folder(name, *marks):
    spec = importlib.util.find_spec(name)
    for place in (spec.submodule_search_locations if spec else []):
        path = pathlib.Path(place)
        if all((path / mark).exists() for mark in marks):
            return path
    return ''
kvikio = folder('libkvikio', 'include/kvikio/file_handle.hpp', 'lib64/libkvikio.so')
print(kvikio, (kvikio / 'VERSION').read_text().strip() if kvikio else '', sep='\\n')
print(folder('rapids_logger', 'include', 'lib64/librapids_logger.so'))
print(folder('nvidia', 'cu13/include/cuda.h', 'cu13/include/cufile.h'))
" OUTPUT_VARIABLE found ERROR_QUIET)
  endif()
  string(REGEX REPLACE "\n$" "" found "${found}")
  string(REPLACE "\n" ";" found "${found};;;;")
  list(GET found 0 LMCN_KVIKIO_ROOT)
  list(GET found 1 LMCN_KVIKIO_VERSION)
  list(GET found 2 LMCN_RAPIDS_LOGGER_ROOT)
  list(GET found 3 LMCN_GDS_NVIDIA)
  string(REGEX REPLACE "^([0-9]+\\.[0-9]+).*" "\\1" series "${LMCN_KVIKIO_VERSION}")
  if(NOT LMCN_KVIKIO_ROOT)
    set(LMCN_GDS_LACKS "no libkvikio in the packages of ${python}")
  elseif(NOT series STREQUAL LMCN_KVIKIO_SERIES)
    set(LMCN_GDS_LACKS "libkvikio is ${LMCN_KVIKIO_VERSION}, must be ${LMCN_KVIKIO_SERIES}")
  elseif(NOT LMCN_RAPIDS_LOGGER_ROOT)
    set(LMCN_GDS_LACKS "no rapids_logger in the packages of ${python}")
  elseif(NOT LMCN_GDS_NVIDIA)
    set(LMCN_GDS_LACKS "no cuda.h beside cufile.h in site-packages/nvidia/cu13/include of ${python}")
  endif()
endif()

# The compile definitions that a targets file of kvikio's package gives to those who link to it.
function(lmcn_kvikio_definitions file out)
  set(${out} "NOTFOUND" PARENT_SCOPE)
  if(EXISTS "${file}")
    file(READ "${file}" text)
    if(text MATCHES "INTERFACE_COMPILE_DEFINITIONS \"([^\"]*)\"")
      string(REPLACE "\\$" "$" definitions "${CMAKE_MATCH_1}")
      set(${out} "${definitions}" PARENT_SCOPE)
    endif()
  endif()
endfunction()
if(NOT LMCN_GDS_LACKS)
  set(package "${LMCN_KVIKIO_ROOT}/lib64/cmake")
  lmcn_kvikio_definitions("${package}/kvikio/kvikio-targets.cmake" LMCN_KVIKIO_DEFINITIONS)
  lmcn_kvikio_definitions("${package}/bs_thread_pool/bs_thread_pool-targets.cmake" LMCN_THREAD_POOL_DEFINITIONS)
  if(NOT LMCN_KVIKIO_DEFINITIONS OR NOT LMCN_THREAD_POOL_DEFINITIONS)
    set(LMCN_GDS_LACKS "no compile definitions in ${package}: it is not the package of libkvikio ${LMCN_KVIKIO_SERIES}")
  endif()
endif()

if(LMCN_GDS_LACKS)
  if(LMCN_GDS STREQUAL "ON")
    message(FATAL_ERROR "LMCN_GDS=ON, but ${LMCN_GDS_LACKS}.\npip install -r requirements-gds-build.txt "
                        "(then build with --no-build-isolation).")
  endif()
  message(STATUS "GPUDirect Storage: not built (LMCN_GDS=${LMCN_GDS}: ${LMCN_GDS_LACKS})")
  return()
endif()

set(LMCN_WITH_GDS ON)
message(STATUS "GPUDirect Storage: libkvikio ${LMCN_KVIKIO_VERSION} at ${LMCN_KVIKIO_ROOT} (LMCN_GDS=${LMCN_GDS})")
add_library(lmcn_kvikio INTERFACE)
target_include_directories(lmcn_kvikio SYSTEM INTERFACE "${LMCN_KVIKIO_ROOT}/include" "${LMCN_RAPIDS_LOGGER_ROOT}/include"
                                                        "${LMCN_GDS_NVIDIA}/cu13/include")
target_compile_definitions(lmcn_kvikio INTERFACE ${LMCN_KVIKIO_DEFINITIONS} ${LMCN_THREAD_POOL_DEFINITIONS})
target_link_libraries(lmcn_kvikio INTERFACE "${LMCN_KVIKIO_ROOT}/lib64/libkvikio.so" Threads::Threads ${CMAKE_DL_LIBS})
