// Attention backward. One piece of work is one key head and a share of its keys: their gradients are summed
// in its scratch, over all query rows in order. Shares of one head each leave a part of dq, added up at the
// end.
//
// Scores are formed transposed, [keys, query rows]. Then rows of P and dS are the left operands of dv =
// Pᵀ·dout and dk = dSᵀ·q, and dS once more, pairs of its key rows in one unit, is that of dq = dS·k.
#include "cpu/attention.h"

namespace inlay {
namespace INLAY_ISA_NS {

namespace {

template <class E>
struct Buffers {
  static constexpr int64_t kRowUnits = kLanes / E::kStep;
  int64_t units, lead, padded;        // of a row; rounded up to whole Vecs; width rounded up to whole Vecs
  float *keys, *values, *key_groups;  // rows [share, units] twice, groups [share / step, padded]
  float *dk, *dv;                     // [share, padded]
  float *rows, *q, *dout;             // rows [kLanes, lead], channels [lead, kLanes] twice
  float *q_groups, *dout_groups;      // groups [kRowUnits, padded]
  float *scores, *dp;                 // [kTileRows, kLanes]
  float *p, *ds, *ds_units;           // rows [kKeys, kRowUnits] twice, [kKeys / step, kLanes] units
  float *dq, *lse, *delta;            // [kLanes, padded], [kLanes] twice
  int64_t bytes;

  Buffers(int64_t share, int64_t width, char* memory)
      : units(units_of<E>(width)), lead(round_up(units, Vec::kWidth)), padded(round_up(width, Vec::kWidth)) {
    Arena arena(memory);
    share = round_up(share, least(E::kRows, kKeys));
    arena.take(keys, share * units), arena.take(values, share * units);
    arena.take(key_groups, round_up(units_of<E>(share), E::kDepth) * padded);
    arena.take(dk, share * padded), arena.take(dv, share * padded);
    arena.take(rows, kLanes * lead), arena.take(q, lead * kLanes), arena.take(dout, lead * kLanes);
    arena.take(q_groups, kRowUnits * padded), arena.take(dout_groups, kRowUnits * padded);
    arena.take(scores, E::kRows * kLanes), arena.take(dp, E::kRows * kLanes);
    arena.take(p, kKeys * kRowUnits), arena.take(ds, kKeys * kRowUnits);
    ds_units = ds;
    if (kPaired<E>) arena.take(ds_units, kKeys / 2 * kLanes);
    arena.take(dq, kLanes * padded), arena.take(lse, kLanes), arena.take(delta, kLanes);
    bytes = arena.used;
  }
};

template <class T>
struct Head {  // the tensors of one key head, as rows
  Rows<const T> q, k, v, out, dout;
  Rows<const float> lse;
  Rows<T> dq, dk, dv;
};

template <class E, class T>
inline void load_keys(const Buffers<E>& b, const Head<T>& head, int64_t first, int64_t count, int64_t width) {
  pack_rows<E, T>(b.keys, b.units, head.k, first, count, width);
  pack_rows<E, T>(b.values, b.units, head.v, first, count, width);
  pack_groups<E, T>(b.key_groups, b.padded, head.k, first, count, width,
                    round_up(units_of<E>(count), E::kDepth));
  memset(b.dk, 0, size_t(count * b.padded) * 4);
  memset(b.dv, 0, size_t(count * b.padded) * 4);
}

template <class T>
inline float dot(const T* x, const T* y, int64_t size) {
  Vec total(0.0f);
  for_vecs(size, [&](int64_t j, int n) { total = fma(load_n(x + j, n), load_n(y + j, n), total); });
  return sum(total);
}

template <class E, class T>
inline void load_side(const Buffers<E>& b, float* channels, float* groups, const Rows<const T>& from,
                      int64_t first, int64_t count, int64_t width) {
  pack_rows<E, T>(b.rows, b.lead, from, first, count, width);
  transpose_units(channels, kLanes, b.rows, b.lead, count, vecs_of<E>(count) * Vec::kWidth, b.lead);
  pack_groups<E, T>(groups, b.padded, from, first, count, width, b.kRowUnits);
}

template <class E, class T>
inline void load_queries(const Buffers<E>& b, const Head<T>& head, int64_t first, int64_t count,
                         int64_t width) {
  load_side<E, T>(b, b.q, b.q_groups, head.q, first, count, width);
  load_side<E, T>(b, b.dout, b.dout_groups, head.dout, first, count, width);
  auto lse = head.lse.from(first);
  auto dout = head.dout.from(first), out = head.out.from(first);
  for (int64_t r = 0; r < kLanes; ++r) {
    b.lse[r] = r < count ? *lse.next() * kLog2e : __builtin_inff();  // 2^-inf: rows beyond add nothing
    b.delta[r] = r < count ? dot(dout.next(), out.next(), width) : 0.0f;
  }
  memset(b.dq, 0, size_t(kLanes * b.padded) * 4);
}

// Scores as their products are, and bent by a soft cap. `bent` is what `binary` multiplies; it also says what
// a score changes by when its product does.
struct Straight : Scale {
  Vec bent(Vec product, Vec& by) const {
    by = Vec(slope);
    return product;
  }
};
struct Capped : Scale {
  Vec bent(Vec product, Vec& by) const {
    Vec complement;
    const Vec score = tanh(product * Vec(bend), complement);
    by = Vec(slope) * complement * (Vec(1.0f) + abs(score));  // 1 − tanh² in two factors
    return score;
  }
};

// P and dS of Vec v and keys `key`, `key + 1`, from row `row` of the scores.
template <class E, class S>
inline void slopes(const Buffers<E>& b, const Visible& visible, int64_t key, int64_t row, int64_t v,
                   S scale) {
  const int64_t lane = v * Vec::kWidth;
  const Vec lse = load(b.lse + lane), delta = load(b.delta + lane);
  const bool open = key >= visible.all[v].begin && key + E::kStep <= visible.all[v].end;
  Vec p[2], ds[2];
  for (int64_t i = 0; i < E::kStep; ++i) {
    const int64_t at = (row + i) * kLanes + lane;
    Vec slope;
    const Vec score = scale.bent(load(b.scores + at), slope);
    p[i] = power_of_two<E>(fma(score, Vec(scale.binary), Vec(0.0f) - lse));
    ds[i] = p[i] * slope * (load(b.dp + at) - delta);
    if (!open) {
      p[i] = visible.choose(v, key + i, p[i], Vec(0.0f));
      ds[i] = visible.choose(v, key + i, ds[i], Vec(0.0f));
    }
  }
  const int64_t to = key * b.kRowUnits + lane / E::kStep;
  float* units = b.ds_units + key / E::kStep * kLanes + lane;
  if constexpr (kPaired<E>) {
    store_halves(b.p + to, b.p + to + b.kRowUnits, p[0], p[1]);
    store_halves(b.ds + to, b.ds + to + b.kRowUnits, ds[0], ds[1]);
    store_units(units, ds[0], ds[1], E{});
  } else {
    store(b.p + to, p[0]);
    store(units, ds[0]);
  }
}

// The same for `count` keys and all Vecs; dS is 0 outside `vecs`, and both are in rows that only fill up a
// product.
template <class E, class S>
inline void slope_block(const Buffers<E>& b, const Visible& visible, int64_t key, int64_t count, Range vecs,
                        S scale) {
  for (int64_t row = 0; row < count; row += E::kStep) {
    float* units = b.ds_units + (key + row) / E::kStep * kLanes;
    for (int64_t v = 0; v < vecs.begin; ++v) store(units + v * Vec::kWidth, Vec(0.0f));
    for (int64_t v = vecs.begin; v < vecs.end; ++v) slopes(b, visible, key + row, row, v, scale);
    for (int64_t v = vecs.end; v < visible.vecs; ++v) store(units + v * Vec::kWidth, Vec(0.0f));
  }
  if constexpr (E::kDepth > 1) {
    const int64_t used = round_up(count, 2), left = E::kRows - used;
    memset(b.p + (key + used) * b.kRowUnits, 0, size_t(left * b.kRowUnits) * 4);
    memset(b.ds + (key + used) * b.kRowUnits, 0, size_t(left * b.kRowUnits) * 4);
    memset(b.ds_units + (key + used) / 2 * kLanes, 0, size_t(left / 2 * kLanes) * 4);
  }
}

// Everything of keys [key, key + count) and the block's rows, but dq.
template <class E>
inline void add_keys(const Buffers<E>& b, const Visible& visible, int64_t start, int64_t key, int64_t count,
                     const Scale& scale) {
  const Range vecs = visible.of_keys(E{}, key, count);
  const int64_t lane = vecs.begin * Vec::kWidth, number = vecs.end - vecs.begin, at = start + key;
  if (number) {
    multiply(E{}, b.scores + lane, kLanes, Start::zero, nullptr, ByRows{b.keys + at * b.units, b.units},
             b.q + lane, kLanes, b.units, count, number);
    multiply(E{}, b.dp + lane, kLanes, Start::zero, nullptr, ByRows{b.values + at * b.units, b.units},
             b.dout + lane, kLanes, b.units, count, number);
  }
  if (scale.bend == 0) {
    slope_block(b, visible, key, count, vecs, Straight{scale});
  } else {
    slope_block(b, visible, key, count, vecs, Capped{scale});
  }
  if (!number) return;
  const int64_t from = key * b.kRowUnits + lane / E::kStep, groups = lane / E::kStep * b.padded;
  const int64_t depth = number * Vec::kWidth / E::kStep, across = b.padded / Vec::kWidth;
  multiply(E{}, b.dv + at * b.padded, b.padded, Start::sum, nullptr, ByRows{b.p + from, b.kRowUnits},
           b.dout_groups + groups, b.padded, depth, count, across);
  multiply(E{}, b.dk + at * b.padded, b.padded, Start::sum, nullptr, ByRows{b.ds + from, b.kRowUnits},
           b.q_groups + groups, b.padded, depth, count, across);
}

template <class E>
inline void add_queries(const Buffers<E>& b, const Visible& visible, int64_t start) {
  for (int64_t r = 0; r < visible.rows; r += E::kRows) {
    const int64_t count = least(visible.rows - r, E::kRows);
    const Range keys = visible.of_rows(E{}, r, count);
    if (!keys.empty())
      multiply(E{}, b.dq + r * b.padded, b.padded, Start::sum, nullptr,
               ByColumns{b.ds_units + keys.begin * kLanes + r, kLanes},
               b.key_groups + (start / E::kStep + keys.begin) * b.padded, b.padded, keys.end - keys.begin,
               count, b.padded / Vec::kWidth);
  }
}

template <class T>
inline void store_rows(const Rows<T>& to, const float* from, int64_t ld, int64_t first, int64_t count,
                       int64_t width) {
  auto row = to.from(first);
  for (int64_t r = 0; r < count; ++r) {
    T* at = row.next();
    for_vecs(width, [&](int64_t j, int n) { store_n(at + j, load(from + r * ld + j), n); });
  }
}

// One key head and keys [begin, end) of it.
template <class E, class T, class Part>
inline void backward_share(const Sizes& s, const Head<T>& head, const Rows<Part>& dq, const Spans& seen,
                           Range share, const Scale& scale, const Buffers<E>& b) {
  load_keys(b, head, share.begin, share.end - share.begin, s.width);
  for (int64_t first = 0; first < s.rows; first += kLanes) {
    const int64_t count = least(kLanes, s.rows - first);
    const int64_t low = seen.begin(first / s.group), high = seen.end((first + count - 1) / s.group);
    const int64_t from = low > share.begin ? (low - share.begin) / kKeys * kKeys : 0,
                  to = least(high, share.end) - share.begin;
    if (from < to) {
      load_queries(b, head, first, count, s.width);
    } else {
      memset(b.dq, 0, size_t(kLanes * b.padded) * 4);
    }
    for (int64_t start = from; start < to; start += kKeys) {
      const Visible visible(E{}, seen, first, count, s.group, share.begin + start, least(kKeys, to - start));
      for (int64_t key = 0; key < visible.keys; key += E::kRows)
        add_keys(b, visible, start, key, least(visible.keys - key, E::kRows), scale);
      add_queries(b, visible, start);
    }
    store_rows(dq, b.dq, b.padded, first, count, s.width);
  }
  store_rows(head.dk, b.dk, b.padded, share.begin, share.end - share.begin, s.width);
  store_rows(head.dv, b.dv, b.padded, share.begin, share.end - share.begin, s.width);
}

template <class T>
void add_parts(const TensorView& dq, const TensorView& parts) {
  const int64_t heads = dq.shape[1], tokens = dq.shape[2], width = dq.shape[3], shares = parts.shape[0];
  parallel_for(dq.shape[0] * heads * tokens, shares * width / 8, [&](int64_t i) {
    const int64_t b = i / (heads * tokens), h = i / tokens % heads, t = i % tokens;
    T* to = data<T>(dq) + b * dq.strides[0] + h * dq.strides[1] + t * dq.strides[2];
    const float* from =
        data<const float>(parts) + b * parts.strides[1] + h * parts.strides[2] + t * parts.strides[3];
    for_vecs(width, [&](int64_t j, int n) {
      Vec total(0.0f);
      for (int64_t p = 0; p < shares; ++p) total = total + load_n(from + p * parts.strides[0] + j, n);
      store_n(to + j, total, n);
    });
  });
}

inline TensorView part_of(const TensorView& parts, int64_t share) {  // [B, H, T, D]
  TensorView part = parts;
  part.ndim = 4;
  part.data = data<float>(parts) + share * parts.strides[0];
  for (int i = 0; i < 4; ++i) part.shape[i] = parts.shape[i + 1], part.strides[i] = parts.strides[i + 1];
  return part;
}

template <class T, class E>
void backward(const TensorView& dq, const TensorView& dk, const TensorView& dv, const TensorView& parts,
              const TensorView& dout, const TensorView& q, const TensorView& k, const TensorView& v,
              const TensorView& out, const TensorView& lse, const TensorView& spans, const Scale& scale) {
  const Sizes s(q, k);
  const int64_t shares = parts.data ? parts.shape[0] : 1, heads = s.batch * s.key_heads;
  const int64_t share = round_up((s.keys + shares - 1) / shares, kKeys);
  const int64_t bytes = Buffers<E>(least(share, s.keys), s.width, nullptr).bytes;
  parallel_with_scratch(
      shares * heads, s.rows * share * s.width / 16, bytes, [&](int64_t piece, char* memory) {
        const int64_t batch = piece % heads / s.key_heads, h = piece % s.key_heads, number = piece / heads;
        const Head<T> head{{q, batch, h, s.group},   {k, batch, h, 1},          {v, batch, h, 1},
                           {out, batch, h, s.group}, {dout, batch, h, s.group}, {lse, batch, h, s.group},
                           {dq, batch, h, s.group},  {dk, batch, h, 1},         {dv, batch, h, 1}};
        const Buffers<E> b(least(share, s.keys), s.width, memory);
        [[maybe_unused]] const Setup<E> setup;
        const Range range{least(number * share, s.keys), least((number + 1) * share, s.keys)};
        const Spans seen(spans, batch);
        if (parts.data) {
          backward_share(s, head, Rows<float>(part_of(parts, number), batch, h, s.group), seen, range, scale,
                         b);
        } else {
          backward_share(s, head, head.dq, seen, range, scale, b);
        }
      });
  if (parts.data) add_parts<T>(dq, parts);
}

// Of one head: its sink's share of the softmax of every row, times what a smaller share of the others loses.
template <class T>
inline float sink_slope(const TensorView& dout, const TensorView& out, const TensorView& lse, int64_t head,
                        float sink) {
  double total = 0;
  for (int64_t b = 0; b < out.shape[0]; ++b) {
    auto gradient = Rows<const T>(dout, b, head, 1).from(0), values = Rows<const T>(out, b, head, 1).from(0);
    auto sum = Rows<const float>(lse, b, head, 1).from(0);
    for (int64_t t = 0; t < out.shape[2]; ++t) {
      const float delta = dot(gradient.next(), values.next(), out.shape[3]), all = *sum.next();
      if (all != -__builtin_inff()) total -= double(delta) * __builtin_exp(double(sink) - double(all));
    }
  }
  return float(total);
}

}  // namespace

void attention_backward(const TensorView& dq, const TensorView& dk, const TensorView& dv,
                        const TensorView& parts, const TensorView& dout, const TensorView& q,
                        const TensorView& k, const TensorView& v, const TensorView& out,
                        const TensorView& lse, const TensorView& spans, double scale, double softcap) {
  with_engine(q.dtype, q.shape[3], [&](auto t, auto engine) {
    backward<decltype(t), decltype(engine)>(dq, dk, dv, parts, dout, q, k, v, out, lse, spans,
                                            Scale(scale, softcap));
  });
}

void attention_sinks(const TensorView& dsinks, const TensorView& dout, const TensorView& out,
                     const TensorView& lse, const TensorView& sinks) {
  const int64_t batch = out.shape[0], heads = out.shape[1], tokens = out.shape[2], width = out.shape[3];
  with_float(out.dtype, [&](auto t) {
    parallel_for(heads, batch * tokens * width / 4, [&](int64_t h) {
      data<float>(dsinks)[h] = sink_slope<decltype(t)>(dout, out, lse, h, data<const float>(sinks)[h]);
    });
  });
}

}  // namespace INLAY_ISA_NS
}  // namespace inlay
