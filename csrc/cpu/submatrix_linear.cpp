// Gather, rounded add, scatter-add and write for the submatrix delta. Memory-bound; rows in parallel.
#include "cpu/kernel.h"

namespace inlay {
namespace INLAY_ISA_NS {

void submatrix_gather(const TensorView& out, const TensorView& x, const TensorView& indices) {
  const int64_t chosen = indices.shape[0];
  const auto* index = data<const int64_t>(indices);
  with_float(x.dtype, [&](auto in) {
    using In = decltype(in);
    with_float(out.dtype, [&](auto to) {
      using Out = decltype(to);
      parallel_for(x.shape[0], chosen, [&](int64_t m) {
        const In* from = row<const In>(x, m);
        Out* into = row<Out>(out, m);
        for_vecs(chosen, [&](int64_t j, int n) {
          In lanes[Vec::kWidth] = {};
          for (int i = 0; i < n; ++i) lanes[i] = from[index[j + i]];
          store_n(into + j, load(lanes), n);
        });
      });
    });
  });
}

void submatrix_add(const TensorView& out, const TensorView& y, const TensorView& acc) {
  with_float(y.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(y.shape[0], y.shape[1], [&](int64_t m) {
      const T* from = row<const T>(y, m);
      const float* add = row<const float>(acc, m);
      T* into = row<T>(out, m);
      for_vecs(y.shape[1],
               [&](int64_t j, int n) { store_n(into + j, load_n(from + j, n) + load_n(add + j, n), n); });
    });
  });
}

void submatrix_scatter_add(const TensorView& dx, const TensorView& indices, const TensorView& acc) {
  const int64_t chosen = indices.shape[0];
  const auto* index = data<const int64_t>(indices);
  with_float(dx.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(dx.shape[0], 2 * chosen, [&](int64_t m) {
      T* into = row<T>(dx, m);
      const float* add = row<const float>(acc, m);
      for_vecs(chosen, [&](int64_t j, int n) {
        T lanes[Vec::kWidth] = {};
        for (int i = 0; i < n; ++i) lanes[i] = into[index[j + i]];
        store(lanes, load(lanes) + load_n(add + j, n));
        for (int i = 0; i < n; ++i) into[index[j + i]] = lanes[i];
      });
    });
  });
}

void submatrix_write(const TensorView& weight, const TensorView& indices, const TensorView& values) {
  const int64_t rows = weight.shape[0], chosen = indices.shape[0];
  const auto* index = data<const int64_t>(indices);
  with_float(weight.dtype, [&](auto element) {
    using T = decltype(element);
    const auto write = [&](int64_t r, int64_t j) {
      const float value = data<const float>(values)[r * values.strides[0] + j * values.strides[1]];
      store_one(data<T>(weight) + r * weight.strides[0] + index[j] * weight.strides[1], value);
    };
    // The outer loop follows the larger stride of the weight, so that the inner one stays in few cache lines.
    if (weight.strides[0] >= weight.strides[1]) {
      parallel_for(rows, 4 * chosen, [&](int64_t r) {
        for (int64_t j = 0; j < chosen; ++j) write(r, j);
      });
    } else {
      parallel_for(chosen, 4 * rows, [&](int64_t j) {
        for (int64_t r = 0; r < rows; ++r) write(r, j);
      });
    }
  });
}

}  // namespace INLAY_ISA_NS
}  // namespace inlay
