// Causal attention backward on AMX tiles. One piece of work is one query head of one sequence; everything it
// needs besides its inputs and outputs lies in one scratch block that fits L2.
//
// Scores are formed transposed, [keys, queries]: then P and dS are, as they are stored, the left operands of
// dV = Pᵀ·dO and dK = dSᵀ·Q, and a pair of key rows of dS interleaves into the right operand of dQᵀ = Kᵀ·dSᵀ.
// Work goes in 32 x 32 squares (2 x 2 tiles); squares in the masked half are never touched.
#include "cpu/tiles.h"

namespace inlay {
namespace INLAY_ISA_NS {

#if !defined(INLAY_VEC_amx)

void causal_attention_backward(const TensorView&, const TensorView&, const TensorView&,
                               const TensorView& dout, const TensorView&, const TensorView&,
                               const TensorView&, const TensorView&, const TensorView&, double) {
  fail("causal_attention_backward", "instruction set", "amx", dout, "use the reference on this machine");
}

#else

namespace {

constexpr int64_t kQueries =
    128;  // queries per block: four K-steps per tile of dV and dK that is loaded and stored

// One [T, D] slice of a [B, H, T, D] tensor with unit stride along D.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  Rows(const TensorView& t, int64_t b, int64_t h)
      : data(inlay::INLAY_ISA_NS::data<T>(t) + b * t.strides[0] + h * t.strides[1]), stride(t.strides[2]) {}
  T* operator[](int64_t r) const { return data + r * stride; }
};
using Bits = Rows<const uint16_t>;

// out [count, width] = rows, as they are
inline void copy_rows(uint16_t* out, const Bits& rows, int64_t first, int64_t count, int64_t width) {
  for (int64_t r = 0; r < count; ++r) memcpy(out + r * width, rows[first + r], size_t(width) * 2);
}

struct Head {
  int64_t tokens, padded, width;  // padded: tokens rounded up to whole squares
  float scale;
  uint16_t *k, *v, *k_t;         // [padded, width] twice, [width, padded]
  float *dk, *dv;                // [padded, width]
  uint16_t *q, *dout;            // [kQueries, width]
  uint32_t *q_cols, *dout_cols;  // [width/2, kQueries] pairs
  uint32_t *q_rows, *dout_rows;  // [kQueries/2, width] pairs
  uint16_t *p, *ds;              // [padded, kQueries]
  uint32_t* ds_pairs;            // [padded/2, kQueries] pairs
  float *dq_t, *lse, *delta;     // [width, kQueries], [kQueries] twice
  char* block;

  Head(int64_t t, int64_t w, float s) : tokens(t), padded((t + 31) / 32 * 32), width(w), scale(s) {
    const int64_t all = padded * width, some = kQueries * width, scores = padded * kQueries;
    const int64_t size = 3 * all * 2 + 2 * all * 4 + 2 * some * 2 + 4 * some * 2 + 3 * scores * 2 + some * 4 +
                         2 * kQueries * 4 + 32 * 64;
    block = new char[size_t(size)];
    memset(block, 0, size_t(size));  // the rows that pad to whole squares stay 0
    char* next = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(block) + 63) / 64 * 64);
    const auto take = [&](auto*& pointer, int64_t bytes) {
      pointer = reinterpret_cast<decltype(+pointer)>(next);
      next += (bytes + 63) / 64 * 64;
    };
    take(k, all * 2), take(v, all * 2), take(k_t, all * 2), take(dk, all * 4), take(dv, all * 4);
    take(q, some * 2), take(dout, some * 2), take(q_cols, some * 2), take(dout_cols, some * 2);
    take(q_rows, some * 2), take(dout_rows, some * 2), take(p, scores * 2), take(ds, scores * 2);
    take(ds_pairs, scores * 2), take(dq_t, some * 4), take(lse, kQueries * 4), take(delta, kQueries * 4);
  }
  ~Head() { delete[] block; }
  Head(const Head&) = delete;
  Head& operator=(const Head&) = delete;
};

inline void load_keys(Head& h, const Bits& k, const Bits& v) {
  copy_rows(h.k, k, 0, h.tokens, h.width);
  copy_rows(h.v, v, 0, h.tokens, h.width);
  transpose(h.k_t, h.padded, h.k, h.tokens, h.width);
}

inline float dot(const uint16_t* a, const uint16_t* b, int64_t size) {
  const auto *x = reinterpret_cast<const bf16*>(a), *y = reinterpret_cast<const bf16*>(b);
  Vec total(0.0f);
  for_vecs(size, [&](int64_t j, int n) { total = fma(load_n(x + j, n), load_n(y + j, n), total); });
  return sum(total);
}

inline void load_queries(Head& h, const Bits& q, const Bits& dout, const Bits& out, const float* lse,
                         int64_t first) {
  const int64_t count = h.tokens - first < kQueries ? h.tokens - first : kQueries;
  if (count < kQueries) {
    memset(h.q + count * h.width, 0, size_t((kQueries - count) * h.width) * 2);
    memset(h.dout + count * h.width, 0, size_t((kQueries - count) * h.width) * 2);
  }
  copy_rows(h.q, q, first, count, h.width);
  copy_rows(h.dout, dout, first, count, h.width);
  for (int64_t r = 0; r < kQueries; ++r) {
    h.lse[r] = r < count ? lse[first + r] : __builtin_inff();  // exp(... - inf) = 0: padding adds nothing
    h.delta[r] = r < count ? dot(dout[first + r], out[first + r], h.width) : 0.0f;
  }
  pair_channels(h.q_cols, kQueries, h.q, kQueries, h.width);
  pair_channels(h.dout_cols, kQueries, h.dout, kQueries, h.width);
  pair_rows(h.q_rows, h.q, kQueries, h.width);
  pair_rows(h.dout_rows, h.dout, kQueries, h.width);
}

// P and dS of one key row and 16 queries; `query - key >= 0` decides what is seen.
inline void score(const Head& h, const float* s, const float* dp, int64_t q, int64_t key, int64_t query,
                  __m256i* p, __m256i* ds) {
  const __m512i distance =
      _mm512_add_epi32(_mm512_set1_epi32(int(query - key)),
                       _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  const __mmask16 seen = _mm512_cmpge_epi32_mask(distance, _mm512_setzero_si512());
  const Vec all = exp(fma(load(s), Vec(h.scale), Vec(0.0f) - load(h.lse + q)));
  const Vec probability = _mm512_maskz_mov_ps(seen, all.v);
  const Vec slope = _mm512_maskz_mov_ps(seen, (all * (load(dp) - load(h.delta + q)) * Vec(h.scale)).v);
  *p = narrow(probability, bf16{});
  *ds = narrow(slope, bf16{});
}

// Scores of keys [key, key+32) and queries [q, q+32) of the block that starts at `first`.
inline void score_square(Head& h, int64_t key, int64_t q, int64_t first) {
  alignas(64) float s[kSquare * kSquare], dp[kSquare * kSquare];
  const int64_t steps = h.width / 32, ldb = 2 * kQueries;
  const auto columns = [&](const uint32_t* pairs) { return reinterpret_cast<const uint16_t*>(pairs + q); };
  square(s, kSquare, false, h.k + key * h.width, h.width, columns(h.q_cols), ldb, steps);
  square(dp, kSquare, false, h.v + key * h.width, h.width, columns(h.dout_cols), ldb, steps);
  for (int64_t r = 0; r < kSquare; r += 2)
    for (int64_t c = 0; c < kSquare; c += 16) {
      __m256i p[2], ds[2];
      for (int odd = 0; odd < 2; ++odd) {
        const int64_t at = (r + odd) * kSquare + c, to = (key + r + odd) * kQueries + q + c;
        score(h, s + at, dp + at, q + c, key + r + odd, first + q + c, &p[odd], &ds[odd]);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(h.p + to), p[odd]);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(h.ds + to), ds[odd]);
      }
      const __m512i low = _mm512_cvtepu16_epi32(ds[0]),
                    high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(ds[1]), 16);
      _mm512_storeu_si512(h.ds_pairs + (key + r) / 2 * kQueries + q + c, _mm512_or_si512(low, high));
    }
}

inline void add_key_gradients(Head& h, int64_t first, int64_t keys) {
  for (int64_t key = 0; key < keys; key += kSquare) {
    const int64_t q = key > first ? key - first : 0;  // earlier queries do not see these keys
    const int64_t steps = (kQueries - q) / 32, ldb = 2 * h.width;
    for (int64_t d = 0; d < h.width; d += kSquare) {
      const auto rows = [&](const uint32_t* pairs) {
        return reinterpret_cast<const uint16_t*>(pairs + q / 2 * h.width + d);
      };
      float *dv = h.dv + key * h.width + d, *dk = h.dk + key * h.width + d;
      square(dv, h.width, true, h.p + key * kQueries + q, kQueries, rows(h.dout_rows), ldb, steps);
      square(dk, h.width, true, h.ds + key * kQueries + q, kQueries, rows(h.q_rows), ldb, steps);
    }
  }
}

inline void store_query_gradients(Head& h, const Rows<uint16_t>& dq, int64_t first) {
  const int64_t count = h.tokens - first < kQueries ? h.tokens - first : kQueries;
  for (int64_t q = 0; q < count; q += kSquare) {
    const int64_t steps = (first + q) / 32 + 1;
    for (int64_t d = 0; d < h.width; d += kSquare)
      square(h.dq_t + d * kQueries + q, kQueries, false, h.k_t + d * h.padded, h.padded,
             reinterpret_cast<const uint16_t*>(h.ds_pairs + q), 2 * kQueries, steps);
  }
  for (int64_t q = 0; q < count; ++q) {
    alignas(64) float lanes[16];
    for (int64_t d = 0; d < h.width; d += 16) {
      for (int i = 0; i < 16; ++i) lanes[i] = h.dq_t[(d + i) * kQueries + q];
      store(reinterpret_cast<bf16*>(dq[first + q] + d), load(lanes));
    }
  }
}

}  // namespace

void causal_attention_backward(const TensorView& dq, const TensorView& dk, const TensorView& dv,
                               const TensorView& dout, const TensorView& q, const TensorView& k,
                               const TensorView& v, const TensorView& out, const TensorView& lse,
                               double scale) {
  const int64_t batch = q.shape[0], heads = q.shape[1], tokens = q.shape[2], width = q.shape[3];
  const int64_t repeat = heads / k.shape[1];
  parallel_for(batch * heads, tokens * tokens * width / 64 + 4 * tokens * width, [&](int64_t i) {
    const int64_t b = i / heads, head = i % heads;
    const Tiles tiles;
    Head h(tokens, width, float(scale));
    load_keys(h, Bits(k, b, head / repeat), Bits(v, b, head / repeat));
    const float* sums = data<const float>(lse) + b * lse.strides[0] + head * lse.strides[1];
    for (int64_t first = 0; first < tokens; first += kQueries) {
      load_queries(h, Bits(q, b, head), Bits(dout, b, head), Bits(out, b, head), sums, first);
      const int64_t keys = first + kQueries < h.padded ? first + kQueries : h.padded;
      for (int64_t key = 0; key < keys; key += kSquare)
        for (int64_t query = key > first ? key - first : 0; query < kQueries; query += kSquare)
          score_square(h, key, query, first);
      add_key_gradients(h, first, keys);
      store_query_gradients(h, Rows<uint16_t>(dq, b, head), first);
    }
    const Rows<float> to_k(dk, b, head), to_v(dv, b, head);
    for (int64_t r = 0; r < tokens; ++r) {
      memcpy(to_k[r], h.dk + r * width, size_t(width) * 4);
      memcpy(to_v[r], h.dv + r * width, size_t(width) * 4);
    }
  });
}

#endif

}  // namespace INLAY_ISA_NS
}  // namespace inlay
