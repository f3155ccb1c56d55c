// What every entry is made of: checks of its arguments against ops.h, then the kernel that dispatch chose.
#pragma once

#include <stdexcept>
#include <string>

#include "dispatch.h"

namespace inlay {

inline int64_t rows_of(const char* op, const char* name, const TensorView& t) {
  if (t.ndim != 2) fail(op, name, "2 dimensions", t, "flatten the leading ones");
  return t.shape[0];
}

// [rows, cols] of the dtype of `like`
inline void check_like(const char* op, const char* name, const TensorView& t, const TensorView& like) {
  check_dtype(op, name, t, like.dtype);
  check_matrix(op, name, t, like.shape[0], like.shape[1]);
}

inline void check_lead(const char* op, const char* name, const TensorView& t) {
  check_float(op, name, t);
  const int64_t rows = rows_of(op, name, t);
  check_matrix(op, name, t, rows, t.shape[1]);
}

// Not None.
inline bool given(const TensorView& t) { return t.data || t.ndim != 0; }

// Scratch of a sum over rows: [P, columns], a row for each share of them.
inline void check_sums(const char* op, const TensorView& sums, int64_t columns) {
  check_dtype(op, "sums", sums, DType::f32);
  if (rows_of(op, "sums", sums) < 1) fail(op, "sums", "one row or more", sums, "pass a row per share");
  check_matrix(op, "sums", sums, sums.shape[0], columns);
}

// All tensors of a call are on one device; `first` is the first of them, numbers are none.
inline void same_device(const char* op, const TensorView*& first, const TensorView& tensor) {
  if (!given(tensor)) return;
  if (!first) first = &tensor;
  if (tensor.device == first->device && tensor.device_index == first->device_index) return;
  throw std::invalid_argument("inlay." + std::string(op) +
                              ": tensors: wanted all on one device, got several; move them together");
}
inline void same_device(const char* op, const TensorView*& first, const TensorList& list) {
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

}  // namespace inlay
