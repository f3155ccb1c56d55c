// Sums over the rows of a matrix, one per column. Each share of the rows is summed by one thread into a row
// of its own, and the shares are added in their order: how many there are is the caller's choice, so that no
// bit depends on the threads.
#pragma once

#include "cpu/kernel.h"

namespace inlay {
namespace INLAY_ISA_NS {
namespace {

// f(total, m) for every row m; total [sums.shape[1]], zero at first, is its share's. `cost`: of one row.
template <class F>
inline void for_shares(const TensorView& sums, int64_t rows, int64_t cost, F&& f) {
  const int64_t shares = sums.shape[0], each = (rows + shares - 1) / shares;
  parallel_for(shares, each * cost, [&](int64_t p) {
    float* total = row<float>(sums, p);
    memset(total, 0, size_t(sums.shape[1]) * sizeof(float));
    const int64_t end = (p + 1) * each < rows ? (p + 1) * each : rows;
    for (int64_t m = p * each; m < end; ++m) f(total, m);
  });
}

constexpr int64_t kShareSpan = 64;  // added in a row; then these sums are, so that many shares lose nothing

// out[j] = round(Σ_p sums[p, column + j]), out [n] of any float dtype
inline void add_shares(const TensorView& out, const TensorView& sums, int64_t column) {
  const int64_t shares = sums.shape[0];
  with_float(out.dtype, [&](auto element) {
    auto* into = data<decltype(element)>(out);
    for_vecs(out.shape[0], [&](int64_t j, int n) {
      Vec total(0.0f);
      for (int64_t first = 0; first < shares; first += kShareSpan) {
        const int64_t end = first + kShareSpan < shares ? first + kShareSpan : shares;
        Vec part(0.0f);
        for (int64_t p = first; p < end; ++p) part = part + load_n(row<const float>(sums, p) + column + j, n);
        total = total + part;
      }
      store_n(into + j, total, n);
    });
  });
}

}  // namespace
}  // namespace INLAY_ISA_NS
}  // namespace inlay
