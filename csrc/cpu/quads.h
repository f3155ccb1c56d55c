// Operands of a product in 8 bits, as vpdpbusd takes them: four neighbours along the contraction in a word of
// 32 bits.
//
//   left    a scale per row, s = max|x|/127, and x/s + 128 in 0..255: the instruction wants one operand
//   without a sign right   a scale per column; panels of 32 columns, row q of which holds numbers 4q to 4q +
//   3 of each column sum     Σ (a + 128)·b = Σ a·b + 128·Σ b, so 128 times a column's sum is taken off again
#pragma once

#include "cpu/panels.h"

#if defined(__AVX512VNNI__)

namespace inlay {
namespace INLAY_ISA_NS {
namespace {

// From 2⁻¹¹⁹ on the inverse of a scale is finite, too; what is smaller becomes 0. A NaN stays one.
inline float scale_of(float largest) { return largest < 0x1p-119f ? 1.0f : largest / 127.0f; }

inline __m512 wide_at(const uint16_t* p, int64_t n) {
  const __m256i words = _mm256_maskz_loadu_epi16(first(n < 0 ? 0 : n < 16 ? int(n) : 16), p);
  return widen(words, bf16{}).v;
}
inline __m512i rounded(__m512 x, __m512 inverse) { return _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)); }

// largest magnitude of n numbers of a row
inline float largest_of(const uint16_t* row, int64_t n) {
  __m512i most = _mm512_setzero_si512();  // magnitudes of bf16 are ordered as their bits are
  for (int64_t k = 0; k < n; k += 32) {
    const __m512i bits = _mm512_maskz_loadu_epi16(first_words(n - k), row + k);
    most = _mm512_max_epu16(most, _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff)));
  }
  alignas(64) uint16_t words[32];
  _mm512_store_si512(words, most);
  uint16_t result = 0;
  for (const uint16_t word : words) result = word > result ? word : result;
  return from_bits(uint32_t(result) << 16);
}

// 64 numbers of a row as bytes with a sign; those behind the n-th are 0
inline __m512i bytes_of(const uint16_t* row, int64_t n, __m512 inverse) {
  __m512i result = _mm512_castsi128_si512(_mm512_cvtsepi32_epi8(rounded(wide_at(row, n), inverse)));
  result = _mm512_inserti32x4(result, _mm512_cvtsepi32_epi8(rounded(wide_at(row + 16, n - 16), inverse)), 1);
  result = _mm512_inserti32x4(result, _mm512_cvtsepi32_epi8(rounded(wide_at(row + 32, n - 32), inverse)), 2);
  return _mm512_inserti32x4(result, _mm512_cvtsepi32_epi8(rounded(wide_at(row + 48, n - 48), inverse)), 3);
}

// A left operand in 8 bits: rows an odd number of cache lines apart, and their scales.
struct Bytes {
  const int64_t depth, ld;
  const Aligned numbers, scales;
  Bytes(int64_t rows, int64_t depth_)
      : depth(depth_), ld((depth_ + 63) / 128 * 128 + 64), numbers(rows * ld), scales(rows * 4) {}
  uint8_t* row(int64_t m) const { return reinterpret_cast<uint8_t*>(numbers.start) + m * ld; }
  float* scale() const { return reinterpret_cast<float*>(scales.start); }

  void fill(int64_t m, const uint16_t* from) const {
    const float s = scale()[m] = scale_of(largest_of(from, depth));
    const __m512 inverse = _mm512_set1_ps(1.0f / s);
    for (int64_t k = 0; k < depth; k += 64) {
      const __m512i bytes = bytes_of(from + k, depth - k < 64 ? depth - k : 64, inverse);
      _mm512_store_si512(row(m) + k, _mm512_xor_si512(bytes, _mm512_set1_epi8(char(0x80))));
    }
  }
};

// Scales of a panel's columns, and what is taken off their sums.
struct Columns {
  alignas(64) float scale[kPanel];
  alignas(64) int32_t offset[kPanel];
};

inline __m512i times_128(__m512i sums) { return _mm512_slli_epi32(sums, 7); }

// Columns [j, j + width) of an operand whose stored rows are its columns.
inline void quads_along(uint32_t* out, Columns& columns, const uint16_t* data, int64_t stride, int64_t j,
                        int64_t width, int64_t depth) {
  __m512 inverse[kPanel];
  for (int64_t c = 0; c < kPanel; ++c) {
    columns.scale[c] = c < width ? scale_of(largest_of(data + (j + c) * stride, depth)) : 1.0f;
    inverse[c] = _mm512_set1_ps(1.0f / columns.scale[c]);
  }
  for (int64_t c = 0; c < width; c += 16) {
    __m512i sums = _mm512_setzero_si512();
    for (int64_t d = 0; d < depth; d += 64) {
      __m512i rows[16];
      for (int i = 0; i < 16; ++i)
        rows[i] = c + i < width ? bytes_of(data + (j + c + i) * stride + d, depth - d, inverse[c + i])
                                : _mm512_setzero_si512();
      transpose(rows);
      for (int i = 0; i < 16 && d + 4 * i < depth; ++i) {
        _mm512_store_si512(out + (d / 4 + i) * kPanel + c, rows[i]);
        sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), rows[i]);
      }
    }
    _mm512_store_si512(columns.offset + c, times_128(sums));
  }
}

// The same of an operand whose stored rows run across its columns.
inline void quads_across(uint32_t* out, Columns& columns, const uint16_t* data, int64_t stride, int64_t j,
                         int64_t width, int64_t depth) {
  const uint16_t* from = data + j;
  __m512i most = _mm512_setzero_si512();
  for (int64_t k = 0; k < depth; ++k) {
    const __m512i bits = _mm512_maskz_loadu_epi16(first_words(width), from + k * stride);
    most = _mm512_max_epu16(most, _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff)));
  }
  alignas(64) uint16_t words[kPanel];
  _mm512_store_si512(words, most);
  for (int64_t c = 0; c < kPanel; ++c) columns.scale[c] = scale_of(from_bits(uint32_t(words[c]) << 16));
  const __m512i low = _mm512_set1_epi32(0xff);
  for (int64_t c = 0; c < width; c += 16) {
    const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_load_ps(columns.scale + c));
    __m512i sums = _mm512_setzero_si512();
    for (int64_t d = 0; d < depth; d += 4) {
      __m512i quad = _mm512_setzero_si512();
      for (int i = 0; i < 4 && d + i < depth; ++i) {
        const __m512i number = rounded(wide_at(from + (d + i) * stride + c, width - c), inverse);
        quad =
            _mm512_or_si512(quad, _mm512_sllv_epi32(_mm512_and_si512(number, low), _mm512_set1_epi32(8 * i)));
      }
      _mm512_store_si512(out + d / 4 * kPanel + c, quad);
      sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), quad);
    }
    _mm512_store_si512(columns.offset + c, times_128(sums));
  }
}

}  // namespace
}  // namespace INLAY_ISA_NS
}  // namespace inlay

#endif
