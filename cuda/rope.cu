// Rotary embedding: one block per (batch, position); its heads share cos and sin through L1.
//
//   y1 = x1·cos1 − x2·sin1   y2 = x2·cos2 + x1·sin2       halves of the first R channels; the others are
//   copied inverse: y1 = x1·cos1 + x2·sin2   y2 = x2·cos2 − x1·sin1
//
//   x, y  [B, H, T, D], any strides but along D    cos, sin  [B or 1, T, R]
#include "rows.cuh"

namespace inlay {
namespace cuda {

namespace {

template <class T>
struct Heads {
  T* data;
  int64_t batch, head, token;  // strides
  __device__ __forceinline__ T* at(int64_t b, int64_t h, int64_t t) const {
    return data + b * batch + h * head + t * token;
  }
};

struct Shape {
  int64_t tokens, heads, half, width;  // half = R/2, width = D
};

// Threads: x over packs of channels, y over heads.
template <class T, class C, int N>
__global__ void __launch_bounds__(256) rotate_kernel(Heads<T> y, Heads<const T> x, Heads<const C> cos,
                                                     Heads<const C> sin, Shape shape, bool inverse) {
  const int64_t b = blockIdx.x / shape.tokens, t = blockIdx.x % shape.tokens;
  const C *c = cos.at(b, 0, t), *s = sin.at(b, 0, t);
  const C* low_sin = inverse ? s + shape.half : s;   // multiplies x2
  const C* high_sin = inverse ? s : s + shape.half;  // multiplies x1
  const float sign = inverse ? -1.0f : 1.0f;
  for (int64_t h = threadIdx.y; h < shape.heads; h += blockDim.y) {
    const T* from = x.at(b, h, t);
    T* into = y.at(b, h, t);
    for (int64_t j = int64_t(threadIdx.x) * N; j < shape.half; j += int64_t(blockDim.x) * N) {
      auto low = load<N>(from + j), high = load<N>(from + shape.half + j);
      const auto c1 = load<N>(c + j), c2 = load<N>(c + shape.half + j);
      const auto s1 = load<N>(low_sin + j), s2 = load<N>(high_sin + j);
      for (int i = 0; i < N; ++i) {
        const float x1 = to_float(low.at[i]), x2 = to_float(high.at[i]);
        from_float(x1 * to_float(c1.at[i]) - sign * x2 * to_float(s1.at[i]), low.at[i]);
        from_float(x2 * to_float(c2.at[i]) + sign * x1 * to_float(s2.at[i]), high.at[i]);
      }
      store(into + j, low);
      store(into + shape.half + j, high);
    }
    for (int64_t j = 2 * shape.half + threadIdx.x; j < shape.width; j += blockDim.x) into[j] = from[j];
  }
}

template <class T>
Heads<T> heads_of(const TensorView& t) {
  return {static_cast<T*>(t.data), t.strides[0], t.strides[1], t.strides[2]};
}

template <class T>
Heads<T> angles_of(const TensorView& t) {
  return {static_cast<T*>(t.data), t.shape[0] == 1 ? 0 : t.strides[0], 0, t.strides[1]};
}

// Every row starts on 16 bytes, whichever way one walks.
bool aligned(const TensorView& t) {
  bool all = reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
  for (int d = 0; d < t.ndim - 1; ++d)
    all = all && (t.shape[d] <= 1 || t.strides[d] * element_size(t.dtype) % 16 == 0);
  return all;
}

}  // namespace

void rope_rotate(const TensorView& y, const TensorView& x, const TensorView& cos, const TensorView& sin,
                 bool inverse) {
  const Shape shape{x.shape[2], x.shape[1], cos.shape[2] / 2, x.shape[3]};
  const bool all_aligned = aligned(y) && aligned(x) && aligned(cos) && aligned(sin);
  with_float(x.dtype, [&](auto element) {
    with_float(cos.dtype, [&](auto angle) {
      using T = decltype(element);
      using C = decltype(angle);
      const auto run = [&](auto n) {
        // Half a head of 64 to 256 channels is 4 to 16 packs: a few lanes per head, many heads per block.
        unsigned across = 4;
        while (across < 32 && across * n() < shape.half) across *= 2;
        const Grid grid{dim3(blocks_for(x.shape[0] * shape.tokens, 1)), dim3(across, 256 / across)};
        launch("rope_rotate", rotate_kernel<T, C, n()>, grid, heads_of<T>(y), heads_of<const T>(x),
               angles_of<const C>(cos), angles_of<const C>(sin), shape, inverse);
      };
      constexpr int kPack = 16 / (sizeof(T) < sizeof(C) ? sizeof(C) : sizeof(T));
      if (all_aligned && shape.half % 8 == 0) return run(std::integral_constant<int, kPack>{});
      run(std::integral_constant<int, 1>{});
    });
  });
}

}  // namespace cuda
}  // namespace inlay
