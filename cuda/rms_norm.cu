// RMSNorm: one block per row; x is read twice, the second time from L1 or L2.
//
//   rstd = 1/sqrt(mean(x²) + eps)   y = x·rstd·(offset + weight)
//   t = dy·(offset + weight)        dx = rstd·(t − x·rstd²·mean(t·x))
#include "launch.cuh"

#define INLAY_OP(name, args) void name args;
namespace inlay {
namespace cuda {
#include "ops.h"
}
}  // namespace inlay
#undef INLAY_OP

namespace inlay {
namespace cuda {

namespace {

constexpr int kThreads = 256;  // 8 warps: a row of 2,048 to 8,192 gives each lane 8 to 32 elements

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

template <class T>
struct Rows {
  T* data;
  int64_t stride;  // elements between rows
  __device__ __forceinline__ T* at(int64_t m) const { return data + m * stride; }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(Rows<T> y, float* rstd, int64_t rstd_stride, Rows<const T> x, Scale scale, int64_t width,
                   float eps) {
  INLAY_SHARED(float, partial, kThreads / kWarp);
  const int64_t m = blockIdx.x;
  const T* from = x.at(m);
  float squares = 0.0f;
  for (int64_t j = threadIdx.x; j < width; j += kThreads) {
    const float v = to_float(from[j]);
    squares += v * v;
  }
  const float r = rsqrtf(block_sum(squares, partial) / float(width) + eps);
  if (threadIdx.x == 0) rstd[m * rstd_stride] = r;
  T* into = y.at(m);
  for (int64_t j = threadIdx.x; j < width; j += kThreads)
    from_float(to_float(from[j]) * r * scale.at(j), into[j]);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(Rows<T> dx, Rows<const T> dy, Rows<const T> x, Scale scale, const float* rstd,
                    int64_t rstd_stride, int64_t width) {
  INLAY_SHARED(float, partial, kThreads / kWarp);
  const int64_t m = blockIdx.x;
  const T *from = x.at(m), *grad = dy.at(m);
  float products = 0.0f;
  for (int64_t j = threadIdx.x; j < width; j += kThreads)
    products += to_float(grad[j]) * scale.at(j) * to_float(from[j]);
  const float r = rstd[m * rstd_stride];
  const float pull = -block_sum(products, partial) / float(width) * r * r;
  T* into = dx.at(m);
  for (int64_t j = threadIdx.x; j < width; j += kThreads)
    from_float(r * (to_float(grad[j]) * scale.at(j) + to_float(from[j]) * pull), into[j]);
}

Scale scale_of(const TensorView& weight, double offset) {
  return {weight.ndim == 0 ? nullptr : weight.data, weight.dtype, float(offset)};
}

template <class T>
Rows<T> rows(const TensorView& t) {
  return {static_cast<T*>(t.data), t.strides[0]};
}

}  // namespace

void rms_norm_forward(const TensorView& y, const TensorView& rstd, const TensorView& x,
                      const TensorView& weight, double eps, double offset) {
  const Grid grid{dim3(blocks_for(x.shape[0], 1)), dim3(kThreads)};
  with_float(x.dtype, [&](auto element) {
    using T = decltype(element);
    INLAY_LAUNCH(forward_kernel<T>, grid, rows<T>(y), data<float>(rstd), rstd.strides[0], rows<const T>(x),
                 scale_of(weight, offset), x.shape[1], float(eps));
  });
}

void rms_norm_backward(const TensorView& dx, const TensorView& dy, const TensorView& x,
                       const TensorView& weight, const TensorView& rstd, double offset) {
  const Grid grid{dim3(blocks_for(x.shape[0], 1)), dim3(kThreads)};
  with_float(x.dtype, [&](auto element) {
    using T = decltype(element);
    INLAY_LAUNCH(backward_kernel<T>, grid, rows<T>(dx), rows<const T>(dy), rows<const T>(x),
                 scale_of(weight, offset), data<const float>(rstd), rstd.strides[0], x.shape[1]);
  });
}

}  // namespace cuda
}  // namespace inlay
