// Rotary embedding: one piece of work is one (batch, position); its heads share cos and sin.
#include "cpu/kernel.h"

namespace inlay {
namespace INLAY_ISA_NS {

namespace {

// One head: halves of the first 2·half channels. sign = 1 rotates, -1 with swapped sines transposes.
template <class T, class C>
inline void rotate(T* y, const T* x, const C* cos, const C* sin, int64_t half, int64_t width, bool inverse) {
  const C* low_sin = inverse ? sin + half : sin;   // the sine that multiplies x2
  const C* high_sin = inverse ? sin : sin + half;  // the sine that multiplies x1
  const Vec sign(inverse ? -1.0f : 1.0f);
  for_vecs(half, [&](int64_t j, int n) {
    const Vec x1 = load_n(x + j, n), x2 = load_n(x + half + j, n);
    const Vec y1 = x1 * load_n(cos + j, n) - sign * x2 * load_n(low_sin + j, n);
    const Vec y2 = x2 * load_n(cos + half + j, n) + sign * x1 * load_n(high_sin + j, n);
    store_n(y + j, y1, n);
    store_n(y + half + j, y2, n);
  });
  for (int64_t j = 2 * half; j < width; ++j) y[j] = x[j];
}

}  // namespace

void rope_rotate(const TensorView& y, const TensorView& x, const TensorView& cos, const TensorView& sin,
                 bool inverse) {
  const int64_t batch = x.shape[0], heads = x.shape[1], tokens = x.shape[2], width = x.shape[3];
  const int64_t half = cos.shape[2] / 2;
  with_float(x.dtype, [&](auto element) {
    using T = decltype(element);
    with_float(cos.dtype, [&](auto angle) {
      using C = decltype(angle);
      const auto at = [](const TensorView& t, int64_t b, int64_t pos) {
        return data<const C>(t) + (t.shape[0] == 1 ? 0 : b) * t.strides[0] + pos * t.strides[1];
      };
      parallel_for(batch * tokens, 2 * heads * width, [&](int64_t i) {
        const int64_t b = i / tokens, pos = i % tokens;
        for (int64_t h = 0; h < heads; ++h)
          rotate(data<T>(y) + b * y.strides[0] + h * y.strides[1] + pos * y.strides[2],
                 data<const T>(x) + b * x.strides[0] + h * x.strides[1] + pos * x.strides[2], at(cos, b, pos),
                 at(sin, b, pos), half, width, inverse);
      });
    });
  });
}

}  // namespace INLAY_ISA_NS
}  // namespace inlay
