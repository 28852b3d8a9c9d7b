# Fails when a call of CUDA, cuBLASLt, cuDNN or NCCL has a result that nobody looks at, or when a kernel is launched
# other than by launch(): cmake -DROOT=<source folder> -P tools/cuda_calls.cmake
#
# A result is looked at when the call stands within a check (a function with "check" in its name), is returned,
# assigned or compared. Releasing may be left unchecked: nothing can be done about a failure. Anything else that is
# meant says so by static_cast<void>.

set(wrappers "([a-z_]*check[a-z_]*|static_cast<void>)[(]$")
set(uses "(=|return|if [(]|while [(]|!|&&|[|][|])$")
set(releases "(Destroy[A-Za-z]*|Free|FreeHost|FreeAsync|Abort|CloseMemHandle|cudaGetLastError)$")
set(no_result "(GetErrorName|GetErrorString|GetStatusString|GetLastErrorString|cublasLtGetVersion|cudnnGetVersion|ncclGetLastError)$")

set(complaints "")
file(GLOB files RELATIVE ${ROOT} ${ROOT}/kernels/cuda/*.h ${ROOT}/kernels/cuda/*.cpp ${ROOT}/kernels/cuda/*.cu
     ${ROOT}/kernels/cuda/*.cuh ${ROOT}/parallel/*.h ${ROOT}/parallel/*.cpp)
foreach(file ${files})
  file(READ ${ROOT}/${file} text)
  # What lists of CMake cannot hold, comments, and the white space between tokens.
  string(REGEX REPLACE "//[^\n]*" "" text "${text}")
  string(REGEX REPLACE "[][;\\]" "@" text "${text}")
  string(REGEX REPLACE "[ \n\t]+" " " text "${text}")
  string(FIND "${text}" "<<<" launch)
  if(NOT launch EQUAL -1)
    list(APPEND complaints "${file}: a launch in angle brackets")
  endif()
  if(text MATCHES "cudaLaunch[A-Z]" AND NOT file STREQUAL "kernels/cuda/language.h")
    list(APPEND complaints "${file}: a launch without launch() of language.h")
  endif()
  # A list of what lies before each call: the text since the call before it, which begins with that one's name.
  string(REGEX REPLACE "(^|[^A-Za-z0-9_\"])((cuda|cublasLt|cudnn|nccl)[A-Z][A-Za-z0-9]*)[(]" "\\1;\\2@(" parts "${text}")
  set(before "")
  foreach(part IN LISTS parts)
    if(part MATCHES "^((cuda|cublasLt|cudnn|nccl)[A-Z][A-Za-z0-9]*)@[(]")
      set(call ${CMAKE_MATCH_1})
      string(STRIP "${before}" before)
      if(NOT before MATCHES "${wrappers}" AND NOT before MATCHES "${uses}" AND NOT call MATCHES "${releases}"
         AND NOT call MATCHES "${no_result}")
        list(APPEND complaints "${file}: nobody looks at the result of ${call}")
      endif()
    endif()
    set(before "${part}")
  endforeach()
endforeach()

if(complaints)
  list(JOIN complaints "\n  " text)
  message(FATAL_ERROR "cuda_calls:\n  ${text}")
endif()
message(STATUS "cuda_calls: every result is looked at")
