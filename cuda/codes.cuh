// Four-bit codes: the scales of their blocks, and 16-entry tables without bank conflicts.
#pragma once

#include "rows.cuh"

namespace inlay {
namespace cuda {

// absmax of each block: fp32 as stored, or double-quantized, map[codes[b]]·absmax[b / 256] + offset with two
// roundings (a fused multiply-add would differ from bitsandbytes by an ulp).
struct Scales {
  const float* absmax;
  const uint8_t* codes;  // null: absmax is what is stored
  const float* map;      // [256]
  const float* offset;   // []
  int shift;             // blocks are 2^shift elements: 64-bit divisions are slow, and spill registers

  // Of the block that element i of the weight is in.
  __device__ __forceinline__ float at(int64_t i) const { return codes ? at<true>(i) : at<false>(i); }
  template <bool Nested>
  __device__ __forceinline__ float at(int64_t i) const {
    const int64_t block = i >> shift;
    if constexpr (!Nested) return absmax[block];
    return __fadd_rn(__fmul_rn(map[codes[block]], absmax[block / 256]), *offset);
  }
};

inline Scales scales_of(const TensorView& absmax, const TensorView& codes, const TensorView& map,
                        const TensorView& offset, int64_t blocksize) {
  int shift = 0;
  while (int64_t(1) << shift < blocksize) ++shift;
  return {data<const float>(absmax), data<const uint8_t>(codes), data<const float>(map),
          data<const float>(offset), shift};
}

// 16 floats, one copy per bank, so that 32 lanes look up 32 different codes at once: shared, [16·32].
struct Levels {
  static constexpr int kSize = 16 * kWarp;
  float* copies;

  __device__ __forceinline__ void fill(const float* levels) const {
    const int me = int(threadIdx.y * blockDim.x + threadIdx.x), all = int(blockDim.x * blockDim.y);
    for (int i = me; i < kSize; i += all) copies[i] = levels[i / kWarp];
    __syncthreads();
  }
  __device__ __forceinline__ float at(uint32_t code) const {
    return copies[code * kWarp + threadIdx.x % kWarp];
  }
};

// The k-th code of eight in four packed bytes, as a little-endian word: the high nibble comes first.
__device__ __forceinline__ uint32_t code_of(uint32_t word, int k) {
  return word >> (8 * (k / 2) + (k % 2 ? 0 : 4)) & 15;
}

}  // namespace cuda
}  // namespace inlay
