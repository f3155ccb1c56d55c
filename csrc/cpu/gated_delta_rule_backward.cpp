// Gated delta rule backward. Nothing of the forward is kept but its inputs: a first sweep rebuilds the state
// before each chunk and its U into scratch, a second one goes back over the chunks with the gradient of the
// state. With dU the gradient of U, and R what the triangular system of a chunk is solved for:
//   dU = Pᵀ·dout + diag(e^(G_n − G))·K·dS'            dR = (I + A)⁻ᵀ·dU
//   dS = e^(G_n)·dS' + Qᵀ·diag(e^G)·dout − Kᵀ·diag(beta·e^G)·dR
// Heads of a group add to one gradient of their keys and queries, in order.
#include "cpu/gated_delta_rule.h"

namespace inlay {
namespace INLAY_ISA_NS {

namespace {

struct BackwardBuffers {
  KeyChunk chunk;
  Gates gates;
  float *states, *us;               // [group, chunks, keys, ldv], [group, chunks, kChunk, ldv]
  float *dstates, *rows, *factors;  // [group, keys, ldv], [kChunk, ldv], [keys]
  float *dout, *du;                 // [kChunk, ldv]; du becomes dR
  float *turned_state, *turned_u;   // [ldv, ldk], [ldv, kChunk]
  float *dk, *dq, *read;            // [kChunk, ldk]
  float *dkk, *dqk;                 // [kChunk, kChunk], of k·k and q·k without their decay
  float *da, *dp;                   // the same of one head
  float *dgates, *dbeta;            // [kChunk]; of G
  int64_t bytes;

  BackwardBuffers(const DeltaSizes& s, char* memory) {
    Arena arena(memory);
    chunk.take(arena, s), gates.take(arena);
    arena.take(states, s.group * s.chunks * s.state());
    arena.take(us, s.group * s.chunks * kChunk * s.ldv);
    arena.take(dstates, s.group * s.state()), arena.take(rows, kChunk * s.ldv), arena.take(factors, s.keys);
    arena.take(dout, kChunk * s.ldv), arena.take(du, kChunk * s.ldv);
    arena.take(turned_state, s.ldv * s.ldk), arena.take(turned_u, s.ldv * kChunk);
    arena.take(dk, kChunk * s.ldk), arena.take(dq, kChunk * s.ldk), arena.take(read, kChunk * s.ldk);
    arena.take(dkk, kChunk * kChunk), arena.take(dqk, kChunk * kChunk);
    arena.take(da, kChunk * kChunk), arena.take(dp, kChunk * kChunk);
    arena.take(dgates, kChunk), arena.take(dbeta, kChunk);
    bytes = arena.used;
  }
};

struct Inputs {
  const TensorView &dout, &dfinal, &q, &k, &v, &g, &beta, &initial;
};

// Rows j and later in the chunk decay with what is added to G_j: dg is the sum of dG from its token on.
inline void store_gates(const TokenRows<float>& dg, const TokenRows<float>& dbeta, const BackwardBuffers& b,
                        int64_t n) {
  double total = 0;
  for (int64_t i = n - 1; i >= 0; --i) {
    *dg[i] = float(total += double(b.dgates[i]));
    *dbeta[i] = b.dbeta[i];
  }
}

// read [n, ldk] ← rows·stateᵀ, with `turned_state` the state transposed
inline void read_state(const DeltaSizes& s, const BackwardBuffers& b, const float* rows, int64_t n) {
  product(b.read, s.ldk, Start::zero, nullptr, ByRows{rows, s.ldv}, b.turned_state, s.ldk, s.values, n,
          s.ldk);
}

inline void turn_state(const DeltaSizes& s, const BackwardBuffers& b, const float* state) {
  transpose_units(b.turned_state, s.ldk, state, s.ldv, s.keys, s.ldk, s.ldv);
}

// Gradients through the products of tokens with each other: P and A.
inline void slopes_of_pairs(const DeltaSizes& s, const BackwardBuffers& b, const float* u, int64_t n) {
  transpose_units(b.turned_u, kChunk, u, s.ldv, n, round_up(n, Vec::kWidth), s.ldv);
  product<Part::result>(b.dp, kChunk, Start::zero, nullptr, ByRows{b.dout, s.ldv}, b.turned_u, kChunk,
                        s.values, n, n);
  product<Part::result>(b.da, kChunk, Start::zero, nullptr, ByRows{b.du, s.ldv}, b.turned_u, kChunk, s.values,
                        n, n);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = i * kChunk;
    Vec from_beta(0.0f), from_gates(0.0f);
    for (int64_t j = 0; j < i; j += Vec::kWidth) {
      const Vec decay = load(b.gates.decay + at + j), da = Vec(0.0f) - load(b.da + at + j) * decay;
      const Vec dqk = load(b.dp + at + j) * decay, kk = da * load(b.chunk.kk + at + j);
      const Vec dkk = da * Vec(b.gates.beta[i]);
      const Vec both = fma(dqk, load(b.chunk.qk + at + j), kk * Vec(b.gates.beta[i]));
      store(b.dkk + at + j, load(b.dkk + at + j) + dkk);
      store(b.dqk + at + j, load(b.dqk + at + j) + dqk);
      store(b.dgates + j, load(b.dgates + j) - both);
      from_beta = from_beta + kk;
      from_gates = from_gates + both;
    }
    b.dqk[at + i] += b.dp[at + i];
    b.dbeta[i] += sum(from_beta);
    b.dgates[i] += sum(from_gates);
  }
}

// Through what the chunk reads of the state before it: K·S by way of R, and Q·S by way of out.
template <class T>
inline void slopes_of_reads(const DeltaSizes& s, const BackwardBuffers& b, const float* state,
                            const TokenRows<const T>& values, int64_t n) {
  turn_state(s, b, state);
  read_state(s, b, b.du, n);
  for (int64_t i = 0; i < n; ++i) {
    const float* read = b.read + i * s.ldk;
    const float share = b.gates.grown[i] * dot_rows(read, b.chunk.k + i * s.ldk, s.ldk);
    Vec along(0.0f);
    for_vecs(s.values, [&](int64_t j, int lanes) {
      along = fma(load(b.du + i * s.ldv + j), load_n(values[i] + j, lanes), along);
    });
    b.dbeta[i] += sum(along) - share;
    b.dgates[i] -= b.gates.beta[i] * share;
    add_row(b.dk + i * s.ldk, read, -b.gates.beta[i] * b.gates.grown[i], s.ldk);
  }
  read_state(s, b, b.dout, n);
  for (int64_t i = 0; i < n; ++i) {
    const float* read = b.read + i * s.ldk;
    b.dgates[i] += b.gates.grown[i] * dot_rows(read, b.chunk.q + i * s.ldk, s.ldk);
    add_row(b.dq + i * s.ldk, read, b.gates.grown[i], s.ldk);
  }
}

// Through what the chunk adds to the state, and the decay of what was there.
inline void slopes_of_state(const DeltaSizes& s, const BackwardBuffers& b, const float* state,
                            const float* dstate, const float* u, int64_t n) {
  turn_state(s, b, dstate);
  read_state(s, b, u, n);
  double last = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float* read = b.read + i * s.ldk;
    const float share = b.gates.left[i] * dot_rows(read, b.chunk.k + i * s.ldk, s.ldk);
    b.dgates[i] -= share;
    last += double(share);
    add_row(b.dk + i * s.ldk, read, b.gates.left[i], s.ldk);
  }
  double kept = 0;
  for (int64_t i = 0; i < s.keys; ++i) kept += double(dot_rows(state + i * s.ldv, dstate + i * s.ldv, s.ldv));
  b.dgates[n - 1] += float(last + kept * double(b.gates.last));
}

// dstate ← the gradient of the state before the chunk
inline void retreat(const DeltaSizes& s, const BackwardBuffers& b, float* dstate, int64_t n) {
  for (int64_t i = 0; i < s.keys; ++i) b.factors[i] = b.gates.last;
  scale_rows(b.rows, b.dout, b.gates.grown, s.ldv, n);
  product(dstate, s.ldv, Start::scaled, b.factors, ByColumns{b.chunk.q, s.ldk}, b.rows, s.ldv, n, s.keys,
          s.ldv);
  for (int64_t i = 0; i < n; ++i) b.factors[i] = -b.gates.beta[i] * b.gates.grown[i];
  scale_rows(b.rows, b.du, b.factors, s.ldv, n);
  product(dstate, s.ldv, Start::sum, nullptr, ByColumns{b.chunk.k, s.ldk}, b.rows, s.ldv, n, s.keys, s.ldv);
}

// One head and chunk: dv, dg and dbeta; what it adds to dk, dq, dkk and dqk; dstate becomes that before the
// chunk.
template <class T>
inline void backward_head(const DeltaSizes& s, const BackwardBuffers& b, const float* state, const float* u,
                          float* dstate, const TokenRows<const T>& values, const TokenRows<T>& dv,
                          int64_t n) {
  memset(b.dgates, 0, size_t(kChunk) * 4), memset(b.dbeta, 0, size_t(kChunk) * 4);
  product(b.du, s.ldv, Start::zero, nullptr, ByRows{b.chunk.k, s.ldk}, dstate, s.ldv, s.keys, n, s.ldv);
  product<Part::left>(b.du, s.ldv, Start::scaled, b.gates.left, ByColumns{b.gates.scores, kChunk}, b.dout,
                      s.ldv, n, n, s.ldv);
  solve_upper(b.gates.negated, b.du, s.ldv, n);
  scale_rows(b.rows, b.du, b.gates.beta, s.ldv, n);
  store_tokens(dv, b.rows, s.ldv, n, s.values);
  slopes_of_pairs(s, b, u, n);
  slopes_of_reads(s, b, state, values, n);
  slopes_of_state(s, b, state, dstate, u, n);
  retreat(s, b, dstate, n);
}

// From the gradients of products of keys and queries, and of their norms, to those of rows as they came.
inline void finish_keys(const DeltaSizes& s, const BackwardBuffers& b, int64_t n) {
  product<Part::left>(b.dq, s.ldk, Start::sum, nullptr, ByRows{b.dqk, kChunk}, b.chunk.k, s.ldk, n, n, s.ldk);
  product<Part::left>(b.dk, s.ldk, Start::sum, nullptr, ByColumns{b.dqk, kChunk}, b.chunk.q, s.ldk, n, n,
                      s.ldk);
  product<Part::left>(b.dk, s.ldk, Start::sum, nullptr, ByRows{b.dkk, kChunk}, b.chunk.k, s.ldk, n, n, s.ldk);
  product<Part::left>(b.dk, s.ldk, Start::sum, nullptr, ByColumns{b.dkk, kChunk}, b.chunk.k, s.ldk, n, n,
                      s.ldk);
}

// d ← the gradient of rows that became `normed`, each times inverse·scale
inline void undo_norm(float* d, const float* normed, const float* inverse, float scale, bool used, int64_t ld,
                      int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float* row = d + i * ld;
    const float* unit = normed + i * ld;  // scale times a row of length 1
    const float along = used ? -dot_rows(row, unit, ld) / scale : 0.0f;
    for (int64_t j = 0; j < ld; j += Vec::kWidth)
      store(row + j, fma(load(unit + j), Vec(along), load(row + j) * Vec(scale)) * Vec(inverse[i]));
  }
}

template <class T>
struct Sweep {
  const DeltaSizes& s;
  const Inputs& in;
  const Norm& norm;
  BackwardBuffers& b;
  int64_t batch, key_head;
  float scale;

  int64_t head(int64_t h) const { return key_head * s.group + h; }
  float* state(int64_t h, int64_t c) const { return b.states + (h * s.chunks + c) * s.state(); }
  float* u(int64_t h, int64_t c) const { return b.us + (h * s.chunks + c) * kChunk * s.ldv; }
  TokenRows<const T> values(int64_t h, int64_t c) const { return {in.v, batch, head(h), c * kChunk}; }

  void load_gates(int64_t h, int64_t c) const {
    b.gates.load({in.g, batch, head(h), c * kChunk}, {in.beta, batch, head(h), c * kChunk}, s.count(c));
    b.gates.form_system(b.chunk.kk, s.count(c));
  }
  void forward() const {
    for (int64_t h = 0; h < s.group; ++h) load_state(s, in.initial, batch, head(h), state(h, 0));
    for (int64_t c = 0; c < s.chunks; ++c) {
      b.chunk.load_keys(s, TokenRows<const T>(in.k, batch, key_head, c * kChunk), norm, s.count(c));
      for (int64_t h = 0; h < s.group; ++h) {
        load_gates(h, c);
        updates(s, b.chunk, b.gates, state(h, c), values(h, c), u(h, c), s.count(c));
        if (c + 1 == s.chunks) continue;
        memcpy(state(h, c + 1), state(h, c), size_t(s.state()) * 4);
        advance(s, b.chunk, b.gates, u(h, c), b.rows, b.factors, state(h, c + 1), s.count(c));
      }
    }
  }
  void load_chunk(int64_t c) const {
    const int64_t first = c * kChunk, n = s.count(c);
    b.chunk.load_keys(s, TokenRows<const T>(in.k, batch, key_head, first), norm, n);
    b.chunk.load_queries(s, TokenRows<const T>(in.q, batch, key_head, first), norm, scale, n);
    memset(b.dk, 0, size_t(kChunk * s.ldk) * 4), memset(b.dq, 0, size_t(kChunk * s.ldk) * 4);
    memset(b.dkk, 0, size_t(kChunk * kChunk) * 4), memset(b.dqk, 0, size_t(kChunk * kChunk) * 4);
  }
  void backward(const TensorView& dq, const TensorView& dk, const TensorView& dv, const TensorView& dg,
                const TensorView& dbeta, const TensorView& dinitial) const {
    for (int64_t h = 0; h < s.group; ++h) load_state(s, in.dfinal, batch, head(h), b.dstates + h * s.state());
    for (int64_t c = s.chunks - 1; c >= 0; --c) {
      const int64_t first = c * kChunk, n = s.count(c);
      load_chunk(c);
      for (int64_t h = 0; h < s.group; ++h) {
        load_gates(h, c);
        b.gates.form_scores(b.chunk.qk, n);
        load_tokens(b.dout, s.ldv, TokenRows<const T>(in.dout, batch, head(h), first), n, s.values);
        backward_head<T>(s, b, state(h, c), u(h, c), b.dstates + h * s.state(), values(h, c),
                         {dv, batch, head(h), first}, n);
        store_gates({dg, batch, head(h), first}, {dbeta, batch, head(h), first}, b, n);
      }
      finish_keys(s, b, n);
      undo_norm(b.dk, b.chunk.k, b.chunk.k_inverse, 1.0f, norm.used, s.ldk, n);
      undo_norm(b.dq, b.chunk.q, b.chunk.q_inverse, scale, norm.used, s.ldk, n);
      store_tokens(TokenRows<T>(dk, batch, key_head, first), b.dk, s.ldk, n, s.keys);
      store_tokens(TokenRows<T>(dq, batch, key_head, first), b.dq, s.ldk, n, s.keys);
    }
    for (int64_t h = 0; h < s.group; ++h) store_state(s, dinitial, batch, head(h), b.dstates + h * s.state());
  }
};

}  // namespace

void gated_delta_rule_backward(const TensorView& dq, const TensorView& dk, const TensorView& dv,
                               const TensorView& dg, const TensorView& dbeta, const TensorView& dinitial,
                               const TensorView& dout, const TensorView& dfinal, const TensorView& q,
                               const TensorView& k, const TensorView& v, const TensorView& g,
                               const TensorView& beta, const TensorView& initial_state, double scale,
                               bool normalize, double eps) {
  const DeltaSizes s(q, v);
  const Norm norm{normalize, eps};
  const Inputs in{dout, dfinal, q, k, v, g, beta, initial_state};
  const int64_t bytes = BackwardBuffers(s, nullptr).bytes;
  with_float(q.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t cost = s.tokens * s.group * s.keys * s.values;
    parallel_with_scratch(s.batch * s.key_heads, cost, bytes, [&](int64_t piece, char* memory) {
      BackwardBuffers b(s, memory);
      const Sweep<T> sweep{s, in, norm, b, piece / s.key_heads, piece % s.key_heads, float(scale)};
      sweep.forward();
      sweep.backward(dq, dk, dv, dg, dbeta, dinitial);
    });
  });
}

}  // namespace INLAY_ISA_NS
}  // namespace inlay
