// RMSNorm: one thread per row; a row is read twice and stays in cache between.
#include "cpu/column_sums.h"

namespace inlay {
namespace INLAY_ISA_NS {

namespace {

// offset + weight as fp32, made once per call; rows then read it from cache.
struct Scale {
  float* values = nullptr;

  Scale(const TensorView& weight, double offset, int64_t width) {
    values = new float[size_t(width > 0 ? width : 1)];
    if (!given(weight)) {
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

// One row: its dx, and what it adds to dweight.
template <class T, bool Dx, bool Dweight>
inline void backward_row(T* dx, float* dweight, const T* dy, const T* x, const Scale& scale, float r,
                         int64_t width) {
  float pull = 0.0f;
  if (Dx) {
    const double products = long_sum(width, [&](int64_t j, int n) {
      return load_n(dy + j, n) * load_n(scale.values + j, n) * load_n(x + j, n);
    });
    pull = float(-products / double(width) * double(r) * double(r));
  }
  for_vecs(width, [&](int64_t j, int n) {
    const Vec d = load_n(dy + j, n), value = load_n(x + j, n);
    if (Dx) store_n(dx + j, Vec(r) * fma(value, Vec(pull), d * load_n(scale.values + j, n)), n);
    if (Dweight) store_n(dweight + j, fma(d * value, Vec(r), load_n(dweight + j, n)), n);
  });
}

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

void rms_norm_backward(const TensorView& dx, const TensorView& dweight, const TensorView& sums,
                       const TensorView& dy, const TensorView& x, const TensorView& weight,
                       const TensorView& rstd, double offset) {
  const int64_t count = x.shape[0], width = x.shape[1];
  const Scale scale(weight, offset, width);
  with_float(x.dtype, [&](auto element) {
    using T = decltype(element);
    const auto r = [&](int64_t m) { return data<const float>(rstd)[m * rstd.strides[0]]; };
    const auto from = [&](const TensorView& t, int64_t m) { return row<const T>(t, m); };
    if (!given(dweight))
      return parallel_for(count, 4 * width, [&](int64_t m) {
        backward_row<T, true, false>(row<T>(dx, m), nullptr, from(dy, m), from(x, m), scale, r(m), width);
      });
    for_shares(sums, count, 6 * width, [&](float* total, int64_t m) {
      if (given(dx)) {
        backward_row<T, true, true>(row<T>(dx, m), total, from(dy, m), from(x, m), scale, r(m), width);
      } else {
        backward_row<T, false, true>(nullptr, total, from(dy, m), from(x, m), scale, r(m), width);
      }
    });
    add_shares(dweight, sums, 0);
  });
}

}  // namespace INLAY_ISA_NS
}  // namespace inlay
