// Causal convolution of each channel by itself, with or without silu behind it. Tokens lie in rows, as
// projections leave them. One piece of work is a span of tokens of one sample; channels go through it in
// blocks, so that what a block keeps stays in L1.
#include "cpu/column_sums.h"
#include "scratch.h"

namespace inlay {
namespace INLAY_ISA_NS {

namespace {

constexpr int64_t kSpan = kConvTokens, kBlock = 256;  // tokens and channels

// Taps as fp32 [K, C] and the bias [C], or zeros: made once per call.
struct Taps {
  float* values;
  int64_t count, channels;

  Taps(const TensorView& weight, const TensorView& bias) : count(weight.shape[1]), channels(weight.shape[0]) {
    values = new float[size_t((count + 1) * channels + 1)];
    memset(values, 0, size_t((count + 1) * channels) * 4);
    with_float(weight.dtype, [&](auto element) {
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t j = 0; j < count; ++j)
          values[j * channels + c] =
              load_one(row<const decltype(element)>(weight, c) + j * weight.strides[1]);
    });
    if (!given(bias)) return;
    with_float(bias.dtype, [&](auto element) {
      for (int64_t c = 0; c < channels; ++c)
        values[count * channels + c] = load_one(row<const decltype(element)>(bias, c));
    });
  }
  ~Taps() { delete[] values; }
  Taps(const Taps&) = delete;
  Taps& operator=(const Taps&) = delete;
  const float* tap(int64_t j) const { return values + j * channels; }
  const float* bias() const { return values + count * channels; }
};

// A sample's tokens as rows.
template <class T>
struct Sample {
  T* data;
  int64_t stride;
  Sample(const TensorView& t, int64_t b)
      : data(given(t) ? INLAY_ISA_NS::data<T>(t) + b * t.strides[0] : nullptr), stride(t.strides[1]) {}
  T* operator[](int64_t t) const { return data + t * stride; }
};

// What token t is before the activation, at channels [c, c + n).
template <class T>
inline Vec convolved(const Taps& taps, const Sample<const T>& x, int64_t t, int64_t c, int n) {
  Vec total = load_n(taps.bias() + c, n);
  for (int64_t j = t + 1 < taps.count ? taps.count - 1 - t : 0; j < taps.count; ++j)
    total = fma(load_n(taps.tap(j) + c, n), load_n(x[t - taps.count + 1 + j] + c, n), total);
  return total;
}

inline Vec silu_slope(Vec z) {
  Vec complement;
  const Vec s = sigmoid(z, complement);
  return s * fma(z, complement, Vec(1.0f));
}

template <class F>
inline void for_spans(const TensorView& x, int64_t cost, F&& f) {
  const int64_t spans = (x.shape[1] + kSpan - 1) / kSpan;
  parallel_for(x.shape[0] * spans, kSpan * x.shape[2] * cost, [&](int64_t piece) {
    const int64_t first = piece % spans * kSpan;
    f(piece, piece / spans, first, least(first + kSpan, x.shape[1]));
  });
}

template <class T>
struct Gradients {
  const Taps& taps;
  Sample<T> dx;
  Sample<const T> dy, x;
  float* sums;  // of a span, [K + 1, C]: dweight by taps, then dbias; or null
  bool silu;
  int64_t tokens;

  // Tokens [first, end), channels [c, c + width), from the last token whose gradient reaches them down.
  void block(int64_t first, int64_t end, int64_t c, int64_t width, float* slopes) const {
    for (int64_t t = least(end + taps.count - 1, tokens) - 1; t >= first; --t) {
      for_vecs(width, [&](int64_t i, int n) {
        Vec d = load_n(dy[t] + c + i, n);
        if (silu) d = d * silu_slope(convolved(taps, x, t, c + i, n));
        store(slopes + t % taps.count * kBlock + i, d);
        if (t < end && dx.data) store_n(dx[t] + c + i, spread(slopes + i, t, c + i, n), n);
        if (t < end && sums) add(d, t, c + i, n);
      });
    }
  }

 private:
  Vec spread(const float* slopes, int64_t t, int64_t c, int n) const {
    Vec total(0.0f);
    for (int64_t s = 0; s < taps.count && t + s < tokens; ++s)
      total = fma(load_n(taps.tap(taps.count - 1 - s) + c, n), load(slopes + (t + s) % taps.count * kBlock),
                  total);
    return total;
  }
  void add(Vec d, int64_t t, int64_t c, int n) const {
    for (int64_t j = t + 1 < taps.count ? taps.count - 1 - t : 0; j < taps.count; ++j) {
      float* at = sums + j * taps.channels + c;
      store_n(at, fma(d, load_n(x[t - taps.count + 1 + j] + c, n), load_n(at, n)), n);
    }
    float* at = sums + taps.count * taps.channels + c;
    store_n(at, load_n(at, n) + d, n);
  }
};

// out [C, K] or [C] of any float dtype, from sums [K', C] in fp32
void store_taps(const TensorView& out, const float* sums, int64_t count) {
  if (!given(out)) return;
  with_float(out.dtype, [&](auto element) {
    for (int64_t c = 0; c < out.shape[0]; ++c)
      for (int64_t j = 0; j < count; ++j)
        store_one(row<decltype(element)>(out, c) + (out.ndim > 1 ? j * out.strides[1] : 0),
                  sums[j * out.shape[0] + c]);
  });
}

}  // namespace

void causal_conv1d_forward(const TensorView& y, const TensorView& x, const TensorView& weight,
                           const TensorView& bias, bool silu) {
  const Taps taps(weight, bias);
  with_float(x.dtype, [&](auto element) {
    using T = decltype(element);
    for_spans(x, taps.count + 4, [&](int64_t, int64_t b, int64_t first, int64_t end) {
      const Sample<T> out(y, b);
      const Sample<const T> in(x, b);
      for (int64_t c = 0; c < x.shape[2]; c += kBlock)
        for (int64_t t = first; t < end; ++t)
          for_vecs(least(kBlock, x.shape[2] - c), [&](int64_t i, int n) {
            const Vec z = convolved(taps, in, t, c + i, n);
            store_n(out[t] + c + i, silu ? z * sigmoid(z) : z, n);
          });
    });
  });
}

void causal_conv1d_backward(const TensorView& dx, const TensorView& dweight, const TensorView& dbias,
                            const TensorView& sums, const TensorView& dy, const TensorView& x,
                            const TensorView& weight, const TensorView& bias, bool silu) {
  const Taps taps(weight, bias);
  with_float(x.dtype, [&](auto element) {
    using T = decltype(element);
    for_spans(x, 2 * taps.count + 8, [&](int64_t piece, int64_t b, int64_t first, int64_t end) {
      float* total = given(sums) ? row<float>(sums, piece) : nullptr;
      if (total) memset(total, 0, size_t(sums.shape[1]) * 4);
      const Gradients<T> gradients{taps, {dx, b}, {dy, b}, {x, b}, total, silu, x.shape[1]};
      float* slopes = new float[size_t(taps.count * kBlock)];
      for (int64_t c = 0; c < x.shape[2]; c += kBlock)
        gradients.block(first, end, c, least(kBlock, x.shape[2] - c), slopes);
      delete[] slopes;
    });
  });
  if (!given(sums)) return;
  float* total = new float[size_t(sums.shape[1]) + 1];
  TensorView row_of_all;
  row_of_all.data = total, row_of_all.dtype = DType::f32, row_of_all.ndim = 1;
  row_of_all.shape[0] = sums.shape[1], row_of_all.strides[0] = 1;
  add_shares(row_of_all, sums, 0);
  store_taps(dweight, total, taps.count);
  store_taps(dbias, total + taps.count * taps.channels, 1);
  delete[] total;
}

}  // namespace INLAY_ISA_NS
}  // namespace inlay
