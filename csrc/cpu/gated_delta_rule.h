// What the gated delta rule's forward and backward are made of: a chunk of tokens, and its products.
//
// Within a chunk of n tokens, with G_i the sum of g up to token i of the chunk and S the state before it,
//   U = (I + A)⁻¹·diag(beta)·(V − diag(e^G)·K·S)      A[i, j] = beta_i·(k_i·k_j)·e^(G_i − G_j), j < i
//   out = diag(e^G)·Q·S + P·U                         P[i, j] = (q_i·k_j)·e^(G_i − G_j), j ≤ i
//   S' = e^(G_n)·S + Kᵀ·diag(e^(G_n − G))·U
// which is section 3.3 of arXiv:2412.06464 with the state put in before the triangular system is solved, so
// that W of its WY form is not needed. Every exponent is at most 0 where g is.
#pragma once

#include "cpu/attention.h"

namespace inlay {
namespace INLAY_ISA_NS {
namespace {

constexpr int64_t kChunk = 64;

struct DeltaSizes {
  int64_t batch, tokens, key_heads, heads, group, keys, values, chunks;
  int64_t ldk, ldv;  // widths of keys and values, rounded up to whole Vecs
  DeltaSizes(const TensorView& q, const TensorView& v)
      : batch(q.shape[0]),
        tokens(q.shape[1]),
        key_heads(q.shape[2]),
        heads(v.shape[2]),
        group(heads / key_heads),
        keys(q.shape[3]),
        values(v.shape[3]),
        chunks((tokens + kChunk - 1) / kChunk),
        ldk(round_up(keys, Vec::kWidth)),
        ldv(round_up(values, Vec::kWidth)) {}
  int64_t state() const { return keys * ldv; }
  int64_t count(int64_t chunk) const { return least(kChunk, tokens - chunk * kChunk); }
};

// Rows of [B, T, heads, width] for one head, from token `first` on.
template <class T>
struct TokenRows {
  T* data;
  int64_t stride;
  TokenRows(const TensorView& t, int64_t b, int64_t head, int64_t first)
      : data(INLAY_ISA_NS::data<T>(t) + b * t.strides[0] + first * t.strides[1] + head * t.strides[2]),
        stride(t.strides[1]) {}
  T* operator[](int64_t i) const { return data + i * stride; }
};

// --- products
// ------------------------------------------------------------------------------------------------

// Which part of a square of tokens there is: all, or what lies on and below the diagonal, of the left operand
// (its rows see the tokens up to their own; its columns those from their own on) or of the result.
enum class Part { all, left, result };

// c [rows, whole Vecs of columns] = start + a·b over `depth`
template <Part kPart = Part::all, bool kColumns>
inline void product(float* c, int64_t ldc, Start start, const float* factors, Left<kColumns> a,
                    const float* b, int64_t ldb, int64_t depth, int64_t rows, int64_t columns) {
  constexpr int64_t kPanel = kTileVecs * Vec::kWidth;  // of b, read by all rows while it is in L1
  for (int64_t v = 0; v < columns; v += kPanel)
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t m = least(kTileRows, rows - r);
      int64_t width = least(kPanel, round_up(columns - v, Vec::kWidth)), from = 0, to = depth;
      if (kPart == Part::result) width = least(width, round_up(r + m, Vec::kWidth) - v);
      if (width <= 0) continue;
      if (kPart == Part::left && kColumns) from = r;
      if (kPart == Part::left && !kColumns) to = least(depth, r + m);
      const float* left = a.units + (kColumns ? from * a.ld + r : r * a.ld + from);
      multiply(Singles{}, c + r * ldc + v, ldc, start, factors ? factors + r : nullptr,
               Left<kColumns>{left, a.ld}, b + from * ldb + v, ldb, to - from, m, width / Vec::kWidth);
    }
}

inline void add_row(float* to, const float* from, float factor, int64_t ld) {
  for (int64_t j = 0; j < ld; j += Vec::kWidth) store(to + j, fma(load(from + j), Vec(factor), load(to + j)));
}

// x ← (I − negated)⁻¹·x, `negated` strictly lower [n, kChunk]: blocks of rows, each by those above it
inline void solve_lower(const float* negated, float* x, int64_t ld, int64_t n) {
  for (int64_t r = 0; r < n; r += kTileRows) {
    const int64_t m = least(kTileRows, n - r);
    if (r)
      product(x + r * ld, ld, Start::sum, nullptr, ByRows{negated + r * kChunk, kChunk}, x, ld, r, m, ld);
    for (int64_t i = r + 1; i < r + m; ++i)
      for (int64_t j = r; j < i; ++j) add_row(x + i * ld, x + j * ld, negated[i * kChunk + j], ld);
  }
}

// x ← (I − negatedᵀ)⁻¹·x: from the last block up
inline void solve_upper(const float* negated, float* x, int64_t ld, int64_t n) {
  for (int64_t r = (n - 1) / kTileRows * kTileRows; r >= 0; r -= kTileRows) {
    const int64_t m = least(kTileRows, n - r), below = r + m;
    if (below < n)
      product(x + r * ld, ld, Start::sum, nullptr, ByColumns{negated + below * kChunk + r, kChunk},
              x + below * ld, ld, n - below, m, ld);
    for (int64_t i = r + m - 2; i >= r; --i)
      for (int64_t j = i + 1; j < r + m; ++j) add_row(x + i * ld, x + j * ld, negated[j * kChunk + i], ld);
  }
}

// --- a chunk
// ------------------------------------------------------------------------------------------------

// out [n, ld]: rows in fp32; what is left of ld is 0
template <class T>
inline void load_tokens(float* out, int64_t ld, const TokenRows<const T>& rows, int64_t n, int64_t width) {
  for (int64_t i = 0; i < n; ++i)
    for_vecs(width, [&](int64_t j, int lanes) { store(out + i * ld + j, load_n(rows[i] + j, lanes)); });
}

template <class T>
inline void store_tokens(const TokenRows<T>& rows, const float* from, int64_t ld, int64_t n, int64_t width) {
  for (int64_t i = 0; i < n; ++i)
    for_vecs(width, [&](int64_t j, int lanes) { store_n(rows[i] + j, load(from + i * ld + j), lanes); });
}

inline float dot_rows(const float* x, const float* y, int64_t ld) {
  Vec total(0.0f);
  for (int64_t j = 0; j < ld; j += Vec::kWidth) total = fma(load(x + j), load(y + j), total);
  return sum(total);
}

struct Norm {
  bool used;
  double eps;
  // Rows become row / sqrt(|row|² + eps), times `scale`; the factors without it are left in `inverse`.
  void apply(float* rows, float* inverse, float scale, int64_t ld, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) {
      float* row = rows + i * ld;
      inverse[i] = used ? float(1.0 / __builtin_sqrt(double(dot_rows(row, row, ld)) + eps)) : 1.0f;
      const Vec factor(inverse[i] * scale);
      for (int64_t j = 0; j < ld; j += Vec::kWidth) store(row + j, load(row + j) * factor);
    }
  }
};

// Keys and queries of a chunk, and their products, which the heads of a group share.
struct KeyChunk {
  float *k, *q, *turned;  // [kChunk, ldk] twice, Kᵀ [ldk, kChunk]
  float *kk, *qk;         // [kChunk, kChunk], on and below the diagonal
  float *k_inverse, *q_inverse;

  void take(Arena& arena, const DeltaSizes& s) {
    arena.take(k, kChunk * s.ldk), arena.take(q, kChunk * s.ldk), arena.take(turned, s.ldk * kChunk);
    arena.take(kk, kChunk * kChunk), arena.take(qk, kChunk * kChunk);
    arena.take(k_inverse, kChunk), arena.take(q_inverse, kChunk);
  }
  template <class T>
  void load_keys(const DeltaSizes& s, const TokenRows<const T>& keys, const Norm& norm, int64_t n) const {
    load_tokens(k, s.ldk, keys, n, s.keys);
    norm.apply(k, k_inverse, 1.0f, s.ldk, n);
    transpose_units(turned, kChunk, k, s.ldk, n, round_up(n, Vec::kWidth), s.ldk);
    product<Part::result>(kk, kChunk, Start::zero, nullptr, ByRows{k, s.ldk}, turned, kChunk, s.keys, n, n);
  }
  template <class T>
  void load_queries(const DeltaSizes& s, const TokenRows<const T>& queries, const Norm& norm, float scale,
                    int64_t n) const {
    load_tokens(q, s.ldk, queries, n, s.keys);
    norm.apply(q, q_inverse, scale, s.ldk, n);
    product<Part::result>(qk, kChunk, Start::zero, nullptr, ByRows{q, s.ldk}, turned, kChunk, s.keys, n, n);
  }
};

// What g and beta of one head say of a chunk.
struct Gates {
  double* sums;                     // G
  float *beta, *grown, *left;       // e^G, e^(G_n − G)
  float *decay, *negated, *scores;  // e^(G_i − G_j) below the diagonal, −A, P: [kChunk, kChunk], 0 above
  float last;                       // e^(G_n)

  void take(Arena& arena) {
    arena.take(sums, kChunk);
    arena.take(beta, kChunk), arena.take(grown, kChunk), arena.take(left, kChunk);
    arena.take(decay, kChunk * kChunk), arena.take(negated, kChunk * kChunk);
    arena.take(scores, kChunk * kChunk);
  }
  void load(const TokenRows<const float>& g, const TokenRows<const float>& betas, int64_t n) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
      sums[i] = total += double(*g[i]);
      beta[i] = *betas[i];
    }
    for (int64_t i = n; i < kChunk; ++i) sums[i] = total;
    for (int64_t i = 0; i < kChunk; ++i) grown[i] = float(sums[i]), left[i] = float(total - sums[i]);
    for (int64_t i = 0; i < kChunk; i += Vec::kWidth) {
      store(grown + i, exp(INLAY_ISA_NS::load(grown + i)));
      store(left + i, exp(INLAY_ISA_NS::load(left + i)));
    }
    last = grown[n - 1];
    for (int64_t i = 0; i < n; ++i) {
      float* row = decay + i * kChunk;
      for (int64_t j = 0; j < kChunk; ++j) row[j] = float(sums[i] - sums[j]);
      for (int64_t j = 0; j < i; j += Vec::kWidth) store(row + j, exp(INLAY_ISA_NS::load(row + j)));
      memset(row + i, 0, size_t(kChunk - i) * 4);
    }
  }
  void form_system(const float* kk, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) times_decay(negated, kk, i, Vec(-beta[i]));
  }
  void form_scores(const float* qk, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) {
      times_decay(scores, qk, i, Vec(1.0f));
      scores[i * kChunk + i] = qk[i * kChunk + i];
    }
  }

 private:
  void times_decay(float* out, const float* from, int64_t i, Vec factor) const {
    const int64_t at = i * kChunk, seen = round_up(i, Vec::kWidth);
    for (int64_t j = 0; j < seen; j += Vec::kWidth)
      store(out + at + j, INLAY_ISA_NS::load(from + at + j) * INLAY_ISA_NS::load(decay + at + j) * factor);
    memset(out + at + seen, 0, size_t(kChunk - seen) * 4);
  }
};

// u ← U of the chunk, from the state before it
template <class T>
inline void updates(const DeltaSizes& s, const KeyChunk& chunk, const Gates& gates, const float* state,
                    const TokenRows<const T>& values, float* u, int64_t n) {
  product(u, s.ldv, Start::zero, nullptr, ByRows{chunk.k, s.ldk}, state, s.ldv, s.keys, n, s.ldv);
  for (int64_t i = 0; i < n; ++i) {
    float* row = u + i * s.ldv;
    const Vec beta(gates.beta[i]), factor(-gates.grown[i]);
    for_vecs(s.values, [&](int64_t j, int lanes) {
      store(row + j, beta * fma(factor, load(row + j), load_n(values[i] + j, lanes)));
    });
  }
  solve_lower(gates.negated, u, s.ldv, n);
}

// out [n, ld] = diag(factors)·rows
inline void scale_rows(float* out, const float* rows, const float* factors, int64_t ld, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i * ld; j < (i + 1) * ld; j += Vec::kWidth)
      store(out + j, load(rows + j) * Vec(factors[i]));
}

// state ← S'; `scaled` [kChunk, ldv] and `factors` [keys] are overwritten
inline void advance(const DeltaSizes& s, const KeyChunk& chunk, const Gates& gates, const float* u,
                    float* scaled, float* factors, float* state, int64_t n) {
  scale_rows(scaled, u, gates.left, s.ldv, n);
  for (int64_t i = 0; i < s.keys; ++i) factors[i] = gates.last;
  product(state, s.ldv, Start::scaled, factors, ByColumns{chunk.k, s.ldk}, scaled, s.ldv, n, s.keys, s.ldv);
}

inline const float* state_of(const TensorView& t, int64_t b, int64_t head) {
  return data<const float>(t) + b * t.strides[0] + head * t.strides[1];
}

// to [keys, ldv], from a dense [keys, values], or 0
inline void load_state(const DeltaSizes& s, const TensorView& states, int64_t b, int64_t head, float* to) {
  memset(to, 0, size_t(s.state()) * 4);
  if (!given(states)) return;
  const float* from = state_of(states, b, head);
  for (int64_t i = 0; i < s.keys; ++i) memcpy(to + i * s.ldv, from + i * s.values, size_t(s.values) * 4);
}

inline void store_state(const DeltaSizes& s, const TensorView& states, int64_t b, int64_t head,
                        const float* from) {
  if (!given(states)) return;
  float* to = const_cast<float*>(state_of(states, b, head));
  for (int64_t i = 0; i < s.keys; ++i) memcpy(to + i * s.values, from + i * s.ldv, size_t(s.values) * 4);
}

}  // namespace
}  // namespace INLAY_ISA_NS
}  // namespace inlay
