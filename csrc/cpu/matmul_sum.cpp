// out = round(Σ_i left_i·right_i + bias), or that added to out before the one rounding. Left operands are all
// bf16, right ones bf16 or fp32; or all are fp32.
#include "cpu/finish.h"
#include "cpu/product.h"

namespace inlay {

#if defined(__AVX512BF16__)
namespace avx512 {  // the same, compiled without pairs
void matmul_sum(const TensorView& out, const TensorList& lefts, const TensorList& rights,
                const TensorView& bias, bool add);
}
#endif

namespace INLAY_ISA_NS {

#if !defined(INLAY_VEC_avx512) && !defined(INLAY_VEC_avx2)

void matmul_sum(const TensorView& out, const TensorList&, const TensorList&, const TensorView&, bool) {
  fail("matmul_sum", "instruction set", "avx2 or newer", out, "use the reference on this machine");
}

#else

namespace {

Operand operand(const TensorView& t, int contraction, bool low) {
  const bool along = t.strides[contraction] == 1 || t.shape[contraction] == 1;
  return {t.data,
          t.strides[along ? 1 - contraction : contraction],
          t.shape[contraction],
          along,
          t.dtype == DType::f32,
          low};
}

Operands operands(const TensorList& lefts, const TensorList& rights) {
  Operands all;
  for (int64_t i = 0; i < lefts.size; ++i) {
    const Operand left = operand(lefts.items[i], 1, false);
    const int parts = kPer == 2 && rights.items[i].dtype == DType::f32 ? 2 : 1;
    for (int part = 0; part < parts; ++part) all.add(left, operand(rights.items[i], 0, part == 1));
  }
  return all;
}

}  // namespace

void matmul_sum(const TensorView& out, const TensorList& lefts, const TensorList& rights,
                const TensorView& bias, bool add) {
#if defined(__AVX512BF16__)
  if (lefts.items[0].dtype == DType::f32) return avx512::matmul_sum(out, lefts, rights, bias, add);
#endif
  const Operands all = operands(lefts, rights);
  const Finish finish{out, bias, add};
  in_rectangles(out.shape[0], out.shape[1], all.depth(),
                [&](const Rectangle& part) { product_of(all, part, finish); });
}

#endif

}  // namespace INLAY_ISA_NS
}  // namespace inlay
