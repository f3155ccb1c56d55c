// Products of rows that are sorted by expert.
#include "entries/entry.h"

namespace inlay {

namespace {

void check_integers(const char* op, const char* name, const TensorView& t, int64_t size) {
  check_dtype(op, name, t, DType::i64);
  check_vector(op, name, t, size);
}

// Values of an int64 vector, all in [low, high)
void check_range(const char* op, const char* name, const TensorView& t, int64_t low, int64_t high,
                 const char* wanted) {
  if (t.device != Device::cpu) return;
  const auto* values = static_cast<const int64_t*>(t.data);
  for (int64_t i = 0; i < t.shape[0]; ++i)
    if (values[i] < low || values[i] >= high) fail(op, name, wanted, t, "make a plan of these rows anew");
}

int64_t check_offsets(const char* op, const TensorView& offsets, int64_t rows) {
  const int64_t count = offsets.ndim == 1 ? offsets.shape[0] : 0;
  if (count < 1) fail(op, "offsets", "one more number than there are experts", offsets, "make a plan");
  check_integers(op, "offsets", offsets, count);
  const auto* values = static_cast<const int64_t*>(offsets.data);
  int64_t before = 0;
  for (int64_t e = 0; e < count; ++e) {
    if (values[e] < before || values[e] > rows)
      fail(op, "offsets", "numbers that do not fall and are no more than there are rows", offsets,
           "make a plan of these rows anew");
    before = values[e];
  }
  return count - 1;
}

// [*, columns] bf16, of `rows` rows or of those that `places` name
void check_rows(const char* op, const char* name, const TensorView& t, int64_t rows,
                const TensorView& places) {
  check_dtype(op, name, t, DType::bf16);
  const int64_t there = rows_of(op, name, t);
  check_matrix(op, name, t, given(places) ? there : rows, t.shape[1]);
  if (t.shape[1] < 1) fail(op, name, "one column or more", t, "leave out what is empty");
  if (!given(places)) return;
  check_integers(op, "rows", places, rows);
  check_range(op, "rows", places, 0, there, "numbers of rows that there are");
}

void check_out(const char* op, const TensorView& out) {
  if (out.dtype != DType::f32) check_dtype(op, "out", out, DType::bf16);
}

void check_stack(const char* op, const char* name, const TensorView& t, int64_t rows, int64_t columns) {
  const int64_t wanted[] = {t.ndim == 3 ? t.shape[0] : 0, rows, columns};
  check_shape(op, name, t, 3, wanted);
  const bool unit = t.strides[1] == 1 || t.strides[2] == 1 || rows == 1 || columns == 1;
  if (!unit) fail(op, name, "unit stride along one of the last dimensions", t, "call .contiguous() first");
}

}  // namespace

void expert_matmul(const TensorView& out, const TensorList& lefts, const TensorList& rights,
                   const TensorList& slots, const TensorView& rows, const TensorView& offsets,
                   const TensorView& bias, bool fine, bool add) {
  constexpr const char* op = "expert_matmul";
  if (lefts.size != rights.size || lefts.size != slots.size || lefts.size < 1 || lefts.size > 2)
    throw std::invalid_argument("inlay.expert_matmul: lefts, rights, slots: wanted 1 or 2 of each, got " +
                                std::to_string(lefts.size) + ", " + std::to_string(rights.size) + " and " +
                                std::to_string(slots.size) + "; pass them together");
  check_out(op, out);
  const int64_t count = rows_of(op, "out", out);
  check_matrix(op, "out", out, count, out.shape[1]);
  const int64_t experts = check_offsets(op, offsets, count);
  for (int64_t i = 0; i < lefts.size; ++i) {
    const TensorView &left = lefts.items[i], &right = rights.items[i];
    check_rows(op, "lefts", left, count, i == 0 ? rows : TensorView());
    if (right.dtype != DType::f32) check_dtype(op, "rights", right, DType::bf16);
    check_stack(op, "rights", right, left.shape[1], out.shape[1]);
    check_integers(op, "slots", slots.items[i], experts);
    check_range(op, "slots", slots.items[i], -1, right.shape[0], "numbers of matrices that there are, or -1");
  }
  if (given(bias)) {
    check_dtype(op, "bias", bias, out.dtype);
    check_matrix(op, "bias", bias, experts, out.shape[1]);
  }
  run(op, &KernelTable::expert_matmul, out, lefts, rights, slots, rows, offsets, bias, fine, add);
}

void expert_grad(const TensorView& out, const TensorView& left, const TensorView& right,
                 const TensorView& left_rows, const TensorView& right_rows, const TensorView& offsets,
                 const TensorView& slots) {
  constexpr const char* op = "expert_grad";
  check_out(op, out);
  const int64_t rows = given(left_rows)    ? left_rows.shape[0]
                       : given(right_rows) ? right_rows.shape[0]
                                           : rows_of(op, "left", left);
  check_rows(op, "left", left, rows, left_rows);
  check_rows(op, "right", right, rows, right_rows);
  check_stack(op, "out", out, left.shape[1], right.shape[1]);
  const int64_t experts = check_offsets(op, offsets, rows);
  check_integers(op, "slots", slots, experts);
  check_range(op, "slots", slots, -1, out.shape[0], "numbers of matrices that there are, or -1");
  run(op, &KernelTable::expert_grad, out, left, right, left_rows, right_rows, offsets, slots);
}

void expert_combine(const TensorView& out, const TensorView& y, const TensorView& places,
                    const TensorView& weights) {
  constexpr const char* op = "expert_combine";
  check_lead(op, "out", out);
  check_dtype(op, "y", y, out.dtype);
  check_matrix(op, "y", y, rows_of(op, "y", y), out.shape[1]);
  check_dtype(op, "places", places, DType::i64);
  rows_of(op, "places", places);
  check_matrix(op, "places", places, out.shape[0], places.shape[1]);
  const auto* values = static_cast<const int64_t*>(places.data);
  for (int64_t t = 0; t < places.shape[0]; ++t)
    for (int64_t k = 0; k < places.shape[1]; ++k)
      if (values[t * places.strides[0] + k] >= y.shape[0])
        fail(op, "places", "numbers of rows that there are", places, "make a plan of these rows anew");
  if (given(weights)) {
    check_dtype(op, "weights", weights, DType::f32);
    check_matrix(op, "weights", weights, out.shape[0], places.shape[1]);
  }
  run(op, &KernelTable::expert_combine, out, y, places, weights);
}

}  // namespace inlay
