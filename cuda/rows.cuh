// Rows of tensors, and reading them 16 bytes at a time where they allow it.
#pragma once

#include <type_traits>

#include "launch.cuh"

namespace inlay {
namespace cuda {

// N neighbouring elements; loaded and stored as one vector of up to 16 bytes.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T at[N];
};

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <int N, class T>
__device__ __forceinline__ void store(T* into, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(into) = pack;
}

template <class T>
struct Rows {
  T* data;
  int64_t stride;  // elements between rows
  __device__ __forceinline__ T* at(int64_t m) const { return data + m * stride; }
};

template <class T>
Rows<T> rows(const TensorView& t) {
  return {static_cast<T*>(t.data), t.strides[0]};
}

inline int64_t element_size(DType dtype) {
  if (dtype == DType::i64) return 8;
  return dtype == DType::f32 ? 4 : dtype == DType::u8 ? 1 : 2;
}

// Do all rows of `t` start on 16 bytes?
inline bool rows_aligned(const TensorView& t) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 &&
         (t.shape[0] <= 1 || t.strides[0] * element_size(t.dtype) % 16 == 0);
}

// Calls f(N) with N = the elements of T in 16 bytes if `width` and all the tensors allow it, with 1
// otherwise.
template <class T, class F, class... Tensors>
void with_pack(int64_t width, F&& f, const Tensors&... tensors) {
  constexpr int kPack = 16 / sizeof(T);
  if (width % kPack == 0 && (rows_aligned(tensors) && ...)) return f(std::integral_constant<int, kPack>{});
  f(std::integral_constant<int, 1>{});
}

// A grid of blocks of 256 threads over a matrix of `rows` by `items`, one thread per item. Few items share a
// block with the next rows; x counts rows, since only x may exceed 65,535.
inline Grid elementwise(int64_t rows, int64_t items) {
  unsigned across = kWarp;
  while (across < 256 && across < items) across *= 2;
  const dim3 threads(across, 256 / across);
  return {dim3(blocks_for(rows, threads.y), blocks_for(items, across)), threads};
}

// Where a thread of such a grid is.
__device__ __forceinline__ int64_t row_here() { return int64_t(blockIdx.x) * blockDim.y + threadIdx.y; }
__device__ __forceinline__ int64_t item_here() { return int64_t(blockIdx.y) * blockDim.x + threadIdx.x; }

}  // namespace cuda
}  // namespace inlay
