// Operands of a product in 8 bits, as vpdpbusd takes them: four neighbours along the contraction in a word of
// 32 bits.
//
//   both   64 neighbours of the contraction are turned first, H·x of the Hadamard matrix H / 8: products keep
//          their value, and one large number, which would leave few of the 8 bits to the rest of its row, is
//          spread over 64
//   left   a scale per row, s = max|x|/127, and x/s + 128 in 0..255: the instruction wants one operand
//   without
//          a sign
//   right  a scale per column; panels of 32 columns, row q of which holds numbers 4q to 4q + 3 of each column
//   sum    Σ (a + 128)·b = Σ a·b + 128·Σ b, so 128 times a column's sum is taken off again
#pragma once

#include "cpu/panels.h"

#if defined(__AVX512VNNI__)

namespace inlay {
namespace INLAY_ISA_NS {
namespace {

constexpr int64_t kTurned = 64;  // numbers that are turned together: a cache line of bytes
constexpr float kNorm = 0.125f;  // that keeps their length: 1 / √64, exact

inline int64_t turned(int64_t depth) { return (depth + kTurned - 1) / kTurned * kTurned; }

// From 2⁻¹¹⁹ on the inverse of a scale is finite, too; what is smaller becomes 0. A NaN stays one.
inline float scale_of(float largest) { return largest < 0x1p-119f ? 1.0f : largest / 127.0f; }

inline __m512 wide_at(const uint16_t* p, int64_t n) {
  const __m256i words = _mm256_maskz_loadu_epi16(first(n < 0 ? 0 : n < 16 ? int(n) : 16), p);
  return widen(words, bf16{}).v;
}

// The butterfly of neighbours whose places differ in the bit that `swapped` exchanged: sums below,
// differences above, where `signs` is -1. A product with ±1 is exact.
inline __m512 butterfly(__m512 x, __m512 swapped, __m512 signs) { return _mm512_fmadd_ps(x, signs, swapped); }
inline __m512 signs(__mmask16 above) {
  return _mm512_mask_blend_ps(above, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
}

// 8·H of 64 neighbours, from the widest butterfly to the narrowest.
inline void turn(__m512 (&x)[4]) {
  for (int i = 0; i < 2; ++i) {
    const __m512 sum = _mm512_add_ps(x[i], x[i + 2]);
    x[i + 2] = _mm512_sub_ps(x[i], x[i + 2]);
    x[i] = sum;
  }
  for (int i = 0; i < 4; i += 2) {
    const __m512 sum = _mm512_add_ps(x[i], x[i + 1]);
    x[i + 1] = _mm512_sub_ps(x[i], x[i + 1]);
    x[i] = sum;
  }
  for (__m512& each : x) {
    each = butterfly(each, _mm512_shuffle_f32x4(each, each, 0x4e), signs(0xff00));
    each = butterfly(each, _mm512_shuffle_f32x4(each, each, 0xb1), signs(0xf0f0));
    each = butterfly(each, _mm512_permute_ps(each, 0x4e), signs(0xcccc));
    each = butterfly(each, _mm512_permute_ps(each, 0xb1), signs(0xaaaa));
  }
}

// 64 neighbours of a row, turned; those behind the n-th are 0 before.
inline void load_turned(__m512 (&x)[4], const uint16_t* row, int64_t n) {
  for (int i = 0; i < 4; ++i) x[i] = wide_at(row + 16 * i, n - 16 * i);
  turn(x);
}

// Three butterflies across eight registers: 4, 2 and 1 of them apart.
inline void turn_across(__m512 (&x)[8]) {
#pragma GCC unroll 3
  for (int apart = 4; apart; apart /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      if (i & apart) continue;
      const __m512 sum = _mm512_add_ps(x[i], x[i + apart]);
      x[i + apart] = _mm512_sub_ps(x[i], x[i + apart]);
      x[i] = sum;
    }
  }
}

// Largest magnitudes, ordered as their bits are: a NaN is the largest.
struct Largest {
  __m512i bits = _mm512_setzero_si512();
  void see(__m512 x) {
    bits = _mm512_max_epu32(bits, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
  }
  float of_all() const { return from_bits(_mm512_reduce_max_epu32(bits)) * kNorm; }
  void of_each(float* out) const {
    _mm512_store_ps(out, _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(kNorm)));
  }
};

// What turned numbers are multiplied by to become bytes.
inline __m512 inverse_of(float scale) { return _mm512_set1_ps(1.0f / scale * kNorm); }

inline __m128i bytes_of(__m512 x, __m512 inverse) {
  return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)));
}
inline __m512i bytes_of(const __m512 (&x)[4], __m512 inverse) {
  __m512i result = _mm512_castsi128_si512(bytes_of(x[0], inverse));
  result = _mm512_inserti32x4(result, bytes_of(x[1], inverse), 1);
  result = _mm512_inserti32x4(result, bytes_of(x[2], inverse), 2);
  return _mm512_inserti32x4(result, bytes_of(x[3], inverse), 3);
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
    __m512 x[4];
    Largest largest;
    for (int64_t k = 0; k < depth; k += kTurned) {
      load_turned(x, from + k, depth - k);
      for (const __m512 each : x) largest.see(each);
    }
    scale()[m] = scale_of(largest.of_all());
    const __m512 inverse = inverse_of(scale()[m]);
    for (int64_t k = 0; k < depth; k += kTurned) {
      load_turned(x, from + k, depth - k);
      _mm512_store_si512(row(m) + k, _mm512_xor_si512(bytes_of(x, inverse), _mm512_set1_epi8(char(0x80))));
    }
  }
};

// Scales of a panel's columns, and what is taken off their sums.
struct Columns {
  alignas(64) float scale[kPanel];
  alignas(64) int32_t offset[kPanel];
};

// 128 times the sums of 16 columns' bytes
struct Offset {
  __m512i sums = _mm512_setzero_si512();
  void see(__m512i quads) { sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), quads); }
  void store(int32_t* out) const { _mm512_store_si512(out, _mm512_slli_epi32(sums, 7)); }
};

// Right operands are turned 16 columns at a time into `space`, which has room for them in fp32.
inline int64_t space_of(int64_t depth) { return turned(depth) * 16 * int64_t(sizeof(float)); }

// Columns [j, j + width) of an operand whose stored rows are its columns.
inline void quads_along(uint32_t* out, Columns& columns, float* space, const uint16_t* data, int64_t stride,
                        int64_t j, int64_t width, int64_t depth) {
  const int64_t ld = turned(depth);
  for (int64_t c = 0; c < width; c += 16) {
    __m512 x[4], inverse[16];
    for (int64_t i = 0; i < 16; ++i) {
      const bool there = c + i < width;
      Largest largest;
      for (int64_t d = 0; d < ld; d += kTurned) {
        load_turned(x, data + (j + c + i) * stride + d, there ? depth - d : 0);
        for (int n = 0; n < 4; ++n) {
          largest.see(x[n]);
          _mm512_store_ps(space + i * ld + d + 16 * n, x[n]);
        }
      }
      columns.scale[c + i] = scale_of(largest.of_all());
      inverse[i] = inverse_of(columns.scale[c + i]);
    }
    Offset offset;
    for (int64_t d = 0; d < ld; d += kTurned) {
      __m512i rows[16];
      for (int i = 0; i < 16; ++i) {
        for (int n = 0; n < 4; ++n) x[n] = _mm512_load_ps(space + i * ld + d + 16 * n);
        rows[i] = bytes_of(x, inverse[i]);
      }
      transpose(rows);
      for (int i = 0; i < 16; ++i) {
        _mm512_store_si512(out + (d / 4 + i) * kPanel + c, rows[i]);
        offset.see(rows[i]);
      }
    }
    offset.store(columns.offset + c);
  }
}

// 64 rows of 16 columns, turned across them; rows behind the n-th are 0 before.
inline void turn_rows(float* space, Largest& largest, const uint16_t* from, int64_t stride, int64_t width,
                      int64_t n) {
  __m512 x[8];
  for (int64_t r = 0; r < 8; ++r) {
    for (int64_t i = 0; i < 8; ++i)
      x[i] = r + 8 * i < n ? wide_at(from + (r + 8 * i) * stride, width) : _mm512_setzero_ps();
    turn_across(x);
    for (int64_t i = 0; i < 8; ++i) _mm512_store_ps(space + (r + 8 * i) * 16, x[i]);
  }
  for (int64_t r = 0; r < kTurned; r += 8) {
    for (int64_t i = 0; i < 8; ++i) x[i] = _mm512_load_ps(space + (r + i) * 16);
    turn_across(x);
    for (int64_t i = 0; i < 8; ++i) {
      largest.see(x[i]);
      _mm512_store_ps(space + (r + i) * 16, x[i]);
    }
  }
}

// The same of an operand whose stored rows run across its columns.
inline void quads_across(uint32_t* out, Columns& columns, float* space, const uint16_t* data, int64_t stride,
                         int64_t j, int64_t width, int64_t depth) {
  for (int64_t c = 0; c < width; c += 16) {
    Largest largest;
    for (int64_t d = 0; d < depth; d += kTurned)
      turn_rows(space + d * 16, largest, data + d * stride + j + c, stride, width - c, depth - d);
    float* scale = columns.scale + c;
    largest.of_each(scale);
    for (int i = 0; i < 16; ++i) scale[i] = scale_of(scale[i]);
    const __m512 inverse =
        _mm512_mul_ps(_mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_load_ps(scale)), _mm512_set1_ps(kNorm));
    Offset offset;
    for (int64_t d = 0; d < turned(depth); d += 4) {
      __m512i quad = _mm512_setzero_si512();
      for (int i = 0; i < 4; ++i) {
        const __m512 x = _mm512_mul_ps(_mm512_load_ps(space + (d + i) * 16), inverse);
        const __m512i low = _mm512_and_si512(_mm512_cvtps_epi32(x), _mm512_set1_epi32(0xff));
        quad = _mm512_or_si512(quad, _mm512_sllv_epi32(low, _mm512_set1_epi32(8 * i)));
      }
      _mm512_store_si512(out + d / 4 * kPanel + c, quad);
      offset.see(quad);
    }
    offset.store(columns.offset + c);
  }
}

}  // namespace
}  // namespace INLAY_ISA_NS
}  // namespace inlay

#endif
