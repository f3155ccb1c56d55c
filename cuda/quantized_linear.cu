// y = x·Wᵀ + bias for a few rows x, straight from bitsandbytes' four-bit layout: W is read once and never
// written. A low-rank branch s·(x·Aᵀ)·Bᵀ is added before the one rounding: r more terms of a sum of K, 4·N·r
// bytes beside N·K/2 of W, and none of the five launches and two passes over y that it costs by itself.
//
//   x  [M, K]    W  [N, K], packed two codes a byte    y  [M, N]    bias  [N] or none
//   inner = s·x·Aᵀ  fp32 [M, r] (lora_linear.cu)    B  fp32 [N, r]
//
// Two kernels. Tensor cores (16-bit x, K and blocksize multiples of 64, M ≤ 64): levels in x's dtype, their
// fp32 scale applied to the fp32 sum of each 64-wide piece, tiles of W shared among blocks where whole ones
// would leave multiprocessors idle (shares.cuh). Otherwise one warp per row of W, all in fp32.
#include "quantized_mma.cuh"

namespace inlay {
namespace cuda {

namespace {

constexpr int kDotThreads = 256;
constexpr int kTokens = 4;  // rows of x that share one pass over W

template <class T>
__global__ void __launch_bounds__(kDotThreads) dot_kernel(Product<T> p) {
  INLAY_SHARED(float, copies, Levels::kSize);
  const Levels table{copies};
  table.fill(p.w.levels);
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t n = int64_t(blockIdx.x) * (kDotThreads / kWarp) + threadIdx.x / kWarp;
  if (n >= p.w.rows) return;  // a whole warp
  const int64_t start = n * p.w.columns, first = int64_t(blockIdx.y) * kTokens;
  float sums[kTokens] = {};
  for (int64_t k = lane; k < p.w.columns; k += kWarp) {
    const int64_t i = start + k;
    const float weight = table.at(code_of(p.w.packed[i >> 1], int(i & 1))) * p.w.scales.at(i);
    for (int m = 0; m < kTokens; ++m)
      if (first + m < p.tokens) sums[m] = fmaf(weight, to_float(p.x.at(first + m)[k]), sums[m]);
  }
  for (int m = 0; m < kTokens; ++m) {
    const float total = warp_sum(sums[m]);
    if (lane == 0 && first + m < p.tokens) p.put(first + m, n, total);
  }
}

void launch_linear(const TensorView& y, const TensorView& x, const TensorView& packed,
                   const TensorView& levels, const TensorView& absmax, const TensorView& codes,
                   const TensorView& map, const TensorView& offset, const TensorView& bias,
                   const Branch& branch, const TensorView& counters, const TensorView& sums,
                   int64_t blocksize) {
  const int64_t tokens = x.shape[0];
  if (tokens == 0 || y.shape[1] == 0) return;
  const Weight w{data<const uint8_t>(packed), data<const float>(levels),
                 scales_of(absmax, codes, map, offset, blocksize), y.shape[1], x.shape[1]};
  with_float(x.dtype, [&](auto element) {
    using T = decltype(element);
    const Product<T> p{rows<T>(y), rows<const T>(x), w, data<const T>(bias), branch, tokens};
    if (fits_tensor_cores(x, packed, blocksize)) return with_tensor_cores(p, counters, sums);
    const Grid grid{dim3(blocks_for(w.rows, kDotThreads / kWarp), blocks_for(tokens, kTokens)),
                    dim3(kDotThreads)};
    launch("quantized_linear (dot)", dot_kernel<T>, grid, p);
  });
}

}  // namespace

void quantized_linear(const TensorView& y, const TensorView& x, const TensorView& packed,
                      const TensorView& levels, const TensorView& absmax, const TensorView& codes,
                      const TensorView& map, const TensorView& offset, const TensorView& bias,
                      const TensorView& counters, const TensorView& sums, int64_t blocksize) {
  launch_linear(y, x, packed, levels, absmax, codes, map, offset, bias, Branch{}, counters, sums, blocksize);
}

void quantized_lora_linear(const TensorView& y, const TensorView& x, const TensorView& packed,
                           const TensorView& levels, const TensorView& absmax, const TensorView& codes,
                           const TensorView& map, const TensorView& offset, const TensorView& bias,
                           const TensorView& inner, const TensorView& b, const TensorView& counters,
                           const TensorView& sums, int64_t blocksize) {
  const Branch branch{b.shape[1] ? data<const float>(inner) : nullptr, rows<const float>(b), b.shape[1]};
  launch_linear(y, x, packed, levels, absmax, codes, map, offset, bias, branch, counters, sums, blocksize);
}

SplitScratch quantized_linear_scratch(int64_t tokens, int64_t rows, int64_t columns) {
  if (tokens < 1 || tokens > kMostTokens || columns % kPiece) return {};
  const int64_t sums = with_tiles(tokens, [&](auto tiles) {
    constexpr int kTiles = decltype(tiles)::value;
    return sums_of<kTiles>(line_of<kTiles>(rows, columns, tokens, true), tokens);
  });
  return {sums ? counters_of() : 0, sums};
}

}  // namespace cuda
}  // namespace inlay
