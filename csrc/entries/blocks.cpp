// What fused blocks and the loss are made of.
#include "entries/entry.h"

namespace inlay {

namespace {

void check_norm_weight(const char* op, const TensorView& weight, int64_t width) {
  if (!given(weight)) return;
  check_float(op, "weight", weight);
  check_vector(op, "weight", weight, width);
}

void check_act(const char* op, int64_t act) {
  if (act < 0 || act > 2)
    throw std::invalid_argument("inlay." + std::string(op) + ": act: wanted 0, 1 or 2, got " +
                                std::to_string(act) + "; see ops.h");
}

}  // namespace

void swiglu_forward(const TensorView& out, const TensorView& gate, const TensorView& up, int64_t act) {
  constexpr const char* op = "swiglu_forward";
  check_lead(op, "gate", gate);
  check_like(op, "up", up, gate);
  check_like(op, "out", out, gate);
  check_act(op, act);
  run(op, &KernelTable::swiglu_forward, out, gate, up, act);
}

void swiglu_backward(const TensorView& dgate, const TensorView& dup, const TensorView& h_sel,
                     const TensorView& dh, const TensorView& gate, const TensorView& up,
                     const TensorView& indices, int64_t act) {
  constexpr const char* op = "swiglu_backward";
  check_lead(op, "gate", gate);
  check_like(op, "up", up, gate);
  check_like(op, "dh", dh, gate);
  check_like(op, "dgate", dgate, gate);
  check_like(op, "dup", dup, gate);
  check_indices(op, indices, gate.shape[1]);
  check_dtype(op, "h_sel", h_sel, gate.dtype);
  check_matrix(op, "h_sel", h_sel, gate.shape[0], indices.shape[0]);
  check_act(op, act);
  run(op, &KernelTable::swiglu_backward, dgate, dup, h_sel, dh, gate, up, indices, act);
}

void rms_norm_forward(const TensorView& y, const TensorView& rstd, const TensorView& x,
                      const TensorView& weight, double eps, double offset) {
  constexpr const char* op = "rms_norm_forward";
  check_lead(op, "x", x);
  check_like(op, "y", y, x);
  check_dtype(op, "rstd", rstd, DType::f32);
  check_vector(op, "rstd", rstd, x.shape[0]);
  check_norm_weight(op, weight, x.shape[1]);
  run(op, &KernelTable::rms_norm_forward, y, rstd, x, weight, eps, offset);
}

void rms_norm_backward(const TensorView& dx, const TensorView& dweight, const TensorView& sums,
                       const TensorView& dy, const TensorView& x, const TensorView& weight,
                       const TensorView& rstd, double offset) {
  constexpr const char* op = "rms_norm_backward";
  check_lead(op, "x", x);
  check_like(op, "dy", dy, x);
  if (given(dx) || !given(dweight)) check_like(op, "dx", dx, x);
  if (given(dweight)) {
    check_float(op, "dweight", dweight);
    check_vector(op, "dweight", dweight, x.shape[1]);
    check_sums(op, sums, x.shape[1]);
  }
  check_dtype(op, "rstd", rstd, DType::f32);
  check_vector(op, "rstd", rstd, x.shape[0]);
  check_norm_weight(op, weight, x.shape[1]);
  run(op, &KernelTable::rms_norm_backward, dx, dweight, sums, dy, x, weight, rstd, offset);
}

namespace {

// Numbers of gamma or beta: one per channel, or per chosen channel.
int64_t check_channels(const char* op, const TensorView& indices, int64_t width) {
  if (!given(indices)) return width;
  check_indices(op, indices, width);
  return indices.shape[0];
}

void check_per_channel(const char* op, const char* name, const TensorView& t, int64_t size) {
  if (!given(t)) return;
  check_dtype(op, name, t, DType::f32);
  check_vector(op, name, t, size);
}

}  // namespace

void scale_shift_forward(const TensorView& y, const TensorView& x, const TensorView& gamma,
                         const TensorView& beta, const TensorView& indices) {
  constexpr const char* op = "scale_shift_forward";
  check_lead(op, "x", x);
  check_like(op, "y", y, x);
  const int64_t size = check_channels(op, indices, x.shape[1]);
  check_per_channel(op, "gamma", gamma, size);
  check_per_channel(op, "beta", beta, size);
  if (!given(gamma) && !given(beta))
    fail(op, "gamma, beta", "at least one of them", gamma, "pass a scale or a shift");
  run(op, &KernelTable::scale_shift_forward, y, x, gamma, beta, indices);
}

void scale_shift_backward(const TensorView& dx, const TensorView& dgamma, const TensorView& dbeta,
                          const TensorView& sums, const TensorView& dy, const TensorView& x,
                          const TensorView& gamma, const TensorView& indices) {
  constexpr const char* op = "scale_shift_backward";
  check_lead(op, "dy", dy);
  const int64_t size = check_channels(op, indices, dy.shape[1]);
  check_per_channel(op, "gamma", gamma, size);
  check_per_channel(op, "dgamma", dgamma, size);
  check_per_channel(op, "dbeta", dbeta, size);
  check_sums(op, sums, size * (given(dgamma) + given(dbeta)));
  if (given(dx)) {
    check_like(op, "dx", dx, dy);
    if (!given(gamma))
      fail(op, "gamma", "a scale, since dx is asked for", gamma, "pass it, or take dy for dx");
  }
  if (given(dgamma)) {
    check_dtype(op, "x", x, dy.dtype);
    check_matrix(op, "x", x, dy.shape[0], size);
  }
  run(op, &KernelTable::scale_shift_backward, dx, dgamma, dbeta, sums, dy, x, gamma, indices);
}

void rope_rotate(const TensorView& y, const TensorView& x, const TensorView& cos, const TensorView& sin,
                 bool inverse) {
  constexpr const char* op = "rope_rotate";
  check_float(op, "x", x);
  if (x.ndim != 4 || (x.shape[3] > 1 && x.strides[3] != 1))
    fail(op, "x", "[B, H, T, D] with unit stride along D", x, "call .contiguous() first");
  check_dtype(op, "y", y, x.dtype);
  check_shape(op, "y", y, 4, x.shape);
  check_float(op, "cos", cos);
  if (cos.ndim != 3 || (cos.shape[0] != 1 && cos.shape[0] != x.shape[0]) || cos.shape[1] != x.shape[2] ||
      cos.shape[2] > x.shape[3] || cos.shape[2] % 2 || (cos.shape[2] > 1 && cos.strides[2] != 1))
    fail(op, "cos", "[B or 1, T, R] with R even and at most D", cos,
         "pass the embeddings of these positions");
  check_dtype(op, "sin", sin, cos.dtype);
  check_shape(op, "sin", sin, 3, cos.shape);
  if (sin.shape[2] > 1 && sin.strides[2] != 1)
    fail(op, "sin", "unit inner stride", sin, "call .contiguous() first");
  run(op, &KernelTable::rope_rotate, y, x, cos, sin, inverse);
}

void cross_entropy_chunk(const TensorView& loss, const TensorView& logits, const TensorView& labels,
                         double scale, bool write_grad) {
  constexpr const char* op = "cross_entropy_chunk_";
  check_lead(op, "logits", logits);
  check_dtype(op, "loss", loss, DType::f32);
  check_vector(op, "loss", loss, logits.shape[0]);
  check_dtype(op, "labels", labels, DType::i64);
  check_vector(op, "labels", labels, logits.shape[0]);
  const auto* values = static_cast<const int64_t*>(labels.data);
  for (int64_t i = 0; labels.device == Device::cpu && i < labels.shape[0]; ++i)
    if (values[i] < 0 || values[i] >= logits.shape[1])
      throw std::out_of_range("inlay.cross_entropy_chunk_: labels: wanted values in [0, " +
                              std::to_string(logits.shape[1]) + "), got " + std::to_string(values[i]) +
                              "; drop ignored rows first");
  run(op, &KernelTable::cross_entropy_chunk, loss, logits, labels, scale, write_grad);
}

}  // namespace inlay
