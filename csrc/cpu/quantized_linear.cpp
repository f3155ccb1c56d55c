// y = x·Wᵀ + b for a few rows x, straight from four-bit storage: each weight is decoded in registers and used
// at once.
#include "cpu/codes.h"
#include "cpu/tiles.h"

namespace inlay {
namespace INLAY_ISA_NS {

namespace {

constexpr int kRows = 4;  // weight rows per tile: each load of x serves all of them
constexpr int kTokens =
    4;  // rows of x per tile: kRows·kTokens accumulators fill half the registers of AVX-512

constexpr int64_t kScales = 64;  // of a row, decoded at once where they are themselves in 8 bits

// Bytes of a row fetched ahead of use; past its end is the next row, or nothing that faults.
constexpr int64_t kAhead = 512;

// x as fp32, even and odd columns apart, the way packed bytes hold the weights.
struct Split {
  float* values = nullptr;
  int64_t half = 0;

  Split(const TensorView& x) : values(new float[size_t(x.shape[0] * x.shape[1] + 1)]), half(x.shape[1] / 2) {
    with_float(x.dtype, [&](auto element) {
      using T = decltype(element);
      for (int64_t m = 0; m < x.shape[0]; ++m)
        for (int64_t k = 0; k < half; ++k) {
          even(m)[k] = load_one(row<const T>(x, m) + 2 * k);
          odd(m)[k] = load_one(row<const T>(x, m) + 2 * k + 1);
        }
    });
  }
  ~Split() { delete[] values; }
  Split(const Split&) = delete;
  Split& operator=(const Split&) = delete;
  float* even(int64_t m) const { return values + 2 * m * half; }
  float* odd(int64_t m) const { return even(m) + half; }
};

struct Weight {
  const uint8_t* packed;
  Levels levels;
  Scales scales;
  int64_t columns, blocksize;
};

// sums[r][t] = W[n + r] · x[m + t]. Blocks do not straddle rows here, and hold whole Vecs of bytes.
template <int Rows, int Tokens>
void dot_tile(const Weight& w, const Split& x, int64_t n, int64_t m, float (&sums)[kRows][kTokens]) {
  // With one or two tokens a block's products are scaled once, when they are summed; with more there are no
  // registers left for sums of a block.
  constexpr bool kScaleSums = Tokens <= 2;
  Vec total[Rows][Tokens], part[Rows][Tokens];
  auto& running = kScaleSums ? part : total;
  for (auto& r : total)
    for (Vec& t : r) t = Vec(0.0f);
  const int64_t blocks = w.columns / w.blocksize, bytes = w.blocksize / 2;
  float scales[Rows][kScales];
  for (int64_t b = 0; b < blocks; ++b) {
    if (b % kScales == 0)
      for (int r = 0; r < Rows; ++r)
        w.scales.fill(scales[r], (n + r) * blocks + b, blocks - b < kScales ? blocks - b : kScales);
    Vec scale[Rows];
    for (int r = 0; r < Rows; ++r) {
      scale[r] = Vec(scales[r][b % kScales]);
      __builtin_prefetch(w.packed + (n + r) * (w.columns / 2) + b * bytes + kAhead);
    }
    if (kScaleSums)
      for (auto& r : part)
        for (Vec& t : r) t = Vec(0.0f);
    for (int64_t k = b * bytes; k < (b + 1) * bytes; k += Vec::kWidth) {
      for (int r = 0; r < Rows; ++r) {
        const uint8_t* p = w.packed + (n + r) * (w.columns / 2) + k;
        const Vec even = kScaleSums ? w.levels.high(p) : w.levels.high(p) * scale[r];
        const Vec odd = kScaleSums ? w.levels.low(p) : w.levels.low(p) * scale[r];
        for (int t = 0; t < Tokens; ++t) {
          running[r][t] = fma(even, load(x.even(m + t) + k), running[r][t]);
          running[r][t] = fma(odd, load(x.odd(m + t) + k), running[r][t]);
        }
      }
    }
    if (kScaleSums)
      for (int r = 0; r < Rows; ++r)
        for (int t = 0; t < Tokens; ++t) total[r][t] = fma(part[r][t], scale[r], total[r][t]);
  }
  for (int r = 0; r < Rows; ++r)
    for (int t = 0; t < Tokens; ++t) sums[r][t] = sum(total[r][t]);
}

template <int Rows>
void dot_tokens(const Weight& w, const Split& x, int64_t n, int64_t m, int tokens,
                float (&sums)[kRows][kTokens]) {
  if (tokens == 4) return dot_tile<Rows, 4>(w, x, n, m, sums);
  if (tokens == 3) return dot_tile<Rows, 3>(w, x, n, m, sums);
  if (tokens == 2) return dot_tile<Rows, 2>(w, x, n, m, sums);
  dot_tile<Rows, 1>(w, x, n, m, sums);
}

template <class T>
struct Output {
  const TensorView& y;
  const T* bias;

  void put(int64_t m, int64_t n, float value) const {
    store_one(row<T>(y, m) + n, bias ? value + load_one(bias + n) : value);
  }
};

template <class T>
void tiles(const Weight& w, const Split& x, const Output<T>& out) {
  const int64_t tokens = out.y.shape[0], rows = out.y.shape[1];
  parallel_for((rows + kRows - 1) / kRows, kRows * w.columns * (tokens + 2), [&](int64_t tile) {
    const int64_t n = tile * kRows;
    const int height = int(rows - n < kRows ? rows - n : kRows);
    for (int64_t m = 0; m < tokens; m += kTokens) {
      const int width = int(tokens - m < kTokens ? tokens - m : kTokens);
      float sums[kRows][kTokens];
      if (height == kRows) {
        dot_tokens<kRows>(w, x, n, m, width, sums);
        for (int r = 0; r < height; ++r)
          for (int t = 0; t < width; ++t) out.put(m + t, n + r, sums[r][t]);
        continue;
      }
      for (int r = 0; r < height; ++r) {
        dot_tokens<1>(w, x, n + r, m, width, sums);
        for (int t = 0; t < width; ++t) out.put(m + t, n + r, sums[0][t]);
      }
    }
  });
}

#if defined(INLAY_VEC_amx)

// Up to 16 rows of x at once on tiles: weights expand to bf16(level·absmax), the weights that training
// multiplies by, 32 rows by one block at a time, and are consumed from L1. x lies ready as pairs of channels,
// one column per row of x.
struct Pairs {
  const Aligned block;
  uint32_t* values;
  explicit Pairs(const TensorView& x) : block(x.shape[1] * 32) {
    values = reinterpret_cast<uint32_t*>(block.start);
    memset(values, 0, size_t(x.shape[1]) * 32);  // columns beyond the last row of x stay 0
    for (int64_t m = 0; m < x.shape[0]; ++m)
      pair_channels(values + m, 16, row<const uint16_t>(x, m), 1, x.shape[1]);
  }
};

void amx_rows(const Weight& w, const float* table, const Pairs& x, int64_t n, int64_t rows, float* sums) {
  constexpr int kSteps = 4;  // 32-channel steps expanded ahead: 32 rows of them are 8 KiB
  alignas(64) uint16_t weights[kSteps][32][32];
  const Vec levels = load(table);
  // Divisions stay out of the loop over rows: two of them would take as long as expanding a block.
  const int64_t steps = w.columns / 32, per_block = w.blocksize / 32, row_blocks = w.columns / w.blocksize;
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t first = 0; first < steps; first += kSteps) {
    const int64_t count = steps - first < kSteps ? steps - first : kSteps;
    const int64_t first_block = first / per_block, first_stop = (first_block + 1) * per_block - first;
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* p = w.packed + (n + r) * (w.columns / 2) + first * 16;
      __builtin_prefetch(p + kAhead);  // 32 rows are more streams than the hardware follows
      int64_t block = (n + r) * row_blocks + first_block;
      for (int64_t s = 0, stop = first_stop; s < count; ++block, stop += per_block) {
        const Vec scale(w.scales.at(block));
        // The instruction rounds as narrow() does, but for subnormal products, which become 0.
        const Words products(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh((levels * scale).v)));
        for (; s < count && s < stop; ++s) _mm512_store_si512(weights[s][r], products.expand(p + 16 * s));
      }
    }
    for (int64_t s = 0; s < count; ++s) {
      _tile_loadd(2, x.values + (first + s) * 16 * 16, 64);
      _tile_loadd(3, weights[s][0], 64);
      _tile_loadd(4, weights[s][16], 64);
      _tile_dpbf16ps(0, 3, 2);
      _tile_dpbf16ps(1, 4, 2);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 16 * 16, 64);
}

void amx(const Weight& w, const float* table, const TensorView& x, const Output<bf16>& out) {
  const Pairs pairs(x);
  const int64_t tokens = x.shape[0], rows = out.y.shape[1];
  parallel_for((rows + 31) / 32, 32 * w.columns, [&](int64_t tile) {
    const Tiles configured;
    alignas(64) float sums[32 * 16];
    const int64_t n = tile * 32, height = rows - n < 32 ? rows - n : 32;
    amx_rows(w, table, pairs, n, height, sums);
    for (int64_t r = 0; r < height; ++r)
      for (int64_t m = 0; m < tokens; ++m) out.put(m, n + r, sums[r * 16 + m]);
  });
}

bool tiles_fit(const Weight& w, const TensorView& x) {
  return x.dtype == DType::bf16 && x.shape[0] > kTokens && x.shape[0] <= 16 && w.columns % w.blocksize == 0;
}

#endif

// Any shape: odd columns, blocks that straddle rows. One element at a time.
template <class T>
void any_shape(const Weight& w, const float* levels, const TensorView& x, const Output<T>& out) {
  const int64_t tokens = x.shape[0], columns = w.columns;
  parallel_for(out.y.shape[1], columns * (tokens + 4), [&](int64_t n) {
    for (int64_t m = 0; m < tokens; ++m) {
      double total = 0;
      for (int64_t k = 0; k < columns; ++k) {
        const int64_t i = n * columns + k;
        const int code = i % 2 ? w.packed[i / 2] & 15 : w.packed[i / 2] >> 4;
        total += double(levels[code] * w.scales.at(i / w.blocksize) * load_one(row<const T>(x, m) + k));
      }
      out.put(m, n, float(total));
    }
  });
}

}  // namespace

void quantized_linear(const TensorView& y, const TensorView& x, const TensorView& packed,
                      const TensorView& levels, const TensorView& absmax, const TensorView& codes,
                      const TensorView& map, const TensorView& offset, const TensorView& bias,
                      const TensorView&, const TensorView&, int64_t blocksize) {
  const int64_t columns = x.shape[1];
  const float* table = data<const float>(levels);
  const Weight w{data<const uint8_t>(packed), Levels(table), Scales(absmax, codes, map, offset), columns,
                 blocksize};
  with_float(x.dtype, [&](auto element) {
    using T = decltype(element);
    const Output<T> out{y, data<const T>(bias)};
#if defined(INLAY_VEC_amx)
    if constexpr (sizeof(T) == 2) {
      if (tiles_fit(w, x)) return amx(w, table, x, {y, data<const bf16>(bias)});
    }
#endif
    if (columns % blocksize == 0 && blocksize % (2 * Vec::kWidth) == 0) return tiles(w, Split(x), out);
    any_shape(w, table, x, out);
  });
}

}  // namespace INLAY_ISA_NS
}  // namespace inlay
