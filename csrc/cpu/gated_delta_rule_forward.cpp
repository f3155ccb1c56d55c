// Gated delta rule forward: one piece of work is one key head with the heads of its group, chunk after chunk.
#include "cpu/gated_delta_rule.h"

namespace inlay {
namespace INLAY_ISA_NS {

namespace {

struct ForwardBuffers {
  KeyChunk chunk;
  Gates gates;
  float *states, *u, *rows, *factors;  // [group, keys, ldv], [kChunk, ldv] twice, [keys]
  int64_t bytes;

  ForwardBuffers(const DeltaSizes& s, char* memory) {
    Arena arena(memory);
    chunk.take(arena, s), gates.take(arena);
    arena.take(states, s.group * s.state());
    arena.take(u, kChunk * s.ldv), arena.take(rows, kChunk * s.ldv), arena.take(factors, s.keys);
    bytes = arena.used;
  }
};

// One head of the group: out of this chunk, and the state after it.
template <class T>
inline void forward_head(const DeltaSizes& s, ForwardBuffers& b, float* state,
                         const TokenRows<const T>& values, const TokenRows<T>& out, int64_t n) {
  b.gates.form_system(b.chunk.kk, n);
  b.gates.form_scores(b.chunk.qk, n);
  updates(s, b.chunk, b.gates, state, values, b.u, n);
  product(b.rows, s.ldv, Start::zero, nullptr, ByRows{b.chunk.q, s.ldk}, state, s.ldv, s.keys, n, s.ldv);
  product<Part::left>(b.rows, s.ldv, Start::scaled, b.gates.grown, ByRows{b.gates.scores, kChunk}, b.u, s.ldv,
                      n, n, s.ldv);
  store_tokens(out, b.rows, s.ldv, n, s.values);
  advance(s, b.chunk, b.gates, b.u, b.rows, b.factors, state, n);
}

}  // namespace

void gated_delta_rule_forward(const TensorView& out, const TensorView& final_state, const TensorView& q,
                              const TensorView& k, const TensorView& v, const TensorView& g,
                              const TensorView& beta, const TensorView& initial_state, double scale,
                              bool normalize, double eps) {
  const DeltaSizes s(q, v);
  const Norm norm{normalize, eps};
  const int64_t bytes = ForwardBuffers(s, nullptr).bytes;
  with_float(q.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t cost = s.tokens * s.group * s.keys * s.values / 4;
    parallel_with_scratch(s.batch * s.key_heads, cost, bytes, [&](int64_t piece, char* memory) {
      const int64_t batch = piece / s.key_heads, key_head = piece % s.key_heads;
      ForwardBuffers b(s, memory);
      for (int64_t h = 0; h < s.group; ++h)
        load_state(s, initial_state, batch, key_head * s.group + h, b.states + h * s.state());
      for (int64_t c = 0; c < s.chunks; ++c) {
        const int64_t first = c * kChunk, n = s.count(c);
        b.chunk.load_keys(s, TokenRows<const T>(k, batch, key_head, first), norm, n);
        b.chunk.load_queries(s, TokenRows<const T>(q, batch, key_head, first), norm, float(scale), n);
        for (int64_t h = 0; h < s.group; ++h) {
          const int64_t head = key_head * s.group + h;
          b.gates.load({g, batch, head, first}, {beta, batch, head, first}, n);
          forward_head<T>(s, b, b.states + h * s.state(), {v, batch, head, first}, {out, batch, head, first},
                          n);
        }
      }
      for (int64_t h = 0; h < s.group; ++h)
        store_state(s, final_state, batch, key_head * s.group + h, b.states + h * s.state());
    });
  });
}

}  // namespace INLAY_ISA_NS
}  // namespace inlay
