// out = Σ_i left_i·right_i of bf16 pairs on AVX-512, fp32 sums, for many rows.
//
//   strip   up to 14 rows of the left operands: they stay near while all panels of a group pass by
//   panel   32 columns of the right operands, packed (panels.h)
//   group   panels that fit in L2 together: packed once, used by every strip
//
// Packing costs some 10 instructions for 32 numbers that M rows multiply by, so nothing packed outlives a
// call. A sum runs over its whole contraction in one order, whatever the sizes of strips and groups and the
// number of threads.
#pragma once

#include "cpu/panels.h"

#if defined(__AVX512BF16__)

namespace inlay {
namespace INLAY_ISA_NS {
namespace {

// 14 x 2 sums, two registers of the panel and one of a left operand: 31 of 32. 28 products hide 16 loads.
constexpr int kStrip = 14;
// Packed panels at a time: less than half of an L2 of 1 MiB, since strips need a share of it, too.
constexpr int64_t kGroupBytes = 512 << 10;
// Longest stretch of the contraction that is packed: 128 KiB of a panel. Sums of a longer one wait in memory.
constexpr int64_t kDepth = 2048;
// And the longest that a strip is used of before the next panel: 24 KiB of a strip, in an L1 of 32.
constexpr int64_t kNear = 896;
// Operands that one sum can have; each fp32 one counts as two.
constexpr int kMostOperands = 32;

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
  void pack(uint32_t* out, int64_t ld, int64_t j, int64_t width, int64_t k, int64_t count) const {
    source([&](const auto& words) {
      if (along) return pack_along(out, ld, words, j, width, k, count);
      pack_across(out, ld, words, j, width, k, count);
    });
  }
};

struct Operands {
  Operand left[kMostOperands], right[kMostOperands];
  int64_t start[kMostOperands + 1] = {};  // where each begins in the whole contraction: at even places
  int count = 0;

  void add(const Operand& l, const Operand& r) {
    left[count] = l;
    right[count] = r;
    start[count + 1] = start[count] + (l.depth + 1) / 2 * 2;
    ++count;
  }
  int64_t depth() const { return start[count]; }

  // f(i, k, depth, place): the part of operand i that lies in [from, to) of the contraction, `place` behind
  // `from`
  template <class F>
  void for_parts(int64_t from, int64_t to, F&& f) const {
    for (int i = 0; i < count; ++i) {
      const int64_t begin = from > start[i] ? from : start[i];
      const int64_t last = start[i] + left[i].depth, end = to < last ? to : last;
      if (begin < end) f(i, begin - start[i], end - begin, begin - from);
    }
  }
  bool lefts_along() const {
    for (int i = 0; i < count; ++i)
      if (!left[i].along) return false;
    return true;
  }
};

// Left operand of a strip: pair p of row r at data[r·row + p·pair].
struct Strip {
  const uint16_t* data;
  int64_t row, pair;
};

// to[r] (+)= strip[r] · panel over `pairs` pairs; Wide: both registers of the panel's columns, or the first.
template <int Rows, bool Wide>
void tile(float* to, int64_t ld, bool add, Strip strip, const uint32_t* panel, int64_t pairs) {
  __m512 sums[Rows][2];
#pragma GCC unroll 14
  for (int r = 0; r < Rows; ++r) {
    sums[r][0] = add ? _mm512_loadu_ps(to + r * ld) : _mm512_setzero_ps();
    sums[r][1] = Wide && add ? _mm512_loadu_ps(to + r * ld + 16) : _mm512_setzero_ps();
  }
  const uint16_t *third = strip.data + 3 * strip.row, *sixth = third + 3 * strip.row,
                 *ninth = sixth + 3 * strip.row, *twelfth = ninth + 3 * strip.row;
  for (int64_t p = 0; p < pairs; ++p, panel += kPanel) {
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
    strip.data += strip.pair;
    third += strip.pair;
    sixth += strip.pair;
    ninth += strip.pair;
    twelfth += strip.pair;
  }
#pragma GCC unroll 14
  for (int r = 0; r < Rows; ++r) {
    _mm512_storeu_ps(to + r * ld, sums[r][0]);
    if (Wide) _mm512_storeu_ps(to + r * ld + 16, sums[r][1]);
  }
}

template <int Rows = kStrip>
void tile_of(int rows, bool wide, float* to, int64_t ld, bool add, Strip strip, const uint32_t* panel,
             int64_t pairs) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return tile_of<Rows - 1>(rows, wide, to, ld, add, strip, panel, pairs);
  }
  (wide ? tile<Rows, true> : tile<Rows, false>)(to, ld, add, strip, panel, pairs);
}

// Numbers from row to row of a copied strip: an odd number of cache lines, so that 14 rows meet in no set of
// a cache. Where rows lie 18 lines apart, as those of 576 numbers do, products run at nine tenths of their
// speed.
inline int64_t odd_lines(int64_t numbers) { return (numbers + 31) / 64 * 64 + 32; }

inline void copy_words(uint16_t* to, const uint16_t* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 32)
    _mm512_mask_storeu_epi16(to + i, first_words(count - i),
                             _mm512_maskz_loadu_epi16(first_words(count - i), from + i));
}

// Rows of left operands in [from, to) of the contraction: where they lie, or copied together into `room`.
inline Strip strip_of(const Operands& all, int64_t m, int rows, int64_t from, int64_t to, uint16_t* room) {
  if (!all.lefts_along()) {
    all.for_parts(from, to, [&](int i, int64_t k, int64_t depth, int64_t place) {
      all.left[i].pack(reinterpret_cast<uint32_t*>(room) + place / 2 * 16, 16, m, rows, k, depth);
    });
    return {room, 2, 32};
  }
  const int64_t ld = odd_lines(to - from);
  all.for_parts(from, to, [&](int i, int64_t k, int64_t depth, int64_t place) {
    for (int r = 0; r < rows; ++r) {
      uint16_t* row = room + r * ld + place;
      copy_words(row, all.left[i].row16(m + r) + k, depth);
      if (depth % 2) row[depth] = 0;
    }
  });
  return {room, ld, 2};
}

// A rectangle of the output that one thread computes: panels [first, last) of columns, rows [top, bottom).
struct Rectangle {
  int64_t first, last, top, bottom, columns;
};

// [0, size) in equal steps of even length, each at most `most`.
struct Steps {
  int64_t count, length;
  Steps(int64_t size, int64_t most)
      : count((size + most - 1) / most), length(((size + count - 1) / count + 1) / 2 * 2) {}
};

// What a thread works with: packed panels, room for a strip, and sums of all columns of a group, of one strip
// or, where the contraction is packed in several stretches, of all.
struct Workspace {
  const Steps stretches;
  const int64_t group, ld;
  const Aligned panels, room, sums;
  Workspace(int64_t depth, int64_t most, int64_t height)
      : stretches(depth, kDepth),
        group(clamp(kGroupBytes / (stretches.length * 2 * kPanel), most)),
        ld(group * kPanel),
        panels(group * stretches.length * 2 * kPanel),
        room(kStrip * (stretches.length + 64) * 4),
        sums((stretches.count > 1 ? height : kStrip) * ld * 4) {}
  static int64_t clamp(int64_t fit, int64_t most) { return fit < 1 ? 1 : fit < most ? fit : most; }
  uint32_t* panel(int64_t p) const {
    return reinterpret_cast<uint32_t*>(panels.start) + p * stretches.length / 2 * kPanel;
  }
};

inline int64_t width_of(const Rectangle& part, int64_t panel) {
  const int64_t rest = part.columns - panel * kPanel;
  return rest < kPanel ? rest : kPanel;
}

// Panels [g, g + count) of [from, to) of the contraction
inline void pack_group(const Operands& all, const Rectangle& part, const Workspace& work, int64_t g,
                       int64_t count, int64_t from, int64_t to) {
  for (int64_t p = 0; p < count; ++p)
    all.for_parts(from, to, [&](int i, int64_t k, int64_t depth, int64_t place) {
      all.right[i].pack(work.panel(p) + place / 2 * kPanel, kPanel, (g + p) * kPanel, width_of(part, g + p),
                        k, depth);
    });
}

// One strip by the packed panels of a group; store(p, sums) where a panel's sums are whole.
template <class Store>
void strip_by_group(const Rectangle& part, const Workspace& work, const Strip& strip, int rows, float* sums,
                    bool add, int64_t g, int64_t count, int64_t pairs, Store&& store) {
  const Steps steps(2 * pairs, kNear);
  for (int64_t near = 0; near < pairs; near += steps.length / 2) {
    const int64_t here = pairs - near < steps.length / 2 ? pairs - near : steps.length / 2;
    const Strip from{strip.data + near * strip.pair, strip.row, strip.pair};
    for (int64_t p = 0; p < count; ++p) {
      float* to = steps.count > 1 || work.stretches.count > 1 ? sums + p * kPanel : sums;
      tile_of(rows, width_of(part, g + p) > 16, to, work.ld, add || near, from, work.panel(p) + near * kPanel,
              here);
      if (near + here == pairs) store(p, to);
    }
  }
}

// store(m, rows, j, width, sums, ld) for each tile of the rectangle
template <class Store>
void product_of(const Operands& all, const Rectangle& part, Store&& store) {
  const int64_t depth = all.depth(), height = part.bottom - part.top, strips = (height + kStrip - 1) / kStrip;
  const Workspace work(depth, part.last - part.first, height);
  for (int64_t g = part.first; g < part.last; g += work.group) {
    const int64_t count = part.last - g < work.group ? part.last - g : work.group;
    for (int64_t from = 0; from < depth; from += work.stretches.length) {
      const int64_t to = from + work.stretches.length < depth ? from + work.stretches.length : depth;
      pack_group(all, part, work, g, count, from, to);
      for (int64_t s = 0; s < strips; ++s) {
        const int64_t m = part.top + s * height / strips, next = part.top + (s + 1) * height / strips;
        float* sums = reinterpret_cast<float*>(work.sums.start);
        if (work.stretches.count > 1) sums += (m - part.top) * work.ld;
        const Strip strip =
            strip_of(all, m, int(next - m), from, to, reinterpret_cast<uint16_t*>(work.room.start));
        strip_by_group(part, work, strip, int(next - m), sums, from > 0, g, count, (to - from) / 2,
                       [&](int64_t p, const float* whole) {
                         if (to == depth)
                           store(m, int(next - m), (g + p) * kPanel, width_of(part, g + p), whole, work.ld);
                       });
      }
    }
  }
}

// Threads by rows and by columns so that the largest share is the smallest; of equals the one with more
// columns, since each panel is then packed by fewer threads.
struct Grid {
  int64_t down = 1, across = 1;
  Grid(int64_t threads, int64_t strips, int64_t panels) {
    int64_t least = strips * panels;
    for (int64_t columns = 1; columns <= threads && columns <= panels; ++columns) {
      const int64_t rows = threads / columns < strips ? threads / columns : strips;
      const int64_t share = ((strips + rows - 1) / rows) * ((panels + columns - 1) / columns);
      if (share <= least) least = share, down = rows, across = columns;
    }
  }
};

// f(rectangle) for a share of the output for every thread; depth: numbers that each sum adds up
template <class F>
void in_rectangles(int64_t rows, int64_t columns, int64_t depth, F&& f) {
  if (!rows || !columns) return;
  const int64_t strips = (rows + kStrip - 1) / kStrip, panels = (columns + kPanel - 1) / kPanel;
  const int64_t cost = rows * columns * (depth + 32) / 32;
  const Grid grid(threads_for(strips * panels, cost), strips, panels);
  parallel_for(grid.down * grid.across, cost, [&](int64_t piece) {
    const int64_t d = piece / grid.across, a = piece % grid.across;
    const int64_t top = d * strips / grid.down * kStrip, bottom = (d + 1) * strips / grid.down * kStrip;
    f(Rectangle{a * panels / grid.across, (a + 1) * panels / grid.across, top, bottom < rows ? bottom : rows,
                columns});
  });
}

}  // namespace
}  // namespace INLAY_ISA_NS
}  // namespace inlay

#endif
