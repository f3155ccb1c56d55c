// What attention's forward and backward are made of: operands as units of 32 bits, their products, and which
// query sees which keys.
//
// A unit is one fp32 number, or, where the CPU multiplies them two at a time, a pair of bf16 that are
// neighbours along the summed dimension. The same loops serve both. All query heads that share a key head
// are one matrix: row r is query head r % group of token r / group, so that a row sees no key before the
// rows above it do, and gradients of keys are summed over their heads inside the products.
#pragma once

#include "cpu/attention_products.h"

namespace inlay {
namespace INLAY_ISA_NS {
namespace {

constexpr int64_t kLanes = 64;  // query rows of a block: scores of a key lie in so many lanes
constexpr int64_t kKeys = 64;   // keys of a block; its scores, P and V stay in L1 at width 64

// Rows of one key head: [R, D] of a [B, H, T, D] tensor, unit stride along D.
template <class T>
struct Rows {
  T* data;
  int64_t token, head, group;  // strides, and query heads per key head
  Rows(const TensorView& t, int64_t b, int64_t key_head, int64_t heads)
      : data(INLAY_ISA_NS::data<T>(t) + b * t.strides[0] + key_head * heads * t.strides[1]),
        token(t.strides[2]),
        head(t.strides[1]),
        group(heads) {}

  // Goes from row to row: a division for each would take as long as packing it.
  struct Cursor {
    T* at;
    int64_t left, token, head, group;  // rows of this token that are still to come
    T* next() {
      T* const row = at;
      at += head;
      if (--left == 0) at += token, left = group;
      return row;
    }
  };
  Cursor from(int64_t r) const {
    const int64_t t = r / group, h = r - t * group;
    return {data + t * token + h * head, group - h, token - group * head, head, group};
  }
};

// Cuts one block of memory into arrays; without memory it only counts how much they want.
struct Arena {
  char* base;
  int64_t used = 0;
  explicit Arena(char* memory) : base(memory) {}
  template <class T>
  void take(T*& pointer, int64_t count) {
    pointer = reinterpret_cast<T*>(base + used);
    used += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
  }
};

// f(i, arena) for i in [0, pieces), whichever thread is free taking the next: causal pieces differ in size.
template <class F>
inline void parallel_with_scratch(int64_t pieces, int64_t cost, int64_t bytes, F&& f) {
  const int threads = threads_for(pieces, pieces * cost);
  (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Aligned scratch(bytes);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < pieces; ++i) f(i, scratch.start);
  }
}

// The stretch of keys that each token's queries see. Without spans: causal, keys up to the token's own.
struct Spans {
  const int64_t* pairs = nullptr;
  int64_t stride = 0, step = 0;
  Spans(const TensorView& t, int64_t b) {
    if (!t.data) return;
    pairs = data<const int64_t>(t) + (t.shape[0] > 1 ? b * t.strides[0] : 0);
    stride = t.strides[1];
    step = t.strides[2];
  }
  int64_t begin(int64_t token) const { return pairs ? pairs[token * stride] : 0; }
  int64_t end(int64_t token) const { return pairs ? pairs[token * stride + step] : token + 1; }
};

template <class E>
inline int64_t vecs_of(int64_t rows) {
  return round_up((rows + Vec::kWidth - 1) / Vec::kWidth, E::kVecs);
}

struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// What the rows of one block see of one block of keys, in numbers relative to its first key. Neither border
// falls from row to row, so the keys that some, or all, of a Vec of rows see are one stretch each.
struct Visible {
  static constexpr int64_t kVecs = kLanes / Vec::kWidth;
  int64_t rows, vecs, keys;
  alignas(64) float begin[kLanes], end[kLanes];
  Range some[kVecs], all[kVecs];

  template <class E>
  Visible(E, const Spans& spans, int64_t first, int64_t count, int64_t group, int64_t first_key,
          int64_t key_count)
      : rows(count), vecs(vecs_of<E>(count)), keys(key_count) {
    const int64_t first_token = first / group, last_token = (first + count - 1) / group;
    if (spans.begin(last_token) <= first_key && spans.end(first_token) >= first_key + keys) {
      for (int64_t i = 0; i < kLanes; i += Vec::kWidth) {
        store(begin + i, Vec(0.0f));
        store(end + i, Vec(float(keys)));
      }
      for (int64_t v = 0; v < vecs; ++v) some[v] = all[v] = {0, keys};
      return;
    }
    int64_t token = first_token, left = group - (first - token * group);  // rows of the token still to come
    for (int64_t r = 0; r < vecs * Vec::kWidth; ++r) {
      begin[r] = float(clamp(spans.begin(token) - first_key, 0, keys));
      end[r] = float(clamp(spans.end(token) - first_key, 0, keys));
      if (--left == 0 && token < last_token) ++token, left = group;  // rows beyond the last see what it does
    }
    for (int64_t v = 0; v < vecs; ++v) {
      const int64_t low = v * Vec::kWidth, high = low + Vec::kWidth - 1;
      some[v] = {int64_t(begin[low]), int64_t(end[high])};
      all[v] = {int64_t(begin[high]), int64_t(end[low])};
      if (some[v].empty()) some[v] = {0, 0};
      if (all[v].empty()) all[v] = {some[v].end, some[v].end};
    }
  }
  // The units of keys that rows [first, first + count) see.
  template <class E>
  Range of_rows(E, int64_t first, int64_t count) const {
    const int64_t from = int64_t(begin[first]), to = int64_t(end[first + count - 1]);
    if (from >= to) return {0, 0};
    return {from / E::kStep / E::kDepth * E::kDepth, round_up(units_of<E>(to), E::kDepth)};
  }
  // The Vecs in which keys [first, first + count) are seen.
  template <class E>
  Range of_keys(E, int64_t first, int64_t count) const {
    Range found{0, vecs};
    while (found.begin < vecs && some[found.begin].end <= first) ++found.begin;
    while (found.end > found.begin &&
           (some[found.end - 1].begin >= first + count || some[found.end - 1].empty()))
      --found.end;
    if (found.empty()) return {0, 0};
    return {found.begin / E::kVecs * E::kVecs, round_up(found.end, E::kVecs)};
  }
  // f(key, masked) for every key of the block that Vec v sees something of.
  template <class F>
  void for_keys(int64_t v, F&& f) const {
    int64_t key = some[v].begin;
    for (; key < all[v].begin; ++key) f(key, true);
    for (; key < all[v].end; ++key) f(key, false);
    for (; key < some[v].end; ++key) f(key, true);
  }
  // x in the lanes of Vec v that see the key, `other` elsewhere.
  Vec choose(int64_t v, int64_t key, Vec x, Vec other) const {
    const Vec at = Vec(float(key)), low = load(begin + v * Vec::kWidth), high = load(end + v * Vec::kWidth);
    return where_negative(at - low, other, where_negative(at - high, x, other));
  }
};

// (2^r − 1)/r: a minimax polynomial on [-1/2, 1/2], so that 2^r has error 1.9e-9 before rounding.
inline Vec rise_of_two(Vec r) {
  Vec p = fma(Vec(1.534581161e-04f), r, Vec(1.339993122e-03f));
  p = fma(p, r, Vec(9.618488959e-03f));
  p = fma(p, r, Vec(5.550328777e-02f));
  p = fma(p, r, Vec(2.402264689e-01f));
  return fma(p, r, Vec(6.931472057e-01f));
}

// 2^x for x that is at most 0, or little more. Where the result becomes bf16 a shorter polynomial does: error
// 2.6e-6.
template <class E>
inline Vec power_of_two(Vec x) {
  x = max(Vec(-150.0f), x);  // in this order a NaN comes through
  const Vec n = round(x), r = x - n;
  if constexpr (!kPaired<E>) return times_power_of_two(fma(rise_of_two(r), r, Vec(1.0f)), n);
  Vec p = fma(Vec(9.570101433e-03f), r, Vec(5.591786028e-02f));
  p = fma(p, r, Vec(2.402474484e-01f));
  p = fma(p, r, Vec(6.931218147e-01f));
  p = fma(p, r, Vec(9.999992614e-01f));
  return times_power_of_two(p, n);
}

// tanh |x| = t/(t + 2), t = e^2|x| − 1, formed without the cancellation: small x keep all their digits. Also
// 1 − tanh |x| = 2/(t + 2), which keeps them where tanh is nearly 1.
inline Vec tanh(Vec x, Vec& complement) {
  const Vec z =
      min(Vec(100.0f), abs(x) * Vec(2 * 1.44269504088896341f));  // in this order a NaN comes through
  const Vec n = round(z), r = z - n, power = times_power_of_two(Vec(1.0f), n);
  const Vec t = fma(power * r, rise_of_two(r), power - Vec(1.0f)), inverse = Vec(1.0f) / (t + Vec(2.0f));
  complement = inverse + inverse;
  const Vec y = t * inverse;
  return where_negative(x, Vec(0.0f) - y, y);
}

struct Sizes {
  int64_t batch, heads, tokens, keys, width, key_heads, group, rows;
  Sizes(const TensorView& q, const TensorView& k)
      : batch(q.shape[0]),
        heads(q.shape[1]),
        tokens(q.shape[2]),
        keys(k.shape[2]),
        width(q.shape[3]),
        key_heads(k.shape[1]),
        group(heads / key_heads),
        rows(tokens * group) {}
};

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// From products of queries and keys to scores. With a soft cap a product becomes tanh(product·bend) first.
struct Scale {
  float bend;    // 0: no soft cap
  float binary;  // of what is left to the scores, times log2(e)
  float slope;   // of a score by its product, where tanh does not bend
  Scale(double scale, double softcap)
      : bend(softcap == 0 ? 0.0f : float(scale / softcap)),
        binary(float(softcap == 0 ? scale : softcap) * kLog2e),
        slope(float(scale)) {}
};

// Calls f(T{}, E{}): the element type of `dtype`, and how its products are formed. Pairs of bf16 are left to
// the isa that is named for them: Intel's AVX-512 multiplies them at half the rate of fp32 (55 beside 109 G/s
// on Sapphire Rapids), AMD's, by its tables, at twice.
template <class F>
inline void with_engine(DType dtype, [[maybe_unused]] int64_t width, F&& f) {
  with_float(dtype, [&](auto t) {
    [[maybe_unused]] constexpr bool bf16_data = kIsBf16<decltype(t)>;
#if defined(INLAY_VEC_amx)
    if constexpr (bf16_data) {
      if (width % 32 == 0) return f(t, Squares{});
    }
    f(t, Singles{});
#elif defined(__AVX512BF16__)
    if constexpr (bf16_data) return f(t, Pairs{});
    f(t, Singles{});
#else
    f(t, Singles{});
#endif
  });
}

}  // namespace
}  // namespace INLAY_ISA_NS
}  // namespace inlay
