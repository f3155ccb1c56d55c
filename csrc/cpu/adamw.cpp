// AdamW over all tensors in one parallel loop, with fp32 or 8-bit states (cpu/adamw.h has the formula).
#include "cpu/adamw.h"

namespace inlay {
namespace INLAY_ISA_NS {

void adamw_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                const TensorList& exp_avg_sqs, double lr, double beta1, double beta2, double eps,
                double weight_decay, int64_t step, double grad_scale) {
  const Coefficients c(lr, beta1, beta2, eps, weight_decay, step, grad_scale);
  for_spans(params, [&](int64_t i, int64_t start, int64_t size) {
    update_run(c, data<float>(params.items[i]) + start, data<const float>(grads.items[i]) + start,
               data<float>(exp_avgs.items[i]) + start, data<float>(exp_avg_sqs.items[i]) + start, size);
  });
}

void adamw_8bit_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                     const TensorList& exp_avg_sqs, const TensorList& exp_avg_absmaxes,
                     const TensorList& exp_avg_sq_absmaxes, const TensorView& signed_map,
                     const TensorView& unsigned_map, double lr, double beta1, double beta2, double eps,
                     double weight_decay, int64_t step, double grad_scale) {
  const Coefficients c(lr, beta1, beta2, eps, weight_decay, step, grad_scale);
  for_blocks(params, [&](int64_t i, int64_t at, int size) {
    update_block(c, data<float>(params.items[i]) + at, data<const float>(grads.items[i]) + at,
                 coded(exp_avgs.items[i], exp_avg_absmaxes.items[i], signed_map, at),
                 coded(exp_avg_sqs.items[i], exp_avg_sq_absmaxes.items[i], unsigned_map, at), size);
  });
}

}  // namespace INLAY_ISA_NS
}  // namespace inlay
