// out = Σ_i left_i·right_i with fp32 sums, for many rows: of bf16 as pairs (panels.h), or in fp32
// (singles.h).
//
//   strip   kStrip rows of the left operands: they stay near while all panels of a group pass by
//   panel   two registers of columns of the right operands, packed
//   group   panels that fit in L2 together: packed once, used by every strip
//
// Packing costs some 10 instructions for 32 numbers that M rows multiply by, so nothing packed outlives a
// call. A sum runs over its whole contraction in one order, whatever the sizes of strips and groups and the
// number of threads.
#pragma once

#if defined(__AVX512BF16__)
#include "cpu/panels.h"
#else
#include "cpu/singles.h"
#endif

#if defined(INLAY_VEC_avx512) || defined(INLAY_VEC_avx2)

namespace inlay {
namespace INLAY_ISA_NS {
namespace {

// Bytes of a number, packed.
constexpr int64_t kBytes = 4 / kPer;
// Packed panels at a time: less than half of an L2, since strips need a share of it, too: of 1 MiB with
// AVX-512, of 256 to 512 KiB on older CPUs.
constexpr int64_t kGroupBytes = Vec::kWidth == 16 ? 512 << 10 : 160 << 10;
// Longest stretch of the contraction that is packed: of a panel 128 KiB, and 40 with AVX2, so that a group
// has four. Sums of a longer one wait in memory.
constexpr int64_t kDepth = ((Vec::kWidth == 16 ? 128 : 40) << 10) / kBytes / kPanel;
// And the longest that a strip is used of before the next panel: 24 KiB of a strip, in an L1 of 32.
constexpr int64_t kNear = (24 << 10) / kBytes / kStrip / 32 * 32;
// Operands that one sum can have; as pairs, each fp32 one counts as two.
constexpr int kMostOperands = 32;

struct Operands {
  Operand left[kMostOperands], right[kMostOperands];
  int64_t start[kMostOperands + 1] = {};  // where each begins in the whole contraction: at a whole word
  int count = 0;

  void add(const Operand& l, const Operand& r) {
    left[count] = l;
    right[count] = r;
    start[count + 1] = start[count] + (l.depth + kPer - 1) / kPer * kPer;
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

template <int Rows = kStrip>
void tile_of(int rows, bool wide, float* to, int64_t ld, bool add, Strip strip, const Word* panel,
             int64_t words) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return tile_of<Rows - 1>(rows, wide, to, ld, add, strip, panel, words);
  }
  (wide ? tile<Rows, true> : tile<Rows, false>)(to, ld, add, strip, panel, words);
}

// Numbers from row to row of a copied strip: an odd number of cache lines, so that its rows meet in no set of
// a cache. Where rows lie 18 lines apart, as those of 576 bf16 do, products run at nine tenths of their
// speed.
inline int64_t odd_lines(int64_t numbers) {
  constexpr int64_t line = 64 / kBytes;
  return (numbers + line - 1) / (2 * line) * 2 * line + line;
}

// Rows of left operands in [from, to) of the contraction, copied or packed together into `room`.
inline Strip strip_of(const Operands& all, int64_t m, int rows, int64_t from, int64_t to, Number* room) {
  if (!all.lefts_along()) {
    constexpr int64_t words = kPanel / 2;  // of a register: room for the rows
    all.for_parts(from, to, [&](int i, int64_t k, int64_t depth, int64_t place) {
      all.left[i].pack(reinterpret_cast<Word*>(room) + place / kPer * words, words, m, rows, k, depth);
    });
    return {room, kPer, kPer * words};
  }
  const int64_t ld = odd_lines(to - from);
  all.for_parts(from, to, [&](int i, int64_t k, int64_t depth, int64_t place) {
    for (int r = 0; r < rows; ++r) all.left[i].copy(room + r * ld + place, m + r, k, depth);
  });
  return {room, ld, kPer};
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
        group(clamp(kGroupBytes / (stretches.length * kBytes * kPanel), most)),
        ld(group * kPanel),
        panels(group * stretches.length * kBytes * kPanel),
        room((kStrip < kPanel / 2 ? kPanel / 2 : kStrip) * (stretches.length + 64) * 4),
        sums((stretches.count > 1 ? height : kStrip) * ld * 4) {}
  static int64_t clamp(int64_t fit, int64_t most) { return fit < 1 ? 1 : fit < most ? fit : most; }
  Word* panel(int64_t p) const {
    return reinterpret_cast<Word*>(panels.start) + p * stretches.length / kPer * kPanel;
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
      all.right[i].pack(work.panel(p) + place / kPer * kPanel, kPanel, (g + p) * kPanel,
                        width_of(part, g + p), k, depth);
    });
}

// One strip by the packed panels of a group; store(p, sums) where a panel's sums are whole.
template <class Store>
void strip_by_group(const Rectangle& part, const Workspace& work, const Strip& strip, int rows, float* sums,
                    bool add, int64_t g, int64_t count, int64_t words, Store&& store) {
  const Steps steps(kPer * words, kNear);
  for (int64_t near = 0; near < words; near += steps.length / kPer) {
    const int64_t here = least(words - near, steps.length / kPer);
    const Strip from{strip.data + near * strip.step, strip.row, strip.step};
    for (int64_t p = 0; p < count; ++p) {
      float* to = steps.count > 1 || work.stretches.count > 1 ? sums + p * kPanel : sums;
      tile_of(rows, width_of(part, g + p) > kPanel / 2, to, work.ld, add || near, from,
              work.panel(p) + near * kPanel, here);
      if (near + here == words) store(p, to);
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
            strip_of(all, m, int(next - m), from, to, reinterpret_cast<Number*>(work.room.start));
        strip_by_group(part, work, strip, int(next - m), sums, from > 0, g, count, (to - from) / kPer,
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
