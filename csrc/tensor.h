// TensorView: what a kernel sees of a tensor. Checks that name what was wanted, what came and what to do.
//
// This header is included by files compiled for different instruction sets. It therefore defines no
// inline function that does work: the linker keeps one copy of an inline function, and it might keep the
// AVX-512 one.
#pragma once

#include <cstdint>

namespace inlay {

enum class DType : int { f32, bf16, f16, i64, i16, u8, other };
enum class Device : int { cpu, cuda, other };

constexpr int kMaxDims = 8;

struct TensorView {
  void* data = nullptr;  // nullptr with ndim 0: the caller passed None
  DType dtype = DType::other;
  Device device = Device::cpu;
  int device_index = 0;
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements
};

struct TensorList {
  const TensorView* items = nullptr;
  int64_t size = 0;
};

struct IntList {
  const int64_t* items = nullptr;
  int64_t size = 0;
};

const char* dtype_name(DType dtype);
int64_t numel(const TensorView& tensor);
int64_t rows_of_packed(const TensorView& packed, int64_t columns);  // two weights a byte, columns ≥ 2

// Each check throws std::invalid_argument("inlay.<op>: <name>: wanted ..., got ...; <what to do>").
[[noreturn]] void fail(const char* op, const char* name, const char* wanted, const TensorView& got,
                       const char* todo);
void check_device(const char* op, const char* name, const TensorView& tensor);  // CPU or CUDA
void check_dtype(const char* op, const char* name, const TensorView& tensor, DType dtype);
void check_float(const char* op, const char* name, const TensorView& tensor);
void check_shape(const char* op, const char* name, const TensorView& tensor, int ndim, const int64_t* shape);
void check_matrix(const char* op, const char* name, const TensorView& tensor, int64_t rows, int64_t cols);
void check_vector(const char* op, const char* name, const TensorView& tensor, int64_t size);
// int64 [s], strictly increasing, in [0, width). Throws std::out_of_range for a channel that is not there.
// Values on a GPU are not looked at: that would wait for the device.
void check_indices(const char* op, const TensorView& indices, int64_t width);

}  // namespace inlay
