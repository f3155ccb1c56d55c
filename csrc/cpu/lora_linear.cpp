// The low-rank branch for a few rows, in one pass: the products are too small for a GEMM call, and what five
// calls from Python cost is more than what they compute.
#include "cpu/kernel.h"

namespace inlay {
namespace INLAY_ISA_NS {

namespace {

struct Inner {
  float* values;  // s·x·Aᵀ [M, r]
  int64_t rank;
  Inner(int64_t rows, int64_t r) : values(new float[size_t(rows * r + 1)]), rank(r) {}
  ~Inner() { delete[] values; }
  Inner(const Inner&) = delete;
  Inner& operator=(const Inner&) = delete;
  float* row(int64_t m) const { return values + m * rank; }
};

template <class T>
void project(const Inner& inner, const TensorView& x, const TensorView& a, float scale) {
  const int64_t rows = x.shape[0], width = x.shape[1];
  parallel_for(inner.rank, rows * width, [&](int64_t j) {
    const float* factor = row<const float>(a, j);
    for (int64_t m = 0; m < rows; ++m) {
      const T* from = row<const T>(x, m);
      const double total =
          long_sum(width, [&](int64_t k, int n) { return load_n(from + k, n) * load_n(factor + k, n); });
      inner.row(m)[j] = scale * float(total);
    }
  });
}

inline float dot(const float* left, const float* right, int64_t size) {
  Vec total(0.0f);
  for_vecs(size, [&](int64_t j, int n) { total = fma(load_n(left + j, n), load_n(right + j, n), total); });
  return sum(total);
}

template <class T>
void expand(const Inner& inner, const TensorView& y, const TensorView& b) {
  const int64_t rows = y.shape[0], width = y.shape[1], rank = inner.rank;
  constexpr int64_t kSpan = 16;  // outputs a piece: a whole Vec of them is rounded and stored at once
  parallel_for((width + kSpan - 1) / kSpan, kSpan * rows * rank, [&](int64_t piece) {
    const int64_t begin = piece * kSpan, size = width - begin < kSpan ? width - begin : kSpan;
    for (int64_t m = 0; m < rows; ++m) {
      float sums[kSpan];
      for (int64_t i = 0; i < size; ++i) sums[i] = dot(row<const float>(b, begin + i), inner.row(m), rank);
      T* into = row<T>(y, m) + begin;
      for_vecs(size,
               [&](int64_t i, int n) { store_n(into + i, load_n(into + i, n) + load_n(sums + i, n), n); });
    }
  });
}

}  // namespace

void lora_add(const TensorView& y, const TensorView& x, const TensorView& a, const TensorView& b,
              double scale) {
  const Inner inner(x.shape[0], a.shape[0]);
  with_float(x.dtype, [&](auto element) {
    using T = decltype(element);
    project<T>(inner, x, a, float(scale));
    expand<T>(inner, y, b);
  });
}

}  // namespace INLAY_ISA_NS
}  // namespace inlay
