// Operands of a product as pairs of bf16 along its contraction: row p of a panel holds, for each of its
// columns j, the numbers 2p and 2p + 1 of column j, as vdpbf16ps takes them.
#pragma once

#include "cpu/kernel.h"

#if defined(__AVX512BF16__)

namespace inlay {
namespace INLAY_ISA_NS {
namespace {

constexpr int64_t kPanel = 32;  // columns of a panel: two registers
constexpr int64_t kPer = 2;     // numbers of the contraction in a word of 32 bits
// 14 x 2 sums, two registers of the panel and one of a left operand: 31 of 32. 28 products hide 16 loads.
constexpr int kStrip = 14;
using Number = uint16_t;  // of a strip
using Word = uint32_t;    // of a panel

inline __m512bh as_pairs(__m512i bits) { return reinterpret_cast<__m512bh>(bits); }
inline __m512i as_bits(__m512bh pairs) { return reinterpret_cast<__m512i>(pairs); }
inline __mmask32 first_words(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1; }

// Rows of a weight lie too far apart for the hardware to fetch the next ones itself: how far ahead they are
// asked for, in numbers of a row (four cache lines) and in rows.
constexpr int64_t kAheadAlong = 128, kAheadAcross = 24;

// What an operand is stored in: load(r, c, n) is n ≤ 32 neighbours of a stored row, as bf16, and zeros behind
// them.
struct Words16 {
  const uint16_t* data;
  int64_t stride;
  __m512i load(int64_t r, int64_t c, int64_t n) const {
    return _mm512_maskz_loadu_epi16(first_words(n), data + r * stride + c);
  }
  void fetch(int64_t r, int64_t c) const {
    _mm_prefetch(reinterpret_cast<const char*>(data + r * stride + c), _MM_HINT_T0);
  }
};

// The same where row r is stored as rows[r].
struct Gathered16 {
  const uint16_t* data;
  int64_t stride;
  const int64_t* rows;
  __m512i load(int64_t r, int64_t c, int64_t n) const {
    return _mm512_maskz_loadu_epi16(first_words(n), data + rows[r] * stride + c);
  }
  void fetch(int64_t, int64_t) const {}  // the rows ahead may be none
};

// An fp32 operand takes part as two of bf16, hi + lo: 16 bits of its 24, where what it is summed into
// keeps 8.
struct Halves {
  const float* data;
  int64_t stride;
  bool low;
  void fetch(int64_t, int64_t) const {}  // they are small
  __m512i load(int64_t r, int64_t c, int64_t n) const {
    const float* p = data + r * stride + c;
    const __m512 left = _mm512_maskz_loadu_ps(first(n < 16 ? int(n) : 16), p);
    const __m512 right = n > 16 ? _mm512_maskz_loadu_ps(first(int(n) - 16), p + 16) : _mm512_setzero_ps();
    const __m512i high = as_bits(_mm512_cvtne2ps_pbh(right, left));
    if (!low) return high;
    const auto rest = [&](__m512 x, int half) {
      const __m256i words = half ? _mm512_extracti64x4_epi64(high, 1) : _mm512_castsi512_si256(high);
      return _mm512_sub_ps(x, widen(words, bf16{}).v);
    };
    return as_bits(_mm512_cvtne2ps_pbh(rest(right, 1), rest(left, 0)));
  }
};

// 16 rows of 16 words of 32 bits, turned.
inline void transpose(__m512i (&rows)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Numbers [k, k + depth) of columns [j, j + width) of an operand whose stored rows are its columns (W of y =
// x·Wᵀ), into `out`, whose rows are `ld` words apart. Zeros fill what `width` leaves of 16 columns, and an
// odd depth's last pair.
template <class Source>
void pack_along(uint32_t* out, int64_t ld, const Source& source, int64_t j, int64_t width, int64_t k,
                int64_t depth) {
  for (int64_t c = 0; c < width; c += 16) {
    for (int64_t d = 0; d < depth; d += 32) {
      const int64_t count = depth - d < 32 ? depth - d : 32;
      __m512i rows[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        rows[i] = c + i < width ? source.load(j + c + i, k + d, count) : _mm512_setzero_si512();
        if (c + i < width) source.fetch(j + c + i, k + d + kAheadAlong);
      }
      transpose(rows);
      uint32_t* to = out + d / 2 * ld + c;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (2 * i < count) _mm512_store_si512(to + i * ld, rows[i]);
    }
  }
}

// The same of an operand whose stored rows run across its columns (W of dx = dy·W).
template <class Source>
void pack_across(uint32_t* out, int64_t ld, const Source& source, int64_t j, int64_t width, int64_t k,
                 int64_t depth) {
  alignas(64) uint16_t order[2][32];
  for (int i = 0; i < 32; ++i) {
    order[0][i] = uint16_t(i / 2 + i % 2 * 32);  // number i / 2 of the one row, or of the other
    order[1][i] = uint16_t(order[0][i] + 16);
  }
  const __m512i left = _mm512_load_si512(order[0]), right = _mm512_load_si512(order[1]);
  for (int64_t d = 0; d < depth; d += 2, out += ld) {
    source.fetch(k + d + kAheadAcross, j);
    source.fetch(k + d + kAheadAcross + 1, j);
    const __m512i even = source.load(k + d, j, width);
    const __m512i odd = d + 1 < depth ? source.load(k + d + 1, j, width) : _mm512_setzero_si512();
    _mm512_store_si512(out, _mm512_permutex2var_epi16(even, left, odd));
    if (width > 16) _mm512_store_si512(out + 16, _mm512_permutex2var_epi16(even, right, odd));
  }
}

// A left operand [M, depth] or a right one [depth, N]. `along`: neighbours in memory follow the contraction.
// `rows`, of one of 16 bits: where its rows are stored; or none, in order.
struct Operand {
  const void* data;
  int64_t stride, depth;
  bool along, wide, low;
  const int64_t* rows = nullptr;

  const uint16_t* row16(int64_t r) const {
    return static_cast<const uint16_t*>(data) + (rows ? rows[r] : r) * stride;
  }
  template <class F>
  void source(F&& f) const {
    if (wide) return f(Halves{static_cast<const float*>(data), stride, low});
    if (rows) return f(Gathered16{static_cast<const uint16_t*>(data), stride, rows});
    f(Words16{static_cast<const uint16_t*>(data), stride});
  }
  void pack(Word* out, int64_t ld, int64_t j, int64_t width, int64_t k, int64_t count) const {
    source([&](const auto& words) {
      if (along) return pack_along(out, ld, words, j, width, k, count);
      pack_across(out, ld, words, j, width, k, count);
    });
  }
  // Numbers [k, k + count) of row m, of bf16 that lie along; a zero behind an odd count.
  void copy(Number* to, int64_t m, int64_t k, int64_t count) const {
    const uint16_t* from = row16(m) + k;
    for (int64_t i = 0; i < count; i += 32)
      _mm512_mask_storeu_epi16(to + i, first_words(count - i),
                               _mm512_maskz_loadu_epi16(first_words(count - i), from + i));
    if (count % 2) to[count] = 0;
  }
};

// Left operand of a strip: word p of row r at data[r·row + p·step].
struct Strip {
  const Number* data;
  int64_t row, step;
};

// to[r] (+)= strip[r] · panel over `words` words; Wide: both registers of the panel's columns, or the first.
template <int Rows, bool Wide>
void tile(float* to, int64_t ld, bool add, Strip strip, const uint32_t* panel, int64_t words) {
  __m512 sums[Rows][2];
#pragma GCC unroll 14
  for (int r = 0; r < Rows; ++r) {
    sums[r][0] = add ? _mm512_loadu_ps(to + r * ld) : _mm512_setzero_ps();
    sums[r][1] = Wide && add ? _mm512_loadu_ps(to + r * ld + 16) : _mm512_setzero_ps();
  }
  const uint16_t *third = strip.data + 3 * strip.row, *sixth = third + 3 * strip.row,
                 *ninth = sixth + 3 * strip.row, *twelfth = ninth + 3 * strip.row;
  for (int64_t p = 0; p < words; ++p, panel += kPanel) {
    const __m512i one = _mm512_load_si512(panel), two = _mm512_load_si512(panel + 16);
#pragma GCC unroll 14
    for (int r = 0; r < Rows; ++r) {
      // Every third row has a pointer of its own: more addresses than that would not fit in registers.
      const uint16_t* const thirds[] = {strip.data, third, sixth, ninth, twelfth};
      int32_t bits;
      memcpy(&bits, thirds[r / 3] + r % 3 * strip.row, 4);
      const __m512i pair = _mm512_set1_epi32(bits);
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], as_pairs(pair), as_pairs(one));
      if (Wide) sums[r][1] = _mm512_dpbf16_ps(sums[r][1], as_pairs(pair), as_pairs(two));
    }
    strip.data += strip.step;
    third += strip.step;
    sixth += strip.step;
    ninth += strip.step;
    twelfth += strip.step;
  }
#pragma GCC unroll 14
  for (int r = 0; r < Rows; ++r) {
    _mm512_storeu_ps(to + r * ld, sums[r][0]);
    if (Wide) _mm512_storeu_ps(to + r * ld + 16, sums[r][1]);
  }
}

}  // namespace
}  // namespace INLAY_ISA_NS
}  // namespace inlay

#endif
