// AdamW over many tensors: a launch takes the pointers of up to 64 of them by value, and cuts them into spans
// of one size, so that many small tensors and a few large ones keep every multiprocessor equally busy.
//
//   g = grad·grad_scale;  p ← p·keep;  m ← m + (1−β1)·(g−m);  v ← β2·v + (1−β2)·g²
//   p ← p − step_size·m/(sqrt(v)/root_correction + eps)
#include <cmath>

#include "rows.cuh"

namespace inlay {
namespace cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kTensors = 64;             // 64·44 bytes: within the 4 KB that every GPU takes as parameters
constexpr int64_t kSpan = 4096;          // elements per block: four vectors of each array per thread
constexpr int64_t kMostSpans = 1 << 30;  // per launch

struct Tensor {
  float *param, *exp_avg, *exp_avg_sq;
  const float* grad;
  int64_t size;
};

struct Table {
  Tensor tensors[kTensors];
  int first_span[kTensors + 1];  // [i]: spans before tensor i; equal for what the table does not hold
  bool vectors;                  // every array starts on 16 bytes
};

struct Coefficients {
  float grad_scale, keep, one_minus_beta1, beta2, one_minus_beta2, step_size, root_correction, eps;
};

template <int N>
__device__ __forceinline__ void update(const Coefficients& c, const Tensor& t, int64_t j) {
  auto p = load<N>(t.param + j), m = load<N>(t.exp_avg + j), v = load<N>(t.exp_avg_sq + j);
  const auto grad = load<N>(t.grad + j);
  for (int i = 0; i < N; ++i) {
    const float g = grad.at[i] * c.grad_scale;
    m.at[i] = m.at[i] + c.one_minus_beta1 * (g - m.at[i]);
    v.at[i] = v.at[i] * c.beta2 + c.one_minus_beta2 * g * g;
    const float denominator = sqrtf(v.at[i]) / c.root_correction + c.eps;
    p.at[i] = p.at[i] * c.keep - c.step_size * m.at[i] / denominator;
  }
  store(t.param + j, p);
  store(t.exp_avg + j, m);
  store(t.exp_avg_sq + j, v);
}

__global__ void __launch_bounds__(kThreads) step_kernel(const Table table, const Coefficients c) {
  const int span = int(blockIdx.x);
  int low = 0;  // the last tensor whose first span is not after this one
  for (int step = kTensors / 2; step > 0; step /= 2)
    if (table.first_span[low + step] <= span) low += step;
  const Tensor& t = table.tensors[low];
  const int64_t begin = int64_t(span - table.first_span[low]) * kSpan;
  const int64_t end = begin + kSpan < t.size ? begin + kSpan : t.size;
  int64_t j = begin + threadIdx.x;
  if (table.vectors) {
    for (j = begin + int64_t(threadIdx.x) * 4; j + 4 <= end; j += kThreads * 4) update<4>(c, t, j);
    j = end - end % 4 + threadIdx.x;  // begin is a multiple of 4
  }
  for (; j < end; j += kThreads) update<1>(c, t, j);
}

}  // namespace

void adamw_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                const TensorList& exp_avg_sqs, double lr, double beta1, double beta2, double eps,
                double weight_decay, int64_t step, double grad_scale) {
  const double correction1 = 1.0 - std::pow(beta1, double(step));
  const double correction2 = 1.0 - std::pow(beta2, double(step));
  const Coefficients c = {float(grad_scale),
                          float(1.0 - lr * weight_decay),
                          float(1.0 - beta1),
                          float(beta2),
                          float(1.0 - beta2),
                          float(lr / correction1),
                          float(std::sqrt(correction2)),
                          float(eps)};
  Table table = {};
  int held = 0;
  int64_t spans = 0;
  const auto flush = [&] {
    for (int i = held; i <= kTensors; ++i) table.first_span[i] = int(spans);
    launch("adamw_step", step_kernel, Grid{dim3(unsigned(spans)), dim3(kThreads)}, table, c);
    held = 0, spans = 0;
  };
  const TensorList* lists[] = {&params, &grads, &exp_avgs, &exp_avg_sqs};
  for (int64_t i = 0; i < params.size; ++i) {
    const int64_t more = (params.items[i].shape[0] + kSpan - 1) / kSpan;
    if (more == 0) continue;
    if (held == kTensors || spans + more > kMostSpans) flush();
    if (held == 0) table.vectors = true;
    for (const TensorList* list : lists)
      table.vectors = table.vectors && reinterpret_cast<uintptr_t>(list->items[i].data) % 16 == 0;
    table.tensors[held] = {data<float>(params.items[i]), data<float>(exp_avgs.items[i]),
                           data<float>(exp_avg_sqs.items[i]), data<const float>(grads.items[i]),
                           params.items[i].shape[0]};
    table.first_span[held++] = int(spans);
    spans += more;
  }
  flush();
}

}  // namespace cuda
}  // namespace inlay
