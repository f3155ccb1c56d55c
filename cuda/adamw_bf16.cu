// AdamW on bf16 parameters (csrc/ops.h; adamw.cuh has the formula): a thread widens eight neighbours, 16
// bytes, to fp32, steps them as fp32 parameters are, and rounds them, either with the 16 bits that are left
// kept beside them, or at random, by one call of Philox for the eight.
//
// Bytes per element with bf16 gradients, what memory allows being the floor:
//
//   states   residual   at random
//   fp32     26         22
//   8 bits   14.06      10.06
#include "adamw.cuh"
#include "philox.h"

namespace inlay {
namespace cuda {

namespace {

constexpr uint32_t kNan = 0x7fc00000;

struct Tensor {
  static constexpr int kMost = 64;  // 56 bytes each
  bf16* param;
  const void* grad;
  float *exp_avg, *exp_avg_sq;
  int16_t* residual;
  uint64_t position;
  int64_t size;

  bool aligned() const {
    return start_on_vectors(param, grad, exp_avg, exp_avg_sq, residual) && position % kHalves == 0;
  }
};

struct CodedTensor {
  static constexpr int kMost = 32;  // 72 bytes each
  bf16* param;
  const void* grad;
  CodedStates states;
  int16_t* residual;
  uint64_t position;
  int64_t size;

  bool aligned() const { return start_on_vectors(param, grad, states.exp_avg, states.exp_avg_sq, residual); }
};

// What all random numbers of a call depend on.
struct Draws {
  uint64_t step, seed;

  __device__ __forceinline__ PhiloxWords at(uint64_t position) const {
    return philox(position / kHalves, step, seed);
  }
};

// Neighbouring parameters: the eight that share a call of Philox, or one of them.
template <bool kResidual, int N>
struct Parameters {
  Pack<bf16, N> rounded;
  Pack<int16_t, N> residual;

  __device__ __forceinline__ void widen(float (&p)[N]) const {
    for (int i = 0; i < N; ++i) {
      const uint32_t rest = kResidual ? uint32_t(int32_t(residual.at[i])) : 0;
      p[i] = __uint_as_float((uint32_t(rounded.at[i].bits) << 16) + rest);
    }
  }

  __device__ __forceinline__ void narrow(const float (&p)[N], const Draws& draws, uint64_t position) {
    PhiloxWords words = {};
    if (!kResidual) words = draws.at(position);
    const int first = N == kHalves ? 0 : int(position % kHalves);
    for (int i = 0; i < N; ++i) {
      const uint32_t bits = p[i] == p[i] ? __float_as_uint(p[i]) : kNan;
      const uint32_t more = kResidual ? 0x8000 : words.half(first + i);
      rounded.at[i].bits = uint16_t((bits + more) >> 16);
      residual.at[i] = int16_t(bits);  // the difference to the nearest bf16
    }
  }
};

template <class Grad, bool kResidual, int N>
__device__ __forceinline__ void update(const Coefficients& c, const Tensor& t, const Draws& draws,
                                       int64_t j) {
  Parameters<kResidual, N> params;
  params.rounded = load<N>(t.param + j);
  if (kResidual) params.residual = load<N>(t.residual + j);
  auto m = load<N>(t.exp_avg + j), v = load<N>(t.exp_avg_sq + j);
  const auto grad = load<N>(static_cast<const Grad*>(t.grad) + j);
  float p[N];
  params.widen(p);
  for (int i = 0; i < N; ++i) c.update(p[i], to_float(grad.at[i]), m.at[i], v.at[i]);
  params.narrow(p, draws, t.position + uint64_t(j));
  store(t.param + j, params.rounded);
  if (kResidual) store(t.residual + j, params.residual);
  store(t.exp_avg + j, m);
  store(t.exp_avg_sq + j, v);
}

template <class Grad, bool kResidual>
__global__ void __launch_bounds__(kThreads)
    step_kernel(const Table<Tensor> table, const Coefficients c, const Draws draws) {
  int64_t begin, end;
  const Tensor& t = table.find(kSpan, begin, end);
  int64_t j = begin + threadIdx.x;
  if (table.vectors) {
    for (j = begin + int64_t(threadIdx.x) * 8; j + 8 <= end; j += kThreads * 8)
      update<Grad, kResidual, 8>(c, t, draws, j);
    j = end - end % 8 + threadIdx.x;  // begin is a multiple of 8
  }
  for (; j < end; j += kThreads) update<Grad, kResidual, 1>(c, t, draws, j);
}

template <class Grad, bool kResidual>
__global__ void __launch_bounds__(kThreads)
    coded_kernel(const Table<CodedTensor> table, const Coefficients c, const Draws draws,
                 const float* signed_map, const float* unsigned_map) {
  static_assert(kRun == kHalves, "a lane's parameters share a call of Philox");
  INLAY_SHARED(float, maps, 512);
  copy_maps(maps, signed_map, unsigned_map);
  int64_t begin, end;
  const CodedTensor& t = table.find(kCodedSpan, begin, end);
  for_state_blocks(begin, end, table.vectors, [&](const Lane& lane) {
    Parameters<kResidual, kRun> params;
    params.rounded = lane.load(t.param);
    if (kResidual) params.residual = lane.load(t.residual);
    float p[kRun];
    params.widen(p);
    update_run(c, t.states, maps, lane, p, lane.load(static_cast<const Grad*>(t.grad)));
    params.narrow(p, draws, t.position + uint64_t(lane.j));
    lane.store(t.param, params.rounded);
    if (kResidual) lane.store(t.residual, params.residual);
  });
}

// --- launches

// Calls f(Grad{}, kResidual) with the gradients' type and the rounding that the arguments are of.
template <class F>
void with_types(const TensorList& grads, const TensorList& residuals, F&& f) {
  const auto with_rounding = [&](auto grad) {
    if (residuals.size) return f(grad, std::true_type{});
    f(grad, std::false_type{});
  };
  if (grads.size && grads.items[0].dtype == DType::bf16) return with_rounding(bf16{});
  with_rounding(float{});
}

int16_t* residual_of(const TensorList& residuals, int64_t i) {
  return residuals.size ? data<int16_t>(residuals.items[i]) : nullptr;
}

uint64_t position_of(const IntList& positions, int64_t i) {
  return positions.size ? uint64_t(positions.items[i]) : 0;
}

}  // namespace

void adamw_bf16_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                     const TensorList& exp_avg_sqs, const TensorList& residuals, const IntList& positions,
                     double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step,
                     double grad_scale, int64_t seed) {
  static_assert(sizeof(Table<Tensor>) + sizeof(Coefficients) + sizeof(Draws) <= kMostParameters,
                "one launch");
  static_assert(kSpan % 8 == 0, "spans begin on vectors");
  const Coefficients c(lr, beta1, beta2, eps, weight_decay, step, grad_scale);
  const Draws draws{uint64_t(step), uint64_t(seed)};
  const auto make = [&](int64_t i) {
    return Tensor{data<bf16>(params.items[i]),    grads.items[i].data,
                  data<float>(exp_avgs.items[i]), data<float>(exp_avg_sqs.items[i]),
                  residual_of(residuals, i),      position_of(positions, i),
                  params.items[i].shape[0]};
  };
  with_types(grads, residuals, [&](auto grad, auto residual) {
    for_tables<Tensor>(params.size, kSpan, make, [&](const Table<Tensor>& table, const Grid& grid) {
      launch("adamw_bf16_step", step_kernel<decltype(grad), residual.value>, grid, table, c, draws);
    });
  });
}

void adamw_8bit_bf16_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                          const TensorList& exp_avg_sqs, const TensorList& exp_avg_absmaxes,
                          const TensorList& exp_avg_sq_absmaxes, const TensorList& residuals,
                          const IntList& positions, const TensorView& signed_map,
                          const TensorView& unsigned_map, double lr, double beta1, double beta2, double eps,
                          double weight_decay, int64_t step, double grad_scale, int64_t seed) {
  static_assert(sizeof(Table<CodedTensor>) + sizeof(Coefficients) + sizeof(Draws) + 16 <= kMostParameters,
                "one launch");
  const Coefficients c(lr, beta1, beta2, eps, weight_decay, step, grad_scale);
  const Draws draws{uint64_t(step), uint64_t(seed)};
  const auto make = [&](int64_t i) {
    return CodedTensor{
        data<bf16>(params.items[i]),
        grads.items[i].data,
        CodedStates{data<float>(exp_avg_absmaxes.items[i]), data<float>(exp_avg_sq_absmaxes.items[i]),
                    data<uint8_t>(exp_avgs.items[i]), data<uint8_t>(exp_avg_sqs.items[i])},
        residual_of(residuals, i),
        position_of(positions, i),
        params.items[i].shape[0]};
  };
  with_types(grads, residuals, [&](auto grad, auto residual) {
    for_tables<CodedTensor>(
        params.size, kCodedSpan, make, [&](const Table<CodedTensor>& table, const Grid& grid) {
          launch("adamw_8bit_bf16_step", coded_kernel<decltype(grad), residual.value>, grid, table, c, draws,
                 data<const float>(signed_map), data<const float>(unsigned_map));
        });
  });
}

}  // namespace cuda
}  // namespace inlay
