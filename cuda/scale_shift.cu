// A scale and a shift per channel, at all channels or at chosen ones.
//
//   forward   y = gamma·x + beta
//   backward  dx = gamma·dy   dgamma = Σ_m dy·x   dbeta = Σ_m dy
//
//   x, y, dx, dy  [M, K]    gamma, beta, dgamma, dbeta  [K] or [s]    x of the backward  [M, K] or [M, s]
#include "chosen.cuh"
#include "column_sums.cuh"

namespace inlay {
namespace cuda {

namespace {

struct PerChannel {
  const float *gamma, *beta;  // or null: 1, 0

  __device__ __forceinline__ float of(float x, int64_t j) const {
    if (!gamma) return x + beta[j];
    return beta ? fmaf(gamma[j], x, beta[j]) : gamma[j] * x;
  }
};

template <class T, int N>
__global__ void forward_kernel(Rows<T> y, Rows<const T> x, PerChannel numbers, int64_t count, int64_t width) {
  const int64_t m = row_here(), j = item_here() * N;
  if (m >= count || j >= width) return;
  auto pack = load<N>(x.at(m) + j);
  for (int i = 0; i < N; ++i) from_float(numbers.of(to_float(pack.at[i]), j + i), pack.at[i]);
  store(y.at(m) + j, pack);
}

// A warp copies its 32·N channels and then writes those that are chosen among them.
template <class T, int N>
__global__ void chosen_kernel(Rows<T> y, Rows<const T> x, PerChannel numbers, Chosen chosen, int64_t count,
                              int64_t width) {
  const int64_t m = row_here(), j = item_here() * N;
  if (m >= count) return;  // a whole warp
  if (j < width) store(y.at(m) + j, load<N>(x.at(m) + j));
  __syncwarp();  // another lane copied what this one writes
  for_chosen<N>(chosen, j,
                [&](int64_t i, int64_t c) { from_float(numbers.of(to_float(x.at(m)[c]), i), y.at(m)[c]); });
}

// A thread sums its N channels over a share of the rows. With indices N is 1 and there is no dx.
template <class T, int N>
__global__ void backward_kernel(Rows<T> dx, Rows<float> dgamma, Rows<float> dbeta, Rows<const T> dy,
                                Rows<const T> x, const float* gamma, const int64_t* indices, int64_t shares,
                                int64_t count, int64_t each, int64_t width) {
  const int64_t share = row_here(), j = item_here() * N;
  if (share >= shares || j >= width) return;
  const int64_t first = share * each, end = first + each < count ? first + each : count;
  const int64_t c = indices ? indices[j] : j;
  Pack<float, N> products{}, sums{};
  for (int64_t m = first; m < end; ++m) {
    auto d = load<N>(dy.at(m) + c);
    if (dgamma.data) {
      const auto value = load<N>(x.at(m) + j);
      for (int i = 0; i < N; ++i)
        products.at[i] = fmaf(to_float(d.at[i]), to_float(value.at[i]), products.at[i]);
    }
    for (int i = 0; i < N; ++i) sums.at[i] += to_float(d.at[i]);
    if (!dx.data) continue;
    for (int i = 0; i < N; ++i) from_float(gamma[j + i] * to_float(d.at[i]), d.at[i]);
    store(dx.at(m) + j, d);
  }
  if (dgamma.data) store(dgamma.at(share) + j, products);
  if (dbeta.data) store(dbeta.at(share) + j, sums);
}

template <class T>
T* data_or_null(const TensorView& t) {
  return t.ndim == 0 ? nullptr : data<T>(t);
}

void forward(const char* name, const TensorView& y, const TensorView& x, const PerChannel& numbers,
             const TensorView& indices) {
  const int64_t count = x.shape[0], width = x.shape[1];
  with_float(x.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto n) {
      const Grid grid = elementwise(count, width / n());
      if (indices.ndim == 0)
        return launch(name, forward_kernel<T, n()>, grid, rows<T>(y), rows<const T>(x), numbers, count,
                      width);
      launch(name, chosen_kernel<T, n()>, grid, rows<T>(y), rows<const T>(x), numbers, chosen_of(indices),
             count, width);
    };
    with_pack<T>(width, run, y, x);
  });
}

}  // namespace

void scale_shift_forward(const TensorView& y, const TensorView& x, const TensorView& gamma,
                         const TensorView& beta, const TensorView& indices) {
  const PerChannel numbers{data_or_null<const float>(gamma), data_or_null<const float>(beta)};
  forward("scale_shift_forward", y, x, numbers, indices);
}

void scale_shift_backward(const TensorView& dx, const TensorView& dgamma, const TensorView& dbeta,
                          const TensorView& sums, const TensorView& dy, const TensorView& x,
                          const TensorView& gamma, const TensorView& indices) {
  constexpr const char* name = "scale_shift_backward";
  const bool all = indices.ndim == 0;
  const int64_t width = all ? dy.shape[1] : indices.shape[0], shares = sums.shape[0],
                stride = sums.strides[0];
  float* const first = data<float>(sums);
  const Rows<float> for_gamma{dgamma.ndim ? first : nullptr, stride};
  const Rows<float> for_beta{dbeta.ndim ? first + (dgamma.ndim ? width : 0) : nullptr, stride};
  with_float(dy.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto n) {
      launch(name, backward_kernel<T, n()>, elementwise(shares, width / n()),
             all ? rows<T>(dx) : Rows<T>{nullptr, 0}, for_gamma, for_beta, rows<const T>(dy),
             rows<const T>(x), data_or_null<const float>(gamma), data_or_null<const int64_t>(indices), shares,
             dy.shape[0], rows_of_share(sums, dy.shape[0]), width);
    };
    if (all) {
      with_pack<T>(width, run, dx, dy, x, sums);  // what is None is aligned
    } else {
      run(std::integral_constant<int, 1>{});
    }
  });
  if (dgamma.ndim) add_shares(name, dgamma, sums, 0);
  if (dbeta.ndim) add_shares(name, dbeta, sums, dgamma.ndim ? width : 0);
  if (!all && dx.ndim) forward(name, dx, dy, {data<const float>(gamma), nullptr}, indices);
}

}  // namespace cuda
}  // namespace inlay
