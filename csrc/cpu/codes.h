// Four-bit codes: 16-entry tables, and the scales of their blocks.
#pragma once

#include "cpu/kernel.h"

namespace inlay {
namespace INLAY_ISA_NS {
namespace {

// Table lookups by nibble. `high(p)` and `low(p)` look up the high and low nibbles of kWidth bytes: in packed
// storage the high nibble is the even element, the low nibble the odd one.
struct Levels {
#if defined(INLAY_VEC_avx512)
  __m512 table;
  explicit Levels(const float* values) : table(_mm512_loadu_ps(values)) {}
  static __m512i bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // vpermps reads four bits of each index only, so the other nibble needs no masking.
  Vec high(const uint8_t* p) const { return _mm512_permutexvar_ps(_mm512_srli_epi32(bytes(p), 4), table); }
  Vec low(const uint8_t* p) const { return _mm512_permutexvar_ps(bytes(p), table); }
#elif defined(INLAY_VEC_avx2)
  __m256 first, second;
  explicit Levels(const float* values)
      : first(_mm256_loadu_ps(values)), second(_mm256_loadu_ps(values + 8)) {}
  static __m256i bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  // vpermps reads three bits; the fourth, moved to the sign, chooses between the two halves of the table.
  Vec at(__m256i codes) const {
    const __m256 fourth = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, codes), _mm256_permutevar8x32_ps(second, codes),
                            fourth);
  }
  Vec high(const uint8_t* p) const { return at(_mm256_srli_epi32(bytes(p), 4)); }
  Vec low(const uint8_t* p) const { return at(bytes(p)); }
#else
  const float* table;
  explicit Levels(const float* values) : table(values) {}
  Vec high(const uint8_t* p) const { return table[*p >> 4]; }
  Vec low(const uint8_t* p) const { return table[*p & 15]; }
#endif
};

#if defined(INLAY_VEC_avx512)
// The 16 values a block's codes stand for, as 16-bit words: 16 packed bytes expand to 32 of them, in order.
// The even element is looked up in the low half of each lane, the odd one in the high half.
struct Words {
  __m512i even, odd;
  explicit Words(__m256i values) : even(_mm512_cvtepu16_epi32(values)), odd(_mm512_slli_epi32(even, 16)) {}
  __m512i expand(const uint8_t* p) const {
    const __m512i codes = Levels::bytes(p);
    const __m512i low = _mm512_permutexvar_epi32(_mm512_srli_epi32(codes, 4), even);
    return _mm512_or_si512(low, _mm512_permutexvar_epi32(codes, odd));
  }
};
#endif

// absmax of each block: fp32 as stored, or double-quantized, map[codes[b]]·absmax2[b / 256] + offset with two
// roundings (a fused multiply-add would differ from bitsandbytes by an ulp).
struct Scales {
  const float* absmax;
  const uint8_t* codes;
  const float* map;
  float offset;

  Scales(const TensorView& absmax_, const TensorView& codes_, const TensorView& map_,
         const TensorView& offset_)
      : absmax(data<const float>(absmax_)),
        codes(data<const uint8_t>(codes_)),
        map(data<const float>(map_)),
        offset(codes ? *data<const float>(offset_) : 0.0f) {}

  float at(int64_t block) const {
    if (!codes) return absmax[block];
    const volatile float product = map[codes[block]] * absmax[block / 256];  // volatile: no contraction
    return product + offset;
  }

  // out[i] = at(first + i)
  void fill(float* out, int64_t first, int64_t count) const {
    if (!codes) {
      memcpy(out, absmax + first, size_t(count) * sizeof(float));
      return;
    }
    int64_t i = 0;
#if defined(INLAY_VEC_avx512)
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + 16 <= count; i += 16) {
      const __m512i coarse = _mm512_add_epi32(lanes, _mm512_set1_epi32(int((first + i) % 256)));
      const float* near = absmax + (first + i) / 256;
      __m512 product = _mm512_mul_ps(_mm512_i32gather_ps(Levels::bytes(codes + first + i), map, 4),
                                     _mm512_i32gather_ps(_mm512_srli_epi32(coarse, 8), near, 4));
      asm("" : "+v"(product));  // no contraction here either
      _mm512_storeu_ps(out + i, _mm512_add_ps(product, _mm512_set1_ps(offset)));
    }
#endif
    for (; i < count; ++i) out[i] = at(first + i);
  }
};

}  // namespace
}  // namespace INLAY_ISA_NS
}  // namespace inlay
