// Operands of a product in fp32, whatever they are stored in: row k of a panel holds number k of each of its
// columns. What panels.h is on CPUs without pairs of bf16.
#pragma once

#include "cpu/kernel.h"
#include "cpu/transpose.h"

namespace inlay {
namespace INLAY_ISA_NS {
namespace {

constexpr int64_t kLanes = Vec::kWidth;
constexpr int64_t kPanel = 2 * kLanes;  // columns of a panel: two registers
constexpr int64_t kPer = 1;             // numbers of the contraction in a word of 32 bits
// Rows of a strip: two sums each, two registers of the panel and one of a left operand are 31 of AVX-512's 32
// registers and 15 of AVX2's 16.
constexpr int kStrip = kLanes == 16 ? 14 : 6;
using Number = float;  // of a strip
using Word = float;    // of a panel

// A left operand [M, depth] or a right one [depth, N]. `along`: neighbours in memory follow the contraction.
struct Operand {
  const void* data;
  int64_t stride, depth;
  bool along, wide, low;

  template <class F>
  void source(F&& f) const {
    if (wide) return f(static_cast<const float*>(data));
    f(static_cast<const bf16*>(data));
  }

  // Numbers [k, k + count) of columns [j, j + width) into `out`, whose rows are `ld` words apart. Zeros fill
  // what `width` leaves of a register.
  void pack(Word* out, int64_t ld, int64_t j, int64_t width, int64_t k, int64_t count) const {
    source([&](const auto* from) {
      if (along) return pack_along(out, ld, from + j * stride + k, width, count);
      pack_across(out, ld, from + k * stride + j, width, count);
    });
  }

  // Numbers [k, k + count) of row m of an operand that lies along.
  void copy(Number* to, int64_t m, int64_t k, int64_t count) const {
    source([&](const auto* from) {
      from += m * stride + k;
      for_vecs(count, [&](int64_t i, int n) { store_n(to + i, load_n(from + i, n), n); });
    });
  }

  template <class T>
  void pack_along(Word* out, int64_t ld, const T* from, int64_t width, int64_t count) const {
    for (int64_t c = 0; c < width; c += kLanes)
      for_vecs(count, [&](int64_t d, int n) {
        Vec rows[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
          rows[i] = c + i < width ? load_n(from + (c + i) * stride + d, n) : Vec(0.0f);
        transpose_vecs(rows);
        for (int i = 0; i < n; ++i) store(out + (d + i) * ld + c, rows[i]);
      });
  }

  template <class T>
  void pack_across(Word* out, int64_t ld, const T* from, int64_t width, int64_t count) const {
    for (int64_t d = 0; d < count; ++d, out += ld, from += stride)
      for_vecs(width, [&](int64_t c, int n) { store(out + c, load_n(from + c, n)); });
  }
};

// Left operand of a strip: word p of row r at data[r·row + p·step].
struct Strip {
  const Number* data;
  int64_t row, step;
};

// to[r] (+)= strip[r] · panel over `words` words; Wide: both registers of the panel's columns, or the first.
template <int Rows, bool Wide>
void tile(float* to, int64_t ld, bool add, Strip strip, const Word* panel, int64_t words) {
  Vec sums[Rows][2];
#pragma GCC unroll 14
  for (int r = 0; r < Rows; ++r) {
    sums[r][0] = add ? load(to + r * ld) : Vec(0.0f);
    sums[r][1] = Wide && add ? load(to + r * ld + kLanes) : Vec(0.0f);
  }
  const float *third = strip.data + 3 * strip.row, *sixth = third + 3 * strip.row,
              *ninth = sixth + 3 * strip.row, *twelfth = ninth + 3 * strip.row;
  for (int64_t p = 0; p < words; ++p, panel += kPanel) {
    const Vec one = load(panel), two = load(panel + kLanes);
#pragma GCC unroll 14
    for (int r = 0; r < Rows; ++r) {
      const float* const thirds[] = {strip.data, third, sixth, ninth, twelfth};  // as in panels.h
      const Vec number(thirds[r / 3][r % 3 * strip.row]);
      sums[r][0] = fma(number, one, sums[r][0]);
      if (Wide) sums[r][1] = fma(number, two, sums[r][1]);
    }
    strip.data += strip.step;
    third += strip.step;
    sixth += strip.step;
    ninth += strip.step;
    twelfth += strip.step;
  }
#pragma GCC unroll 14
  for (int r = 0; r < Rows; ++r) {
    store(to + r * ld, sums[r][0]);
    if (Wide) store(to + r * ld + kLanes, sums[r][1]);
  }
}

}  // namespace
}  // namespace INLAY_ISA_NS
}  // namespace inlay
