// act(gate)·up and its backward, which also rebuilds h[..., I] for the submatrix gradient.
#include "cpu/kernel.h"

namespace inlay {
namespace INLAY_ISA_NS {

namespace {

// value = act(g) and slope = act'(g) of one Vec; each activation is one type, chosen outside the loops.
struct Silu {
  static Vec value(Vec g) { return g * sigmoid(g); }
  static Vec value_and_slope(Vec g, Vec& slope) {
    Vec complement;
    const Vec s = sigmoid(g, complement);
    slope = s * fma(g, complement, Vec(1.0f));
    return g * s;
  }
};

// g/2·(1 + tanh(u)) = g·sigmoid(2u), u = sqrt(2/pi)·(g + 0.044715·g³)
struct GeluTanh {
  static constexpr float kTwoRoot = 1.59576912160573071f;  // 2·sqrt(2/pi)
  static Vec value(Vec g) { return g * sigmoid(Vec(kTwoRoot) * g * fma(Vec(0.044715f) * g, g, Vec(1.0f))); }
  static Vec value_and_slope(Vec g, Vec& slope) {
    const Vec square = g * g;
    Vec complement;
    const Vec s = sigmoid(Vec(kTwoRoot) * g * fma(Vec(0.044715f), square, Vec(1.0f)), complement);
    const Vec inner = Vec(kTwoRoot) * fma(Vec(3 * 0.044715f), square, Vec(1.0f));
    slope = s * fma(g * inner, complement, Vec(1.0f));
    return g * s;
  }
};

// g·Phi(g); the slope adds g·phi(g)
struct Gelu {
  static Vec value(Vec g) { return g * normal_cdf(g); }
  static Vec value_and_slope(Vec g, Vec& slope) {
    const Vec cdf = normal_cdf(g);
    slope = fma(g * Vec(0.398942280401432678f), exp(Vec(-0.5f) * g * g), cdf);
    return g * cdf;
  }
};

template <class F>
inline void with_act(int64_t act, F&& f) {
  if (act == 0) return f(Silu{});
  if (act == 1) return f(GeluTanh{});
  return f(Gelu{});
}

// About how many elementary steps one element costs, for the choice of threads.
constexpr int64_t kCost = 4;

template <class T, class Act>
inline void rebuild(T* h_sel, const T* gate, const T* up, const int64_t* index, int64_t chosen) {
  for_vecs(chosen, [&](int64_t j, int n) {
    T gates[Vec::kWidth] = {}, ups[Vec::kWidth] = {};
    for (int i = 0; i < n; ++i) {
      gates[i] = gate[index[j + i]];
      ups[i] = up[index[j + i]];
    }
    store_n(h_sel + j, Act::value(load(gates)) * load(ups), n);
  });
}

template <class T, class Act>
inline void backward_row(T* dgate, T* dup, const T* dh, const T* gate, const T* up, int64_t width) {
  for_vecs(width, [&](int64_t j, int n) {
    Vec slope;
    const Vec d = load_n(dh + j, n), u = load_n(up + j, n);
    const Vec value = Act::value_and_slope(load_n(gate + j, n), slope);
    store_n(dgate + j, d * u * slope, n);
    store_n(dup + j, d * value, n);
  });
}

}  // namespace

void swiglu_forward(const TensorView& out, const TensorView& gate, const TensorView& up, int64_t act) {
  with_float(gate.dtype, [&](auto element) {
    using T = decltype(element);
    with_act(act, [&](auto activation) {
      using Act = decltype(activation);
      parallel_for(gate.shape[0], kCost * gate.shape[1], [&](int64_t m) {
        const T *g = row<const T>(gate, m), *u = row<const T>(up, m);
        T* into = row<T>(out, m);
        for_vecs(gate.shape[1], [&](int64_t j, int n) {
          store_n(into + j, Act::value(load_n(g + j, n)) * load_n(u + j, n), n);
        });
      });
    });
  });
}

void swiglu_backward(const TensorView& dgate, const TensorView& dup, const TensorView& h_sel,
                     const TensorView& dh, const TensorView& gate, const TensorView& up,
                     const TensorView& indices, int64_t act) {
  with_float(gate.dtype, [&](auto element) {
    using T = decltype(element);
    with_act(act, [&](auto activation) {
      using Act = decltype(activation);
      parallel_for(gate.shape[0], 2 * kCost * gate.shape[1], [&](int64_t m) {
        const T *g = row<const T>(gate, m), *u = row<const T>(up, m);
        backward_row<T, Act>(row<T>(dgate, m), row<T>(dup, m), row<const T>(dh, m), g, u, gate.shape[1]);
        rebuild<T, Act>(row<T>(h_sel, m), g, u, data<const int64_t>(indices), indices.shape[0]);
      });
    });
  });
}

}  // namespace INLAY_ISA_NS
}  // namespace inlay
