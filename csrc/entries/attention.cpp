// Attention, forward and backward.
#include "entries/entry.h"

namespace inlay {

namespace {

void check_rows(const char* op, const char* name, const TensorView& t, DType dtype, const int64_t* shape) {
  check_dtype(op, name, t, dtype);
  check_shape(op, name, t, 4, shape);
  if (t.strides[3] != 1) fail(op, name, "unit stride along D", t, "call .contiguous() first");
}

void check_spans(const char* op, const TensorView& spans, const TensorView& q, int64_t keys) {
  if (!spans.data && spans.ndim == 0) {
    if (q.shape[2] != keys) fail(op, "q", "as many tokens as k without spans", q, "pass spans");
    return;
  }
  check_dtype(op, "spans", spans, DType::i64);
  const int64_t batch = spans.ndim == 3 && spans.shape[0] == 1 ? 1 : q.shape[0];
  const int64_t shape[] = {batch, q.shape[2], 2};
  check_shape(op, "spans", spans, 3, shape);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t t = 0; t < q.shape[2]; ++t) {
      const auto* span =
          static_cast<const int64_t*>(spans.data) + b * spans.strides[0] + t * spans.strides[1];
      const int64_t begin = span[0], end = span[spans.strides[2]];
      const bool falls =
          t > 0 && (begin < span[-spans.strides[1]] || end < span[spans.strides[2] - spans.strides[1]]);
      if (begin < 0 || begin > end || end > keys || falls)
        fail(op, "spans", "0 <= begin <= end <= S, neither falling along T", spans,
             "pass a mask to torch instead");
    }
}

void check_inputs(const char* op, const TensorView& q, const TensorView& k, const TensorView& v,
                  const TensorView& out, const TensorView& lse, const TensorView& spans) {
  check_float(op, "q", q);
  if (q.ndim != 4) fail(op, "q", "[B, H, T, D]", q, "split the heads first");
  const int64_t keys[] = {q.shape[0], k.ndim == 4 ? k.shape[1] : 0, k.ndim == 4 ? k.shape[2] : 0, q.shape[3]};
  if (keys[1] < 1 || q.shape[1] % keys[1])
    fail(op, "k", "[B, G, S, D] with H a multiple of G", k, "split the heads first");
  check_rows(op, "q", q, q.dtype, q.shape);
  check_rows(op, "out", out, q.dtype, q.shape);
  check_rows(op, "k", k, q.dtype, keys);
  check_rows(op, "v", v, q.dtype, keys);
  check_dtype(op, "lse", lse, DType::f32);
  check_shape(op, "lse", lse, 3, q.shape);
  check_spans(op, spans, q, keys[2]);
}

void check_sinks(const char* op, const char* name, const TensorView& sinks, int64_t heads) {
  check_dtype(op, name, sinks, DType::f32);
  check_vector(op, name, sinks, heads);
}

void check_softcap(const char* op, double softcap) {
  if (!(softcap >= 0))
    throw std::invalid_argument("inlay." + std::string(op) +
                                ": softcap: wanted a positive number or 0, got " + std::to_string(softcap) +
                                "; 0 is none");
}

}  // namespace

void attention_forward(const TensorView& out, const TensorView& lse, const TensorView& q, const TensorView& k,
                       const TensorView& v, const TensorView& spans, const TensorView& sinks, double scale,
                       double softcap) {
  constexpr const char* op = "attention_forward";
  check_inputs(op, q, k, v, out, lse, spans);
  if (given(sinks)) check_sinks(op, "sinks", sinks, q.shape[1]);
  check_softcap(op, softcap);
  run(op, &KernelTable::attention_forward, out, lse, q, k, v, spans, sinks, scale, softcap);
}

void attention_backward(const TensorView& dq, const TensorView& dk, const TensorView& dv,
                        const TensorView& parts, const TensorView& dout, const TensorView& q,
                        const TensorView& k, const TensorView& v, const TensorView& out,
                        const TensorView& lse, const TensorView& spans, double scale, double softcap) {
  constexpr const char* op = "attention_backward";
  check_inputs(op, q, k, v, out, lse, spans);
  check_softcap(op, softcap);
  check_rows(op, "dq", dq, q.dtype, q.shape);
  check_rows(op, "dout", dout, q.dtype, q.shape);
  check_rows(op, "dk", dk, q.dtype, k.shape);
  check_rows(op, "dv", dv, q.dtype, k.shape);
  if (parts.data || parts.ndim) {
    check_dtype(op, "parts", parts, DType::f32);
    const int64_t shape[] = {parts.ndim ? parts.shape[0] : 0, q.shape[0], q.shape[1], q.shape[2], q.shape[3]};
    check_shape(op, "parts", parts, 5, shape);
    if (shape[0] < 1 || parts.strides[4] != 1)
      fail(op, "parts", "[P, B, H, T, D], P at least 1, unit stride along D", parts,
           "pass None for one share");
  }
  run(op, &KernelTable::attention_backward, dq, dk, dv, parts, dout, q, k, v, out, lse, spans, scale,
      softcap);
}

void attention_sinks(const TensorView& dsinks, const TensorView& dout, const TensorView& out,
                     const TensorView& lse, const TensorView& sinks) {
  constexpr const char* op = "attention_sinks";
  check_float(op, "out", out);
  if (out.ndim != 4) fail(op, "out", "[B, H, T, D]", out, "split the heads first");
  check_rows(op, "out", out, out.dtype, out.shape);
  check_rows(op, "dout", dout, out.dtype, out.shape);
  check_dtype(op, "lse", lse, DType::f32);
  check_shape(op, "lse", lse, 3, out.shape);
  check_sinks(op, "sinks", sinks, out.shape[1]);
  check_sinks(op, "dsinks", dsinks, out.shape[1]);
  run(op, &KernelTable::attention_sinks, dsinks, dout, out, lse, sinks);
}

}  // namespace inlay
