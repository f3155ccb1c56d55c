// The causal convolution of linear attention, forward and backward.
#include "entries/entry.h"
#include "scratch.h"

namespace inlay {

namespace {

void check_rows(const char* op, const char* name, const TensorView& t, const TensorView& x) {
  check_dtype(op, name, t, x.dtype);
  check_shape(op, name, t, 3, x.shape);
  if (t.shape[2] > 1 && t.strides[2] != 1)
    fail(op, name, "unit stride along C", t, "call .contiguous() first");
}

void check_inputs(const char* op, const TensorView& x, const TensorView& weight, const TensorView& bias) {
  check_float(op, "x", x);
  if (x.ndim != 3) fail(op, "x", "[B, T, C]", x, "put channels last");
  check_rows(op, "x", x, x);
  check_float(op, "weight", weight);
  if (weight.ndim != 2 || weight.shape[0] != x.shape[2] || weight.shape[1] < 1)
    fail(op, "weight", "[C, K] with K at least 1", weight, "one row of taps per channel");
  if (!given(bias)) return;
  check_float(op, "bias", bias);
  check_vector(op, "bias", bias, x.shape[2]);
}

}  // namespace

void causal_conv1d_forward(const TensorView& y, const TensorView& x, const TensorView& weight,
                           const TensorView& bias, bool silu) {
  constexpr const char* op = "causal_conv1d_forward";
  check_inputs(op, x, weight, bias);
  check_rows(op, "y", y, x);
  run(op, &KernelTable::causal_conv1d_forward, y, x, weight, bias, silu);
}

void causal_conv1d_backward(const TensorView& dx, const TensorView& dweight, const TensorView& dbias,
                            const TensorView& sums, const TensorView& dy, const TensorView& x,
                            const TensorView& weight, const TensorView& bias, bool silu) {
  constexpr const char* op = "causal_conv1d_backward";
  check_inputs(op, x, weight, bias);
  check_rows(op, "dy", dy, x);
  if (given(dx)) check_rows(op, "dx", dx, x);
  if (given(dweight)) {
    check_float(op, "dweight", dweight);
    check_shape(op, "dweight", dweight, 2, weight.shape);
  }
  if (given(dbias)) {
    check_float(op, "dbias", dbias);
    check_vector(op, "dbias", dbias, x.shape[2]);
  }
  if (given(dweight) || given(dbias)) {
    const int64_t shape[] = {x.shape[0] * ((x.shape[1] + kConvTokens - 1) / kConvTokens),
                             (weight.shape[1] + 1) * weight.shape[0]};
    check_dtype(op, "sums", sums, DType::f32);
    check_shape(op, "sums", sums, 2, shape);
    check_matrix(op, "sums", sums, shape[0], shape[1]);
  }
  run(op, &KernelTable::causal_conv1d_backward, dx, dweight, dbias, sums, dy, x, weight, bias, silu);
}

}  // namespace inlay
