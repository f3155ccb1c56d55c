// The two products of a low-rank branch for a few rows. quantized_linear adds the second one to its own sums.
//
//   project   inner[m, j] = s·Σ_k x[m, k]·A[j, k]
//   expand    y[m, n] = round(y[m, n] + Σ_j inner[m, j]·B[n, j])
//
//   x  [M, K]    y  [M, N]    A, B, inner  fp32 [r, K], [N, r], [M, r]
//
// A is what there is to read: 4·r·K bytes, 0.9 MB at r = 16 and K = 14,336, and most of the time is the
// launch's. A block per row of A, which up to four rows of x share.
#include "rows.cuh"

namespace inlay {
namespace cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 4;

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    project_kernel(Rows<float> inner, Rows<const T> x, Rows<const float> a, int64_t tokens, int64_t width,
                   float scale) {
  INLAY_SHARED(float, partial, kThreads / kWarp);
  const int64_t j = blockIdx.x, first = int64_t(blockIdx.y) * kTokens;
  float sums[kTokens] = {};
  for (int64_t k = int64_t(threadIdx.x) * N; k < width; k += kThreads * N) {
    const auto factor = load<N>(a.at(j) + k);
    for (int m = 0; m < kTokens; ++m) {
      if (first + m >= tokens) break;
      const auto values = load<N>(x.at(first + m) + k);
      for (int i = 0; i < N; ++i) sums[m] = fmaf(to_float(values.at[i]), factor.at[i], sums[m]);
    }
  }
  for (int m = 0; m < kTokens; ++m) {
    const float total = block_sum(sums[m], partial);
    if (threadIdx.x == 0 && first + m < tokens) inner.at(first + m)[j] = scale * total;
  }
}

// A thread per output: the r numbers that its lane reads of B are whole sectors from r = 8 on.
template <class T>
__global__ void expand_kernel(Rows<T> y, Rows<const float> inner, Rows<const float> b, int64_t tokens,
                              int64_t width, int64_t rank) {
  const int64_t m = row_here(), n = item_here();
  if (m >= tokens || n >= width) return;
  float sum = 0.0f;
  for (int64_t j = 0; j < rank; ++j) sum = fmaf(inner.at(m)[j], b.at(n)[j], sum);
  T& target = y.at(m)[n];
  from_float(to_float(target) + sum, target);
}

}  // namespace

void lora_expand(const TensorView& y, const TensorView& inner, const TensorView& b) {
  const int64_t tokens = y.shape[0], width = y.shape[1];
  with_float(y.dtype, [&](auto element) {
    using T = decltype(element);
    launch("lora_expand", expand_kernel<T>, elementwise(tokens, width), rows<T>(y), rows<const float>(inner),
           rows<const float>(b), tokens, width, b.shape[1]);
  });
}

void lora_project(const TensorView& inner, const TensorView& x, const TensorView& a, double scale) {
  const int64_t tokens = x.shape[0], width = x.shape[1];
  const Grid grid{dim3(blocks_for(a.shape[0], 1), blocks_for(tokens, kTokens)), dim3(kThreads)};
  with_float(x.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto n) {
      launch("lora_project", project_kernel<T, n()>, grid, rows<float>(inner), rows<const T>(x),
             rows<const float>(a), tokens, width, float(scale));
    };
    with_pack<T>(width, run, x, a);
  });
}

}  // namespace cuda
}  // namespace inlay
