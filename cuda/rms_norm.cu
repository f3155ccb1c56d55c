// RMSNorm: one block per row; x is read twice, the second time from L1 or L2.
//
//   rstd = 1/sqrt(mean(x²) + eps)   y = x·rstd·(offset + weight)
//   t = dy·(offset + weight)        dx = rstd·(t − x·rstd²·mean(t·x))   dweight = Σ_m dy·x·rstd
//
//   x, y, dx, dy  [M, H]    rstd  [M]    weight, dweight  [H] or none
#include "column_sums.cuh"

namespace inlay {
namespace cuda {

namespace {

constexpr int kThreads = 256;  // 8 warps: a row of 2,048 to 8,192 gives each lane one to four packs

struct Scale {
  const void* weight;  // [H], or null for 1
  DType dtype;
  float offset;

  __device__ __forceinline__ float at(int64_t j) const {
    if (!weight) return 1.0f;
    if (dtype == DType::f32) return offset + static_cast<const float*>(weight)[j];
    if (dtype == DType::bf16) return offset + to_float(static_cast<const bf16*>(weight)[j]);
    return offset + to_float(static_cast<const f16*>(weight)[j]);
  }
};

Scale scale_of(const TensorView& weight, double offset) {
  return {weight.ndim == 0 ? nullptr : weight.data, weight.dtype, float(offset)};
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(Rows<T> y, float* rstd, int64_t rstd_stride, Rows<const T> x, Scale scale, int64_t width,
                   float eps) {
  INLAY_SHARED(float, partial, kThreads / kWarp);
  const int64_t m = blockIdx.x;
  const T* from = x.at(m);
  float squares = 0.0f;
  for (int64_t j = threadIdx.x * N; j < width; j += kThreads * N) {
    const auto pack = load<N>(from + j);
    for (int i = 0; i < N; ++i) squares = fmaf(to_float(pack.at[i]), to_float(pack.at[i]), squares);
  }
  const float r = rsqrtf(block_sum(squares, partial) / float(width) + eps);
  if (threadIdx.x == 0) rstd[m * rstd_stride] = r;
  for (int64_t j = threadIdx.x * N; j < width; j += kThreads * N) {
    auto pack = load<N>(from + j);
    for (int i = 0; i < N; ++i) from_float(to_float(pack.at[i]) * r * scale.at(j + i), pack.at[i]);
    store(y.at(m) + j, pack);
  }
}

// One row: dx, and what it adds to dweight; either may be null. Each thread has columns of its own.
template <class T, int N>
__device__ __forceinline__ void backward_row(T* dx, float* dweight, const T* dy, const T* x,
                                             const Scale& scale, float r, int64_t width, float* partial) {
  float pull = 0.0f;
  if (dx) {
    float products = 0.0f;
    for (int64_t j = threadIdx.x * N; j < width; j += kThreads * N) {
      const auto value = load<N>(x + j), d = load<N>(dy + j);
      for (int i = 0; i < N; ++i)
        products = fmaf(to_float(d.at[i]) * scale.at(j + i), to_float(value.at[i]), products);
    }
    pull = -block_sum(products, partial) / float(width) * r * r;
  }
  for (int64_t j = threadIdx.x * N; j < width; j += kThreads * N) {
    auto value = load<N>(x + j);
    const auto d = load<N>(dy + j);
    if (dweight) {
      auto sum = load<N>(dweight + j);
      for (int i = 0; i < N; ++i) sum.at[i] = fmaf(to_float(d.at[i]) * to_float(value.at[i]), r, sum.at[i]);
      store(dweight + j, sum);
    }
    if (!dx) continue;
    for (int i = 0; i < N; ++i)
      from_float(r * fmaf(to_float(value.at[i]), pull, to_float(d.at[i]) * scale.at(j + i)), value.at[i]);
    store(dx + j, value);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(Rows<T> dx, Rows<const T> dy, Rows<const T> x, Scale scale, const float* rstd,
                    int64_t rstd_stride, int64_t width) {
  INLAY_SHARED(float, partial, kThreads / kWarp);
  const int64_t m = blockIdx.x;
  backward_row<T, N>(dx.at(m), nullptr, dy.at(m), x.at(m), scale, rstd[m * rstd_stride], width, partial);
}

constexpr int64_t kHeld = 12 << 10;  // floats in 48 KiB

// With dweight: a block takes a share of the rows, and sums where it has room, in shared memory.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    weight_kernel(Rows<T> dx, Rows<float> sums, Rows<const T> dy, Rows<const T> x, Scale scale,
                  const float* rstd, int64_t rstd_stride, int64_t count, int64_t each, int64_t width) {
  INLAY_SHARED(float, partial, kThreads / kWarp);
  INLAY_DYNAMIC_SHARED(float, held);
  float* const into = sums.at(blockIdx.x);
  float* const total = width <= kHeld ? held : into;
  const int64_t first = blockIdx.x * each, end = first + each < count ? first + each : count;
  for (int64_t j = threadIdx.x * N; j < width; j += kThreads * N) store(total + j, Pack<float, N>{});
  for (int64_t m = first; m < end; ++m)
    backward_row<T, N>(dx.data ? dx.at(m) : nullptr, total, dy.at(m), x.at(m), scale, rstd[m * rstd_stride],
                       width, partial);
  if (total == into) return;
  for (int64_t j = threadIdx.x * N; j < width; j += kThreads * N) store(into + j, load<N>(total + j));
}

}  // namespace

void rms_norm_forward(const TensorView& y, const TensorView& rstd, const TensorView& x,
                      const TensorView& weight, double eps, double offset) {
  const Grid grid{dim3(blocks_for(x.shape[0], 1)), dim3(kThreads)};
  with_float(x.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto n) {
      launch("rms_norm_forward", forward_kernel<T, n()>, grid, rows<T>(y), data<float>(rstd), rstd.strides[0],
             rows<const T>(x), scale_of(weight, offset), x.shape[1], float(eps));
    };
    with_pack<T>(x.shape[1], run, y, x);
  });
}

void rms_norm_backward(const TensorView& dx, const TensorView& dweight, const TensorView& sums,
                       const TensorView& dy, const TensorView& x, const TensorView& weight,
                       const TensorView& rstd, double offset) {
  constexpr const char* name = "rms_norm_backward";
  const int64_t count = x.shape[0], width = x.shape[1];
  const auto* r = data<const float>(rstd);
  with_float(x.dtype, [&](auto element) {
    using T = decltype(element);
    const auto alone = [&](auto n) {
      const Grid grid{dim3(blocks_for(count, 1)), dim3(kThreads)};
      launch(name, backward_kernel<T, n()>, grid, rows<T>(dx), rows<const T>(dy), rows<const T>(x),
             scale_of(weight, offset), r, rstd.strides[0], width);
    };
    const auto with_weight = [&](auto n) {
      const size_t shared = width <= kHeld ? size_t(width) * sizeof(float) : 0;
      const Grid grid{dim3(blocks_for(sums.shape[0], 1)), dim3(kThreads), shared};
      launch(name, weight_kernel<T, n()>, grid, rows<T>(dx), rows<float>(sums), rows<const T>(dy),
             rows<const T>(x), scale_of(weight, offset), r, rstd.strides[0], count,
             rows_of_share(sums, count), width);
      add_shares(name, dweight, sums, 0);
    };
    if (dweight.ndim == 0) return with_pack<T>(width, alone, dx, dy, x);
    if (dx.ndim == 0) return with_pack<T>(width, with_weight, dy, x, sums);
    with_pack<T>(width, with_weight, dx, dy, x, sums);
  });
}

}  // namespace cuda
}  // namespace inlay
