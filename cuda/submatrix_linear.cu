// Gather, rounded add, scatter-add and write for the submatrix delta: memory-bound, one thread per element.
//
//   gather       out[m, j] = x[m, indices[j]]                     out [M, s], x [M, K]
//   add          out = round(y + acc)                             [M, N]
//   scatter_add  dx[m, indices[j]] = round(that + acc[m, j])      dx [M, K], acc [M, s]
//   write        weight[r, indices[j]] = round(values[r, j])      weight [R, K], values [R, s]
#include "rows.cuh"

namespace inlay {
namespace cuda {

namespace {

template <class In, class Out>
__global__ void gather_kernel(Rows<Out> out, Rows<const In> x, const int64_t* indices, int64_t count,
                              int64_t chosen) {
  const int64_t m = row_here(), j = item_here();
  if (m < count && j < chosen) from_float(to_float(x.at(m)[indices[j]]), out.at(m)[j]);
}

template <class T, int N>
__global__ void add_kernel(Rows<T> out, Rows<const T> y, Rows<const float> acc, int64_t count,
                           int64_t width) {
  const int64_t m = row_here(), j = item_here() * N;
  if (m >= count || j >= width) return;
  auto pack = load<N>(y.at(m) + j);
  const auto sum = load<N>(acc.at(m) + j);
  for (int i = 0; i < N; ++i) from_float(to_float(pack.at[i]) + sum.at[i], pack.at[i]);
  store(out.at(m) + j, pack);
}

template <class T>
__global__ void scatter_add_kernel(Rows<T> dx, const int64_t* indices, Rows<const float> acc, int64_t count,
                                   int64_t chosen) {
  const int64_t m = row_here(), j = item_here();
  if (m >= count || j >= chosen) return;
  T& target = dx.at(m)[indices[j]];  // indices are unique: no two threads meet here
  from_float(to_float(target) + acc.at(m)[j], target);
}

struct Strides {
  int64_t row, column;
};

// Lanes run over columns of values, or over rows where the weight's rows are the closer neighbours.
template <class T>
__global__ void write_kernel(T* weight, Strides weight_strides, const int64_t* indices, const float* values,
                             Strides value_strides, int64_t count, int64_t chosen, bool over_rows) {
  const int64_t r = over_rows ? item_here() : row_here(), j = over_rows ? row_here() : item_here();
  if (r >= count || j >= chosen) return;
  from_float(values[r * value_strides.row + j * value_strides.column],
             weight[r * weight_strides.row + indices[j] * weight_strides.column]);
}

}  // namespace

void submatrix_gather(const TensorView& out, const TensorView& x, const TensorView& indices) {
  const int64_t count = x.shape[0], chosen = indices.shape[0];
  with_float(x.dtype, [&](auto in) {
    with_float(out.dtype, [&](auto to) {
      using In = decltype(in);
      using Out = decltype(to);
      launch("submatrix_gather", gather_kernel<In, Out>, elementwise(count, chosen), rows<Out>(out),
             rows<const In>(x), data<const int64_t>(indices), count, chosen);
    });
  });
}

void submatrix_add(const TensorView& out, const TensorView& y, const TensorView& acc) {
  const int64_t count = y.shape[0], width = y.shape[1];
  with_float(y.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto n) {
      launch("submatrix_add", add_kernel<T, n()>, elementwise(count, width / n()), rows<T>(out),
             rows<const T>(y), rows<const float>(acc), count, width);
    };
    with_pack<T>(width, run, out, y, acc);
  });
}

void submatrix_scatter_add(const TensorView& dx, const TensorView& indices, const TensorView& acc) {
  const int64_t count = dx.shape[0], chosen = indices.shape[0];
  with_float(dx.dtype, [&](auto element) {
    using T = decltype(element);
    launch("submatrix_scatter_add", scatter_add_kernel<T>, elementwise(count, chosen), rows<T>(dx),
           data<const int64_t>(indices), rows<const float>(acc), count, chosen);
  });
}

void submatrix_write(const TensorView& weight, const TensorView& indices, const TensorView& values) {
  const int64_t count = weight.shape[0], chosen = indices.shape[0];
  const bool over_rows = weight.strides[0] < weight.strides[1];
  const Grid grid = over_rows ? elementwise(chosen, count) : elementwise(count, chosen);
  with_float(weight.dtype, [&](auto element) {
    using T = decltype(element);
    launch("submatrix_write", write_kernel<T>, grid, data<T>(weight),
           Strides{weight.strides[0], weight.strides[1]}, data<const int64_t>(indices),
           data<const float>(values), Strides{values.strides[0], values.strides[1]}, count, chosen,
           over_rows);
  });
}

}  // namespace cuda
}  // namespace inlay
