// A low-rank branch.
#include "entries/entry.h"

namespace inlay {

void lora_expand(const TensorView& y, const TensorView& inner, const TensorView& b) {
  constexpr const char* op = "lora_expand";
  check_lead(op, "y", y);
  check_dtype(op, "b", b, DType::f32);
  check_matrix(op, "b", b, y.shape[1], b.ndim == 2 ? b.shape[1] : -1);
  check_dtype(op, "inner", inner, DType::f32);
  check_matrix(op, "inner", inner, y.shape[0], b.shape[1]);
  run(op, &KernelTable::lora_expand, y, inner, b);
}

void lora_backward(const TensorView& dyb, const TensorView& db, const TensorView& dy, const TensorView& xa,
                   const TensorView& sb) {
  constexpr const char* op = "lora_backward";
  check_lead(op, "dy", dy);
  if (dy.dtype == DType::f32) fail(op, "dy", "bfloat16 or float16", dy, "use the two products");
  check_dtype(op, "xa", xa, dy.dtype);
  check_matrix(op, "xa", xa, dy.shape[0], xa.ndim == 2 ? xa.shape[1] : -1);
  check_dtype(op, "sb", sb, dy.dtype);
  check_matrix(op, "sb", sb, dy.shape[1], xa.shape[1]);
  const auto parts = [&](const char* name, const TensorView& t, int64_t size) {
    check_dtype(op, name, t, DType::f32);
    const int64_t wanted[] = {t.ndim == 3 && t.shape[0] > 0 ? t.shape[0] : 1, size, xa.shape[1]};
    check_shape(op, name, t, 3, wanted);
    if (t.shape[2] > 1 && t.strides[2] != 1)
      fail(op, name, "adjacent columns", t, "call .contiguous() first");
  };
  parts("dyb", dyb, dy.shape[0]);
  parts("db", db, dy.shape[1]);
  run(op, &KernelTable::lora_backward, dyb, db, dy, xa, sb);
}

void lora_project(const TensorView& inner, const TensorView& x, const TensorView& a, double scale) {
  constexpr const char* op = "lora_project";
  check_lead(op, "x", x);
  check_dtype(op, "a", a, DType::f32);
  check_matrix(op, "a", a, a.ndim == 2 ? a.shape[0] : -1, x.shape[1]);
  check_dtype(op, "inner", inner, DType::f32);
  check_matrix(op, "inner", inner, x.shape[0], a.shape[0]);
  run(op, &KernelTable::lora_project, inner, x, a, scale);
}

void lora_add(const TensorView& y, const TensorView& x, const TensorView& a, const TensorView& b,
              double scale) {
  constexpr const char* op = "lora_add";
  check_lead(op, "x", x);
  check_dtype(op, "y", y, x.dtype);
  check_matrix(op, "y", y, x.shape[0], y.ndim == 2 ? y.shape[1] : -1);
  check_dtype(op, "a", a, DType::f32);
  check_matrix(op, "a", a, a.ndim == 2 ? a.shape[0] : -1, x.shape[1]);
  check_dtype(op, "b", b, DType::f32);
  check_matrix(op, "b", b, y.shape[1], a.shape[0]);
  run(op, &KernelTable::lora_add, y, x, a, b, scale);
}

}  // namespace inlay
