# Each line alone in a file: tools/cuda_calls.cmake refuses the bad ones, by name, and takes the good ones.
# cmake -DSCRIPT=.../cuda_calls.cmake -DTREES=<a folder of our own> -P cuda_calls_catches.cmake

function(run line result message)
  file(REMOVE_RECURSE ${TREES})
  file(WRITE ${TREES}/kernels/cuda/example.cu "void f() {\n  int before@\n  ${line}@\n}\n")
  file(READ ${TREES}/kernels/cuda/example.cu text)
  string(REPLACE "@" ";" text "${text}")
  file(WRITE ${TREES}/kernels/cuda/example.cu "${text}")
  execute_process(COMMAND ${CMAKE_COMMAND} -DROOT=${TREES} -P ${SCRIPT} RESULT_VARIABLE code ERROR_VARIABLE text
                  OUTPUT_QUIET)
  set(${result} ${code} PARENT_SCOPE)
  set(${message} "${text}" PARENT_SCOPE)
endfunction()

foreach(line "cudaMemcpyAsync(to, from, n, kind, stream)" "if (x) cudaStreamSynchronize(stream)"
        "cuda_check(cudaSetDevice(0))@ cudaSetDevice(\n    1)" "cublasLtMatmul(a, b)" "ncclAllReduce(a, b)"
        "cuda_check(f(a), cudaEventQuery(b))" "cuda_check(cudaLaunchKernelEx(&config, kernel))" "kernel<<<1, 32>>>(x)"
        "kernel<<<grid, 32>>>(x)")
  run("${line}" code message)
  if(code EQUAL 0 OR NOT message MATCHES "example.cu: (nobody looks at|a launch)")
    message(SEND_ERROR "not refused: ${line}\n${message}")
  endif()
endforeach()
foreach(line "cuda_check(cudaMemcpyAsync(to, from, n, kind, stream))" "check_nccl(\n ncclGroupStart(), name)"
        "const cudaError_t e = cudaMalloc(&p, n)" "return cublasLtMatmul(a, b)"
        "if (cudaEventQuery(e) != cudaSuccess) g()" "cudaFree(p)" "static_cast<void>(cudaStreamSynchronize(s))"
        "// cudaDeviceSynchronize()" "fail(cudaGetErrorString(e))" "launch(kernel, grid, stream, x)")
  run("${line}" code message)
  if(NOT code EQUAL 0)
    message(SEND_ERROR "refused: ${line}\n${message}")
  endif()
endforeach()
