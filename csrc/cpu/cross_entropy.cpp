// Softmax cross-entropy of a chunk of rows, gradient in place of the logits.
//
// One pass finds maximum and sum of exponentials together, block by block: a block (1,024 logits with
// AVX-512) is read from memory once (its maximum), and again from L1 (its sum). A second pass writes the
// gradient.
#include "cpu/kernel.h"

namespace inlay {
namespace INLAY_ISA_NS {

namespace {

constexpr int64_t kBlock = kSumSpan;

struct Softmax {
  float maximum;
  double sum;  // of exp(x - maximum)
};

template <class T>
inline float block_max(const T* x, int64_t size) {
  const Vec lowest(-__builtin_inff());
  Vec best = lowest;
  int64_t i = 0;
  for (; i + Vec::kWidth <= size; i += Vec::kWidth)
    best = max(load(x + i), best);  // a NaN is passed over here
  float result = max_lane(best);
  for (; i < size; ++i) {
    const float value = load_one(x + i);
    result = value > result ? value : result;
  }
  return result;
}

template <class T>
inline float block_sum(const T* x, int64_t size, float maximum) {
  Vec total(0.0f);
  int64_t i = 0;
  for (; i + Vec::kWidth <= size; i += Vec::kWidth) total = total + exp(load(x + i) - Vec(maximum));
  float tail = 0;
  if (i < size) {
    float lanes[Vec::kWidth];
    store(lanes, exp(load(x + i, int(size - i)) - Vec(maximum)));
    for (int lane = 0; lane < size - i; ++lane) tail += lanes[lane];
  }
  return sum(total) + tail;
}

template <class T>
inline Softmax reduce(const T* x, int64_t size) {
  Softmax all = {-__builtin_inff(), 0.0};
  for (int64_t start = 0; start < size; start += kBlock) {
    const int64_t count = size - start < kBlock ? size - start : kBlock;
    const float here = block_max(x + start, count);
    if (here > all.maximum) {
      all.sum *= __builtin_exp(double(all.maximum) - double(here));
      all.maximum = here;
    }
    // While all logits are -inf, -inf - (-inf) would be NaN; exp(-inf - 0) is the 0 they count for.
    all.sum += double(block_sum(x + start, count, all.maximum == -__builtin_inff() ? 0.0f : all.maximum));
  }
  return all;
}

template <class T>
inline void write_gradient(T* x, int64_t size, int64_t label, const Softmax& all, double scale) {
  const Vec maximum(all.maximum), factor(float(scale / all.sum));
  const double at_label = __builtin_exp(double(load_one(x + label)) - double(all.maximum)) / all.sum - 1.0;
  for_vecs(size, [&](int64_t j, int n) { store_n(x + j, exp(load_n(x + j, n) - maximum) * factor, n); });
  store_one(x + label, float(at_label * scale));
}

}  // namespace

void cross_entropy_chunk(const TensorView& loss, const TensorView& logits, const TensorView& labels,
                         double scale, bool write_grad) {
  const int64_t vocabulary = logits.shape[1];
  with_float(logits.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(logits.shape[0], 8 * vocabulary, [&](int64_t m) {
      T* x = row<T>(logits, m);
      const int64_t label = data<const int64_t>(labels)[m];
      const Softmax all = reduce(x, vocabulary);
      const double picked = load_one(x + label);
      data<float>(loss)[m * loss.strides[0]] = float(__builtin_log(all.sum) + double(all.maximum) - picked);
      if (write_grad) write_gradient(x, vocabulary, label, all, scale);
    });
  });
}

}  // namespace INLAY_ISA_NS
}  // namespace inlay
