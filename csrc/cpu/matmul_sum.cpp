// out = round(Σ_i left_i·right_i + bias), or that added to out before the one rounding.
#include "cpu/product.h"

namespace inlay {
namespace INLAY_ISA_NS {

#if !defined(__AVX512BF16__)

void matmul_sum(const TensorView& out, const TensorList&, const TensorList&, const TensorView&, bool) {
  fail("matmul_sum", "instruction set", "avx512_bf16", out, "use the reference on this machine");
}

#else

namespace {

Operand operand(const TensorView& t, int contraction, bool low) {
  const bool along = t.strides[contraction] == 1 || t.shape[contraction] == 1;
  return {t.data, t.strides[along ? 1 - contraction : contraction], t.shape[contraction], along,
          t.dtype == DType::f32, low};
}

Operands operands(const TensorList& lefts, const TensorList& rights) {
  Operands all;
  for (int64_t i = 0; i < lefts.size; ++i) {
    const Operand left = operand(lefts.items[i], 1, false);
    const int parts = rights.items[i].dtype == DType::f32 ? 2 : 1;
    for (int part = 0; part < parts; ++part) all.add(left, operand(rights.items[i], 0, part == 1));
  }
  return all;
}

// Sums of one row into `out`.
void finish(bf16* out, const float* sums, int64_t width) {
  for (int64_t c = 0; c < width; c += 32) {
    const __m512 left = _mm512_loadu_ps(sums + c), right = _mm512_loadu_ps(sums + c + 16);
    _mm512_mask_storeu_epi16(out + c, first_words(width - c), as_bits(_mm512_cvtne2ps_pbh(right, left)));
  }
}
void finish(float* out, const float* sums, int64_t width) { memcpy(out, sums, size_t(width) * 4); }

template <class T>
void finish(T* out, const float* sums, const TensorView& bias, int64_t j, int64_t width, bool add) {
  if constexpr (sizeof(T) != sizeof(f16) || !__is_same(T, f16)) {
    if (!bias.data && !add) return finish(out, sums, width);
  }
  for_vecs(width, [&](int64_t c, int n) {
    Vec sum = load(sums + c, n);
    if (bias.data) sum = sum + load(data<const T>(bias) + j + c, n);
    if (add) sum = sum + load(out + c, n);
    store(out + c, sum, n);
  });
}

}  // namespace

void matmul_sum(const TensorView& out, const TensorList& lefts, const TensorList& rights, const TensorView& bias,
                bool add) {
  const Operands all = operands(lefts, rights);
  with_float(out.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t across = out.strides[1];
    product(all, out.shape[0], out.shape[1],
            [&](int64_t m, int rows, int64_t j) {
              for (int r = 0; r < rows && across == 1; ++r) __builtin_prefetch(row<T>(out, m + r) + j, 1);
            },
            [&](int64_t m, int rows, int64_t j, int64_t width, const float* sums, int64_t ld) {
              if (across == 1) {
                for (int r = 0; r < rows; ++r)
                  finish(row<T>(out, m + r) + j, sums + r * ld, bias, j, width, add);
                return;
              }
              for (int64_t c = 0; c < width; ++c)
                for (int r = 0; r < rows; ++r) {
                  T* number = row<T>(out, m + r) + (j + c) * across;
                  float sum = sums[r * ld + c];
                  if (bias.data) sum += load_one(data<const T>(bias) + j + c);
                  store_one(number, add ? sum + load_one(number) : sum);
                }
            });
  });
}

#endif

}  // namespace INLAY_ISA_NS
}  // namespace inlay
