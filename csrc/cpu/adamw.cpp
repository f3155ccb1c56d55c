// AdamW over all tensors in one parallel loop: the tensors are cut into spans of one size, so that many small
// tensors and a few large ones keep every thread equally busy.
#include "cpu/kernel.h"

namespace inlay {
namespace INLAY_ISA_NS {

namespace {

constexpr int64_t kSpan = 8192;  // four fp32 arrays of one span: 128 KB, inside L2

struct Coefficients {
  Vec grad_scale, keep, one_minus_beta1, beta2, one_minus_beta2, step_size, root_correction, eps;
};

inline void update(const Coefficients& c, float* p, const float* grad, float* m, float* v, int64_t size) {
  for_vecs(size, [&](int64_t j, int n) {
    const Vec g = load_n(grad + j, n) * c.grad_scale;
    const Vec m_old = load_n(m + j, n);
    const Vec m_new = m_old + c.one_minus_beta1 * (g - m_old);
    const Vec v_new = load_n(v + j, n) * c.beta2 + c.one_minus_beta2 * g * g;
    const Vec denominator = sqrt(v_new) / c.root_correction + c.eps;
    store_n(m + j, m_new, n);
    store_n(v + j, v_new, n);
    store_n(p + j, load_n(p + j, n) * c.keep - c.step_size * m_new / denominator, n);
  });
}

}  // namespace

void adamw_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                const TensorList& exp_avg_sqs, double lr, double beta1, double beta2, double eps,
                double weight_decay, int64_t step, double grad_scale) {
  const double correction1 = 1.0 - __builtin_pow(beta1, double(step));
  const double correction2 = 1.0 - __builtin_pow(beta2, double(step));
  const Coefficients c = {float(grad_scale),
                          float(1.0 - lr * weight_decay),
                          float(1.0 - beta1),
                          float(beta2),
                          float(1.0 - beta2),
                          float(lr / correction1),
                          float(__builtin_sqrt(correction2)),
                          float(eps)};
  // first_span[i]: the number of spans before tensor i
  int64_t* first_span = new int64_t[size_t(params.size) + 1];
  first_span[0] = 0;
  for (int64_t i = 0; i < params.size; ++i)
    first_span[i + 1] = first_span[i] + (params.items[i].shape[0] + kSpan - 1) / kSpan;

  parallel_for(first_span[params.size], 8 * kSpan, [&](int64_t span) {
    int64_t low = 0, high = params.size - 1;  // the last tensor whose first span is not after `span`
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (first_span[middle] <= span) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    const int64_t start = (span - first_span[low]) * kSpan, left = params.items[low].shape[0] - start;
    update(c, data<float>(params.items[low]) + start, data<const float>(grads.items[low]) + start,
           data<float>(exp_avgs.items[low]) + start, data<float>(exp_avg_sqs.items[low]) + start,
           left < kSpan ? left : kSpan);
  });
  delete[] first_span;
}

}  // namespace INLAY_ISA_NS
}  // namespace inlay
