// RMSNorm: one thread per row; a row is read twice and stays in cache between.
#include "cpu/kernel.h"

namespace inlay {
namespace INLAY_ISA_NS {

namespace {

// offset + weight as fp32, made once per call; rows then read it from cache.
struct Scale {
  float* values = nullptr;

  Scale(const TensorView& weight, double offset, int64_t width) {
    values = new float[size_t(width > 0 ? width : 1)];
    if (!weight.data && weight.ndim == 0) {
      for (int64_t j = 0; j < width; ++j) values[j] = 1.0f;
      return;
    }
    with_float(weight.dtype, [&](auto element) {
      const auto* from = data<const decltype(element)>(weight);
      for_vecs(width,
               [&](int64_t j, int n) { store_n(values + j, load_n(from + j, n) + Vec(float(offset)), n); });
    });
  }
  ~Scale() { delete[] values; }
  Scale(const Scale&) = delete;
  Scale& operator=(const Scale&) = delete;
};

}  // namespace

void rms_norm_forward(const TensorView& y, const TensorView& rstd, const TensorView& x,
                      const TensorView& weight, double eps, double offset) {
  const int64_t width = x.shape[1];
  const Scale scale(weight, offset, width);
  with_float(x.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(x.shape[0], 2 * width, [&](int64_t m) {
      const T* from = row<const T>(x, m);
      const double squares = long_sum(width, [&](int64_t j, int n) {
        const Vec v = load_n(from + j, n);
        return v * v;
      });
      const float r = float(1.0 / __builtin_sqrt(squares / double(width) + eps));
      data<float>(rstd)[m * rstd.strides[0]] = r;
      T* into = row<T>(y, m);
      for_vecs(width, [&](int64_t j, int n) {
        store_n(into + j, load_n(from + j, n) * Vec(r) * load_n(scale.values + j, n), n);
      });
    });
  });
}

void rms_norm_backward(const TensorView& dx, const TensorView& dy, const TensorView& x,
                       const TensorView& weight, const TensorView& rstd, double offset) {
  const int64_t width = x.shape[1];
  const Scale scale(weight, offset, width);
  with_float(x.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(x.shape[0], 4 * width, [&](int64_t m) {
      const T *from = row<const T>(x, m), *grad = row<const T>(dy, m);
      const double products = long_sum(width, [&](int64_t j, int n) {
        return load_n(grad + j, n) * load_n(scale.values + j, n) * load_n(from + j, n);
      });
      const float r = data<const float>(rstd)[m * rstd.strides[0]];
      const float pull = float(-products / double(width) * double(r) * double(r));
      T* into = row<T>(dx, m);
      for_vecs(width, [&](int64_t j, int n) {
        const Vec t = load_n(grad + j, n) * load_n(scale.values + j, n);
        store_n(into + j, Vec(r) * fma(load_n(from + j, n), Vec(pull), t), n);
      });
    });
  });
}

}  // namespace INLAY_ISA_NS
}  // namespace inlay
