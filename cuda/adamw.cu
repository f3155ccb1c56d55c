// AdamW over many tensors, with fp32 or 8-bit states (adamw.cuh has the formula): a launch takes the pointers
// of up to 64 tensors by value.
//
// Bytes per element, what memory allows being the floor: 28 with fp32 states; 16.06 with states of 8 bits, of
// which a warp takes 256 at a time, the elements that share a scale: no barriers, and nothing of the states
// leaves registers.
#include "adamw.cuh"

namespace inlay {
namespace cuda {

namespace {

struct Tensor {
  static constexpr int kMost = 64;  // 40 bytes each
  float *param, *exp_avg, *exp_avg_sq;
  const float* grad;
  int64_t size;

  bool aligned() const { return start_on_vectors(param, exp_avg, exp_avg_sq, grad); }
};

struct CodedTensor {
  static constexpr int kMost = 64;  // 56 bytes each
  float* param;
  const float* grad;
  CodedStates states;
  int64_t size;

  bool aligned() const { return start_on_vectors(param, grad, states.exp_avg, states.exp_avg_sq); }
};

template <int N>
__device__ __forceinline__ void update(const Coefficients& c, const Tensor& t, int64_t j) {
  auto p = load<N>(t.param + j), m = load<N>(t.exp_avg + j), v = load<N>(t.exp_avg_sq + j);
  const auto grad = load<N>(t.grad + j);
  for (int i = 0; i < N; ++i) c.update(p.at[i], grad.at[i], m.at[i], v.at[i]);
  store(t.param + j, p);
  store(t.exp_avg + j, m);
  store(t.exp_avg_sq + j, v);
}

__global__ void __launch_bounds__(kThreads) step_kernel(const Table<Tensor> table, const Coefficients c) {
  int64_t begin, end;
  const Tensor& t = table.find(kSpan, begin, end);
  int64_t j = begin + threadIdx.x;
  if (table.vectors) {
    for (j = begin + int64_t(threadIdx.x) * 4; j + 4 <= end; j += kThreads * 4) update<4>(c, t, j);
    j = end - end % 4 + threadIdx.x;  // begin is a multiple of 4
  }
  for (; j < end; j += kThreads) update<1>(c, t, j);
}

__global__ void __launch_bounds__(kThreads) coded_kernel(const Table<CodedTensor> table, const Coefficients c,
                                                         const float* signed_map, const float* unsigned_map) {
  INLAY_SHARED(float, maps, 512);
  copy_maps(maps, signed_map, unsigned_map);
  int64_t begin, end;
  const CodedTensor& t = table.find(kCodedSpan, begin, end);
  for_state_blocks(begin, end, table.vectors, [&](const Lane& lane) {
    auto p = lane.load(t.param);
    update_run(c, t.states, maps, lane, p.at, lane.load(t.grad));
    lane.store(t.param, p);
  });
}

}  // namespace

void adamw_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                const TensorList& exp_avg_sqs, double lr, double beta1, double beta2, double eps,
                double weight_decay, int64_t step, double grad_scale) {
  const Coefficients c(lr, beta1, beta2, eps, weight_decay, step, grad_scale);
  const auto make = [&](int64_t i) {
    return Tensor{data<float>(params.items[i]), data<float>(exp_avgs.items[i]),
                  data<float>(exp_avg_sqs.items[i]), data<const float>(grads.items[i]),
                  params.items[i].shape[0]};
  };
  for_tables<Tensor>(params.size, kSpan, make, [&](const Table<Tensor>& table, const Grid& grid) {
    launch("adamw_step", step_kernel, grid, table, c);
  });
}

void adamw_8bit_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                     const TensorList& exp_avg_sqs, const TensorList& exp_avg_absmaxes,
                     const TensorList& exp_avg_sq_absmaxes, const TensorView& signed_map,
                     const TensorView& unsigned_map, double lr, double beta1, double beta2, double eps,
                     double weight_decay, int64_t step, double grad_scale) {
  static_assert(sizeof(Table<CodedTensor>) + sizeof(Coefficients) + 16 <= kMostParameters, "one launch");
  const Coefficients c(lr, beta1, beta2, eps, weight_decay, step, grad_scale);
  const auto make = [&](int64_t i) {
    return CodedTensor{
        data<float>(params.items[i]), data<const float>(grads.items[i]),
        CodedStates{data<float>(exp_avg_absmaxes.items[i]), data<float>(exp_avg_sq_absmaxes.items[i]),
                    data<uint8_t>(exp_avgs.items[i]), data<uint8_t>(exp_avg_sqs.items[i])},
        params.items[i].shape[0]};
  };
  for_tables<CodedTensor>(params.size, kCodedSpan, make,
                          [&](const Table<CodedTensor>& table, const Grid& grid) {
                            launch("adamw_8bit_step", coded_kernel, grid, table, c,
                                   data<const float>(signed_map), data<const float>(unsigned_map));
                          });
}

}  // namespace cuda
}  // namespace inlay
