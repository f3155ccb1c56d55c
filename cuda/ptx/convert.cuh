// Conversions between fp32 and the 16-bit floats, rounding to nearest even, in both worlds.
#pragma once

namespace inlay {
namespace cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

#if defined(__CUDACC__)

__device__ __forceinline__ float to_float(f16 x) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
}
__device__ __forceinline__ bf16 to_bf16(float x) {
  bf16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
}
__device__ __forceinline__ f16 to_f16(float x) {
  f16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
}

#else

inline float to_float(f16 x) {
  _Float16 value;
  memcpy(&value, &x.bits, 2);
  return float(value);
}
inline bf16 to_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline f16 to_f16(float x) {
  const _Float16 value = _Float16(x);
  f16 result;
  memcpy(&result.bits, &value, 2);
  return result;
}

#endif

__device__ __forceinline__ void from_float(float x, float& to) { to = x; }
__device__ __forceinline__ void from_float(float x, bf16& to) { to = to_bf16(x); }
__device__ __forceinline__ void from_float(float x, f16& to) { to = to_f16(x); }

}  // namespace cuda
}  // namespace inlay
