// What every .cu file includes: CUDA's own headers under nvcc, the host emulation under g++.
#pragma once

#include "tensor.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define INLAY_SHARED(T, name, count) __shared__ __align__(16) T name[count]
#define INLAY_DYNAMIC_SHARED(T, name)                           \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  T* const name = reinterpret_cast<T*>(name##_bytes)
#else
#include "simt/simt.h"
#endif

#include "ptx/convert.cuh"

namespace inlay {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Sum over the warp, the same in every lane: pairs of lanes add in one fixed order.
__device__ __forceinline__ float warp_sum(float value) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, value, lanes);
    value = other > value ? other : value;
  }
  return value;
}

// Sum over a block of up to 1,024 threads, the same in every thread. `partial`: shared, one float per warp.
__device__ __forceinline__ float block_sum(float value, float* partial) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp, warps = int(blockDim.x) / kWarp;
  value = warp_sum(value);
  __syncthreads();  // `partial` may still be read from an earlier call
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  float total = 0.0f;
  for (int w = 0; w < warps; ++w) total += partial[w];
  return total;
}

// The maximum in the same way; a NaN is passed over unless all are.
__device__ __forceinline__ float block_max(float value, float* partial) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp, warps = int(blockDim.x) / kWarp;
  value = warp_max(value);
  __syncthreads();
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  float total = partial[0];
  for (int w = 1; w < warps; ++w) total = partial[w] > total ? partial[w] : total;
  return total;
}

}  // namespace cuda
}  // namespace inlay
