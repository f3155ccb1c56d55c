// The one place that launches: stream, dynamic shared memory, error check.
#pragma once

#include <stdexcept>
#include <string>

#include "device.cuh"

namespace inlay {
namespace cuda {

// Launch geometry of one kernel.
struct Grid {
  dim3 blocks, threads;
  size_t shared = 0;
};

// The caller's stream, set by the binding before each call (a cudaStream_t; ignored by the emulation).
void* current_stream();

// Of the current device. Kernels that loop over their work start as many blocks as fit, not as many as there
// is work.
int multiprocessors();

// Blocks needed for `items` at `each` per block; 64-bit, and refused where a grid cannot hold them.
inline unsigned blocks_for(int64_t items, int64_t each) {
  const int64_t blocks = (items + each - 1) / each;
  if (blocks > 0x7fffffff)
    throw std::invalid_argument("inlay: a grid of " + std::to_string(blocks) + " blocks is too large");
  return unsigned(blocks);
}

inline bool nothing_to_do(const char* name, const Grid& grid) {
  if (grid.blocks.y > 65535)
    throw std::invalid_argument(std::string("inlay: ") + name + ": rows this long do not fit a grid");
  return grid.blocks.x == 0 || grid.blocks.y == 0;
}

#if defined(__CUDACC__)

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), const Grid& grid, A... arguments) {
  if (nothing_to_do(name, grid)) return;
  auto* stream = static_cast<cudaStream_t>(current_stream());
  if (grid.shared > (48u << 10)) {
    const auto error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared));
    if (error != cudaSuccess)
      throw std::runtime_error(std::string("inlay: ") + name + ": wanted " + std::to_string(grid.shared) +
                               " bytes of shared memory: " + cudaGetErrorString(error));
  }
  kernel<<<grid.blocks, grid.threads, grid.shared, stream>>>(P(arguments)...);
  const auto error = cudaGetLastError();
  if (error == cudaErrorNoKernelImageForDevice)
    throw std::runtime_error(
        std::string("inlay: ") + name +
        ": wanted code for this GPU, and this build has none; `inlay doctor` lists what it "
        "has, INLAY_CUDA_ARCHS chooses what is built");
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("inlay: ") + name + ": " + cudaGetErrorString(error));
}

#else

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), const Grid& grid, A... arguments) {
  if (nothing_to_do(name, grid)) return;
  auto body = [&] { kernel(P(arguments)...); };
  simt::run(
      name, grid.blocks, grid.threads, grid.shared, [](void* f) { (*static_cast<decltype(body)*>(f))(); },
      &body);
}

#endif

// Calls f(T{}) with the device type of a float `dtype`.
template <class F>
void with_float(DType dtype, F&& f) {
  if (dtype == DType::f32) return f(float{});
  if (dtype == DType::bf16) return f(bf16{});
  if (dtype == DType::f16) return f(f16{});
  throw std::invalid_argument(std::string("inlay: wanted float32, bfloat16 or float16, got ") +
                              dtype_name(dtype));
}

// The launchers that this library has to define: one per op.
#define INLAY_OP(name, args) void name args;
#define INLAY_CPU_OP(name, args)
#include "ops.h"
#undef INLAY_OP

template <class T>
T* data(const TensorView& tensor) {
  return static_cast<T*>(tensor.data);
}

}  // namespace cuda
}  // namespace inlay
