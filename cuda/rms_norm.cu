// RMSNorm: one block per row; x is read twice, the second time from L1 or L2.
//
//   rstd = 1/sqrt(mean(x²) + eps)   y = x·rstd·(offset + weight)
//   t = dy·(offset + weight)        dx = rstd·(t − x·rstd²·mean(t·x))
//
//   x, y, dx, dy  [M, H]    rstd  [M]    weight  [H] or none
#include "rows.cuh"

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

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(Rows<T> dx, Rows<const T> dy, Rows<const T> x, Scale scale, const float* rstd,
                    int64_t rstd_stride, int64_t width) {
  INLAY_SHARED(float, partial, kThreads / kWarp);
  const int64_t m = blockIdx.x;
  const T *from = x.at(m), *grad = dy.at(m);
  float products = 0.0f;
  for (int64_t j = threadIdx.x * N; j < width; j += kThreads * N) {
    const auto value = load<N>(from + j), d = load<N>(grad + j);
    for (int i = 0; i < N; ++i)
      products = fmaf(to_float(d.at[i]) * scale.at(j + i), to_float(value.at[i]), products);
  }
  const float r = rstd[m * rstd_stride];
  const float pull = -block_sum(products, partial) / float(width) * r * r;
  for (int64_t j = threadIdx.x * N; j < width; j += kThreads * N) {
    auto value = load<N>(from + j);
    const auto d = load<N>(grad + j);
    for (int i = 0; i < N; ++i)
      from_float(r * fmaf(to_float(value.at[i]), pull, to_float(d.at[i]) * scale.at(j + i)), value.at[i]);
    store(dx.at(m) + j, value);
  }
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

void rms_norm_backward(const TensorView& dx, const TensorView& dy, const TensorView& x,
                       const TensorView& weight, const TensorView& rstd, double offset) {
  const Grid grid{dim3(blocks_for(x.shape[0], 1)), dim3(kThreads)};
  with_float(x.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto n) {
      launch("rms_norm_backward", backward_kernel<T, n()>, grid, rows<T>(dx), rows<const T>(dy),
             rows<const T>(x), scale_of(weight, offset), data<const float>(rstd), rstd.strides[0],
             x.shape[1]);
    };
    with_pack<T>(x.shape[1], run, dx, dy, x);
  });
}

}  // namespace cuda
}  // namespace inlay
