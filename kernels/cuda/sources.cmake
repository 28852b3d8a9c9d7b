# The files of the CUDA backend, for nvcc and for the virtual GPU.
set(distill_cuda_sources "")
foreach(file attention.cpp attention_bf16.cu attention_f16.cu attention_f32.cu attention_f64.cu cuda_device.cpp
        cuda_memory.cpp elementwise.cu gemm.cpp gpus.cpp loss.cpp loss_bf16.cu loss_f16.cu loss_f32.cu loss_f64.cu reductions.cu
        sequence_packing.cu)
  list(APPEND distill_cuda_sources ${CMAKE_CURRENT_LIST_DIR}/${file})
endforeach()
# Newer GPUs get PTX.
set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/gpus.cpp PROPERTIES
                            COMPILE_DEFINITIONS DISTILL_MACHINE_CODE_UP_TO=${DISTILL_MACHINE_CODE_UP_TO})
