# LMCN_CUDA=AUTO|ON|OFF -> LMCN_WITH_CUDA, LMCN_CUDA_VERSION, LMCN_CUDA_ARCHS and, with CUDA, the targets lmcn_cudart (headers and
# the static runtime) and lmcn_cuda (cuda/*.cpp, cuda/*.cu).
#
# The runtime is linked statically and opens libcuda itself when a call needs it: a binary of ours must name neither libcudart nor
# libcuda (a machine without a driver must load it). So never link CUDA::cuda_driver; driver calls go through cudaGetDriverEntryPoint.
#
# The toolkit is, in this order: CUDACXX, CUDA_HOME or CUDA_PATH, nvcc on the PATH, the wheels of requirements-cuda-build.txt
# (the newest site-packages/nvidia/cu* of Python_EXECUTABLE, else of python3). FindCUDAToolkit is not used: it wants a libcudart.so,
# which the wheels have not, and fails where cccl is absent.
#
# 12.8 is the oldest: sm_100 and sm_120, and cudaMemcpyBatchAsync, begin there. What a newer device needs is in the PTX.

set(LMCN_WITH_CUDA OFF)
set(LMCN_CUDA_VERSION "")
set(LMCN_CUDA_OLDEST 12.8)
set(LMCN_CUDA_ARCHS "80-real;90-real;100-real;120-real;120-virtual" CACHE STRING "what the kernels are compiled for, as CMAKE_CUDA_ARCHITECTURES")
option(LMCN_CUDA_RESOURCES "keep what ptxas says of each kernel beside its object (*.ptxas), one architecture after another" OFF)

# The nvcc program and the toolkit's root; NOTFOUND without.
function(lmcn_find_nvcc)
  set(nvcc "")
  if(DEFINED ENV{CUDACXX})
    find_program(nvcc_cudacxx NAMES "$ENV{CUDACXX}" NO_CACHE)
    set(nvcc "${nvcc_cudacxx}")
  else()
    find_program(nvcc_home NAMES nvcc PATHS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin NO_DEFAULT_PATH NO_CACHE)
    find_program(nvcc_path NAMES nvcc NO_CACHE)
    if(nvcc_home)
      set(nvcc "${nvcc_home}")
    elseif(nvcc_path)
      set(nvcc "${nvcc_path}")
    else()
      if(Python_EXECUTABLE)
        set(python "${Python_EXECUTABLE}")
      else()
        find_program(python NAMES python3 python NO_CACHE)  # searches only where the variable is not set, not even to nothing
      endif()
      if(python)
        execute_process(COMMAND "${python}" -c "
import importlib.util, pathlib
spec = importlib.util.find_spec('nvidia')
places = [pathlib.Path(place) for place in (spec.submodule_search_locations if spec else [])]
found = [nvcc for place in places for nvcc in place.glob('cu[0-9]*/bin/nvcc')]
print(max(found, key=lambda nvcc: int(''.join(filter(str.isdigit, nvcc.parts[-3]))), default=''))
" OUTPUT_VARIABLE nvcc OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
      endif()
    endif()
  endif()
  set(root "NOTFOUND")
  if(nvcc)
    # nvcc may be a wrapper script; the real one says where it is at home.
    execute_process(COMMAND "${nvcc}" -v lmcn_where_is_top OUTPUT_VARIABLE said ERROR_VARIABLE said)
    if(said MATCHES "#\\$ TOP=([^\r\n]*)")
      get_filename_component(root "${CMAKE_MATCH_1}" ABSOLUTE)
    endif()
  endif()
  set(LMCN_NVCC "${nvcc}" PARENT_SCOPE)
  set(LMCN_CUDA_ROOT "${root}" PARENT_SCOPE)
endfunction()

set(LMCN_CUDA_LACKS "")
if(NOT LMCN_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "LMCN_CUDA is \"${LMCN_CUDA}\", must be AUTO, ON or OFF")
elseif(LMCN_CUDA STREQUAL "OFF")
  set(LMCN_CUDA_LACKS "as asked")
else()
  lmcn_find_nvcc()
  if(NOT LMCN_CUDA_ROOT)
    set(LMCN_CUDA_LACKS "no nvcc in CUDACXX, CUDA_HOME, CUDA_PATH, PATH or site-packages/nvidia/cu*")
  else()
    find_path(LMCN_INC_cudart NAMES cuda_runtime_api.h HINTS "${LMCN_CUDA_ROOT}/include" "${LMCN_CUDA_ROOT}/targets/x86_64-linux/include")
    find_library(LMCN_LIB_cudart_static NAMES libcudart_static.a
                 HINTS "${LMCN_CUDA_ROOT}/lib64" "${LMCN_CUDA_ROOT}/lib" "${LMCN_CUDA_ROOT}/targets/x86_64-linux/lib")
    execute_process(COMMAND "${LMCN_NVCC}" --version OUTPUT_VARIABLE said)
    if(said MATCHES " V([0-9]+\\.[0-9]+\\.[0-9]+)")
      set(LMCN_CUDA_VERSION "${CMAKE_MATCH_1}")
    endif()
    if(NOT LMCN_INC_cudart OR NOT LMCN_LIB_cudart_static)
      set(LMCN_CUDA_LACKS "${LMCN_CUDA_ROOT} has no cuda_runtime_api.h or no libcudart_static.a")
    elseif(LMCN_CUDA_VERSION VERSION_LESS LMCN_CUDA_OLDEST)
      set(LMCN_CUDA_LACKS "CUDA \"${LMCN_CUDA_VERSION}\" at ${LMCN_CUDA_ROOT} is older than ${LMCN_CUDA_OLDEST}")
    endif()
  endif()
endif()

if(LMCN_CUDA_LACKS)
  set(LMCN_CUDA_VERSION "")
  set(LMCN_CUDA_ARCHS "")
  if(LMCN_CUDA STREQUAL "ON")
    message(FATAL_ERROR "LMCN_CUDA=ON, but ${LMCN_CUDA_LACKS}.\nInstall a CUDA toolkit >= ${LMCN_CUDA_OLDEST} (set CUDA_HOME), or the wheels: "
                        "pip install -r requirements-cuda-build.txt (then build with --no-build-isolation).")
  endif()
  message(STATUS "CUDA: not built, CPU only (LMCN_CUDA=${LMCN_CUDA}: ${LMCN_CUDA_LACKS})")
  return()
endif()

set(LMCN_WITH_CUDA ON)
message(STATUS "CUDA: ${LMCN_CUDA_VERSION} at ${LMCN_CUDA_ROOT} (LMCN_CUDA=${LMCN_CUDA})")

add_library(lmcn_cudart_headers INTERFACE)
target_include_directories(lmcn_cudart_headers SYSTEM INTERFACE "${LMCN_INC_cudart}")
add_library(lmcn_cudart INTERFACE)
target_link_libraries(lmcn_cudart INTERFACE lmcn_cudart_headers "${LMCN_LIB_cudart_static}" Threads::Threads ${CMAKE_DL_LIBS} rt)

file(GLOB LMCN_CUDA_KERNELS CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/cuda/*.cu")
file(GLOB LMCN_CUDA_SOURCES CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/cuda/*.cpp")
if(LMCN_CUDA_KERNELS)
  set(CMAKE_CUDA_COMPILER "${LMCN_NVCC}")
  # The wheels have lib/, their nvcc.profile says lib64/: the link of CMake's compiler check must be told.
  set(ENV{NVCC_APPEND_FLAGS} "$ENV{NVCC_APPEND_FLAGS} -L${LMCN_CUDA_ROOT}/lib")
  set(CMAKE_CUDA_ARCHITECTURES "${LMCN_CUDA_ARCHS}")
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  enable_language(CUDA)
  # Set after the compiler's check, which CMake 3.25 fails otherwise: it does not know that nvcc >= 12 has C++20.
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  endif()
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
else()
  set(LMCN_CUDA_ARCHS "")
endif()

add_library(lmcn_cuda STATIC ${LMCN_CUDA_SOURCES} ${LMCN_CUDA_KERNELS})
# Warnings are errors here too, and a spilled register is one: tests/cuda/kernel_resources.py prints the rest.
set(lmcn_nvcc_flags -lineinfo -Xfatbin=-compress-all -Werror=all-warnings -Xptxas=--warn-on-spills
                    -Xcompiler=-Wall,-Wextra,-Werror)
if(LMCN_CUDA_RESOURCES)
  list(APPEND lmcn_nvcc_flags -Xptxas=-v)
  set_target_properties(lmcn_cuda PROPERTIES CUDA_COMPILER_LAUNCHER "${CMAKE_CURRENT_LIST_DIR}/keep_ptxas.sh")
else()
  list(APPEND lmcn_nvcc_flags --threads=0)
endif()
target_compile_options(lmcn_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${lmcn_nvcc_flags}>)
target_compile_definitions(lmcn_cuda PRIVATE LMCN_WITH_CUDA=1)
target_link_libraries(lmcn_cuda PUBLIC lmcn_copy lmcn_cudart PRIVATE lmcn_flags)
