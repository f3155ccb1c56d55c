// A scale and a shift per channel. Chosen channels become all of them, with numbers that change nothing at
// the others, so that rows are one plain loop wherever the chosen ones lie.
#include "cpu/column_sums.h"

namespace inlay {
namespace INLAY_ISA_NS {

namespace {

// One number per channel: those of `some`, or with indices `other` where none is. Null where `some` is None.
struct PerChannel {
  const float* values = nullptr;
  float* made = nullptr;

  PerChannel(const TensorView& some, const TensorView& indices, int64_t width, float other) {
    if (!given(some)) return;
    values = data<const float>(some);
    if (!given(indices)) return;
    made = new float[size_t(width)];
    for (int64_t j = 0; j < width; ++j) made[j] = other;
    for (int64_t j = 0; j < indices.shape[0]; ++j) made[data<const int64_t>(indices)[j]] = values[j];
    values = made;
  }
  ~PerChannel() { delete[] made; }
  PerChannel(const PerChannel&) = delete;
  PerChannel& operator=(const PerChannel&) = delete;
};

template <class T>
inline void forward_row(T* y, const T* x, const float* gamma, const float* beta, int64_t width) {
  for_vecs(width, [&](int64_t j, int n) {
    const Vec value = load_n(x + j, n);
    if (gamma && beta) return store_n(y + j, fma(load_n(gamma + j, n), value, load_n(beta + j, n)), n);
    store_n(y + j, gamma ? load_n(gamma + j, n) * value : value + load_n(beta + j, n), n);
  });
}

// What a row adds to the sums, and its dx; each may be null.
template <class T>
inline void backward_row(T* dx, float* dgamma, float* dbeta, const T* dy, const T* x, const float* gamma,
                         int64_t width) {
  for_vecs(width, [&](int64_t j, int n) {
    const Vec d = load_n(dy + j, n);
    if (dgamma) store_n(dgamma + j, fma(d, load_n(x + j, n), load_n(dgamma + j, n)), n);
    if (dbeta) store_n(dbeta + j, load_n(dbeta + j, n) + d, n);
    if (dx) store_n(dx + j, load_n(gamma + j, n) * d, n);
  });
}

// The sums at chosen channels; x holds those alone.
template <class T>
inline void add_chosen(float* dgamma, float* dbeta, const T* dy, const T* x, const int64_t* indices,
                       int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    const float d = load_one(dy + indices[j]);
    if (dgamma) dgamma[j] = dgamma[j] + d * load_one(x + j);
    if (dbeta) dbeta[j] = dbeta[j] + d;
  }
}

}  // namespace

void scale_shift_forward(const TensorView& y, const TensorView& x, const TensorView& gamma,
                         const TensorView& beta, const TensorView& indices) {
  const int64_t width = x.shape[1];
  const PerChannel scale(gamma, indices, width, 1.0f), shift(beta, indices, width, -0.0f);  // -0 + -0 is -0
  with_float(x.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(x.shape[0], 2 * width, [&](int64_t m) {
      forward_row(row<T>(y, m), row<const T>(x, m), scale.values, shift.values, width);
    });
  });
}

void scale_shift_backward(const TensorView& dx, const TensorView& dgamma, const TensorView& dbeta,
                          const TensorView& sums, const TensorView& dy, const TensorView& x,
                          const TensorView& gamma, const TensorView& indices) {
  const int64_t width = dy.shape[1], chosen = given(indices) ? indices.shape[0] : width;
  const int64_t after = given(dgamma) ? chosen : 0;  // where the sums of dbeta begin
  const PerChannel scale(gamma, indices, width, 1.0f);
  with_float(dy.dtype, [&](auto element) {
    using T = decltype(element);
    for_shares(sums, dy.shape[0], 4 * width, [&](float* total, int64_t m) {
      float* const for_gamma = given(dgamma) ? total : nullptr;
      float* const for_beta = given(dbeta) ? total + after : nullptr;
      const T *grad = row<const T>(dy, m), *value = given(dgamma) ? row<const T>(x, m) : nullptr;
      T* const into = given(dx) ? row<T>(dx, m) : nullptr;
      if (!given(indices)) return backward_row(into, for_gamma, for_beta, grad, value, scale.values, width);
      add_chosen(for_gamma, for_beta, grad, value, data<const int64_t>(indices), chosen);
      if (into) forward_row(into, grad, scale.values, nullptr, width);
    });
  });
  if (given(dgamma)) add_shares(dgamma, sums, 0);
  if (given(dbeta)) add_shares(dbeta, sums, after);
}

}  // namespace INLAY_ISA_NS
}  // namespace inlay
