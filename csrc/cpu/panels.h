// Operands of a product as pairs of bf16 along its contraction: row p of a panel holds, for each of its
// columns j, the numbers 2p and 2p + 1 of column j, as vdpbf16ps takes them.
#pragma once

#include "cpu/kernel.h"

#if defined(__AVX512BF16__)

namespace inlay {
namespace INLAY_ISA_NS {
namespace {

constexpr int64_t kPanel = 32;  // columns of a panel: two registers

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

}  // namespace
}  // namespace INLAY_ISA_NS
}  // namespace inlay

#endif
