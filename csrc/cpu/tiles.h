// AMX: products of 32 x 32 squares of bf16 with fp32 sums, and the layouts their operands want.
#pragma once

#include "cpu/kernel.h"

#if defined(INLAY_VEC_amx)

namespace inlay {
namespace INLAY_ISA_NS {
namespace {

constexpr int64_t kSquare = 32;  // two tiles of 16 each way
struct alignas(64) TileConfig {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles are configured per thread. oneDNN does so too, so what was there is put back.
struct Tiles {
  TileConfig before;
  Tiles() {
    _tile_storeconfig(&before);
    TileConfig config;
    config.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = 64;
      config.rows[tile] = 16;
    }
    _tile_loadconfig(&config);
  }
  ~Tiles() {
    if (before.palette) {
      _tile_loadconfig(&before);
    } else {
      _tile_release();
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// c [32, 32] fp32 (+)= a [32, 32·steps] · b, b as pairs: row r holds (b[2r][j], b[2r+1][j]) for every column
// j. lda, ldb in 16-bit elements per stored row, ldc in floats.
inline void square(float* c, int64_t ldc, bool add, const uint16_t* a, int64_t lda, const uint16_t* b,
                   int64_t ldb, int64_t steps) {
  const int64_t c_bytes = 4 * ldc, a_bytes = 2 * lda, b_bytes = 2 * ldb;
  if (add) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
    _tile_loadd(2, c + 16 * ldc, c_bytes);
    _tile_loadd(3, c + 16 * ldc + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; ++k, a += 32, b += 16 * ldb) {
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(5, a + 16 * lda, a_bytes);
    _tile_loadd(6, b, b_bytes);
    _tile_loadd(7, b + 32, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  _tile_stored(2, c + 16 * ldc, c_bytes);
  _tile_stored(3, c + 16 * ldc + 16, c_bytes);
}

// out [width/2, ld] of pairs along d: the right operand of a product over d, one column per row of `rows`
inline void pair_channels(uint32_t* out, int64_t ld, const uint16_t* rows, int64_t count, int64_t width) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t d = 0; d < width / 2; ++d) memcpy(out + d * ld + r, rows + r * width + 2 * d, 4);
}

}  // namespace
}  // namespace INLAY_ISA_NS
}  // namespace inlay

#endif
