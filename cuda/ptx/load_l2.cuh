// ld.global.cg: a load from L2 past the multiprocessor's own L1, which may hold what other blocks have since
// overwritten.
//
//   load_l2(from)   after a __threadfence that follows the sign that `from` was written
#pragma once

#include "device.cuh"

namespace inlay {
namespace cuda {

#if defined(__CUDACC__)

__device__ __forceinline__ float load_l2(const float* from) {
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(from) : "memory");
  return value;
}

#else

inline float load_l2(const float* from) { return *from; }

#endif

}  // namespace cuda
}  // namespace inlay
