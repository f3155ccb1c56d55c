// Chosen channels, sorted, in kernels where a warp works on neighbouring channels of one row.
#pragma once

#include "rows.cuh"

namespace inlay {
namespace cuda {

// How many of the sorted indices are below `value`, for all lanes of a warp at once: each looks at the last
// of its 32nd of those in question, so that two rounds of loads settle a thousand.
__device__ __forceinline__ int64_t count_below(const int64_t* indices, int64_t count, int64_t value) {
  const int lane = int(threadIdx.x) % kWarp;
  int64_t low = 0, left = count;  // the answer is in [low, low + left]
  while (left > 0) {
    const int64_t step = (left + kWarp - 1) / kWarp, last = (lane + 1) * step - 1;
    const bool below = last < left && indices[low + last] < value;
    const int64_t passed = __popc(__ballot_sync(kAllLanes, below)) * step;
    low += passed;
    left = left - passed < step ? left - passed : step - 1;
  }
  return low;
}

struct Chosen {
  const int64_t* indices;
  int64_t count;
};

inline Chosen chosen_of(const TensorView& indices) {
  return {data<const int64_t>(indices), indices.ndim == 0 ? 0 : indices.shape[0]};
}

// f(i, c) for every chosen channel c = indices[i] among the 32·N of a warp whose lanes start at channel `j`
// each. All lanes have to come.
template <int N, class F>
__device__ __forceinline__ void for_chosen(const Chosen& chosen, int64_t j, F&& f) {
  if (chosen.count == 0) return;
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t begin = j - lane * N, end = begin + kWarp * N;
  for (int64_t i = count_below(chosen.indices, chosen.count, begin) + lane; i < chosen.count; i += kWarp) {
    const int64_t c = chosen.indices[i];
    if (c >= end) break;
    f(i, c);
  }
}

}  // namespace cuda
}  // namespace inlay
