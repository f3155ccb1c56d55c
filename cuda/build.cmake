# INLAY_CUDA = on: every architecture of INLAY_CUDA_ARCHS. auto: the GPU that is here, or nothing. off: nothing.
# The CUDA runtime is linked statically and no driver is: the module imports on a machine without a GPU.
include(cuda/sources.cmake)

# 90a code runs on sm_90 only, so newer GPUs need the PTX; sm_80 PTX is compiled by the driver for any of them.
set(INLAY_CUDA_ARCHS "80-real;86-real;89-real;90a-real;80-virtual" CACHE STRING "CUDA architectures, as CMake names them")

# The architecture of the first GPU, as CMake names it ("90a-real"); empty without nvcc, without a GPU, and for one older
# than sm_80, which lacks cp.async and bf16 in its tensor cores.
function(inlay_present_gpu result)
  set(${result} "" PARENT_SCOPE)
  find_program(INLAY_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  find_program(INLAY_NVIDIA_SMI nvidia-smi)
  if(NOT INLAY_NVCC OR NOT INLAY_NVIDIA_SMI)
    return()
  endif()
  execute_process(COMMAND ${INLAY_NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader OUTPUT_VARIABLE capability
                  ERROR_QUIET TIMEOUT 20)
  if(capability MATCHES "^([0-9]+)\\.([0-9])")
    if(CMAKE_MATCH_1 LESS 8)
      message(STATUS "inlay: wanted a GPU of compute capability 8.0 or newer, got ${CMAKE_MATCH_1}.${CMAKE_MATCH_2}; plain torch runs there")
      return()
    endif()
    set(arch "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
    string(REPLACE "90" "90a" arch "${arch}")
    set(${result} "${arch}-real" PARENT_SCOPE)
  endif()
endfunction()

string(TOLOWER "${INLAY_CUDA}" inlay_cuda)
if(inlay_cuda STREQUAL "auto")
  inlay_present_gpu(inlay_archs)
elseif(inlay_cuda MATCHES "^(on|1|true|yes)$")
  set(inlay_archs "${INLAY_CUDA_ARCHS}")
elseif(inlay_cuda MATCHES "^(off|0|false|no)$")
  set(inlay_archs "")
else()
  message(FATAL_ERROR "INLAY_CUDA: wanted auto, on or off, got '${INLAY_CUDA}'")
endif()

if(NOT inlay_archs)
  message(STATUS "inlay: CPU kernels only (INLAY_CUDA=${INLAY_CUDA})")
  return()
endif()

find_program(INLAY_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
if(NOT INLAY_NVCC)
  message(FATAL_ERROR "INLAY_CUDA=${INLAY_CUDA}: wanted nvcc, found none on PATH, in CUDA_HOME or /usr/local/cuda; "
                      "install the CUDA toolkit (12.4 or newer), or build with INLAY_CUDA=off")
endif()
set(CMAKE_CUDA_COMPILER "${INLAY_NVCC}")
set(CMAKE_CUDA_ARCHITECTURES "${inlay_archs}")
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
  message(FATAL_ERROR "INLAY_CUDA=${INLAY_CUDA}: wanted nvcc 12.4 or newer, got ${CMAKE_CUDA_COMPILER_VERSION}")
endif()
message(STATUS "inlay: CUDA kernels for ${inlay_archs}")

add_library(inlay_cuda OBJECT ${INLAY_CUDA_SOURCES})
target_include_directories(inlay_cuda PRIVATE csrc cuda)
target_compile_definitions(inlay_cuda PRIVATE INLAY_HAVE_CUDA)
set_target_properties(inlay_cuda PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY Static)
target_compile_options(inlay_cuda PRIVATE -Xcompiler=-Wall,-Wextra ${INLAY_NVCC_OPTIONS})
target_sources(_C PRIVATE $<TARGET_OBJECTS:inlay_cuda>)
set_target_properties(_C PROPERTIES CUDA_RUNTIME_LIBRARY Static LINKER_LANGUAGE CXX)
find_package(CUDAToolkit REQUIRED)
target_link_libraries(_C PRIVATE CUDA::cudart_static)

string(REGEX REPLACE "([0-9]+a?)-real" "sm_\\1" inlay_archs_text "${inlay_archs}")
string(REGEX REPLACE "([0-9]+a?)-virtual" "compute_\\1" inlay_archs_text "${inlay_archs_text}")
string(REPLACE ";" " " inlay_archs_text "${inlay_archs_text}")
target_compile_definitions(_C PRIVATE "INLAY_HAVE_CUDA=\"${inlay_archs_text}\"")
