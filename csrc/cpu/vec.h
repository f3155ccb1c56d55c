// Vec: 1, 8 or 16 floats, so that each kernel is written once and compiled once per instruction set.
//
// Everything here lives in inlay::<isa> and is internal to its file; no std:: template is used, since the
// linker could merge two instruction sets' copies of it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(INLAY_VEC_avx2) || defined(INLAY_VEC_avx512)
#include <immintrin.h>
#endif

namespace inlay {
namespace INLAY_ISA_NS {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

#if defined(INLAY_VEC_avx512)

struct Vec {
  static constexpr int kWidth = 16;
  __m512 v;
  Vec() = default;
  Vec(__m512 x) : v(x) {}
  Vec(float x) : v(_mm512_set1_ps(x)) {}
};
inline Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
inline Vec sqrt(Vec a) { return _mm512_sqrt_ps(a.v); }
// If one is NaN the result is b, as the instruction has it.
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a.v); }
inline Vec round(Vec a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec where_negative(Vec c, Vec a, Vec b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(c.v, _mm512_setzero_ps(), _CMP_LT_OQ), b.v, a.v);
}
inline Vec times_power_of_two(Vec a, Vec n) { return _mm512_scalef_ps(a.v, n.v); }

inline __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }

inline Vec widen(__m256i bits, bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Vec widen(__m256i bits, f16) { return _mm512_cvtph_ps(bits); }
inline __m256i narrow(Vec a, bf16) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i high = _mm512_srli_epi32(rounded, 16);
  return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, high, _mm512_set1_epi32(0x7fc0)));
}
inline __m256i narrow(Vec a, f16) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

template <class T>
inline Vec load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <class T>
inline Vec load(const T* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(first(n), p), T{});
}
template <class T>
inline void store(T* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, T{}));
}
template <class T>
inline void store(T* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow(a, T{}));
}

#elif defined(INLAY_VEC_avx2)

struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;
  Vec() = default;
  Vec(__m256 x) : v(x) {}
  Vec(float x) : v(_mm256_set1_ps(x)) {}
};
inline Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
inline Vec sqrt(Vec a) { return _mm256_sqrt_ps(a.v); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
inline Vec round(Vec a) { return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec where_negative(Vec c, Vec a, Vec b) {
  return _mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(c.v, _mm256_setzero_ps(), _CMP_LT_OQ));
}
// In two halves: 2^n alone overflows or underflows before the product does.
inline Vec times_power_of_two(Vec a, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
  const auto power = [](__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  };
  return _mm256_mul_ps(_mm256_mul_ps(a.v, power(half)), power(_mm256_sub_epi32(whole, half)));
}

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }

inline Vec widen(__m128i bits, bf16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Vec widen(__m128i bits, f16) { return _mm256_cvtph_ps(bits); }
inline __m128i narrow(Vec a, bf16) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
inline __m128i narrow(Vec a, f16) {
  return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

template <class T>
inline Vec load(const T* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
template <class T>
inline void store(T* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a, T{}));
}

#else

struct Vec {
  static constexpr int kWidth = 1;
  float v;
  Vec() = default;
  Vec(float x) : v(x) {}
};
inline Vec operator+(Vec a, Vec b) { return a.v + b.v; }
inline Vec operator-(Vec a, Vec b) { return a.v - b.v; }
inline Vec operator*(Vec a, Vec b) { return a.v * b.v; }
inline Vec operator/(Vec a, Vec b) { return a.v / b.v; }
inline Vec fma(Vec a, Vec b, Vec c) { return a.v * b.v + c.v; }
inline Vec sqrt(Vec a) { return __builtin_sqrtf(a.v); }
inline Vec max(Vec a, Vec b) { return a.v > b.v ? a.v : b.v; }
inline Vec min(Vec a, Vec b) { return a.v < b.v ? a.v : b.v; }
inline Vec abs(Vec a) { return __builtin_fabsf(a.v); }
inline Vec round(Vec a) { return __builtin_rintf(a.v); }
inline Vec where_negative(Vec c, Vec a, Vec b) { return c.v < 0 ? a : b; }
// In two halves: 2^n alone overflows or underflows before the product does.
inline Vec times_power_of_two(Vec a, Vec n) {
  const int32_t whole = n.v == n.v ? int32_t(n.v) : 0, half = whole >> 1;
  const auto power = [](int32_t e) { return from_bits(uint32_t(e + 127) << 23); };
  return a.v * power(half) * power(whole - half);
}

inline Vec load(const float* p) { return *p; }
inline void store(float* p, Vec a) { *p = a.v; }
inline Vec load(const bf16* p) { return from_bits(uint32_t(p->bits) << 16); }
inline void store(bf16* p, Vec a) {
  const uint32_t bits = to_bits(a.v);
  p->bits = a.v == a.v ? uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : uint16_t(0x7fc0);
}
inline Vec load(const f16* p) {
  const uint32_t sign = uint32_t(p->bits & 0x8000) << 16, magnitude = p->bits & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));
  // Moves the fields into place and repairs the exponent bias by a product, which also handles subnormals.
  return from_bits(sign | to_bits(from_bits(magnitude << 13) * from_bits(0x77800000)));
}
inline void store(f16* p, Vec a) {
  const uint32_t bits = to_bits(a.v), sign = (bits >> 16) & 0x8000;
  uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    p->bits = uint16_t(sign | 0x7e00);
  } else if (magnitude >= 0x477ff000) {  // rounds to 65536 or more: infinity
    p->bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // subnormal half: the float adder rounds at the right bit
    p->bits = uint16_t(sign | (to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f)));
  } else {
    magnitude += 0xc8000fff + ((magnitude >> 13) & 1);  // exponent bias 127 -> 15, nearest even
    p->bits = uint16_t(sign | (magnitude >> 13));
  }
}

#endif

#if !defined(INLAY_VEC_avx512)
// The first n lanes; the others are 0 and stay unwritten.
template <class T>
inline Vec load(const T* p, int n) {
  T lanes[Vec::kWidth] = {};
  memcpy(lanes, p, size_t(n) * sizeof(T));
  return load(lanes);
}
template <class T>
inline void store(T* p, Vec a, int n) {
  T lanes[Vec::kWidth];
  store(lanes, a);
  memcpy(p, lanes, size_t(n) * sizeof(T));
}
#endif

// Lane sums and maxima in one fixed order: upper half onto lower half, until one lane is left.
#if defined(INLAY_VEC_avx512) || defined(INLAY_VEC_avx2)
inline float sum_of_eight(__m256 a) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
#endif
inline float sum(Vec a) {
#if defined(INLAY_VEC_avx512)
  return sum_of_eight(_mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1)));
#elif defined(INLAY_VEC_avx2)
  return sum_of_eight(a.v);
#else
  return a.v;
#endif
}

inline float max_lane(Vec a) {
  float lanes[Vec::kWidth];
  store(lanes, a);
  float best = lanes[0];
  for (int i = 1; i < Vec::kWidth; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

// One element, for gathers and tails.
template <class T>
inline float load_one(const T* p) {
  float lanes[Vec::kWidth];
  store(lanes, load(p, 1));
  return lanes[0];
}
inline float load_one(const float* p) { return *p; }
inline float load_one(const bf16* p) { return from_bits(uint32_t(p->bits) << 16); }
template <class T>
inline void store_one(T* p, float value) {
  store(p, Vec(value), 1);
}

// Calls f(i, n) for [0, size) in steps of one Vec: n == kWidth, and once the rest. Inlined into both.
template <class F>
inline void for_vecs(int64_t size, F&& f) {
  int64_t i = 0;
  for (; i + Vec::kWidth <= size; i += Vec::kWidth) f(i, Vec::kWidth);
  if (i < size) f(i, int(size - i));
}
template <class T>
inline Vec load_n(const T* p, int n) {
  return n == Vec::kWidth ? load(p) : load(p, n);
}
template <class T>
inline void store_n(T* p, Vec a, int n) {
  if (n == Vec::kWidth) {
    store(p, a);
  } else {
    store(p, a, n);
  }
}

// e^x, relative error below 2e-7 (2 ulp); overflow to inf, gradual underflow, NaN stays NaN.
// x = n·ln2 + r with |r| <= ln2/2; the series to r^7 leaves 6e-9.
inline Vec exp(Vec x) {
  x = min(Vec(90.0f), max(Vec(-104.0f), x));  // in this order a NaN comes through
  const Vec n = round(x * Vec(1.44269504088896341f));
  Vec r = fma(n, Vec(-0.693359375f), x);  // ln2 in two parts: the first has 9 bits, so n times it is exact
  r = fma(n, Vec(2.12194440054690583e-4f), r);  // 0.693359375 - ln2
  Vec p = Vec(1.0f / 5040);
  p = fma(p, r, Vec(1.0f / 720));
  p = fma(p, r, Vec(1.0f / 120));
  p = fma(p, r, Vec(1.0f / 24));
  p = fma(p, r, Vec(1.0f / 6));
  p = fma(p, r, Vec(0.5f));
  p = fma(p, r, Vec(1.0f));
  p = fma(p, r, Vec(1.0f));
  return times_power_of_two(p, n);
}

inline Vec sigmoid(Vec x) { return Vec(1.0f) / (Vec(1.0f) + exp(Vec(0.0f) - x)); }

// Also 1 - sigmoid(x), without the cancellation: e/(1 + e), e = exp(-x), and 1 where e would overflow.
inline Vec sigmoid(Vec x, Vec& complement) {
  const Vec e = exp(Vec(0.0f) - x);
  const Vec s = Vec(1.0f) / (Vec(1.0f) + e);
  complement = where_negative(x + Vec(80.0f), Vec(1.0f), e * s);
  return s;
}

// The normal distribution function. erfc(z)·e^(z²)/t is a polynomial in t = 1/(1 + z/2): Chebyshev fit of
// degree 10 over z in [0, 10], error 2e-9 before rounding.
inline Vec normal_cdf(Vec x) {
  const Vec z = abs(x) * Vec(0.707106781186547524f);
  const Vec t = Vec(1.0f) / fma(Vec(0.5f), z, Vec(1.0f));
  Vec p = Vec(3.239865218e-02f);
  p = fma(p, t, Vec(-1.716289015e-01f));
  p = fma(p, t, Vec(3.325686610e-01f));
  p = fma(p, t, Vec(-2.189932848e-01f));
  p = fma(p, t, Vec(-8.664944204e-02f));
  p = fma(p, t, Vec(7.456794739e-02f));
  p = fma(p, t, Vec(3.905751788e-02f));
  p = fma(p, t, Vec(1.897954688e-01f));
  p = fma(p, t, Vec(2.444791095e-01f));
  p = fma(p, t, Vec(2.823184277e-01f));
  p = fma(p, t, Vec(2.820858459e-01f));
  const Vec tail = Vec(0.5f) * p * t * exp(Vec(-0.5f) * x * x);
  return where_negative(x, tail, Vec(1.0f) - tail);
}

}  // namespace
}  // namespace INLAY_ISA_NS
}  // namespace inlay
