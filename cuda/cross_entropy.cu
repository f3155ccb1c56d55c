// Softmax cross-entropy of a chunk of rows, gradient in place of the logits: one block per row.
//
//   loss[i] = log Σ exp(x − max) + max − x[label]      x ← (exp(x − max)/Σ − onehot)·scale
//
// Maximum and sum are found in one pass: each thread rescales its sum when it meets a larger logit. The
// second pass reads a row that is still in L2 (256 KB for 128,256 logits in bf16; 132 of them are 34 MB).
#include "rows.cuh"

namespace inlay {
namespace cuda {

namespace {

constexpr int kThreads =
    512;  // four blocks on a multiprocessor: one row's reduction hides behind others' loads

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

// exp(x − maximum); while all logits are −inf the difference would be NaN where 0 is wanted.
// exp2f is one instruction where expf is ten, and this op would be bound by them.
__device__ __forceinline__ float shifted_exp(float x, float maximum) {
  constexpr float kLog2e = 1.44269504088896341f;
  return exp2f((x - (maximum == minus_infinity() ? 0.0f : maximum)) * kLog2e);
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    chunk_kernel(float* loss, int64_t loss_stride, Rows<T> logits, const int64_t* labels, int64_t vocabulary,
                 float scale, bool write_grad) {
  INLAY_SHARED(float, partial, kThreads / kWarp);
  const int64_t m = blockIdx.x, label = labels[m];
  T* const x = logits.at(m);
  // A label outside the vocabulary is the caller's mistake; it costs a NaN, not somebody's memory.
  const float picked = label >= 0 && label < vocabulary ? to_float(x[label]) : __uint_as_float(0x7fc00000u);

  float maximum = minus_infinity(), sum = 0.0f;
  for (int64_t j = int64_t(threadIdx.x) * N; j < vocabulary; j += kThreads * N) {
    const auto pack = load<N>(x + j);
    float here = maximum;
    for (int i = 0; i < N; ++i) here = to_float(pack.at[i]) > here ? to_float(pack.at[i]) : here;
    if (here > maximum) {
      sum *= shifted_exp(maximum, here);
      maximum = here;
    }
    for (int i = 0; i < N; ++i) sum += shifted_exp(to_float(pack.at[i]), maximum);
  }
  const float highest = block_max(maximum, partial);
  const float total = block_sum(sum * shifted_exp(maximum, highest), partial);
  if (threadIdx.x == 0) loss[m * loss_stride] = logf(total) + (highest - picked);
  if (!write_grad) return;

  const float inverse = 1.0f / total;
  for (int64_t j = int64_t(threadIdx.x) * N; j < vocabulary; j += kThreads * N) {
    auto pack = load<N>(x + j);
    for (int i = 0; i < N; ++i) {
      const float p = shifted_exp(to_float(pack.at[i]), highest) * inverse;
      from_float((j + i == label ? p - 1.0f : p) * scale, pack.at[i]);
    }
    store(x + j, pack);
  }
}

}  // namespace

void cross_entropy_chunk(const TensorView& loss, const TensorView& logits, const TensorView& labels,
                         double scale, bool write_grad) {
  const Grid grid{dim3(blocks_for(logits.shape[0], 1)), dim3(kThreads)};
  with_float(logits.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto n) {
      launch("cross_entropy_chunk", chunk_kernel<T, n()>, grid, data<float>(loss), loss.strides[0],
             rows<T>(logits), data<const int64_t>(labels), logits.shape[1], float(scale), write_grad);
    };
    with_pack<T>(logits.shape[1], run, logits);
  });
}

}  // namespace cuda
}  // namespace inlay
