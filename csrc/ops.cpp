// The checked ops: every entry checks its arguments against ops.h and calls the kernel that dispatch chose.
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "dynamic_map.h"

namespace inlay {

namespace {

int64_t rows_of(const char* op, const char* name, const TensorView& t) {
  if (t.ndim != 2) fail(op, name, "2 dimensions", t, "flatten the leading ones");
  return t.shape[0];
}

// [rows, cols] of the dtype of `like`
void check_like(const char* op, const char* name, const TensorView& t, const TensorView& like) {
  check_dtype(op, name, t, like.dtype);
  check_matrix(op, name, t, like.shape[0], like.shape[1]);
}

void check_lead(const char* op, const char* name, const TensorView& t) {
  check_float(op, name, t);
  const int64_t rows = rows_of(op, name, t);
  check_matrix(op, name, t, rows, t.shape[1]);
}

void check_norm_weight(const char* op, const TensorView& weight, int64_t width) {
  if (!weight.data && weight.ndim == 0) return;
  check_float(op, "weight", weight);
  check_vector(op, "weight", weight, width);
}

// All tensors of a call are on one device; `first` is the first of them, numbers are none.
void same_device(const char* op, const TensorView*& first, const TensorView& tensor) {
  if (!tensor.data && tensor.ndim == 0) return;  // None
  if (!first) first = &tensor;
  if (tensor.device == first->device && tensor.device_index == first->device_index) return;
  throw std::invalid_argument("inlay." + std::string(op) +
                              ": tensors: wanted all on one device, got several; move them together");
}
void same_device(const char* op, const TensorView*& first, const TensorList& list) {
  for (int64_t i = 0; i < list.size; ++i) same_device(op, first, list.items[i]);
}
template <class Number>
void same_device(const char*, const TensorView*&, const Number&) {}

// The kernel of the device that the arguments are on.
template <class... Parameters, class... Arguments>
void run(const char* op, void (*KernelTable::*kernel)(Parameters...), const Arguments&... arguments) {
  const TensorView* first = nullptr;
  (same_device(op, first, arguments), ...);
  const KernelTable& table = kernels_for(op, first ? first->device : Device::cpu);
  if (!(table.*kernel))
    throw std::invalid_argument("inlay." + std::string(op) + ": wanted a kernel for " + table.isa +
                                ", but there is none; use the reference");
  (table.*kernel)(arguments...);
}

void check_act(const char* op, int64_t act) {
  if (act < 0 || act > 2)
    throw std::invalid_argument("inlay." + std::string(op) + ": act: wanted 0, 1 or 2, got " +
                                std::to_string(act) + "; see ops.h");
}

}  // namespace

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

void submatrix_grad(const TensorView& out, const TensorView& dy, const TensorView& x) {
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
  run(op, &KernelTable::submatrix_grad, out, dy, x);
}

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

void rms_norm_backward(const TensorView& dx, const TensorView& dy, const TensorView& x,
                       const TensorView& weight, const TensorView& rstd, double offset) {
  constexpr const char* op = "rms_norm_backward";
  check_lead(op, "x", x);
  check_like(op, "dx", dx, x);
  check_like(op, "dy", dy, x);
  check_dtype(op, "rstd", rstd, DType::f32);
  check_vector(op, "rstd", rstd, x.shape[0]);
  check_norm_weight(op, weight, x.shape[1]);
  run(op, &KernelTable::rms_norm_backward, dx, dy, x, weight, rstd, offset);
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

// One list of an optimizer's call: as long as `params`, and each vector as size(its parameter's elements).
template <class F>
void check_list(const char* op, const char* name, const TensorList& list, DType dtype,
                const TensorList& params, F&& size) {
  if (list.size != params.size)
    throw std::invalid_argument("inlay." + std::string(op) + ": " + name + ": wanted " +
                                std::to_string(params.size) + " tensors, got " + std::to_string(list.size) +
                                "; pass one per parameter");
  for (int64_t i = 0; i < list.size; ++i) {
    check_dtype(op, name, list.items[i], dtype);
    check_vector(op, name, list.items[i], size(numel(params.items[i])));
  }
}

void check_step(const char* op, int64_t step) {
  if (step < 1)
    throw std::invalid_argument("inlay." + std::string(op) + ": step: wanted 1 or more, got " +
                                std::to_string(step) + "; count the first step as 1");
}

void adamw_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                const TensorList& exp_avg_sqs, double lr, double beta1, double beta2, double eps,
                double weight_decay, int64_t step, double grad_scale) {
  constexpr const char* op = "adamw_step_";
  const auto same = [](int64_t size) { return size; };
  check_list(op, "params", params, DType::f32, params, same);
  check_list(op, "grads", grads, DType::f32, params, same);
  check_list(op, "exp_avgs", exp_avgs, DType::f32, params, same);
  check_list(op, "exp_avg_sqs", exp_avg_sqs, DType::f32, params, same);
  check_step(op, step);
  run(op, &KernelTable::adamw_step, params, grads, exp_avgs, exp_avg_sqs, lr, beta1, beta2, eps, weight_decay,
      step, grad_scale);
}

// States of 8 bits: a code per element, a scale per block.
void check_coded(const char* op, const TensorList& params, const TensorList& exp_avgs,
                 const TensorList& exp_avg_sqs, const TensorList& exp_avg_absmaxes,
                 const TensorList& exp_avg_sq_absmaxes) {
  const auto same = [](int64_t size) { return size; };
  const auto blocks = [](int64_t size) { return (size + kStateBlock - 1) / kStateBlock; };
  check_list(op, "exp_avgs", exp_avgs, DType::u8, params, same);
  check_list(op, "exp_avg_sqs", exp_avg_sqs, DType::u8, params, same);
  check_list(op, "exp_avg_absmaxes", exp_avg_absmaxes, DType::f32, params, blocks);
  check_list(op, "exp_avg_sq_absmaxes", exp_avg_sq_absmaxes, DType::f32, params, blocks);
}

void check_maps(const char* op, const TensorView& signed_map, const TensorView& unsigned_map) {
  for (const TensorView* map : {&signed_map, &unsigned_map}) {
    check_dtype(op, "map", *map, DType::f32);
    check_vector(op, "map", *map, 256);
  }
}

void adamw_8bit_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                     const TensorList& exp_avg_sqs, const TensorList& exp_avg_absmaxes,
                     const TensorList& exp_avg_sq_absmaxes, const TensorView& signed_map,
                     const TensorView& unsigned_map, double lr, double beta1, double beta2, double eps,
                     double weight_decay, int64_t step, double grad_scale) {
  constexpr const char* op = "adamw_8bit_step_";
  const auto same = [](int64_t size) { return size; };
  check_list(op, "params", params, DType::f32, params, same);
  check_list(op, "grads", grads, DType::f32, params, same);
  check_coded(op, params, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes);
  check_maps(op, signed_map, unsigned_map);
  check_step(op, step);
  run(op, &KernelTable::adamw_8bit_step, params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes,
      exp_avg_sq_absmaxes, signed_map, unsigned_map, lr, beta1, beta2, eps, weight_decay, step, grad_scale);
}

// bf16 parameters, gradients of one dtype, and what their rounding takes; positions are multiples of `each`.
void check_bf16(const char* op, const TensorList& params, const TensorList& grads,
                const TensorList& residuals, const IntList& positions, int64_t each) {
  const auto same = [](int64_t size) { return size; };
  check_list(op, "params", params, DType::bf16, params, same);
  const bool narrow = grads.size && grads.items[0].dtype == DType::bf16;
  check_list(op, "grads", grads, narrow ? DType::bf16 : DType::f32, params, same);
  if (residuals.size) check_list(op, "residuals", residuals, DType::i16, params, same);
  if (positions.size != (residuals.size ? 0 : params.size))
    throw std::invalid_argument("inlay." + std::string(op) + ": positions: wanted " +
                                std::to_string(residuals.size ? 0 : params.size) + " numbers, got " +
                                std::to_string(positions.size) +
                                "; pass a residual per parameter, or a position per parameter");
  for (int64_t i = 0; i < positions.size; ++i)
    if (positions.items[i] < 0 || positions.items[i] % each)
      throw std::invalid_argument("inlay." + std::string(op) + ": positions: wanted multiples of " +
                                  std::to_string(each) + " from 0 on, got " +
                                  std::to_string(positions.items[i]) + "; begin each tensor at one");
}

void adamw_bf16_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                     const TensorList& exp_avg_sqs, const TensorList& residuals, const IntList& positions,
                     double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step,
                     double grad_scale, int64_t seed) {
  constexpr const char* op = "adamw_bf16_step_";
  const auto same = [](int64_t size) { return size; };
  check_bf16(op, params, grads, residuals, positions, 1);
  check_list(op, "exp_avgs", exp_avgs, DType::f32, params, same);
  check_list(op, "exp_avg_sqs", exp_avg_sqs, DType::f32, params, same);
  check_step(op, step);
  run(op, &KernelTable::adamw_bf16_step, params, grads, exp_avgs, exp_avg_sqs, residuals, positions, lr,
      beta1, beta2, eps, weight_decay, step, grad_scale, seed);
}

void adamw_8bit_bf16_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                          const TensorList& exp_avg_sqs, const TensorList& exp_avg_absmaxes,
                          const TensorList& exp_avg_sq_absmaxes, const TensorList& residuals,
                          const IntList& positions, const TensorView& signed_map,
                          const TensorView& unsigned_map, double lr, double beta1, double beta2, double eps,
                          double weight_decay, int64_t step, double grad_scale, int64_t seed) {
  constexpr const char* op = "adamw_8bit_bf16_step_";
  check_bf16(op, params, grads, residuals, positions, 8);
  check_coded(op, params, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes);
  check_maps(op, signed_map, unsigned_map);
  check_step(op, step);
  run(op, &KernelTable::adamw_8bit_bf16_step, params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes,
      exp_avg_sq_absmaxes, residuals, positions, signed_map, unsigned_map, lr, beta1, beta2, eps,
      weight_decay, step, grad_scale, seed);
}

void causal_attention_backward(const TensorView& dq, const TensorView& dk, const TensorView& dv,
                               const TensorView& dout, const TensorView& q, const TensorView& k,
                               const TensorView& v, const TensorView& out, const TensorView& lse,
                               double scale) {
  constexpr const char* op = "causal_attention_backward";
  if (q.ndim != 4 || q.shape[3] % 32)
    fail(op, "q", "[B, H, T, D], D a multiple of 32", q, "use the reference");
  const int64_t kv[] = {q.shape[0], k.ndim == 4 ? k.shape[1] : 0, q.shape[2], q.shape[3]};
  if (kv[1] < 1 || q.shape[1] % kv[1])
    fail(op, "k", "[B, G, T, D] with H a multiple of G", k, "split the heads first");
  const auto check = [&](const char* name, const TensorView& t, DType dtype, const int64_t* shape) {
    check_dtype(op, name, t, dtype);
    check_shape(op, name, t, 4, shape);
    if (t.strides[3] != 1) fail(op, name, "unit stride along D", t, "call .contiguous() first");
  };
  check("q", q, DType::bf16, q.shape);
  check("dq", dq, DType::bf16, q.shape);
  check("dout", dout, DType::bf16, q.shape);
  check("out", out, DType::bf16, q.shape);
  check("k", k, DType::bf16, kv);
  check("v", v, DType::bf16, kv);
  check("dk", dk, DType::f32, q.shape);
  check("dv", dv, DType::f32, q.shape);
  check_dtype(op, "lse", lse, DType::f32);
  check_shape(op, "lse", lse, 3, q.shape);
  if (lse.shape[2] > 1 && lse.strides[2] != 1)
    fail(op, "lse", "unit stride along T", lse, "call .contiguous() first");
  run(op, &KernelTable::causal_attention_backward, dq, dk, dv, dout, q, k, v, out, lse, scale);
}

void check_blocksize(const char* op, int64_t blocksize) {
  if (blocksize < 32 || blocksize > 4096 || (blocksize & (blocksize - 1)))
    throw std::invalid_argument("inlay." + std::string(op) +
                                ": blocksize: wanted a power of two in [32, 4096], got " +
                                std::to_string(blocksize) + "; 64 is the usual choice");
}

// The storage of a weight of `size` elements, of which the last one used is `last`.
void check_four_bit(const char* op, int64_t last, const TensorView& packed, const TensorView& levels,
                    const TensorView& absmax, const TensorView& codes, const TensorView& map,
                    const TensorView& offset, int64_t blocksize) {
  check_blocksize(op, blocksize);
  check_dtype(op, "packed", packed, DType::u8);
  check_vector(op, "packed", packed, numel(packed));
  check_dtype(op, "levels", levels, DType::f32);
  check_vector(op, "levels", levels, 16);
  check_dtype(op, "absmax", absmax, DType::f32);
  check_vector(op, "absmax", absmax, numel(absmax));
  int64_t blocks = numel(absmax);
  if (codes.data) {
    check_dtype(op, "codes", codes, DType::u8);
    check_vector(op, "codes", codes, numel(codes));
    check_dtype(op, "map", map, DType::f32);
    check_vector(op, "map", map, 256);
    check_dtype(op, "offset", offset, DType::f32);
    blocks = numel(codes) <= numel(absmax) * 256 ? numel(codes) : numel(absmax) * 256;
  }
  if (numel(packed) * 2 < last || blocks * blocksize < last)
    throw std::invalid_argument("inlay." + std::string(op) + ": packed: wanted bytes and scales for " +
                                std::to_string(last) + " weights, got " + std::to_string(numel(packed) * 2) +
                                " and " + std::to_string(blocks * blocksize) + "; check shape and blocksize");
}

void quantize_4bit(const TensorView& packed, const TensorView& absmax, const TensorView& w,
                   const TensorView& bounds, const TensorView& order, int64_t blocksize) {
  constexpr const char* op = "quantize_4bit";
  check_blocksize(op, blocksize);
  check_float(op, "w", w);
  const int64_t size = numel(w);
  check_vector(op, "w", w, size);
  check_dtype(op, "packed", packed, DType::u8);
  check_vector(op, "packed", packed, (size + 1) / 2);
  check_dtype(op, "absmax", absmax, DType::f32);
  check_vector(op, "absmax", absmax, (size + blocksize - 1) / blocksize);
  check_dtype(op, "bounds", bounds, DType::f32);
  check_vector(op, "bounds", bounds, 15);
  check_dtype(op, "order", order, DType::u8);
  check_vector(op, "order", order, 16);
  run(op, &KernelTable::quantize_4bit, packed, absmax, w, bounds, order, blocksize);
}

void dequantize_4bit(const TensorView& out, const TensorView& packed, const TensorView& levels,
                     const TensorView& absmax, const TensorView& codes, const TensorView& map,
                     const TensorView& offset, int64_t blocksize, int64_t columns, int64_t row,
                     int64_t column) {
  constexpr const char* op = "dequantize_4bit";
  check_lead(op, "out", out);
  if (row < 0 || column < 0 || column + out.shape[1] > columns)
    fail(op, "out", "a rectangle inside the weight", out, "check row, column and columns");
  const int64_t last = numel(out) ? (row + out.shape[0] - 1) * columns + column + out.shape[1] : 0;
  check_four_bit(op, last, packed, levels, absmax, codes, map, offset, blocksize);
  run(op, &KernelTable::dequantize_4bit, out, packed, levels, absmax, codes, map, offset, blocksize, columns,
      row, column);
}

void dequantize_4bit_stack(const TensorView& out, const TensorList& packed, const TensorView& levels,
                           const TensorList& absmaxes, const TensorList& codes, const TensorView& map,
                           const TensorList& offsets, int64_t blocksize) {
  constexpr const char* op = "dequantize_4bit_stack";
  check_lead(op, "out", out);
  const int64_t columns = out.shape[1], nested = codes.size;
  if (columns < 2) fail(op, "out", "2 columns or more", out, "dequantize the weights one by one");
  if (absmaxes.size != packed.size || (nested && nested != packed.size) || offsets.size != nested)
    throw std::invalid_argument(
        "inlay." + std::string(op) +
        ": packed, absmaxes, codes, offsets: wanted one each (codes and offsets: or none), got " +
        std::to_string(packed.size) + ", " + std::to_string(absmaxes.size) + ", " + std::to_string(nested) +
        ", " + std::to_string(offsets.size) + "; pass the scales of every weight");
  int64_t rows = 0;
  for (int64_t i = 0; i < packed.size; ++i) {
    const int64_t mine = rows_of_packed(packed.items[i], columns);
    const TensorView none;
    check_four_bit(op, mine * columns, packed.items[i], levels, absmaxes.items[i],
                   nested ? codes.items[i] : none, map, nested ? offsets.items[i] : none, blocksize);
    rows += mine;
  }
  if (rows != out.shape[0]) fail(op, "out", "as many rows as all weights together", out, "check the shapes");
  run(op, &KernelTable::dequantize_4bit_stack, out, packed, levels, absmaxes, codes, map, offsets, blocksize);
}

namespace {

// None, or as long as one likes.
void check_scratch(const char* op, const char* name, const TensorView& scratch, DType dtype) {
  if (scratch.ndim == 0) return;
  check_dtype(op, name, scratch, dtype);
  check_vector(op, name, scratch, scratch.shape[0]);
}

void check_quantized_linear(const char* op, const TensorView& y, const TensorView& x,
                            const TensorView& packed, const TensorView& levels, const TensorView& absmax,
                            const TensorView& codes, const TensorView& map, const TensorView& offset,
                            const TensorView& bias, const TensorView& counters, const TensorView& sums,
                            int64_t blocksize) {
  check_lead(op, "x", x);
  check_dtype(op, "y", y, x.dtype);
  check_matrix(op, "y", y, x.shape[0], y.ndim == 2 ? y.shape[1] : -1);
  check_four_bit(op, y.shape[1] * x.shape[1], packed, levels, absmax, codes, map, offset, blocksize);
  if (bias.data) {
    check_dtype(op, "bias", bias, x.dtype);
    check_vector(op, "bias", bias, y.shape[1]);
  }
  check_scratch(op, "counters", counters, DType::i64);
  check_scratch(op, "sums", sums, DType::f32);
}

}  // namespace

void quantized_linear(const TensorView& y, const TensorView& x, const TensorView& packed,
                      const TensorView& levels, const TensorView& absmax, const TensorView& codes,
                      const TensorView& map, const TensorView& offset, const TensorView& bias,
                      const TensorView& counters, const TensorView& sums, int64_t blocksize) {
  constexpr const char* op = "quantized_linear";
  check_quantized_linear(op, y, x, packed, levels, absmax, codes, map, offset, bias, counters, sums,
                         blocksize);
  run(op, &KernelTable::quantized_linear, y, x, packed, levels, absmax, codes, map, offset, bias, counters,
      sums, blocksize);
}

void quantized_lora_linear(const TensorView& y, const TensorView& x, const TensorView& packed,
                           const TensorView& levels, const TensorView& absmax, const TensorView& codes,
                           const TensorView& map, const TensorView& offset, const TensorView& bias,
                           const TensorView& inner, const TensorView& b, const TensorView& counters,
                           const TensorView& sums, int64_t blocksize) {
  constexpr const char* op = "quantized_lora_linear";
  check_quantized_linear(op, y, x, packed, levels, absmax, codes, map, offset, bias, counters, sums,
                         blocksize);
  check_dtype(op, "b", b, DType::f32);
  check_matrix(op, "b", b, y.shape[1], b.ndim == 2 ? b.shape[1] : -1);
  check_dtype(op, "inner", inner, DType::f32);
  check_matrix(op, "inner", inner, x.shape[0], b.shape[1]);
  if (inner.shape[0] > 1 && inner.shape[1] > 0 && inner.strides[0] != inner.shape[1])
    fail(op, "inner", "rows without gaps", inner, "call .contiguous() first");
  run(op, &KernelTable::quantized_lora_linear, y, x, packed, levels, absmax, codes, map, offset, bias, inner,
      b, counters, sums, blocksize);
}

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
