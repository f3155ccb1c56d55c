// What every CPU kernel file starts from: Vec, typed row access, dtype dispatch, the parallel loop.
#pragma once

#include "cpu/vec.h"
#include "tensor.h"
#include "threads.h"

namespace inlay {
namespace INLAY_ISA_NS {

#define INLAY_OP(name, args) void name args;
#include "ops.h"
#undef INLAY_OP

namespace {

// Calls f(T{}) with the element type of `dtype`; the caller has checked that it is a float.
template <class F>
inline void with_float(DType dtype, F&& f) {
  if (dtype == DType::f32) return f(float{});
  if (dtype == DType::bf16) return f(bf16{});
  if (dtype == DType::f16) return f(f16{});
}

template <class T>
inline T* row(const TensorView& t, int64_t m) {
  return static_cast<T*>(t.data) + m * t.strides[0];
}

template <class T>
inline T* data(const TensorView& t) {
  return static_cast<T*>(t.data);
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Not None.
inline bool given(const TensorView& t) { return t.data || t.ndim != 0; }

// Longest stretch that is summed in fp32: 64 additions per lane. Beyond it sums go on in double, so that long
// rows lose nothing, whatever the width of a Vec.
constexpr int64_t kSumSpan = 64 * Vec::kWidth;

// Sum of term(j, n) over [0, size); lanes beyond the end must be 0.
template <class F>
inline double long_sum(int64_t size, F&& term) {
  double total = 0;
  for (int64_t start = 0; start < size; start += kSumSpan) {
    Vec part(0.0f);
    for_vecs(size - start < kSumSpan ? size - start : kSumSpan,
             [&](int64_t j, int n) { part = part + term(start + j, n); });
    total += double(sum(part));
  }
  return total;
}

// 64-byte aligned scratch of any content.
struct Aligned {
  char* block;
  char* start;
  explicit Aligned(int64_t bytes) : block(new char[size_t(bytes + 64)]) {
    start = block + (64 - reinterpret_cast<uintptr_t>(block) % 64) % 64;
  }
  ~Aligned() { delete[] block; }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
};

// f(i) for i in [0, pieces), in contiguous spans per thread. `cost` = elementary steps of one piece.
template <class F>
inline void parallel_for(int64_t pieces, int64_t cost, F&& f) {
  const int threads = threads_for(pieces, pieces * cost);
  if (threads == 1) {
    for (int64_t i = 0; i < pieces; ++i) f(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < pieces; ++i) f(i);
}

}  // namespace
}  // namespace INLAY_ISA_NS
}  // namespace inlay
