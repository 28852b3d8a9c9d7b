# Flags that every target of this project gets, and the three functions that make a target.

add_library(distill_flags INTERFACE)
set(host_flags -Wall -Wextra -Wshadow -Wnon-virtual-dtor -Woverloaded-virtual)
if(DISTILL_WERROR)
  list(APPEND host_flags -Werror)
  target_compile_options(distill_flags INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
endif()
# Floating-point contraction may differ between two copies of one template; bit-identity is a promise, so it is off
# except where a file asks for fused multiply-adds by name (Highway MulAdd, oneDNN). On a GPU there is one copy.
list(APPEND host_flags -ffp-contract=off)
list(JOIN host_flags "," joined_host_flags)
target_compile_options(distill_flags INTERFACE "$<$<COMPILE_LANGUAGE:C,CXX>:${host_flags}>"
                       $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=${joined_host_flags}>)
if(DISTILL_SANITIZE)
  target_compile_options(distill_flags INTERFACE -fsanitize=${DISTILL_SANITIZE} -fno-omit-frame-pointer
                         -fno-sanitize-recover=all)
  if(DISTILL_SANITIZE MATCHES undefined)  # what AddressSanitizer sees as well, and what takes longest to compile
    target_compile_options(distill_flags INTERFACE -fno-sanitize=null,vptr,object-size
                           $<$<CXX_COMPILER_ID:GNU>:-fno-sanitize=alignment,pointer-overflow>)
  endif()
  target_link_options(distill_flags INTERFACE -fsanitize=${DISTILL_SANITIZE})
  target_compile_definitions(distill_flags INTERFACE "DISTILL_SKIPPED_TARGETS=HWY_AVX3")
  # Instrumented code makes gcc 12 see uninitialised values in std::regex, which Catch uses.
  target_compile_options(distill_flags INTERFACE $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)
endif()
# What every executable links besides: nothing, except under AddressSanitizer (keep_loaded.c says why).
add_library(distill_executable INTERFACE)
if(DISTILL_SANITIZE MATCHES address)
  add_library(distill_keep_loaded OBJECT ${PROJECT_SOURCE_DIR}/test/support/keep_loaded.c)
  target_sources(distill_executable INTERFACE $<TARGET_OBJECTS:distill_keep_loaded>)
  target_link_options(distill_executable INTERFACE -Wl,--export-dynamic-symbol=dlclose)
endif()
target_include_directories(distill_flags INTERFACE ${PROJECT_SOURCE_DIR})

# Headers that most files include, compiled once for tests and, under sanitizers, for libraries: a quarter off a build from
# scratch. Off by default, because ccache does better without.
option(DISTILL_PCH "Precompile headers" OFF)
if(DISTILL_PCH)
  set(CMAKE_PCH_WARN_INVALID OFF)  # a file with flags of its own does without
  file(WRITE ${PROJECT_BINARY_DIR}/pch.cpp "")
  set(std_headers <algorithm> <array> <chrono> <cmath> <cstdint> <cstring> <filesystem> <fstream> <functional> <limits> <map>
      <memory> <mutex> <numeric> <optional> <set> <span> <sstream> <stdexcept> <string> <string_view> <thread> <tuple> <utility>
      <variant> <vector>)
endif()
if(DISTILL_PCH AND DISTILL_SANITIZE)
  # gcc 12 forgets that precompiled headers are the system's, and its optimiser warns of what it misunderstands there:
  # hence not where warnings count.
  target_compile_options(distill_flags INTERFACE
    "$<$<COMPILE_LANG_AND_ID:CXX,GNU>:-Wno-array-bounds;-Wno-restrict;-Wno-stringop-overflow;-Wno-stringop-overread>")
  add_library(distill_library_pch OBJECT ${PROJECT_BINARY_DIR}/pch.cpp)
  target_link_libraries(distill_library_pch PRIVATE distill_flags)
  target_precompile_headers(distill_library_pch PRIVATE ${std_headers})
endif()

# distill_library(core SOURCES a.cpp b.cpp DEPENDS distill_core PRIVATE dnnl)
# One static library per folder. DEPENDS is what its headers show, PRIVATE what only its sources see. Every header must
# compile alone: x.cpp shows it for x.h, which it includes first (tools/layering.cmake), and the target
# <name>_verify_interface_header_sets for those without a source, but for what EXCLUDE matches.
function(distill_library name)
  cmake_parse_arguments(arg "" "EXCLUDE" "SOURCES;DEPENDS;PRIVATE" ${ARGN})
  set(target distill_${name})
  file(GLOB_RECURSE headers CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/*.h)
  if(arg_EXCLUDE)
    list(FILTER headers EXCLUDE REGEX ${arg_EXCLUDE})
  endif()
  foreach(header ${headers})
    string(REGEX REPLACE "h$" "cpp" source ${header})
    if(EXISTS ${source})
      list(REMOVE_ITEM headers ${header})
    endif()
  endforeach()
  add_library(${target} STATIC ${arg_SOURCES})
  target_sources(${target} PUBLIC FILE_SET HEADERS BASE_DIRS ${PROJECT_SOURCE_DIR} FILES ${headers})
  set_target_properties(${target} PROPERTIES VERIFY_INTERFACE_HEADER_SETS ON LINKER_LANGUAGE CXX)
  target_link_libraries(${target} PUBLIC distill_flags ${arg_DEPENDS} PRIVATE ${arg_PRIVATE})
  if(TARGET distill_library_pch)
    target_precompile_headers(${target} REUSE_FROM distill_library_pch)
  endif()
endfunction()

# distill_test(tokenizer_test LINKS distill_io [SOURCES …] [RANKS 2] [LABELS slow])
# One executable and one CTest entry per test file. With RANKS it runs under mpirun with that many ranks, and the test
# fails unless that many ranks really started (test/support/mpi_main.cpp). Called again with other RANKS it adds an entry;
# a last call without RANKS adds the run without mpirun. LAUNCHER: a command that starts the test.
function(distill_test name)
  cmake_parse_arguments(arg "" "RANKS;TIMEOUT;VARIANT" "SOURCES;LINKS;LABELS;ENVIRONMENT;ARGS;LAUNCHER" ${ARGN})
  if(NOT TARGET ${name})
    if(NOT arg_SOURCES)
      set(arg_SOURCES ${name}.cpp)
    endif()
    add_executable(${name} ${arg_SOURCES})
    if(arg_RANKS)
      target_link_libraries(${name} PRIVATE distill_executable distill_mpi_test_main ${arg_LINKS})
    else()
      target_link_libraries(${name} PRIVATE distill_executable distill_test_main ${arg_LINKS})
    endif()
    target_compile_options(${name} PRIVATE ${DISTILL_TEST_OPTIMISATION})
    if(TARGET distill_test_pch)
      target_precompile_headers(${name} REUSE_FROM distill_test_pch)
    endif()
    target_compile_definitions(${name} PRIVATE DISTILL_SOURCE_DIR="${PROJECT_SOURCE_DIR}"
                               DISTILL_BINARY_DIR="${PROJECT_BINARY_DIR}")
  endif()
  get_filename_component(folder ${CMAKE_CURRENT_SOURCE_DIR} NAME)
  set(environment OMP_NUM_THREADS=1 GOMP_SPINCOUNT=1000 ${arg_ENVIRONMENT}
      TSAN_OPTIONS=suppressions=${PROJECT_SOURCE_DIR}/test/support/tsan.supp
      LSAN_OPTIONS=suppressions=${PROJECT_SOURCE_DIR}/test/support/lsan.supp:print_suppressions=0)
  if(arg_RANKS)
    set(test_name ${folder}.${name}.ranks${arg_RANKS})
    add_test(NAME ${test_name} COMMAND ${MPIEXEC_EXECUTABLE} -np ${arg_RANKS} --oversubscribe --bind-to none
             $<TARGET_FILE:${name}> ${arg_ARGS})
    list(APPEND environment OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_mpi_yield_when_idle=1
         DISTILL_EXPECT_RANKS=${arg_RANKS})
    set_tests_properties(${test_name} PROPERTIES PROCESSORS ${arg_RANKS})
  else()
    set(test_name ${folder}.${name})
    if(arg_VARIANT)
      string(APPEND test_name .${arg_VARIANT})
    endif()
    add_test(NAME ${test_name} COMMAND ${arg_LAUNCHER} $<TARGET_FILE:${name}> ${arg_ARGS})
  endif()
  if("tsan" IN_LIST arg_LABELS)
    set_property(GLOBAL APPEND PROPERTY DISTILL_TSAN_TESTS ${name})
  endif()
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 300)
  endif()
  set_tests_properties(${test_name} PROPERTIES ENVIRONMENT "${environment}" LABELS "${folder};${arg_LABELS}"
                       TIMEOUT ${arg_TIMEOUT})
endfunction()
