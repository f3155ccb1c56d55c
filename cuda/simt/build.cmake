# Two modules with the same kernels, plain/_C and sanitized/_C (AddressSanitizer and UBSan; load it into a Python
# that runs with libasan preloaded), and the driver of the broken kernels.
include(cuda/sources.cmake)
list(TRANSFORM INLAY_CUDA_SOURCES PREPEND ${CMAKE_SOURCE_DIR}/)

add_library(simt_shared OBJECT ${INLAY_ENTRIES} cuda/simt/dispatch.cpp)
target_include_directories(simt_shared PRIVATE csrc cuda)
target_link_libraries(simt_shared PRIVATE pybind11::module)
target_compile_definitions(simt_shared PRIVATE INLAY_COMPILER="host emulation")
target_compile_options(simt_shared PRIVATE -O0 -Wall -Wextra -Wno-unknown-pragmas)

# No contraction, as INLAY_NVCC_OPTIONS has it.
set(simt_options -x c++ -Wall -Wextra -ffp-contract=off -fno-strict-aliasing)
set(simt_sanitize -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer)

function(simt_module directory)
  pybind11_add_module(simt_${directory} MODULE NO_EXTRAS ${INLAY_CUDA_SOURCES} cuda/simt/scheduler.cpp
                      $<TARGET_OBJECTS:simt_shared>)
  set_source_files_properties(${INLAY_CUDA_SOURCES} PROPERTIES LANGUAGE CXX)
  target_include_directories(simt_${directory} PRIVATE csrc cuda)
  target_compile_options(simt_${directory} PRIVATE ${simt_options} ${ARGN})
  target_link_options(simt_${directory} PRIVATE ${ARGN})
  set_target_properties(simt_${directory} PROPERTIES OUTPUT_NAME _C LIBRARY_OUTPUT_DIRECTORY ${directory})
endfunction()
simt_module(plain -O1)
simt_module(sanitized -O1 -g1 ${simt_sanitize})

add_executable(simt_broken tests/simt/broken.cu cuda/simt/scheduler.cpp csrc/tensor.cpp)
set_source_files_properties(tests/simt/broken.cu PROPERTIES LANGUAGE CXX)
target_include_directories(simt_broken PRIVATE csrc cuda)
target_compile_options(simt_broken PRIVATE ${simt_options} -O1 -g1 ${simt_sanitize})
target_link_options(simt_broken PRIVATE ${simt_sanitize})
