// Sums of products of many rows.
#include "entries/entry.h"

namespace inlay {

namespace {

constexpr int64_t kMostOperands = 16;  // csrc/cpu/product.h has room for them, fp32 ones counted twice

void check_operand(const char* op, const char* name, const TensorView& t, int64_t rows, int64_t columns) {
  const int64_t wanted[] = {rows, columns};
  check_shape(op, name, t, 2, wanted);
  const bool unit = t.strides[0] == 1 || t.strides[1] == 1 || t.shape[0] == 1 || t.shape[1] == 1;
  if (!unit) fail(op, name, "unit stride along one dimension", t, "call .contiguous() first");
}

void check_sum(const char* op, const TensorView& out, const TensorList& lefts, const TensorList& rights,
               const TensorView& bias, bool wide) {
  if (lefts.size != rights.size || lefts.size < 1 || lefts.size > kMostOperands)
    throw std::invalid_argument("inlay." + std::string(op) + ": lefts, rights: wanted 1 to " +
                                std::to_string(kMostOperands) + " operands each, got " +
                                std::to_string(lefts.size) + " and " + std::to_string(rights.size) +
                                "; pass them in pairs");
  rows_of(op, "out", out);
  if (out.dtype != DType::f32) check_dtype(op, "out", out, DType::bf16);
  for (int64_t i = 0; i < lefts.size; ++i) {
    const TensorView &left = lefts.items[i], &right = rights.items[i];
    if (!wide || left.dtype != DType::f32) check_dtype(op, "lefts", left, DType::bf16);
    if (left.dtype != lefts.items[0].dtype) fail(op, "lefts", "operands of one dtype", left, "convert them");
    if (left.dtype == DType::f32 || !wide || right.dtype != DType::f32)
      check_dtype(op, "rights", right, left.dtype);
    rows_of(op, "lefts", left);
    if (left.shape[1] < 1) fail(op, "lefts", "one column or more", left, "leave out what is empty");
    check_operand(op, "lefts", left, out.shape[0], left.shape[1]);
    check_operand(op, "rights", right, left.shape[1], out.shape[1]);
  }
  if (given(bias)) {
    check_dtype(op, "bias", bias, out.dtype);
    check_vector(op, "bias", bias, out.shape[1]);
  }
}

}  // namespace

void matmul_sum(const TensorView& out, const TensorList& lefts, const TensorList& rights,
                const TensorView& bias, bool add) {
  constexpr const char* op = "matmul_sum";
  check_sum(op, out, lefts, rights, bias, true);
  run(op, &KernelTable::matmul_sum, out, lefts, rights, bias, add);
}

void int8_matmul_sum(const TensorView& out, const TensorList& lefts, const TensorList& rights,
                     const TensorView& bias, bool add) {
  constexpr const char* op = "int8_matmul_sum";
  constexpr int64_t kMostDepth = 65536;  // 255·127·65536 is less than 2^31
  check_sum(op, out, lefts, rights, bias, false);
  for (int64_t i = 0; i < lefts.size; ++i) {
    const TensorView& left = lefts.items[i];
    if (left.shape[1] > kMostDepth) fail(op, "lefts", "65536 columns at most", left, "use matmul_sum");
    if (left.strides[1] != 1 && left.shape[1] > 1)
      fail(op, "lefts", "rows without gaps", left, "call .contiguous()");
  }
  run(op, &KernelTable::int8_matmul_sum, out, lefts, rights, bias, add);
}

}  // namespace inlay
