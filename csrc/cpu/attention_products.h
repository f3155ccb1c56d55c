// Operands of 32-bit units and their products, for attention.
//
//   rows      [r, units]: a row's elements as they are; a left operand, one unit broadcast at a time
//   channels  [unit, lanes]: rows as columns; the right operand of a product over channels
//   groups    [r / step, width]: `step` neighbouring rows in one unit; the right operand of a product over
//   rows
//
// Arrays of units are arrays of float whatever they hold: they are loaded, stored and broadcast, never
// computed with except by multiply_add.
#pragma once

#include "cpu/kernel.h"
#include "cpu/tiles.h"
#include "cpu/transpose.h"

namespace inlay {
namespace INLAY_ISA_NS {
namespace {

template <class T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<bf16> = true;

template <int64_t kValue>
struct Count {
  static constexpr int64_t value = kValue;
};

#if defined(INLAY_VEC_avx512)
constexpr int64_t kTileRows = 6, kTileVecs = 4;  // 24 sums of 32 registers
#elif defined(INLAY_VEC_avx2)
constexpr int64_t kTileRows = 6, kTileVecs = 2;  // 12 sums of 16 registers
#else
constexpr int64_t kTileRows = 4, kTileVecs = 4;
#endif

// How products are formed: what a unit holds, and what sizes products come in. `kRows` is even: keys are
// paired.
struct Singles {
  static constexpr int64_t kStep = 1;          // elements of a unit
  static constexpr int64_t kRows = kTileRows;  // of the left operand, at most
  static constexpr int64_t kVecs = 1;          // the right operand's width is a multiple of so many Vecs,
  static constexpr int64_t kDepth = 1;         // and the depth of so many units
};
struct Pairs : Singles {
  static constexpr int64_t kStep = 2;
};
struct Squares : Pairs {  // AMX
  static constexpr int64_t kRows = 32, kVecs = 2, kDepth = 16;
};

// What a thread needs for the length of its work.
template <class E>
struct Setup {};
#if defined(INLAY_VEC_amx)
template <>
struct Setup<Squares> {
  Tiles tiles;
};
#endif

template <class E>
constexpr bool kPaired = E::kStep == 2;

template <class E>
inline int64_t units_of(int64_t elements) {
  return (elements + E::kStep - 1) / E::kStep;
}
inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// a·b + c, of pairs: a[0]·b[0] + a[1]·b[1] + c
template <class E>
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512BF16__)
  if constexpr (kPaired<E>)
    return _mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v));
#endif
  return fma(a, b, c);
}

// --- layouts
// -------------------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)
alignas(64) constexpr uint16_t kInterleaved[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                   21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                   11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
inline __m512i in_halves(Vec low, Vec high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v));
}
#endif

// A unit per lane of P or dS: of one key, or of two neighbours.
inline void store_units([[maybe_unused]] float* at, [[maybe_unused]] Vec even, [[maybe_unused]] Vec odd,
                        Pairs) {
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(at, _mm512_permutexvar_epi16(_mm512_load_si512(kInterleaved), in_halves(even, odd)));
#endif
}
inline void store_units(float* at, Vec even, Vec, Singles) { store(at, even); }

// Two keys' own rows, in 16 bits
inline void store_halves([[maybe_unused]] float* even_row, [[maybe_unused]] float* odd_row,
                         [[maybe_unused]] Vec even, [[maybe_unused]] Vec odd) {
#if defined(__AVX512BF16__)
  const __m512i both = in_halves(even, odd);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(even_row), _mm512_castsi512_si256(both));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(odd_row), _mm512_extracti64x4_epi64(both, 1));
#endif
}

// out [count, ld]: `width` elements of each row; what is left of ld is 0
template <class E, class T, class Source>
inline void pack_rows(float* out, int64_t ld, const Source& rows, int64_t first, int64_t count,
                      int64_t width) {
  auto cursor = rows.from(first);
  for (int64_t r = 0; r < count; ++r) {
    const T* row = cursor.next();
    float* to = out + r * ld;
    if constexpr (kPaired<E>) {
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

// out [`units`, ld]; what is beyond the rows and columns given is 0
template <class E, class T, class Source>
inline void pack_groups(float* out, int64_t ld, const Source& rows, int64_t first, int64_t count,
                        int64_t width, int64_t units) {
  auto cursor = rows.from(first);
  for (int64_t r = 0; r < count; r += E::kStep) {
    const T* even = cursor.next();
    const T* odd = kPaired<E> && r + 1 < count ? cursor.next() : nullptr;
    float* to = out + r / E::kStep * ld;
    for_vecs(width, [&](int64_t j, int n) {  // stores whole Vecs: ld is a multiple of them
      store(to + j, kPaired<E> ? pair_up(even, odd, j, n) : load_n(even + j, n));
    });
    for (int64_t j = round_up(width, Vec::kWidth); j < ld; j += Vec::kWidth) store(to + j, Vec(0.0f));
  }
  const int64_t used = units_of<E>(count);
  memset(out + used * ld, 0, size_t((units - used) * ld) * 4);
}

// out [units, lanes] = in [count, units] transposed; lanes and units are whole Vecs, lanes from count on are
// 0
inline void transpose_units(float* out, int64_t ldo, const float* in, int64_t ldi, int64_t count,
                            int64_t lanes, int64_t units) {
  constexpr int64_t kW = Vec::kWidth;
  for (int64_t r = 0; r < lanes; r += kW)
    for (int64_t u = 0; u < units; u += kW) {
      Vec square[kW];
      for (int64_t i = 0; i < kW; ++i) square[i] = r + i < count ? load(in + (r + i) * ldi + u) : Vec(0.0f);
      transpose_vecs(square);
      for (int64_t i = 0; i < kW; ++i) store(out + (u + i) * ldo + r, square[i]);
    }
}

// --- products
// ------------------------------------------------------------------------------------------------

enum class Start {
  zero,
  sum,
  scaled
};  // of c: from nothing, from what is there, from that times factors[row]

// c [M, N Vecs] = start + a·b over `depth` units. Left operand by rows: a[m·lda + k]; kColumns: a[k·lda + m].
template <class E, bool kColumns, int64_t M, int64_t N>
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
      for (int64_t n = 0; n < N; ++n) sums[m][n] = multiply_add<E>(left, right[n], sums[m][n]);
    }
  }
  const auto finish =
      [&](auto&& with) {  // c is read last: before the loop, 24 registers of it would be spilled
        for (int64_t m = 0; m < M; ++m)
          for (int64_t n = 0; n < N; ++n)
            store(c + m * ldc + n * kW, with(m, sums[m][n], c + m * ldc + n * kW));
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

template <bool kColumns>
struct Left {
  const float* units;
  int64_t ld;
};
using ByRows = Left<false>;
using ByColumns = Left<true>;

// The same for up to E::kRows rows and any number of Vecs.
template <class E, bool kColumns>
inline void multiply(E, float* c, int64_t ldc, Start start, const float* factors, Left<kColumns> a,
                     const float* b, int64_t ldb, int64_t depth, int64_t rows, int64_t vecs) {
  with_count<kTileRows>(rows, [&](auto m) {
    for (int64_t v = 0; v < vecs; v += kTileVecs)
      with_count<kTileVecs>(least(vecs - v, kTileVecs), [&](auto n) {
        multiply_tile<E, kColumns, decltype(m)::value, decltype(n)::value>(
            c + v * Vec::kWidth, ldc, start, factors, a.units, a.ld, b + v * Vec::kWidth, ldb, depth);
      });
  });
}

#if defined(INLAY_VEC_amx)
// On tiles all E::kRows rows are read and written, whatever `rows` says.
inline void multiply(Squares, float* c, int64_t ldc, Start start, const float* factors, ByRows a,
                     const float* b, int64_t ldb, int64_t depth, int64_t rows, int64_t vecs) {
  if (start == Start::scaled)
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t v = 0; v < vecs * Vec::kWidth; v += Vec::kWidth)
        store(c + m * ldc + v, load(c + m * ldc + v) * Vec(factors[m]));
  for (int64_t v = 0; v < vecs * Vec::kWidth; v += kSquare)
    square(c + v, ldc, start != Start::zero, reinterpret_cast<const uint16_t*>(a.units), 2 * a.ld,
           reinterpret_cast<const uint16_t*>(b + v), 2 * ldb, depth / Squares::kDepth);
}
inline void multiply(Squares e, float* c, int64_t ldc, Start start, const float* factors, ByColumns a,
                     const float* b, int64_t ldb, int64_t depth, int64_t rows, int64_t vecs) {
  alignas(64) float turned[Squares::kRows * Squares::kRows];  // depth is at most that of a block of 64 keys
  transpose_units(turned, Squares::kRows, a.units, a.ld, depth, depth, Squares::kRows);
  multiply(e, c, ldc, start, factors, ByRows{turned, Squares::kRows}, b, ldb, depth, rows, vecs);
}
#endif

}  // namespace
}  // namespace INLAY_ISA_NS
}  // namespace inlay
