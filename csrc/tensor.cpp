#include "tensor.h"

#include <stdexcept>
#include <string>

namespace inlay {

namespace {

std::string shape_text(int ndim, const int64_t* shape) {
  std::string text = "[";
  for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

std::string describe(const TensorView& t) {
  if (!t.data && t.ndim == 0) return "None";
  std::string text = std::string(dtype_name(t.dtype)) + " " + shape_text(t.ndim, t.shape);
  return text + " with strides " + shape_text(t.ndim, t.strides);
}

[[noreturn]] void refuse(const char* op, const char* name, const std::string& wanted, const std::string& got,
                         const char* todo) {
  throw std::invalid_argument("inlay." + std::string(op) + ": " + name + ": wanted " + wanted + ", got " +
                              got + "; " + todo);
}

// Rows may be apart, elements of a row may not.
void check_unit_inner(const char* op, const char* name, const TensorView& t) {
  const int last = t.ndim - 1;
  if (t.shape[last] > 1 && t.strides[last] != 1 && numel(t) > 0)
    refuse(op, name, "a last dimension of stride 1", describe(t), "call .contiguous() first");
}

}  // namespace

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::bf16:
      return "bfloat16";
    case DType::f16:
      return "float16";
    case DType::i64:
      return "int64";
    case DType::i16:
      return "int16";
    case DType::u8:
      return "uint8";
    case DType::other:
      break;
  }
  return "an unsupported dtype";
}

int64_t numel(const TensorView& tensor) {
  int64_t count = 1;
  for (int i = 0; i < tensor.ndim; ++i) count *= tensor.shape[i];
  return count;
}

int64_t rows_of_packed(const TensorView& packed, int64_t columns) { return 2 * numel(packed) / columns; }

void fail(const char* op, const char* name, const char* wanted, const TensorView& got, const char* todo) {
  refuse(op, name, wanted, describe(got), todo);
}

void check_device(const char* op, const char* name, const TensorView& tensor) {
  if (tensor.device == Device::other)
    refuse(op, name, "a CPU or CUDA tensor", "a tensor elsewhere", "move it there, or use the reference");
}

void check_dtype(const char* op, const char* name, const TensorView& tensor, DType dtype) {
  check_device(op, name, tensor);
  if (tensor.dtype != dtype) refuse(op, name, dtype_name(dtype), describe(tensor), "cast it first");
}

void check_float(const char* op, const char* name, const TensorView& tensor) {
  check_device(op, name, tensor);
  if (tensor.dtype != DType::f32 && tensor.dtype != DType::bf16 && tensor.dtype != DType::f16)
    refuse(op, name, "float32, bfloat16 or float16", describe(tensor), "cast it first");
}

void check_shape(const char* op, const char* name, const TensorView& tensor, int ndim, const int64_t* shape) {
  bool same = tensor.ndim == ndim;
  for (int i = 0; same && i < ndim; ++i) same = tensor.shape[i] == shape[i];
  if (!same) refuse(op, name, shape_text(ndim, shape), describe(tensor), "pass tensors that fit together");
}

void check_matrix(const char* op, const char* name, const TensorView& tensor, int64_t rows, int64_t cols) {
  const int64_t shape[] = {rows, cols};
  check_shape(op, name, tensor, 2, shape);
  check_unit_inner(op, name, tensor);
}

void check_vector(const char* op, const char* name, const TensorView& tensor, int64_t size) {
  check_shape(op, name, tensor, 1, &size);
  check_unit_inner(op, name, tensor);
}

void check_indices(const char* op, const TensorView& indices, int64_t width) {
  check_dtype(op, "indices", indices, DType::i64);
  check_vector(op, "indices", indices, indices.ndim == 1 ? indices.shape[0] : 0);
  if (indices.device != Device::cpu) return;
  const auto* values = static_cast<const int64_t*>(indices.data);
  for (int64_t j = 0; j < indices.shape[0]; ++j) {
    if (values[j] < 0 || values[j] >= width)
      throw std::out_of_range("inlay." + std::string(op) + ": indices: wanted channels in [0, " +
                              std::to_string(width) + "), got " + std::to_string(values[j]) +
                              "; choose channels of this layer");
    if (j && values[j] <= values[j - 1])
      refuse(op, "indices", "sorted unique channels",
             std::to_string(values[j]) + " after " + std::to_string(values[j - 1]),
             "sort them and drop duplicates");
  }
}

}  // namespace inlay
