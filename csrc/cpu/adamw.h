// What AdamW's CPU kernels share: the formula with its coefficients, one block of 8-bit states, and one
// parallel loop over all tensors, which are cut into spans of one size, so that many small tensors and a few
// large ones keep every thread equally busy.
//
// Products are fused with sums where it says fma and nowhere else (CMakeLists.txt): left to the compiler,
// which ones are could differ from one kernel to the next, and with it the bits of the same step.
#pragma once

#include "cpu/dynamic.h"

namespace inlay {
namespace INLAY_ISA_NS {

namespace {

constexpr int64_t kSpan = 8192;  // four fp32 arrays of one span: 128 KB, inside L2
static_assert(kSpan % kStateBlock == 0, "a block of 8-bit states lies in one span");

struct Coefficients {
  Vec grad_scale, keep, one_minus_beta1, beta2, one_minus_beta2, minus_step_size, root_correction, eps;

  Coefficients(double lr, double beta1, double beta2_, double eps_, double weight_decay, int64_t step,
               double grad_scale_)
      : grad_scale(float(grad_scale_)),
        keep(float(1.0 - lr * weight_decay)),
        one_minus_beta1(float(1.0 - beta1)),
        beta2(float(beta2_)),
        one_minus_beta2(float(1.0 - beta2_)),
        minus_step_size(float(-lr / (1.0 - __builtin_pow(beta1, double(step))))),
        root_correction(float(__builtin_sqrt(1.0 - __builtin_pow(beta2_, double(step))))),
        eps(float(eps_)) {}

  // n elements: m and v become the new states, p is updated in place. The gradient has any float dtype.
  template <class Grad>
  void update(float* p, const Grad* grad, Vec& m, Vec& v, int n) const {
    const Vec g = load_n(grad, n) * grad_scale;
    m = fma(one_minus_beta1, g - m, m);
    v = fma(one_minus_beta2 * g, g, v * beta2);
    const Vec denominator = sqrt(v) / root_correction + eps;
    store_n(p, fma(load_n(p, n), keep, minus_step_size * m / denominator), n);
  }
};

// f(i, start, size) for every span of every tensor i.
template <class F>
inline void for_spans(const TensorList& tensors, F&& f) {
  // first_span[i]: the number of spans before tensor i
  int64_t* first_span = new int64_t[size_t(tensors.size) + 1];
  first_span[0] = 0;
  for (int64_t i = 0; i < tensors.size; ++i)
    first_span[i + 1] = first_span[i] + (tensors.items[i].shape[0] + kSpan - 1) / kSpan;
  parallel_for(first_span[tensors.size], 8 * kSpan, [&](int64_t span) {
    int64_t low = 0, high = tensors.size - 1;  // the last tensor whose first span is not after `span`
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (first_span[middle] <= span) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    const int64_t start = (span - first_span[low]) * kSpan, left = tensors.items[low].shape[0] - start;
    f(low, start, left < kSpan ? left : kSpan);
  });
  delete[] first_span;
}

// f(i, start, size) for every kStateBlock elements of every tensor i.
template <class F>
inline void for_blocks(const TensorList& tensors, F&& f) {
  for_spans(tensors, [&](int64_t i, int64_t start, int64_t size) {
    for (int64_t at = start; at < start + size; at += kStateBlock) {
      const int64_t left = start + size - at;
      f(i, at, int(left < kStateBlock ? left : kStateBlock));
    }
  });
}

// `size` elements with fp32 states.
template <class Grad>
inline void update_run(const Coefficients& c, float* p, const Grad* grad, float* m, float* v, int64_t size) {
  for_vecs(size, [&](int64_t j, int n) {
    Vec m_new = load_n(m + j, n), v_new = load_n(v + j, n);
    c.update(p + j, grad + j, m_new, v_new, n);
    store_n(m + j, m_new, n);
    store_n(v + j, v_new, n);
  });
}

// A state of 8 bits: codes, and a scale per block of 256.
struct Coded {
  uint8_t* codes;
  float* absmax;
  const float* map;
};

// The state from element `at` on, a multiple of kStateBlock.
inline Coded coded(const TensorView& codes, const TensorView& absmax, const TensorView& map, int64_t at) {
  return {data<uint8_t>(codes) + at, data<float>(absmax) + at / kStateBlock, data<const float>(map)};
}

// One block of up to kStateBlock elements.
template <class Grad>
inline void update_block(const Coefficients& c, float* p, const Grad* grad, const Coded& exp_avg,
                         const Coded& exp_avg_sq, int size) {
  float m[kStateBlock], v[kStateBlock];
  Vec largest_m(0.0f), largest_v(0.0f);
  for_vecs(size, [&](int64_t j, int n) {
    Vec m_new = look_up(exp_avg.map, exp_avg.codes + j, n) * Vec(*exp_avg.absmax);
    Vec v_new = look_up(exp_avg_sq.map, exp_avg_sq.codes + j, n) * Vec(*exp_avg_sq.absmax);
    c.update(p + j, grad + j, m_new, v_new, n);
    largest_m = max(abs(m_new), largest_m);  // in this order a NaN is passed over
    largest_v = max(v_new, largest_v);
    store_n(m + j, m_new, n);
    store_n(v + j, v_new, n);
  });
  *exp_avg.absmax = max_lane(largest_m);
  *exp_avg_sq.absmax = max_lane(largest_v);
  const float inverse_m = inverse_of(*exp_avg.absmax), inverse_v = inverse_of(*exp_avg_sq.absmax);
  for_vecs(size, [&](int64_t j, int n) {
    encode_signed(exp_avg.codes + j, load_n(m + j, n), inverse_m, n);
    encode_unsigned(exp_avg_sq.codes + j, load_n(v + j, n), inverse_v, n);
  });
}

}  // namespace
}  // namespace INLAY_ISA_NS
}  // namespace inlay
