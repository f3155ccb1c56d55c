// Products of rows that are sorted by expert, and the sum of a token's rows.
//
// One expert's product is that of product.h: its weight is packed once and used by all of its rows, which are
// read where they are stored. Threads take shares of all experts' panels, so that one expert with many rows
// is worked on by several; the bits of a sum depend neither on the share nor on the other rows.
#include "cpu/finish.h"
#include "cpu/product.h"

namespace inlay {
namespace INLAY_ISA_NS {

#if !defined(__AVX512BF16__)

void expert_matmul(const TensorView& out, const TensorList&, const TensorList&, const TensorList&,
                   const TensorView&, const TensorView&, const TensorView&, bool, bool) {
  fail("expert_matmul", "instruction set", "avx512_bf16", out, "use the reference on this machine");
}

void expert_grad(const TensorView& out, const TensorView&, const TensorView&, const TensorView&,
                 const TensorView&, const TensorView&, const TensorView&) {
  fail("expert_grad", "instruction set", "avx512_bf16", out, "use the reference on this machine");
}

#else

namespace {

// Matrix number `slot` of a stack [n, P, Q], or row number `slot` of a matrix.
TensorView part_of(const TensorView& stack, int64_t slot) {
  TensorView part = stack;
  const int64_t bytes = stack.dtype == DType::f32 ? 4 : 2;
  part.data = static_cast<char*>(stack.data) + slot * stack.strides[0] * bytes;
  part.ndim = stack.ndim - 1;
  for (int d = 0; d < part.ndim; ++d) {
    part.shape[d] = stack.shape[d + 1];
    part.strides[d] = stack.strides[d + 1];
  }
  return part;
}

// Rows [first, first + count) of `t`, or where those of `rows` are stored: the left operand of a product
Operand rows_of(const TensorView& t, const int64_t* rows, int64_t first) {
  const auto* data = static_cast<const uint16_t*>(t.data) + (rows ? 0 : first * t.strides[0]);
  return {data, t.strides[0], t.shape[1], true, false, false, rows ? rows + first : nullptr};
}

// The same rows as the contraction: tᵀ as a left operand, t as a right one
Operand contracted(const TensorView& t, const int64_t* rows, int64_t first, int64_t count) {
  Operand operand = rows_of(t, rows, first);
  operand.depth = count;
  operand.along = false;
  return operand;
}

Operand matrix(const TensorView& t, bool low) {
  const bool along = t.strides[0] == 1 || t.shape[0] == 1;
  return {t.data, t.strides[along ? 1 : 0], t.shape[0], along, t.dtype == DType::f32, low};
}

// f(e, first, last): panels [first, last) of expert e's output, in equal shares of rows · panels for threads
template <class F>
void in_shares(int64_t experts, const int64_t* counts, int64_t panels, int64_t cost_of_row, F&& f) {
  int64_t rows = 0, hit = 0;
  for (int64_t e = 0; e < experts; ++e) rows += counts[e], hit += counts[e] > 0;
  const int64_t work = rows * panels;
  if (!work) return;
  const int64_t shares = threads_for(hit * panels, work * cost_of_row);
  parallel_for(shares, work / shares * cost_of_row, [&](int64_t share) {
    const int64_t from = share * work / shares, to = (share + 1) * work / shares;
    int64_t begin = 0;
    for (int64_t e = 0; e < experts; begin += counts[e++] * panels) {
      const int64_t n = counts[e], end = begin + n * panels;
      if (!n || end <= from || begin >= to) continue;
      const int64_t first = begin >= from ? 0 : (from - begin + n - 1) / n;
      const int64_t last = end <= to ? panels : (to - begin + n - 1) / n;
      if (first < last) f(e, first, last);
    }
  });
}

struct Counts {
  Aligned held;
  explicit Counts(int64_t experts) : held(experts * 8) {}
  int64_t& operator[](int64_t e) const { return reinterpret_cast<int64_t*>(held.start)[e]; }
  const int64_t* all() const { return reinterpret_cast<const int64_t*>(held.start); }
};

}  // namespace

void expert_matmul(const TensorView& out, const TensorList& lefts, const TensorList& rights,
                   const TensorList& slots, const TensorView& rows, const TensorView& offsets,
                   const TensorView& bias, bool fine, bool add) {
  const int64_t experts = offsets.shape[0] - 1, panels = (out.shape[1] + kPanel - 1) / kPanel;
  const int64_t* starts = data<const int64_t>(offsets);
  const Counts counts(experts);
  for (int64_t e = 0; e < experts; ++e) {
    bool any = false;
    for (int64_t i = 0; i < slots.size; ++i) any |= data<const int64_t>(slots.items[i])[e] >= 0;
    counts[e] = any ? starts[e + 1] - starts[e] : 0;
  }
  int64_t depth = 0;
  for (int64_t i = 0; i < lefts.size; ++i) depth += lefts.items[i].shape[1];
  in_shares(experts, counts.all(), panels, depth + 32, [&](int64_t e, int64_t first, int64_t last) {
    Operands all;
    for (int64_t i = 0; i < lefts.size; ++i) {
      const int64_t slot = data<const int64_t>(slots.items[i])[e];
      if (slot < 0) continue;
      const TensorView right = part_of(rights.items[i], slot);
      const int64_t* places = i == 0 && given(rows) ? data<const int64_t>(rows) : nullptr;
      const int parts = fine && right.dtype == DType::f32 ? 2 : 1;
      for (int part = 0; part < parts; ++part)
        all.add(rows_of(lefts.items[i], places, starts[e]), matrix(right, part == 1));
    }
    TensorView to = out, own = given(bias) ? part_of(bias, e) : bias;
    to.data = static_cast<char*>(out.data) + starts[e] * out.strides[0] * (out.dtype == DType::f32 ? 4 : 2);
    product_of(all, Rectangle{first, last, 0, counts[e], out.shape[1]}, Finish{to, own, add});
  });
}

void expert_grad(const TensorView& out, const TensorView& left, const TensorView& right,
                 const TensorView& left_rows, const TensorView& right_rows, const TensorView& offsets,
                 const TensorView& slots) {
  // The narrower operand is that of the strips: it is packed for each of few panels otherwise.
  if (left.shape[1] > right.shape[1]) {
    TensorView turned = out;
    for (int d = 1; d < 3; ++d) turned.shape[d] = out.shape[3 - d], turned.strides[d] = out.strides[3 - d];
    return expert_grad(turned, right, left, right_rows, left_rows, offsets, slots);
  }
  const int64_t experts = offsets.shape[0] - 1, panels = (right.shape[1] + kPanel - 1) / kPanel;
  const int64_t* starts = data<const int64_t>(offsets);
  const Counts counts(experts);
  for (int64_t e = 0; e < experts; ++e)
    counts[e] = data<const int64_t>(slots)[e] >= 0 ? starts[e + 1] - starts[e] : 0;
  const auto places = [](const TensorView& t) { return given(t) ? data<const int64_t>(t) : nullptr; };
  in_shares(experts, counts.all(), panels, left.shape[1] + 32, [&](int64_t e, int64_t first, int64_t last) {
    Operands all;
    all.add(contracted(left, places(left_rows), starts[e], counts[e]),
            contracted(right, places(right_rows), starts[e], counts[e]));
    const TensorView to = part_of(out, data<const int64_t>(slots)[e]);
    product_of(all, Rectangle{first, last, 0, left.shape[1], right.shape[1]},
               Finish{to, TensorView(), false});
  });
}

#endif

void expert_combine(const TensorView& out, const TensorView& y, const TensorView& places,
                    const TensorView& weights) {
  const int64_t width = out.shape[1], chosen = places.shape[1];
  with_float(out.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(out.shape[0], chosen * width / 4 + 1, [&](int64_t t) {
      const int64_t* from = row<const int64_t>(places, t);
      const float* share = given(weights) ? row<const float>(weights, t) : nullptr;
      for_vecs(width, [&](int64_t j, int n) {
        Vec sum(0.0f);
        for (int64_t k = 0; k < chosen; ++k) {
          if (from[k] < 0) continue;
          const Vec part = load(row<const T>(y, from[k]) + j, n);
          sum = share ? fma(Vec(share[k]), part, sum) : sum + part;
        }
        store(row<T>(out, t) + j, sum, n);
      });
    });
  });
}

}  // namespace INLAY_ISA_NS
}  // namespace inlay
