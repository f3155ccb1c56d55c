// AdamW on bf16 parameters: 256 at a time are widened to fp32, stepped as fp32 parameters are (cpu/adamw.h),
// and rounded. The loops over bits are plain ones, which the compiler makes vectors of.
#include "cpu/adamw.h"
#include "philox.h"

namespace inlay {
namespace INLAY_ISA_NS {

namespace {

constexpr uint32_t kInfinity = 0x7f800000, kNan = 0x7fc00000;

// bits(x), of every NaN the same ones: adding to another's could carry into the sign.
inline uint32_t canonical(float x) {
  const uint32_t bits = to_bits(x);
  return (bits & 0x7fffffff) > kInfinity ? kNan : bits;
}

// Where the 16 bits go that a bf16 has no room for (ops.h): beside it, or up or down at random.
struct Rounding {
  const TensorList &params, &residuals;
  const IntList& positions;
  uint64_t step, seed;

  // Of n ≤ kStateBlock parameters of tensor i, from `at` on.
  void widen(float* masters, int64_t i, int64_t at, int n) const {
    const auto* param = data<const uint16_t>(params.items[i]) + at;
    if (residuals.size) return join(masters, param, data<const int16_t>(residuals.items[i]) + at, n);
    for (int j = 0; j < n; ++j) masters[j] = from_bits(uint32_t(param[j]) << 16);
  }

  void narrow(const float* masters, int64_t i, int64_t at, int n) const {
    auto* param = data<uint16_t>(params.items[i]) + at;
    if (residuals.size) return split(masters, param, data<int16_t>(residuals.items[i]) + at, n);
    uint16_t numbers[kStateBlock + kHalves];
    const uint16_t* r = draw(numbers, uint64_t(positions.items[i]) + uint64_t(at), n);
    for (int j = 0; j < n; ++j) param[j] = uint16_t((canonical(masters[j]) + r[j]) >> 16);
  }

  static void join(float* masters, const uint16_t* param, const int16_t* residual, int n) {
    for (int j = 0; j < n; ++j)
      masters[j] = from_bits((uint32_t(param[j]) << 16) + uint32_t(int32_t(residual[j])));
  }

  static void split(const float* masters, uint16_t* param, int16_t* residual, int n) {
    for (int j = 0; j < n; ++j) {
      const uint32_t bits = canonical(masters[j]), nearest = (bits + 0x8000) >> 16;
      param[j] = uint16_t(nearest);
      residual[j] = int16_t(bits);  // the difference to nearest << 16
    }
  }

  // The n random numbers from `position` on: where in `numbers` they begin. A call gives eight neighbours.
  const uint16_t* draw(uint16_t* numbers, uint64_t position, int n) const {
    const uint64_t first = position / kHalves;
    const int skipped = int(position % kHalves), calls = (skipped + n + kHalves - 1) / kHalves;
    for (int call = 0; call < calls; ++call) {
      const PhiloxWords words = philox(first + uint64_t(call), step, seed);
      for (int i = 0; i < kHalves; ++i) numbers[call * kHalves + i] = uint16_t(words.half(i));
    }
    return numbers + skipped;
  }
};

// Calls f(T{}) with the element type of the gradients.
template <class F>
void with_grad(const TensorList& grads, F&& f) {
  if (grads.size && grads.items[0].dtype == DType::bf16) return f(bf16{});
  f(float{});
}

}  // namespace

void adamw_bf16_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                     const TensorList& exp_avg_sqs, const TensorList& residuals, const IntList& positions,
                     double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step,
                     double grad_scale, int64_t seed) {
  const Coefficients c(lr, beta1, beta2, eps, weight_decay, step, grad_scale);
  const Rounding rounding{params, residuals, positions, uint64_t(step), uint64_t(seed)};
  with_grad(grads, [&](auto type) {
    using Grad = decltype(type);
    for_blocks(params, [&](int64_t i, int64_t at, int size) {
      alignas(64) float masters[kStateBlock];
      rounding.widen(masters, i, at, size);
      update_run(c, masters, data<const Grad>(grads.items[i]) + at, data<float>(exp_avgs.items[i]) + at,
                 data<float>(exp_avg_sqs.items[i]) + at, size);
      rounding.narrow(masters, i, at, size);
    });
  });
}

void adamw_8bit_bf16_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                          const TensorList& exp_avg_sqs, const TensorList& exp_avg_absmaxes,
                          const TensorList& exp_avg_sq_absmaxes, const TensorList& residuals,
                          const IntList& positions, const TensorView& signed_map,
                          const TensorView& unsigned_map, double lr, double beta1, double beta2, double eps,
                          double weight_decay, int64_t step, double grad_scale, int64_t seed) {
  const Coefficients c(lr, beta1, beta2, eps, weight_decay, step, grad_scale);
  const Rounding rounding{params, residuals, positions, uint64_t(step), uint64_t(seed)};
  with_grad(grads, [&](auto type) {
    using Grad = decltype(type);
    for_blocks(params, [&](int64_t i, int64_t at, int size) {
      alignas(64) float masters[kStateBlock];
      rounding.widen(masters, i, at, size);
      update_block(c, masters, data<const Grad>(grads.items[i]) + at,
                   coded(exp_avgs.items[i], exp_avg_absmaxes.items[i], signed_map, at),
                   coded(exp_avg_sqs.items[i], exp_avg_sq_absmaxes.items[i], unsigned_map, at), size);
      rounding.narrow(masters, i, at, size);
    });
  });
}

}  // namespace INLAY_ISA_NS
}  // namespace inlay
