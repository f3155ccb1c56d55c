// The optimizer's steps.
#include "dynamic_map.h"
#include "entries/entry.h"

namespace inlay {

namespace {

// One list of an optimizer's call: as long as `params`, and each vector as size(its parameter's elements).
template <class F>
void check_list(const char* op, const char* name, const TensorList& list, DType dtype,
                const TensorList& params, F&& size) {
  if (list.size != params.size)
    throw std::invalid_argument("inlay." + std::string(op) + ": " + name + ": wanted " +
                                std::to_string(params.size) + " tensors, got " + std::to_string(list.size) +
                                "; pass one per parameter");
  for (int64_t i = 0; i < list.size; ++i) {
    check_dtype(op, name, list.items[i], dtype);
    check_vector(op, name, list.items[i], size(numel(params.items[i])));
  }
}

void check_step(const char* op, int64_t step) {
  if (step < 1)
    throw std::invalid_argument("inlay." + std::string(op) + ": step: wanted 1 or more, got " +
                                std::to_string(step) + "; count the first step as 1");
}

}  // namespace

void adamw_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                const TensorList& exp_avg_sqs, double lr, double beta1, double beta2, double eps,
                double weight_decay, int64_t step, double grad_scale) {
  constexpr const char* op = "adamw_step_";
  const auto same = [](int64_t size) { return size; };
  check_list(op, "params", params, DType::f32, params, same);
  check_list(op, "grads", grads, DType::f32, params, same);
  check_list(op, "exp_avgs", exp_avgs, DType::f32, params, same);
  check_list(op, "exp_avg_sqs", exp_avg_sqs, DType::f32, params, same);
  check_step(op, step);
  run(op, &KernelTable::adamw_step, params, grads, exp_avgs, exp_avg_sqs, lr, beta1, beta2, eps, weight_decay,
      step, grad_scale);
}

namespace {

// States of 8 bits: a code per element, a scale per block.
void check_coded(const char* op, const TensorList& params, const TensorList& exp_avgs,
                 const TensorList& exp_avg_sqs, const TensorList& exp_avg_absmaxes,
                 const TensorList& exp_avg_sq_absmaxes) {
  const auto same = [](int64_t size) { return size; };
  const auto blocks = [](int64_t size) { return (size + kStateBlock - 1) / kStateBlock; };
  check_list(op, "exp_avgs", exp_avgs, DType::u8, params, same);
  check_list(op, "exp_avg_sqs", exp_avg_sqs, DType::u8, params, same);
  check_list(op, "exp_avg_absmaxes", exp_avg_absmaxes, DType::f32, params, blocks);
  check_list(op, "exp_avg_sq_absmaxes", exp_avg_sq_absmaxes, DType::f32, params, blocks);
}

void check_maps(const char* op, const TensorView& signed_map, const TensorView& unsigned_map) {
  for (const TensorView* map : {&signed_map, &unsigned_map}) {
    check_dtype(op, "map", *map, DType::f32);
    check_vector(op, "map", *map, 256);
  }
}

}  // namespace

void adamw_8bit_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                     const TensorList& exp_avg_sqs, const TensorList& exp_avg_absmaxes,
                     const TensorList& exp_avg_sq_absmaxes, const TensorView& signed_map,
                     const TensorView& unsigned_map, double lr, double beta1, double beta2, double eps,
                     double weight_decay, int64_t step, double grad_scale) {
  constexpr const char* op = "adamw_8bit_step_";
  const auto same = [](int64_t size) { return size; };
  check_list(op, "params", params, DType::f32, params, same);
  check_list(op, "grads", grads, DType::f32, params, same);
  check_coded(op, params, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes);
  check_maps(op, signed_map, unsigned_map);
  check_step(op, step);
  run(op, &KernelTable::adamw_8bit_step, params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes,
      exp_avg_sq_absmaxes, signed_map, unsigned_map, lr, beta1, beta2, eps, weight_decay, step, grad_scale);
}

namespace {

// bf16 parameters, gradients of one dtype, and what their rounding takes; positions are multiples of `each`.
void check_bf16(const char* op, const TensorList& params, const TensorList& grads,
                const TensorList& residuals, const IntList& positions, int64_t each) {
  const auto same = [](int64_t size) { return size; };
  check_list(op, "params", params, DType::bf16, params, same);
  const bool narrow = grads.size && grads.items[0].dtype == DType::bf16;
  check_list(op, "grads", grads, narrow ? DType::bf16 : DType::f32, params, same);
  if (residuals.size) check_list(op, "residuals", residuals, DType::i16, params, same);
  if (positions.size != (residuals.size ? 0 : params.size))
    throw std::invalid_argument("inlay." + std::string(op) + ": positions: wanted " +
                                std::to_string(residuals.size ? 0 : params.size) + " numbers, got " +
                                std::to_string(positions.size) +
                                "; pass a residual per parameter, or a position per parameter");
  for (int64_t i = 0; i < positions.size; ++i)
    if (positions.items[i] < 0 || positions.items[i] % each)
      throw std::invalid_argument("inlay." + std::string(op) + ": positions: wanted multiples of " +
                                  std::to_string(each) + " from 0 on, got " +
                                  std::to_string(positions.items[i]) + "; begin each tensor at one");
}

}  // namespace

void adamw_bf16_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                     const TensorList& exp_avg_sqs, const TensorList& residuals, const IntList& positions,
                     double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step,
                     double grad_scale, int64_t seed) {
  constexpr const char* op = "adamw_bf16_step_";
  const auto same = [](int64_t size) { return size; };
  check_bf16(op, params, grads, residuals, positions, 1);
  check_list(op, "exp_avgs", exp_avgs, DType::f32, params, same);
  check_list(op, "exp_avg_sqs", exp_avg_sqs, DType::f32, params, same);
  check_step(op, step);
  run(op, &KernelTable::adamw_bf16_step, params, grads, exp_avgs, exp_avg_sqs, residuals, positions, lr,
      beta1, beta2, eps, weight_decay, step, grad_scale, seed);
}

void adamw_8bit_bf16_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                          const TensorList& exp_avg_sqs, const TensorList& exp_avg_absmaxes,
                          const TensorList& exp_avg_sq_absmaxes, const TensorList& residuals,
                          const IntList& positions, const TensorView& signed_map,
                          const TensorView& unsigned_map, double lr, double beta1, double beta2, double eps,
                          double weight_decay, int64_t step, double grad_scale, int64_t seed) {
  constexpr const char* op = "adamw_8bit_bf16_step_";
  check_bf16(op, params, grads, residuals, positions, 8);
  check_coded(op, params, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes);
  check_maps(op, signed_map, unsigned_map);
  check_step(op, step);
  run(op, &KernelTable::adamw_8bit_bf16_step, params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes,
      exp_avg_sq_absmaxes, residuals, positions, signed_map, unsigned_map, lr, beta1, beta2, eps,
      weight_decay, step, grad_scale, seed);
}

}  // namespace inlay
