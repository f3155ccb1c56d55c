// Operands of 32-bit units and their products, for attention.
//
//   rows      [r, units]: a row's elements as they are; a left operand, one unit broadcast at a time
//   channels  [unit, lanes]: rows as columns; the right operand of a product over channels
//   groups    [r / step, width]: `step` neighbouring rows in one unit; the right operand of a product over rows
//
// Arrays of units are arrays of float whatever they hold: they are loaded, stored and broadcast, never computed
// with except by multiply_add.
#pragma once

#include "cpu/kernel.h"

namespace inlay {
namespace INLAY_ISA_NS {
namespace {

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

template <class T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<bf16> = true;

template <int64_t kValue>
struct Count {
  static constexpr int64_t value = kValue;
};

template <bool kPairs>
constexpr int64_t kStep = kPairs ? 2 : 1;  // elements of a unit

template <bool kPairs>
inline int64_t units_of(int64_t elements) {
  return (elements + kStep<kPairs> - 1) / kStep<kPairs>;
}
inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// a·b + c, of pairs: a[0]·b[0] + a[1]·b[1] + c
template <bool kPairs>
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs)
    return _mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v));
#endif
  return fma(a, b, c);
}

// --- layouts -------------------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)
alignas(64) constexpr uint16_t kInterleaved[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
inline __m512i in_halves(Vec low, Vec high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v));
}
#endif

// A unit per lane of P or dS: of one key, or of two neighbours.
inline void store_units([[maybe_unused]] float* at, [[maybe_unused]] Vec even, [[maybe_unused]] Vec odd, Count<true>) {
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(at, _mm512_permutexvar_epi16(_mm512_load_si512(kInterleaved), in_halves(even, odd)));
#endif
}
inline void store_units(float* at, Vec even, Vec, Count<false>) { store(at, even); }

// Two keys' own rows, in 16 bits
inline void store_halves([[maybe_unused]] float* even_row, [[maybe_unused]] float* odd_row, [[maybe_unused]] Vec even, [[maybe_unused]] Vec odd) {
#if defined(__AVX512BF16__)
  const __m512i both = in_halves(even, odd);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(even_row), _mm512_castsi512_si256(both));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(odd_row), _mm512_extracti64x4_epi64(both, 1));
#endif
}

// out [count, ld]: `width` elements of each row; what is left of ld is 0
template <bool kPairs, class T, class Source>
inline void pack_rows(float* out, int64_t ld, const Source& rows, int64_t first, int64_t count, int64_t width) {
  for (int64_t r = 0; r < count; ++r) {
    const T* row = rows[first + r];
    float* to = out + r * ld;
    if constexpr (kPairs) {
      memcpy(to, row, size_t(width) * 2);
      memset(reinterpret_cast<char*>(to) + width * 2, 0, size_t(ld * 4 - width * 2));
    } else {
      for_vecs(width, [&](int64_t j, int n) { store_n(to + j, load_n(row + j, n), n); });
      memset(to + width, 0, size_t(ld - width) * 4);
    }
  }
}

// Two rows' elements j.. side by side; a missing row is 0.
template <class T>
inline Vec pair_up(const T* even, const T* odd, int64_t j, int n) {
#if defined(__AVX512BF16__)
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(load_n(even + j, n).v), 16);
  if (!odd) return _mm512_castsi512_ps(low);
  return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_castps_si512(load_n(odd + j, n).v)));
#else
  (void)odd;
  return load_n(even + j, n);
#endif
}

// out [ceil(count / step), ld]; columns from width on are 0
template <bool kPairs, class T, class Source>
inline void pack_groups(float* out, int64_t ld, const Source& rows, int64_t first, int64_t count, int64_t width) {
  for (int64_t r = 0; r < count; r += kStep<kPairs>, out += ld) {
    const T* even = rows[first + r];
    const T* odd = kPairs && r + 1 < count ? rows[first + r + 1] : nullptr;
    for_vecs(width, [&](int64_t j, int n) {
      const Vec units = kPairs ? pair_up(even, odd, j, n) : load_n(even + j, n);
      store(out + j, units);  // a whole Vec: ld is a multiple of it
    });
    for (int64_t j = round_up(width, Vec::kWidth); j < ld; j += Vec::kWidth) store(out + j, Vec(0.0f));
  }
}

#if defined(INLAY_VEC_avx512)
inline void transpose_vecs(Vec (&x)[16]) {
  __m512 a[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  const auto low = [](__m512 p, __m512 q) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(p), _mm512_castps_pd(q)));
  };
  const auto high = [](__m512 p, __m512 q) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(p), _mm512_castps_pd(q)));
  };
  __m512 b[16];  // b[4i + c]: column c of each quarter, rows 4i to 4i + 3
  for (int i = 0; i < 16; i += 4) {
    b[i] = low(a[i], a[i + 2]);
    b[i + 1] = high(a[i], a[i + 2]);
    b[i + 2] = low(a[i + 1], a[i + 3]);
    b[i + 3] = high(a[i + 1], a[i + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512 even01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88), odd01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88),
                 odd23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
    x[c] = _mm512_shuffle_f32x4(even01, even23, 0x88);
    x[4 + c] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    x[8 + c] = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    x[12 + c] = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  }
}
#elif defined(INLAY_VEC_avx2)
inline void transpose_vecs(Vec (&x)[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(x[i].v, x[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    x[c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
    x[4 + c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
  }
}
#else
inline void transpose_vecs(Vec (&)[1]) {}
#endif

// out [units, kLanes...ldo] = in [count, ldi] transposed; both padded to whole Vecs, rows from count on are 0
inline void transpose_units(float* out, int64_t ldo, const float* in, int64_t ldi, int64_t count, int64_t units) {
  constexpr int64_t kW = Vec::kWidth;
  for (int64_t r = 0; r < count; r += kW)
    for (int64_t u = 0; u < units; u += kW) {
      Vec square[kW];
      for (int64_t i = 0; i < kW; ++i) square[i] = r + i < count ? load(in + (r + i) * ldi + u) : Vec(0.0f);
      transpose_vecs(square);
      for (int64_t i = 0; i < kW; ++i) store(out + (u + i) * ldo + r, square[i]);
    }
}

// --- products ------------------------------------------------------------------------------------------------

#if defined(INLAY_VEC_avx512)
constexpr int64_t kTileRows = 6, kTileVecs = 4;  // 24 sums of 32 registers
#elif defined(INLAY_VEC_avx2)
constexpr int64_t kTileRows = 6, kTileVecs = 2;  // 12 sums of 16 registers
#else
constexpr int64_t kTileRows = 4, kTileVecs = 4;
#endif

enum class Start { zero, sum, scaled };  // of c: from nothing, from what is there, from that times factors[row]

// c [M, N Vecs] = start + a·b over `depth` units. Left operand by rows: a[m·lda + k]; kColumns: a[k·lda + m].
template <bool kPairs, bool kColumns, int64_t M, int64_t N>
void multiply_tile(float* c, int64_t ldc, Start start, const float* factors, const float* a, int64_t lda,
                   const float* b, int64_t ldb, int64_t depth) {
  constexpr int64_t kW = Vec::kWidth;
  Vec sums[M][N];
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) sums[m][n] = Vec(0.0f);
  for (int64_t k = 0; k < depth; ++k, b += ldb, a += kColumns ? lda : 1) {
    Vec right[N];
    for (int64_t n = 0; n < N; ++n) right[n] = load(b + n * kW);
    for (int64_t m = 0; m < M; ++m) {
      const Vec left(a[kColumns ? m : m * lda]);
      for (int64_t n = 0; n < N; ++n) sums[m][n] = multiply_add<kPairs>(left, right[n], sums[m][n]);
    }
  }
  const auto finish = [&](auto&& with) {  // c is read last: before the loop, 24 registers of it would be spilled
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < N; ++n) store(c + m * ldc + n * kW, with(m, sums[m][n], c + m * ldc + n * kW));
  };
  if (start == Start::zero) return finish([](int64_t, Vec sum, const float*) { return sum; });
  if (start == Start::sum) return finish([](int64_t, Vec sum, const float* at) { return load(at) + sum; });
  finish([&](int64_t m, Vec sum, const float* at) { return fma(load(at), Vec(factors[m]), sum); });
}

// Calls f(Count<n>{}) for n in [1, kMost].
template <int64_t kMost, class F>
inline void with_count(int64_t n, F&& f) {
  if constexpr (kMost > 1) {
    if (n < kMost) return with_count<kMost - 1>(n, f);
  }
  f(Count<kMost>{});
}

// The same for any number of Vecs and up to kTileRows rows.
template <bool kPairs, bool kColumns>
inline void multiply(float* c, int64_t ldc, Start start, const float* factors, const float* a, int64_t lda,
                     const float* b, int64_t ldb, int64_t depth, int64_t rows, int64_t vecs) {
  with_count<kTileRows>(rows, [&](auto m) {
    for (int64_t v = 0; v < vecs; v += kTileVecs)
      with_count<kTileVecs>(least(vecs - v, kTileVecs), [&](auto n) {
        multiply_tile<kPairs, kColumns, decltype(m)::value, decltype(n)::value>(
            c + v * Vec::kWidth, ldc, start, factors, a, lda, b + v * Vec::kWidth, ldb, depth);
      });
  });
}

}  // namespace
}  // namespace INLAY_ISA_NS
}  // namespace inlay
