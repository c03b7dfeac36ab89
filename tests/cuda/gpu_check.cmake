# gpu_check on a real device, and the same program on the fake runtime, where its figures mean nothing: that shows that it runs.
set(gpu_check_sources gpu_check.cpp gpu_check_load.cpp gpu_check_verify.cpp)
add_executable(gpu_check ${gpu_check_sources} "${suite}/copier_suite.cpp")
target_include_directories(gpu_check PRIVATE "${suite}" "${PROJECT_SOURCE_DIR}/cuda")
target_link_libraries(gpu_check PRIVATE lmcn_copy lmcn_cuda lmcn_flags)
add_executable(gpu_check_on_cpu ${gpu_check_sources})
target_compile_definitions(gpu_check_on_cpu PRIVATE LMCN_FAKE_CUDART)
target_link_libraries(gpu_check_on_cpu PRIVATE copier_on_fake_cudart kernels_on_cpu)

set(cache "XDG_CACHE_HOME=${CMAKE_CURRENT_BINARY_DIR}/cache")  # of calibrations: this build's own
foreach(part bytes order plans reuse verify)
  add_test(NAME gpu_check_on_cpu_${part} COMMAND gpu_check_on_cpu ${part} --small)
  set_tests_properties(gpu_check_on_cpu_${part} PROPERTIES LABELS unit TIMEOUT 300 ENVIRONMENT "${cache}")
  add_test(NAME gpu_check_${part} COMMAND gpu_check ${part})
  set_tests_properties(gpu_check_${part} PROPERTIES LABELS gpu SKIP_RETURN_CODE 77 TIMEOUT 240 RUN_SERIAL TRUE
                                                        ENVIRONMENT "${cache}")
endforeach()

# memcheck: no access outside an allocation. racecheck: no hazard in shared memory.
find_program(LMCN_COMPUTE_SANITIZER compute-sanitizer HINTS "${LMCN_CUDA_ROOT}/bin" "${LMCN_CUDA_ROOT}/compute-sanitizer")
if(LMCN_COMPUTE_SANITIZER)
  foreach(tool memcheck racecheck)
    foreach(part bytes order plans verify)
      add_test(NAME gpu_check_${part}_${tool} COMMAND "${LMCN_COMPUTE_SANITIZER}" --tool ${tool} --error-exitcode 1
                                                      $<TARGET_FILE:gpu_check> ${part} --small)
      set_tests_properties(gpu_check_${part}_${tool} PROPERTIES LABELS gpu SKIP_RETURN_CODE 77 TIMEOUT 120 RUN_SERIAL TRUE
                                                                      ENVIRONMENT "${cache}")
    endforeach()
  endforeach()
endif()

# The copier for Python that has torch, but not our package.
add_library(copier_c SHARED copier_c.cpp)
target_include_directories(copier_c PRIVATE "${PROJECT_SOURCE_DIR}/cuda")
target_link_libraries(copier_c PRIVATE lmcn_copy lmcn_cuda lmcn_flags)
target_link_options(copier_c PRIVATE -Wl,--exclude-libs,ALL)
add_library(copier_c_on_cpu SHARED copier_c.cpp)
target_compile_definitions(copier_c_on_cpu PRIVATE LMCN_FAKE_CUDART)
target_link_libraries(copier_c_on_cpu PRIVATE copier_on_fake_cudart kernels_on_cpu)
