# Fails when a folder includes what it may not see: cmake -DROOT=<source folder> -P tools/layering.cmake
#   core includes core; kernels, parallel and io include core and themselves; apps includes all of them.
# Also: no raw kernel launch, no backend #if in shared code.

set(core_may core)
set(kernels_may core kernels)
set(parallel_may core parallel)
set(io_may core io)
set(apps_may core kernels parallel io apps)
# Third-party headers, where they may be seen.
set(only_in_kernels "dnnl|omp\\.h|hwy/|cuda|cublas|cudnn")
set(only_in_parallel "mpi\\.h|nccl")
set(only_in_apps "CLI/|spdlog|fmt/")
set(only_in_io "yaml-cpp|hdf5|pcre2|utf8proc|nlohmann")

set(complaints "")
foreach(folder core kernels parallel io apps)
  file(GLOB_RECURSE files RELATIVE ${ROOT} ${ROOT}/${folder}/*.h ${ROOT}/${folder}/*.cpp ${ROOT}/${folder}/*.inc ${ROOT}/${folder}/*.cu
       ${ROOT}/${folder}/*.cuh)
  foreach(file ${files})
    file(STRINGS ${ROOT}/${file} includes REGEX "^#[ ]*include")
    foreach(line ${includes})
      if(line MATCHES "\"([a-z_]+)/" AND NOT CMAKE_MATCH_1 STREQUAL "hwy")
        list(FIND ${folder}_may ${CMAKE_MATCH_1} allowed)
        # The one file that knows both halves of the device language.
        if(allowed EQUAL -1 AND NOT "${file} ${CMAKE_MATCH_1}" STREQUAL "kernels/cuda/language.h virtual_gpu")
          list(APPEND complaints "${file}: ${line} (${folder} may include: ${${folder}_may})")
        endif()
      endif()
      foreach(owner kernels parallel io apps)
        # NCCL groups and the channel between GPUs order themselves by streams and events of the runtime.
        if(NOT folder STREQUAL owner AND line MATCHES "[<\"](${only_in_${owner}})"
           AND NOT "${folder} ${line}" STREQUAL "parallel #include <cuda_runtime_api.h>")
          list(APPEND complaints "${file}: ${line} (belongs in ${owner})")
        endif()
      endforeach()
    endforeach()
    file(STRINGS ${ROOT}/${file} launches REGEX "<<<")
    if(launches)
      list(APPEND complaints "${file}: raw kernel launch: ${launches}")
    endif()
    if(NOT folder MATCHES "kernels|parallel")
      file(STRINGS ${ROOT}/${file} switches REGEX "^#[ ]*if.*(CUDA|NCCL|MPI)")
      if(switches AND NOT file STREQUAL "core/number.h")  # DISTILL_HD is defined there, once for all
        list(APPEND complaints "${file}: backend switch in shared code: ${switches}")
      endif()
    endif()
  endforeach()
endforeach()

if(complaints)
  list(JOIN complaints "\n  " text)
  message(FATAL_ERROR "layering:\n  ${text}")
endif()
message(STATUS "layering: every include points the right way")
