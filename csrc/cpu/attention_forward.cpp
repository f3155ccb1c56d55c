// Attention forward: one pass over the keys with running maxima and sums (Milakov and Gimelshein,
// arXiv:1805.02867; tiled as in arXiv:2205.14135). One piece of work is some hundred query rows of one key
// head; it packs the keys and values that they see once.
//
// Scores are formed transposed, [keys, query rows]: keys are the left operand as they lie in memory, maxima
// and sums go lane by lane, and P, pairs of its key rows in one unit, is the left operand of out = P·v.
#include "cpu/attention.h"

namespace inlay {
namespace INLAY_ISA_NS {

namespace {

constexpr int64_t kPieceRows = 512;  // packing keys for them is 3% of the work at width 64
constexpr float kLowest = -1e30f;    // below any score; finite, so that differences of two are no NaN

template <class E>
struct Buffers {
  int64_t units, lead, padded;    // of a row; rounded up to whole Vecs; width rounded up to whole Vecs
  float *keys, *values;           // rows [keys, units], groups [keys / step, padded]
  float *q_rows, *q;              // rows [kLanes, lead], channels [lead, kLanes]
  float *scores, *p;              // [kKeys, kLanes], [kKeys / step, kLanes] units
  float *high, *total, *factors;  // [kLanes]: largest score so far, sum of P, what the last block's are worth
  float* out;                     // [kLanes, padded]
  int64_t bytes;

  Buffers(const Sizes& sizes, char* memory)
      : units(units_of<E>(sizes.width)),
        lead(round_up(units, Vec::kWidth)),
        padded(round_up(sizes.width, Vec::kWidth)) {
    Arena arena(memory);
    arena.take(keys, round_up(sizes.keys, E::kRows) * units);
    arena.take(values, round_up(units_of<E>(sizes.keys), E::kDepth) * padded);
    arena.take(q_rows, kLanes * lead), arena.take(q, lead * kLanes);
    arena.take(scores, kKeys * kLanes), arena.take(p, kKeys * kLanes);
    arena.take(high, kLanes), arena.take(total, kLanes), arena.take(factors, kLanes);
    arena.take(out, kLanes * padded);
    bytes = arena.used;
  }
};

template <class E>
inline void score(const Buffers<E>& b, const Visible& visible, const float* keys) {
  for (int64_t key = 0; key < visible.keys; key += E::kRows) {
    const int64_t count = least(visible.keys - key, E::kRows);
    const Range vecs = visible.of_keys(E{}, key, count);
    const int64_t lane = vecs.begin * Vec::kWidth;
    if (!vecs.empty())
      multiply(E{}, b.scores + key * kLanes + lane, kLanes, Start::zero, nullptr,
               ByRows{keys + key * b.units, b.units}, b.q + lane, kLanes, b.units, count,
               vecs.end - vecs.begin);
  }
}

// Products become their tangents where somebody sees them; those between were never formed.
inline void bend(float* scores, const Visible& visible, float factor) {
  for (int64_t v = 0; v < visible.vecs; ++v)
    for (int64_t key = visible.some[v].begin; key < visible.some[v].end; ++key) {
      float* at = scores + key * kLanes + v * Vec::kWidth;
      [[maybe_unused]] Vec complement;
      store(at, tanh(load(at) * Vec(factor), complement));
    }
}

inline Vec largest(const float* scores, const Visible& visible, int64_t v, float scale, Vec high) {
  Vec other = high;  // two at a time: one maximum would wait for itself
  visible.for_keys(v, [&](int64_t key, bool masked) {
    Vec s = load(scores + key * kLanes) * Vec(scale);
    if (masked) s = visible.choose(v, key, s, Vec(kLowest));
    if (key % 2) {
      other = max(other, s);
    } else {
      high = max(high, s);
    }
  });
  return max(high, other);
}

// P of Vec v as units; returns its sum over the keys.
template <class E>
inline Vec exponentials(float* p, const float* scores, const Visible& visible, int64_t v, float scale,
                        Vec high) {
  constexpr int64_t kS = E::kStep;
  const Vec factor(scale), offset = Vec(0.0f) - high;
  const auto open = [&](int64_t key) {
    return power_of_two<E>(fma(load(scores + key * kLanes), factor, offset));
  };
  const auto masked = [&](int64_t key) {
    return key < visible.keys ? visible.choose(v, key, open(key), Vec(0.0f)) : Vec(0.0f);
  };
  const Range some = visible.some[v], all = visible.all[v];
  const int64_t units = round_up(units_of<E>(visible.keys), E::kDepth), first = some.begin / kS,
                end = units_of<E>(some.end), open_begin = units_of<E>(all.begin), open_end = all.end / kS;
  Vec total(0.0f);
  const auto unit = [&](int64_t u, auto&& of) {
    const Vec even = of(u * kS), odd = kPaired<E> ? of(u * kS + 1) : Vec(0.0f);
    total = total + (even + odd);
    store_units(p + u * kLanes, even, odd, E{});
  };
  int64_t u = 0;
  for (; u < first; ++u) store(p + u * kLanes, Vec(0.0f));
  for (; u < least(open_begin, end); ++u) unit(u, masked);
  for (; u < open_end; ++u) unit(u, open);
  for (; u < end; ++u) unit(u, masked);
  for (; u < units; ++u) store(p + u * kLanes, Vec(0.0f));
  return total;
}

template <class E>
inline void normalize(const Buffers<E>& b, const Visible& visible, float scale) {
  for (int64_t v = 0; v < visible.vecs; ++v) {
    const int64_t lane = v * Vec::kWidth;
    const Vec before = load(b.high + lane), high = largest(b.scores + lane, visible, v, scale, before);
    const Vec factor = power_of_two<Singles>(before - high);
    const Vec total = exponentials<E>(b.p + lane, b.scores + lane, visible, v, scale, high);
    store(b.high + lane, high);
    store(b.factors + lane, factor);
    store(b.total + lane, fma(load(b.total + lane), factor, total));
  }
}

template <class E>
inline void add_values(const Buffers<E>& b, const Visible& visible, const float* values) {
  for (int64_t r = 0; r < visible.rows; r += E::kRows) {
    const int64_t count = least(visible.rows - r, E::kRows);
    const Range keys = visible.of_rows(E{}, r, count);
    multiply(E{}, b.out + r * b.padded, b.padded, Start::scaled, b.factors + r,
             ByColumns{b.p + keys.begin * kLanes + r, kLanes}, values + keys.begin * b.padded, b.padded,
             keys.end - keys.begin, count, b.padded / Vec::kWidth);
  }
}

template <class E, class T>
inline void load_queries(const Buffers<E>& b, const Rows<const T>& q, int64_t first, int64_t count,
                         int64_t width) {
  pack_rows<E, T>(b.q_rows, b.lead, q, first, count, width);
  transpose_units(b.q, kLanes, b.q_rows, b.lead, count, vecs_of<E>(count) * Vec::kWidth, b.lead);
  for (int64_t i = 0; i < kLanes; i += Vec::kWidth) {
    store(b.high + i, Vec(kLowest));
    store(b.total + i, Vec(0.0f));
  }
}

// A head's sink is in the softmax before any key is: the largest score so far, worth 1 of it.
template <class E>
inline void load_sinks(const Buffers<E>& b, const float* sinks, int64_t first, int64_t count, int64_t group) {
  for (int64_t r = 0; r < count; ++r) {
    const float sink = sinks[(first + r) % group] * kLog2e;
    if (sink <= kLowest) continue;  // a NaN goes on
    b.high[r] = sink;
    b.total[r] = 1.0f;
  }
}

// A row that sees no key is 0, and its logsumexp -inf, or its sink.
template <class E, class T>
inline void store_rows(const Buffers<E>& b, const Rows<T>& out, const Rows<float>& lse, int64_t first,
                       int64_t count, int64_t width) {
  auto row = out.from(first);
  auto sum = lse.from(first);
  for (int64_t r = 0; r < count; ++r) {
    const float total = b.total[r];
    const Vec inverse(total == 0 ? 0.0f : 1.0f / total);
    T* to = row.next();
    const float* from = b.out + r * b.padded;
    for_vecs(width, [&](int64_t j, int n) { store_n(to + j, load(from + j) * inverse, n); });
    *sum.next() = total == 0 ? -__builtin_inff() : float(b.high[r] * double(kLn2) + __builtin_log(total));
  }
}

template <class T, class E>
void forward(const TensorView& out, const TensorView& lse, const TensorView& q, const TensorView& k,
             const TensorView& v, const TensorView& spans, const TensorView& sinks, Scale scale) {
  const Sizes s(q, k);
  const int64_t bytes = Buffers<E>(s, nullptr).bytes, chunks = (s.rows + kPieceRows - 1) / kPieceRows;
  const int64_t cost = least(s.rows, kPieceRows) * s.keys * s.width / 32;
  parallel_with_scratch(chunks * s.batch * s.key_heads, cost, bytes, [&](int64_t piece, char* memory) {
    const int64_t chunk = chunks - 1 - piece / (s.batch * s.key_heads),
                  pair = piece % (s.batch * s.key_heads);
    const int64_t batch = pair / s.key_heads, head = pair % s.key_heads;
    const Buffers<E> b(s, memory);
    [[maybe_unused]] const Setup<E> setup;
    const Spans seen(spans, batch);
    const Rows<const T> queries(q, batch, head, s.group);
    const int64_t begin = chunk * kPieceRows, end = least(begin + kPieceRows, s.rows);
    const int64_t first_key = seen.begin(begin / s.group), last_key = seen.end((end - 1) / s.group);
    const int64_t keys = last_key > first_key ? last_key - first_key : 0;
    pack_rows<E, T>(b.keys, b.units, Rows<const T>(k, batch, head, 1), first_key, keys, s.width);
    pack_groups<E, T>(b.values, b.padded, Rows<const T>(v, batch, head, 1), first_key, keys, s.width,
                      round_up(units_of<E>(keys), E::kDepth));
    for (int64_t first = begin; first < end; first += kLanes) {
      const int64_t count = least(kLanes, end - first), last = first + count - 1;
      load_queries<E, T>(b, queries, first, count, s.width);
      if (given(sinks)) load_sinks(b, data<const float>(sinks) + head * s.group, first, count, s.group);
      const int64_t from = (seen.begin(first / s.group) - first_key) / kKeys * kKeys,
                    to = seen.end(last / s.group) - first_key;
      memset(b.out, 0, size_t(kLanes * b.padded) * 4);
      for (int64_t key = from; key < to; key += kKeys) {
        const Visible visible(E{}, seen, first, count, s.group, first_key + key, least(kKeys, to - key));
        score(b, visible, b.keys + key * b.units);
        if (scale.bend != 0) bend(b.scores, visible, scale.bend);
        normalize(b, visible, scale.binary);
        add_values(b, visible, b.values + key / E::kStep * b.padded);
      }
      store_rows<E, T>(b, Rows<T>(out, batch, head, s.group), Rows<float>(lse, batch, head, s.group), first,
                       count, s.width);
    }
  });
}

}  // namespace

void attention_forward(const TensorView& out, const TensorView& lse, const TensorView& q, const TensorView& k,
                       const TensorView& v, const TensorView& spans, const TensorView& sinks, double scale,
                       double softcap) {
  with_engine(q.dtype, q.shape[3], [&](auto t, auto engine) {
    forward<decltype(t), decltype(engine)>(out, lse, q, k, v, spans, sinks, Scale(scale, softcap));
  });
}

}  // namespace INLAY_ISA_NS
}  // namespace inlay
