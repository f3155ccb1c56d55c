// Sums over the rows of a matrix, one per column, in two stages and one order: blocks sum shares of the rows,
// add_shares adds those.
#pragma once

#include "rows.cuh"

namespace inlay {
namespace cuda {

constexpr int kAdders = 32;  // warps; each adds every 32nd share, so that many loads are under way

// Rows of a share, where `sums` has one row per share.
inline int64_t rows_of_share(const TensorView& sums, int64_t rows) {
  return (rows + sums.shape[0] - 1) / sums.shape[0];
}

template <class T>
__global__ void __launch_bounds__(kWarp* kAdders)
    add_shares_kernel(T* out, Rows<const float> sums, int64_t shares, int64_t columns) {
  INLAY_SHARED(float, parts, kWarp* kAdders);
  const int lane = int(threadIdx.x) % kWarp, adder = int(threadIdx.x) / kWarp;
  const int64_t j = int64_t(blockIdx.x) * kWarp + lane;
  float part = 0.0f;
  if (j < columns)
    for (int64_t p = adder; p < shares; p += kAdders) part += sums.at(p)[j];
  parts[threadIdx.x] = part;
  __syncthreads();
  if (adder != 0 || j >= columns) return;
  float total = 0.0f;
  for (int i = 0; i < kAdders; ++i) total += parts[i * kWarp + lane];
  from_float(total, out[j]);
}

// out[j] = round(Σ_p sums[p, column + j]), out [n] of any float dtype
inline void add_shares(const char* name, const TensorView& out, const TensorView& sums, int64_t column) {
  const Grid grid{dim3(blocks_for(out.shape[0], kWarp)), dim3(kWarp * kAdders)};
  with_float(out.dtype, [&](auto element) {
    using T = decltype(element);
    const Rows<const float> from{data<const float>(sums) + column, sums.strides[0]};
    launch(name, add_shares_kernel<T>, grid, data<T>(out), from, sums.shape[0], out.shape[0]);
  });
}

}  // namespace cuda
}  // namespace inlay
