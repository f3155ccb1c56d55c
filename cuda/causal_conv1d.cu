// The short causal convolution of linear attention, each channel by itself, with silu behind it or without.
//
//   forward   z[t] = bias + Σ_j w[j]·x[t − K + 1 + j]     y = silu(z) or z
//   backward  dz = dy·silu'(z) or dy      dx[t] = Σ_s w[K − 1 − s]·dz[t + s]
//             dw[j] = Σ_t dz[t]·x[t − K + 1 + j]           dbias = Σ_t dz[t]
//
//   x, y, dx, dy  [B, T, C], unit stride along C    weight, dweight  [C, K]    bias, dbias  [C]
//   sums  [P, K + 1, C]: a row for each span of kConvTokens tokens of a sample, taps first, then the bias
//
// Both read each input once from memory: the K rows that a token needs are the neighbours' too, and in L1.
#include "column_sums.cuh"
#include "scratch.h"

namespace inlay {
namespace cuda {

namespace {

constexpr int64_t kSpan = kConvTokens;
constexpr size_t kMostShared = 96u << 10;  // of one block, on every GPU that there is code for

// A sample's tokens as rows.
template <class T>
struct Tokens {
  T* data;
  int64_t batch, token;  // strides
  __device__ __forceinline__ T* at(int64_t b, int64_t t) const { return data + b * batch + t * token; }
};

template <class T>
Tokens<T> tokens_of(const TensorView& t) {
  return {t.ndim == 0 ? nullptr : data<T>(t), t.strides[0], t.strides[1]};
}

template <class W, class S>
struct Taps {
  const W* weight;
  const S* bias;  // or null
  int64_t channel, tap, count;
  __device__ __forceinline__ float at(int64_t c, int64_t j) const {
    return to_float(weight[c * channel + j * tap]);
  }
  // What token t is before the activation; `x` is the sample's first token at channel c.
  template <class T>
  __device__ __forceinline__ float convolved(const T* x, int64_t stride, int64_t t, int64_t c) const {
    float total = bias ? to_float(bias[c]) : 0.0f;
    for (int64_t j = t + 1 < count ? count - 1 - t : 0; j < count; ++j)
      total = fmaf(at(c, j), to_float(x[(t - count + 1 + j) * stride]), total);
    return total;
  }
};

struct Sigmoid {
  float value, complement;  // the complement without the cancellation
};

__device__ __forceinline__ Sigmoid sigmoid(float z) {
  const float e = expf(-fabsf(z)), large = 1.0f / (1.0f + e), small = e * large;
  return z < 0.0f ? Sigmoid{small, large} : Sigmoid{large, small};
}

// A thread per token and channel.
template <class T, class F>
__global__ void __launch_bounds__(256) forward_kernel(Tokens<T> y, Tokens<const T> x, F taps, int64_t count,
                                                      int64_t tokens, int64_t channels, bool silu) {
  const int64_t row = row_here(), c = item_here();
  if (row >= count || c >= channels) return;
  const int64_t b = row / tokens, t = row % tokens;
  const float z = taps.convolved(x.at(b, 0) + c, x.token, t, c);
  from_float(silu ? z * sigmoid(z).value : z, y.at(b, t)[c]);
}

// A thread per span and channel, from the last token whose gradient reaches the span down: dz of the last K
// tokens stands in a ring. That and the sums lie in shared memory, a column a thread, since K is a number
// that no register can be indexed by.
template <class T, class F>
__global__ void __launch_bounds__(128)
    backward_kernel(Tokens<T> dx, Tokens<const T> dy, Tokens<const T> x, F taps, Rows<float> sums,
                    int64_t tokens, int64_t channels, bool silu) {
  INLAY_DYNAMIC_SHARED(float, columns);
  const int64_t c = int64_t(blockIdx.y) * blockDim.x + threadIdx.x, width = blockDim.x;
  if (c >= channels) return;
  const int64_t spans = (tokens + kSpan - 1) / kSpan, b = blockIdx.x / spans;
  const int64_t first = blockIdx.x % spans * kSpan, end = first + kSpan < tokens ? first + kSpan : tokens;
  float* const ring = columns + threadIdx.x;                        // [K]
  float* const total = columns + taps.count * width + threadIdx.x;  // [K + 1]
  for (int64_t j = 0; j <= taps.count; ++j) total[j * width] = 0.0f;
  const T* const from = x.at(b, 0) + c;
  const int64_t reach = end + taps.count - 1 < tokens ? end + taps.count - 1 : tokens;
  // Of t in the ring; t + s is s places further. No division: a 64-bit one is 40 instructions.
  int64_t at = 0;
  for (int64_t t = reach - 1; t >= first; --t) {
    at = at == 0 ? taps.count - 1 : at - 1;
    float d = to_float(dy.at(b, t)[c]);
    if (silu) {
      const float z = taps.convolved(from, x.token, t, c);
      const Sigmoid s = sigmoid(z);
      d *= s.value * fmaf(z, s.complement, 1.0f);
    }
    ring[at * width] = d;
    if (t >= end) continue;
    if (dx.data) {
      float sum = 0.0f;
      for (int64_t s = 0; s < taps.count && t + s < tokens; ++s)
        sum = fmaf(taps.at(c, taps.count - 1 - s),
                   ring[(at + s < taps.count ? at + s : at + s - taps.count) * width], sum);
      from_float(sum, dx.at(b, t)[c]);
    }
    if (!sums.data) continue;
    for (int64_t j = t + 1 < taps.count ? taps.count - 1 - t : 0; j < taps.count; ++j)
      total[j * width] = fmaf(d, to_float(from[(t - taps.count + 1 + j) * x.token]), total[j * width]);
    total[taps.count * width] += d;
  }
  if (!sums.data) return;
  for (int64_t j = 0; j <= taps.count; ++j) sums.at(blockIdx.x)[j * channels + c] = total[j * width];
}

// out [C, K] of strides, from sums [K, C]
template <class T>
__global__ void store_kernel(T* out, int64_t channel, int64_t tap, const float* sums, int64_t taps,
                             int64_t channels) {
  const int64_t j = row_here(), c = item_here();
  if (j >= taps || c >= channels) return;
  from_float(sums[j * channels + c], out[c * channel + j * tap]);
}

void store_taps(const char* name, const TensorView& out, const float* sums, int64_t taps) {
  if (out.ndim == 0) return;
  with_float(out.dtype, [&](auto element) {
    using T = decltype(element);
    launch(name, store_kernel<T>, elementwise(taps, out.shape[0]), data<T>(out), out.strides[0],
           out.ndim > 1 ? out.strides[1] : int64_t(0), sums, taps, out.shape[0]);
  });
}

// Calls f(T{}, Taps) with the dtypes of x, the weight and the bias, which has the weight's where it is None.
template <class F>
void with_taps(const TensorView& x, const TensorView& weight, const TensorView& bias, F&& f) {
  with_float(x.dtype, [&](auto element) {
    with_float(weight.dtype, [&](auto tap) {
      using W = decltype(tap);
      const auto call = [&](auto shift) {
        using S = decltype(shift);
        f(element, Taps<W, S>{data<const W>(weight), bias.ndim == 0 ? nullptr : data<const S>(bias),
                              weight.strides[0], weight.strides[1], weight.shape[1]});
      };
      if (bias.ndim == 0 || bias.dtype == weight.dtype) return call(tap);
      with_float(bias.dtype, call);
    });
  });
}

}  // namespace

void causal_conv1d_forward(const TensorView& y, const TensorView& x, const TensorView& weight,
                           const TensorView& bias, bool silu) {
  const int64_t count = x.shape[0] * x.shape[1], channels = x.shape[2];
  with_taps(x, weight, bias, [&](auto element, auto taps) {
    using T = decltype(element);
    launch("causal_conv1d_forward", forward_kernel<T, decltype(taps)>, elementwise(count, channels),
           tokens_of<T>(y), tokens_of<const T>(x), taps, count, x.shape[1], channels, silu);
  });
}

void causal_conv1d_backward(const TensorView& dx, const TensorView& dweight, const TensorView& dbias,
                            const TensorView& sums, const TensorView& dy, const TensorView& x,
                            const TensorView& weight, const TensorView& bias, bool silu) {
  constexpr const char* name = "causal_conv1d_backward";
  const int64_t spans = x.shape[0] * ((x.shape[1] + kSpan - 1) / kSpan), channels = x.shape[2];
  const int64_t taps_count = weight.shape[1];
  unsigned threads = 128;  // a warp's loads are neighbours; more would only be more shared memory a block
  const auto bytes = [&] { return size_t(2 * taps_count + 1) * threads * sizeof(float); };
  while (threads > kWarp && bytes() > kMostShared) threads /= 2;
  if (bytes() > kMostShared)
    throw std::invalid_argument(
        "inlay.causal_conv1d_backward: weight: wanted at most 383 taps on a GPU, got " +
        std::to_string(taps_count) + "; move the tensors to the CPU");
  const Rows<float> rows_of_sums{sums.ndim == 0 ? nullptr : data<float>(sums),
                                 sums.ndim == 0 ? 0 : sums.strides[0]};
  const Grid grid{dim3(blocks_for(spans, 1), blocks_for(channels, threads)), dim3(threads), bytes()};
  with_taps(x, weight, bias, [&](auto element, auto taps) {
    using T = decltype(element);
    launch(name, backward_kernel<T, decltype(taps)>, grid, tokens_of<T>(dx), tokens_of<const T>(dy),
           tokens_of<const T>(x), taps, rows_of_sums, x.shape[1], channels, silu);
  });
  if (sums.ndim == 0) return;
  TensorView total = sums;  // the first row: a block has read its columns before it writes them
  total.ndim = 1;
  total.shape[0] = sums.shape[1];
  total.strides[0] = 1;
  add_shares(name, total, sums, 0);
  store_taps(name, dweight, data<float>(sums), taps_count);
  store_taps(name, dbias, data<float>(sums) + taps_count * channels, 1);
}

}  // namespace cuda
}  // namespace inlay
