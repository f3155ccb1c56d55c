// 8-bit optimizer states: codes of the dynamic map (csrc/dynamic_map.h), a Vec at a time.
#pragma once

#include "cpu/kernel.h"
#include "dynamic_map.h"

namespace inlay {
namespace INLAY_ISA_NS {
namespace {

// table[codes[i]] of the first n codes; the other lanes are 0.
inline Vec look_up(const float* table, const uint8_t* codes, int n) {
#if defined(INLAY_VEC_avx512)
  const __m512i places = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), codes));
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), first(n), places, table, 4);
#elif defined(INLAY_VEC_avx2)
  if (n == Vec::kWidth)
    return _mm256_i32gather_ps(
        table, _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))), 4);
#endif
  float values[Vec::kWidth] = {};
  for (int i = 0; i < n; ++i) values[i] = table[codes[i]];
  return load(values);
}

// Whole numbers in [0, 255] as bytes.
inline void store_codes(uint8_t* codes, Vec numbers, int n) {
#if defined(INLAY_VEC_avx512)
  _mm_mask_storeu_epi8(codes, first(n), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(numbers.v)));
#else
  float values[Vec::kWidth];
  store(values, numbers);
  for (int i = 0; i < n; ++i) codes[i] = uint8_t(values[i]);
#endif
}

// Among 0, the positive levels below 1, and 1: the number of the one that is nearest to x ≥ 0; 0 for NaN.
inline Vec place(const DynamicMap& map, Vec x) {
  Vec scale(map.scale[0]), shift(-map.shift[0]), intervals(map.lowest);
  float here = map.lowest;
  for (int i = 1; i < kDecades; ++i) {
    const Vec above = Vec(map.above[i]) - x;
    here *= 2;
    scale = where_negative(above, Vec(map.scale[i]), scale);
    shift = where_negative(above, Vec(-map.shift[i]), shift);
    intervals = where_negative(above, Vec(here), intervals);
  }
  const Vec interval = round(fma(x, scale, shift));
  const Vec inside = min(max(interval, Vec(0.0f)), intervals - Vec(1.0f));
  Vec result = inside + intervals + Vec(1.0f - map.lowest);  // decade i begins after lowest·(2^i − 1) levels
  result = where_negative(Vec(map.one) - x, Vec(map.count + 1.0f), result);
  return where_negative(Vec(map.above[0]) - x, result, Vec(0.0f));
}

// Codes of m·inverse in the signed map.
inline void encode_signed(uint8_t* codes, Vec m, float inverse, int n) {
  const Vec x = m * Vec(inverse), place_of = place(kSignedMap, abs(x));
  const Vec below = Vec(float(kZeroCode)) - min(place_of, Vec(kSignedMap.count));  // there is no −1
  store_codes(codes, where_negative(x, below, Vec(float(kZeroCode)) + place_of), n);
}

// Codes of v·inverse, v ≥ 0, in the unsigned map. A positive v never becomes 0: dividing by its root, the
// next step would take that for a tiny one.
inline void encode_unsigned(uint8_t* codes, Vec v, float inverse, int n) {
  const Vec place_of = place(kUnsignedMap, v * Vec(inverse));
  store_codes(codes, where_negative(Vec(0.0f) - v, max(place_of, Vec(1.0f)), place_of), n);
}

inline float inverse_of(float absmax) { return absmax >= kLeastScale ? 1.0f / absmax : 0.0f; }

}  // namespace
}  // namespace INLAY_ISA_NS
}  // namespace inlay
