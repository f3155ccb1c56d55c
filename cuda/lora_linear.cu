// The inner product of a low-rank branch for a few rows; quantized_linear adds its outer one to its own sums.
//
//   inner[m, j] = s·Σ_k x[m, k]·A[j, k]      x  [M, K]    A  fp32 [r, K]    inner  fp32 [M, r]
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

}  // namespace

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
