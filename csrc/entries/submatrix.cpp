// The submatrix delta: gather, add, scatter-add, write, gradient.
#include "entries/entry.h"

namespace inlay {

void submatrix_gather(const TensorView& out, const TensorView& x, const TensorView& indices) {
  constexpr const char* op = "submatrix_gather";
  check_lead(op, "x", x);
  check_indices(op, indices, x.shape[1]);
  check_float(op, "out", out);
  check_matrix(op, "out", out, x.shape[0], indices.shape[0]);
  run(op, &KernelTable::submatrix_gather, out, x, indices);
}

void submatrix_add(const TensorView& out, const TensorView& y, const TensorView& acc) {
  constexpr const char* op = "submatrix_add";
  check_lead(op, "y", y);
  check_like(op, "out", out, y);
  check_dtype(op, "acc", acc, DType::f32);
  check_matrix(op, "acc", acc, y.shape[0], y.shape[1]);
  run(op, &KernelTable::submatrix_add, out, y, acc);
}

void submatrix_scatter_add(const TensorView& dx, const TensorView& indices, const TensorView& acc) {
  constexpr const char* op = "submatrix_scatter_add_";
  check_lead(op, "dx", dx);
  check_indices(op, indices, dx.shape[1]);
  check_dtype(op, "acc", acc, DType::f32);
  check_matrix(op, "acc", acc, dx.shape[0], indices.shape[0]);
  run(op, &KernelTable::submatrix_scatter_add, dx, indices, acc);
}

void submatrix_write(const TensorView& weight, const TensorView& indices, const TensorView& values) {
  constexpr const char* op = "submatrix_write_";
  check_float(op, "weight", weight);
  const int64_t rows = rows_of(op, "weight", weight);
  check_indices(op, indices, weight.shape[1]);
  check_dtype(op, "values", values, DType::f32);
  const int64_t wanted[] = {rows, indices.shape[0]};
  check_shape(op, "values", values, 2, wanted);
  run(op, &KernelTable::submatrix_write, weight, indices, values);
}

void submatrix_grad(const TensorView& out, const TensorView& dy, const TensorView& x, bool add) {
  constexpr const char* op = "submatrix_grad";
  check_lead(op, "dy", dy);
  check_lead(op, "x", x);
  const std::string isa = kernels_for(op, dy.device).isa;
  const int shares = isa == "cuda" || isa == "simt";  // dimensions in front of [N, s]
  if (!shares) check_dtype(op, "dy", dy, DType::bf16);
  if (dy.dtype == DType::f32) fail(op, "dy", "bfloat16 or float16", dy, "use the reference");
  check_dtype(op, "x", x, dy.dtype);
  check_matrix(op, "x", x, dy.shape[0], x.shape[1]);
  check_dtype(op, "out", out, DType::f32);
  if (out.ndim != 2 + shares || out.shape[shares] != dy.shape[1] || out.shape[shares + 1] != x.shape[1])
    fail(op, "out", "[columns of dy, columns of x]", out, "match it to both");
  run(op, &KernelTable::submatrix_grad, out, dy, x, add);
}

}  // namespace inlay
