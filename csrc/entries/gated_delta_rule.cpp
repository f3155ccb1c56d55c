// The gated delta rule, forward and backward.
#include "entries/entry.h"

namespace inlay {

namespace {

// [B, T, heads, width] of q's batch, tokens and dtype
void check_tokens(const char* op, const char* name, const TensorView& t, const TensorView& q, int64_t heads,
                  int64_t width) {
  const int64_t shape[] = {q.shape[0], q.shape[1], heads, width};
  check_dtype(op, name, t, q.dtype);
  check_shape(op, name, t, 4, shape);
  if (width > 1 && t.strides[3] != 1) fail(op, name, "unit stride along D", t, "call .contiguous() first");
}

void check_gates(const char* op, const char* name, const TensorView& t, const TensorView& v) {
  check_dtype(op, name, t, DType::f32);
  check_shape(op, name, t, 3, v.shape);
}

// f32 [B, H, keys, values] without gaps inside a head, or None
void check_state(const char* op, const char* name, const TensorView& t, const TensorView& q,
                 const TensorView& v) {
  if (!given(t)) return;
  const int64_t shape[] = {q.shape[0], v.shape[2], q.shape[3], v.shape[3]};
  check_dtype(op, name, t, DType::f32);
  check_shape(op, name, t, 4, shape);
  if ((shape[3] > 1 && t.strides[3] != 1) || (shape[2] > 1 && t.strides[2] != shape[3]))
    fail(op, name, "rows without gaps", t, "call .contiguous() first");
}

void check_inputs(const char* op, const TensorView& q, const TensorView& k, const TensorView& v,
                  const TensorView& g, const TensorView& beta, const TensorView& initial_state) {
  check_float(op, "q", q);
  if (q.ndim != 4 || q.shape[2] < 1 || q.shape[3] < 1)
    fail(op, "q", "[B, T, G, dk]", q, "split the heads first");
  if (v.ndim != 4 || v.shape[3] < 1 || v.shape[2] < 1 || v.shape[2] % q.shape[2])
    fail(op, "v", "[B, T, H, dv] with H a multiple of G", v, "split the heads first");
  check_tokens(op, "q", q, q, q.shape[2], q.shape[3]);
  check_tokens(op, "k", k, q, q.shape[2], q.shape[3]);
  check_tokens(op, "v", v, q, v.shape[2], v.shape[3]);
  check_gates(op, "g", g, v);
  check_gates(op, "beta", beta, v);
  check_state(op, "initial_state", initial_state, q, v);
}

}  // namespace

void gated_delta_rule_forward(const TensorView& out, const TensorView& final_state, const TensorView& q,
                              const TensorView& k, const TensorView& v, const TensorView& g,
                              const TensorView& beta, const TensorView& initial_state, double scale,
                              bool normalize, double eps) {
  constexpr const char* op = "gated_delta_rule_forward";
  check_inputs(op, q, k, v, g, beta, initial_state);
  check_tokens(op, "out", out, q, v.shape[2], v.shape[3]);
  check_state(op, "final_state", final_state, q, v);
  run(op, &KernelTable::gated_delta_rule_forward, out, final_state, q, k, v, g, beta, initial_state, scale,
      normalize, eps);
}

void gated_delta_rule_backward(const TensorView& dq, const TensorView& dk, const TensorView& dv,
                               const TensorView& dg, const TensorView& dbeta, const TensorView& dinitial,
                               const TensorView& dout, const TensorView& dfinal, const TensorView& q,
                               const TensorView& k, const TensorView& v, const TensorView& g,
                               const TensorView& beta, const TensorView& initial_state, double scale,
                               bool normalize, double eps) {
  constexpr const char* op = "gated_delta_rule_backward";
  check_inputs(op, q, k, v, g, beta, initial_state);
  check_tokens(op, "dq", dq, q, q.shape[2], q.shape[3]);
  check_tokens(op, "dk", dk, q, q.shape[2], q.shape[3]);
  check_tokens(op, "dv", dv, q, v.shape[2], v.shape[3]);
  check_tokens(op, "dout", dout, q, v.shape[2], v.shape[3]);
  check_gates(op, "dg", dg, v);
  check_gates(op, "dbeta", dbeta, v);
  check_state(op, "dinitial", dinitial, q, v);
  check_state(op, "dfinal", dfinal, q, v);
  run(op, &KernelTable::gated_delta_rule_backward, dq, dk, dv, dg, dbeta, dinitial, dout, dfinal, q, k, v, g,
      beta, initial_state, scale, normalize, eps);
}

}  // namespace inlay
