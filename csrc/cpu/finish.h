// What becomes of a tile's fp32 sums: a bias, what `out` holds, one rounding.
#pragma once

#include "cpu/product.h"

#if defined(INLAY_VEC_avx512) || defined(INLAY_VEC_avx2)

namespace inlay {
namespace INLAY_ISA_NS {
namespace {

struct Finish {
  const TensorView &out, &bias;
  bool add;

  void operator()(int64_t m, int rows, int64_t j, int64_t width, const float* sums, int64_t ld) const {
    if (out.dtype == DType::f32) return tile<float>(m, rows, j, width, sums, ld);
    tile<bf16>(m, rows, j, width, sums, ld);
  }

  template <class T>
  void tile(int64_t m, int rows, int64_t j, int64_t width, const float* sums, int64_t ld) const {
    for (int r = 0; r < rows; ++r, sums += ld) {
      T* to = row<T>(out, m + r) + j * out.strides[1];
      if (out.strides[1] != 1) {
        scattered(to, sums, j, width);
      } else if (bias.data || add) {
        summed(to, sums, j, width);
      } else {
        rounded_row(to, sums, width);
      }
    }
  }

  template <class T>
  void summed(T* to, const float* sums, int64_t j, int64_t width) const {
    for_vecs(width, [&](int64_t c, int n) {
      Vec sum = load(sums + c, n);
      if (bias.data) sum = sum + load(data<const T>(bias) + j + c, n);
      if (add) sum = sum + load(to + c, n);
      store(to + c, sum, n);
    });
  }

  template <class T>
  void scattered(T* to, const float* sums, int64_t j, int64_t width) const {
    for (int64_t c = 0; c < width; ++c, to += out.strides[1]) {
      float sum = bias.data ? sums[c] + load_one(data<const T>(bias) + j + c) : sums[c];
      store_one(to, add ? sum + load_one(to) : sum);
    }
  }

#if defined(__AVX512BF16__)
  static void rounded_row(bf16* to, const float* sums, int64_t width) {
    const __m512 left = _mm512_loadu_ps(sums), right = _mm512_loadu_ps(sums + 16);
    _mm512_mask_storeu_epi16(to, first_words(width), as_bits(_mm512_cvtne2ps_pbh(right, left)));
  }
#else
  static void rounded_row(bf16* to, const float* sums, int64_t width) {
    for_vecs(width, [&](int64_t c, int n) { store_n(to + c, load(sums + c), n); });
  }
#endif
  static void rounded_row(float* to, const float* sums, int64_t width) {
    memcpy(to, sums, size_t(width) * 4);
  }
};

}  // namespace
}  // namespace INLAY_ISA_NS
}  // namespace inlay

#endif
