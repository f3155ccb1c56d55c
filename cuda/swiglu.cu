// act(gate)·up and its backward, which also rebuilds h[..., I] for the submatrix gradient.
//
//   forward   h = round(act(gate)·up)
//   backward  dgate = dh·up·act'(gate)   dup = dh·act(gate)   h_sel[m, j] = h[m, indices[j]]
//
//   gate, up, dh, h, dgate, dup  [M, K]    h_sel  [M, s]
#include "chosen.cuh"

namespace inlay {
namespace cuda {

namespace {

// 1/(1 + exp(-x)), and 1 minus that without the cancellation.
__device__ __forceinline__ float sigmoid(float x, float& complement) {
  const float e = expf(-x), s = 1.0f / (1.0f + e);
  complement = x < -80.0f ? 1.0f : e * s;  // e may be infinite there
  return s;
}

// value = act(g), slope = act'(g).
struct Silu {
  static __device__ __forceinline__ float value_and_slope(float g, float& slope) {
    float complement;
    const float s = sigmoid(g, complement);
    slope = s == 0.0f ? 0.0f : s * fmaf(g, complement, 1.0f);
    return g * s;
  }
};

// g/2·(1 + tanh(u)) = g·sigmoid(2u), u = sqrt(2/pi)·(g + 0.044715·g³)
struct GeluTanh {
  static __device__ __forceinline__ float value_and_slope(float g, float& slope) {
    constexpr float kTwoRoot = 1.59576912160573071f;  // 2·sqrt(2/pi)
    const float square = g * g;
    float complement;
    const float s = sigmoid(kTwoRoot * g * fmaf(0.044715f, square, 1.0f), complement);
    const float inner = kTwoRoot * fmaf(3 * 0.044715f, square, 1.0f);
    slope = s == 0.0f ? 0.0f : complement == 0.0f ? s : s * fmaf(g * inner, complement, 1.0f);
    return g * s;
  }
};

// g·Phi(g); the slope adds g·phi(g)
struct Gelu {
  static __device__ __forceinline__ float value_and_slope(float g, float& slope) {
    const float cdf = 0.5f * erfcf(-0.707106781186547524f * g);
    slope = fmaf(g * 0.398942280401432678f, expf(-0.5f * g * g), cdf);
    return g * cdf;
  }
};

// What the forward stores and the backward rebuilds: one function, so that both have the same bits.
template <class Act, class T>
__device__ __forceinline__ void activate(T gate, T up, T& h) {
  float slope;
  from_float(Act::value_and_slope(to_float(gate), slope) * to_float(up), h);
}

template <class T, class Act, int N>
__global__ void forward_kernel(Rows<T> out, Rows<const T> gate, Rows<const T> up, int64_t count,
                               int64_t width) {
  const int64_t m = row_here(), j = item_here() * N;
  if (m >= count || j >= width) return;
  auto g = load<N>(gate.at(m) + j);
  const auto u = load<N>(up.at(m) + j);
  for (int i = 0; i < N; ++i) activate<Act>(g.at[i], u.at[i], g.at[i]);
  store(out.at(m) + j, g);
}

// A warp works on 32·N neighbouring channels of one row. h of those that are chosen is rebuilt from gate and
// up where they lie, in L1 by then: a launch of its own would fetch 32 bytes of each for every two that it
// needs.
template <class T, class Act, int N>
__global__ void backward_kernel(Rows<T> dgate, Rows<T> dup, Rows<T> h_sel, Rows<const T> dh,
                                Rows<const T> gate, Rows<const T> up, Chosen chosen, int64_t count,
                                int64_t width) {
  const int64_t m = row_here(), j = item_here() * N;
  if (m >= count) return;  // a whole warp
  if (j < width) {
    auto g = load<N>(gate.at(m) + j), u = load<N>(up.at(m) + j);
    const auto d = load<N>(dh.at(m) + j);
    for (int i = 0; i < N; ++i) {
      float slope;
      const float grad = to_float(d.at[i]);
      const float value = Act::value_and_slope(to_float(g.at[i]), slope);
      from_float(grad * to_float(u.at[i]) * slope, g.at[i]);
      from_float(grad * value, u.at[i]);
    }
    store(dgate.at(m) + j, g);
    store(dup.at(m) + j, u);
  }
  for_chosen<N>(chosen, j,
                [&](int64_t i, int64_t c) { activate<Act>(gate.at(m)[c], up.at(m)[c], h_sel.at(m)[i]); });
}

template <class F>
void with_act(int64_t act, F&& f) {
  if (act == 0) return f(Silu{});
  if (act == 1) return f(GeluTanh{});
  f(Gelu{});
}

}  // namespace

void swiglu_forward(const TensorView& out, const TensorView& gate, const TensorView& up, int64_t act) {
  const int64_t count = gate.shape[0], width = gate.shape[1];
  with_float(gate.dtype, [&](auto element) {
    with_act(act, [&](auto activation) {
      using T = decltype(element);
      using Act = decltype(activation);
      const auto run = [&](auto n) {
        launch("swiglu_forward", forward_kernel<T, Act, n()>, elementwise(count, width / n()), rows<T>(out),
               rows<const T>(gate), rows<const T>(up), count, width);
      };
      with_pack<T>(width, run, out, gate, up);
    });
  });
}

void swiglu_backward(const TensorView& dgate, const TensorView& dup, const TensorView& h_sel,
                     const TensorView& dh, const TensorView& gate, const TensorView& up,
                     const TensorView& indices, int64_t act) {
  const int64_t count = gate.shape[0], width = gate.shape[1];
  const Chosen chosen = chosen_of(indices);
  with_float(gate.dtype, [&](auto element) {
    with_act(act, [&](auto activation) {
      using T = decltype(element);
      using Act = decltype(activation);
      const auto run = [&](auto n) {
        launch("swiglu_backward", backward_kernel<T, Act, n()>, elementwise(count, width / n()),
               rows<T>(dgate), rows<T>(dup), rows<T>(h_sel), rows<const T>(dh), rows<const T>(gate),
               rows<const T>(up), chosen, count, width);
      };
      with_pack<T>(width, run, dgate, dup, dh, gate, up);
    });
  });
}

}  // namespace cuda
}  // namespace inlay
