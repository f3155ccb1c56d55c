// 8-bit optimizer states: codes of the dynamic map (csrc/dynamic_map.h), by the CPU kernel's arithmetic.
//
// Codes are computed, not searched for: the 255 midpoints would be eight dependent reads of shared memory, at
// random banks, per state. The seven decades are a chain of selects with constant operands.
#pragma once

#include "device.cuh"
#include "dynamic_map.h"

namespace inlay {
namespace cuda {

// To the nearest integer, ties to even, for |x| below 2^22: two additions instead of a conversion at a
// quarter of their rate. Additions are not reordered, since there is no fast-math.
__device__ __forceinline__ float to_integer(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5·2^23
  return __fadd_rn(__fadd_rn(x, kMagic), -kMagic);
}

// Among 0, the positive levels below 1, and 1: the number of the one that is nearest to x ≥ 0; 0 for NaN.
template <bool Signed>
__device__ __forceinline__ float place(float x) {
  constexpr DynamicMap map = Signed ? kSignedMap : kUnsignedMap;
  float scale = map.scale[0], shift = map.shift[0], intervals = map.lowest;
#pragma unroll
  for (int i = 1; i < kDecades; ++i) {
    const bool above = x > map.above[i];
    scale = above ? map.scale[i] : scale;
    shift = above ? map.shift[i] : shift;
    intervals = above ? map.lowest * float(1 << i) : intervals;
  }
  const float interval = to_integer(x * scale - shift);
  const float inside = fminf(fmaxf(interval, 0.0f), intervals - 1.0f);
  float result = inside + intervals + (1.0f - map.lowest);  // decade i begins after lowest·(2^i − 1) levels
  result = x > map.one ? map.count + 1.0f : result;
  return x > map.above[0] ? result : 0.0f;
}

// A whole number in [0, 255] as a byte: the last bits of 2^23 plus it.
__device__ __forceinline__ uint8_t to_code(float number) {
  return uint8_t(__float_as_uint(number + 8388608.0f));
}

__device__ __forceinline__ uint8_t encode_signed(float m, float inverse) {
  const float x = m * inverse, at = place<true>(fabsf(x));
  const float below = float(kZeroCode) - fminf(at, kSignedMap.count);  // there is no −1
  return to_code(x < 0.0f ? below : float(kZeroCode) + at);
}

// v ≥ 0. A positive v never becomes 0: dividing by its root, the next step would take that for a tiny one.
__device__ __forceinline__ uint8_t encode_unsigned(float v, float inverse) {
  const float at = place<false>(v * inverse);
  return to_code(v > 0.0f ? fmaxf(at, 1.0f) : at);
}

__device__ __forceinline__ float inverse_of(float absmax) {
  return absmax >= kLeastScale ? __fdiv_rn(1.0f, absmax) : 0.0f;
}

}  // namespace cuda
}  // namespace inlay
