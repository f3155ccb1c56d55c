// out = round(Σ_i left_i·right_i + bias) with products of 8 bits: each operand is rounded to a scale per row
// (left) or per column (right), products and their sums are whole numbers. Tiles, panels and groups are those
// of product.h.
#include "cpu/finish.h"
#include "cpu/product.h"
#include "cpu/quads.h"

namespace inlay {
namespace INLAY_ISA_NS {

#if !defined(__AVX512VNNI__)

void int8_matmul_sum(const TensorView& out, const TensorList&, const TensorList&, const TensorView&, bool) {
  fail("int8_matmul_sum", "instruction set", "avx512_bf16", out, "use the reference on this machine");
}

#else

namespace {

// Sums in a tile. __m512i may alias anything, for which GCC 12 writes each of them to memory at every step.
typedef int Whole __attribute__((vector_size(64)));

// place (+)= one register of sums, whole numbers, in the units of their operands
inline void scaled(float* place, bool add, Whole sums, const Columns& columns, int64_t at, float scale) {
  const __m512i products = _mm512_sub_epi32(__m512i(sums), _mm512_load_si512(columns.offset + at));
  const __m512 unit = _mm512_mul_ps(_mm512_load_ps(columns.scale + at), _mm512_set1_ps(scale));
  const __m512 before = add ? _mm512_loadu_ps(place) : _mm512_setzero_ps();
  _mm512_storeu_ps(place, _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), unit, before));
}

// to[r] (+)= scaled sums of strip[r] · panel over `quads` words of four bytes
template <int Rows, bool Wide>
void tile8(float* to, bool add, const uint8_t* strip, int64_t row, const float* scale, const uint32_t* panel,
           const Columns& columns, int64_t quads) {
  Whole sums[Rows][2];
#pragma GCC unroll 14
  for (int r = 0; r < Rows; ++r) sums[r][0] = sums[r][1] = Whole{};
  const uint8_t *third = strip + 3 * row, *sixth = third + 3 * row, *ninth = sixth + 3 * row,
                *twelfth = ninth + 3 * row;
  for (int64_t q = 0; q < 4 * quads; q += 4, panel += kPanel) {
    const __m512i one = _mm512_load_si512(panel), two = _mm512_load_si512(panel + 16);
#pragma GCC unroll 14
    for (int r = 0; r < Rows; ++r) {
      const uint8_t* const thirds[] = {strip, third, sixth, ninth, twelfth};  // as in product.h
      int32_t bits;
      memcpy(&bits, thirds[r / 3] + r % 3 * row + q, 4);
      const __m512i four = _mm512_set1_epi32(bits);
      sums[r][0] = Whole(_mm512_dpbusd_epi32(__m512i(sums[r][0]), four, one));
      if (Wide) sums[r][1] = Whole(_mm512_dpbusd_epi32(__m512i(sums[r][1]), four, two));
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < Rows; ++r) {
    scaled(to + r * kPanel, add, sums[r][0], columns, 0, scale[r]);
    if (Wide) scaled(to + r * kPanel + 16, add, sums[r][1], columns, 16, scale[r]);
  }
}

template <int Rows = kStrip>
void tile8_of(int rows, bool wide, float* to, bool add, const uint8_t* strip, int64_t row, const float* scale,
              const uint32_t* panel, const Columns& columns, int64_t quads) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return tile8_of<Rows - 1>(rows, wide, to, add, strip, row, scale, panel, columns, quads);
  }
  (wide ? tile8<Rows, true> : tile8<Rows, false>)(to, add, strip, row, scale, panel, columns, quads);
}

// One pair of operands: the left one in 8 bits, the right one as it is.
struct Pair {
  Bytes* left;
  const uint16_t* right;
  int64_t stride;
  bool along;
  int64_t words;  // of 32 bits, of a panel

  void pack(uint32_t* out, Columns& columns, float* space, int64_t j, int64_t width) const {
    (along ? quads_along : quads_across)(out, columns, space, right, stride, j, width, left->depth);
  }
};

struct Pairs {
  Pair items[kMostOperands];
  int64_t count = 0, words = 0, space = 0;

  Pairs(const TensorList& lefts, const TensorList& rights) : count(lefts.size) {
    for (int64_t i = 0; i < count; ++i) {
      const TensorView &left = lefts.items[i], &right = rights.items[i];
      const bool along = right.strides[0] == 1 || right.shape[0] == 1;
      auto* bytes = new Bytes(left.shape[0], left.shape[1]);
      parallel_for(left.shape[0], left.shape[1],
                   [&](int64_t m) { bytes->fill(m, row<const uint16_t>(left, m)); });
      items[i] = {bytes, data<const uint16_t>(right), right.strides[along ? 1 : 0], along,
                  turned(left.shape[1]) / 4 * kPanel};
      words += items[i].words;
      space = space < space_of(left.shape[1]) ? space_of(left.shape[1]) : space;
    }
  }
  ~Pairs() {
    for (int64_t i = 0; i < count; ++i) delete items[i].left;
  }
  Pairs(const Pairs&) = delete;
  Pairs& operator=(const Pairs&) = delete;
};

void strips_by_group(const Pairs& pairs, const Rectangle& part, int64_t g, int64_t count,
                     const uint32_t* panels, const Columns* columns, const Finish& finish) {
  const int64_t height = part.bottom - part.top, strips = (height + kStrip - 1) / kStrip;
  alignas(64) float sums[kStrip * kPanel];
  for (int64_t s = 0; s < strips; ++s) {
    const int64_t m = part.top + s * height / strips;
    const int rows = int(part.top + (s + 1) * height / strips - m);
    for (int64_t p = 0; p < count; ++p) {
      const int64_t width = width_of(part, g + p);
      const uint32_t* panel = panels + p * pairs.words;
      for (int64_t i = 0; i < pairs.count; ++i) {
        const Pair& pair = pairs.items[i];
        tile8_of(rows, width > 16, sums, i > 0, pair.left->row(m), pair.left->ld, pair.left->scale() + m,
                 panel, columns[p * pairs.count + i], pair.words / kPanel);
        panel += pair.words;
      }
      finish(m, rows, (g + p) * kPanel, width, sums, kPanel);
    }
  }
}

void rectangle_of(const Pairs& pairs, const Rectangle& part, const Finish& finish) {
  const int64_t group = Workspace::clamp(kGroupBytes / (pairs.words * 4), part.last - part.first);
  const Aligned panels(group * pairs.words * 4), columns(group * pairs.count * int64_t(sizeof(Columns)));
  const Aligned space(pairs.space);
  auto* words = reinterpret_cast<uint32_t*>(panels.start);
  auto* scales = reinterpret_cast<Columns*>(columns.start);
  for (int64_t g = part.first; g < part.last; g += group) {
    const int64_t count = part.last - g < group ? part.last - g : group;
    for (int64_t p = 0; p < count; ++p) {
      uint32_t* panel = words + p * pairs.words;
      for (int64_t i = 0; i < pairs.count; ++i) {
        pairs.items[i].pack(panel, scales[p * pairs.count + i], reinterpret_cast<float*>(space.start),
                            (g + p) * kPanel, width_of(part, g + p));
        panel += pairs.items[i].words;
      }
    }
    strips_by_group(pairs, part, g, count, words, scales, finish);
  }
}

}  // namespace

void int8_matmul_sum(const TensorView& out, const TensorList& lefts, const TensorList& rights,
                     const TensorView& bias, bool add) {
  const Pairs pairs(lefts, rights);
  const Finish finish{out, bias, add};
  in_rectangles(out.shape[0], out.shape[1], pairs.words / kPanel,
                [&](const Rectangle& part) { rectangle_of(pairs, part, finish); });
}

#endif

}  // namespace INLAY_ISA_NS
}  // namespace inlay
