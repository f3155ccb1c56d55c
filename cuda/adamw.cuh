// What AdamW's kernels share: the formula, tables of tensors that a launch takes by value, and the step of a
// run of 8-bit states. A launch cuts its tensors into spans of one size, so that many small tensors and a few
// large ones keep every multiprocessor equally busy.
//
//   g = grad·grad_scale;  p ← p·keep;  m ← m + (1−β1)·(g−m);  v ← β2·v + (1−β2)·g²
//   p ← p − step_size·m/(sqrt(v)/root_correction + eps)
#pragma once

#include <cmath>

#include "dynamic.cuh"
#include "rows.cuh"

namespace inlay {
namespace cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kMostParameters = 4096;    // bytes that every GPU takes as a kernel's parameters
constexpr int64_t kMostSpans = 1 << 30;  // per launch

// Elements per block. fp32 states: four vectors of each array per thread. 8 bits: four times 256 per warp,
// 128 KB beside which the 2 KB of the maps are few.
constexpr int64_t kSpan = 4096;
constexpr int64_t kCodedSpan = 8192;
static_assert(kCodedSpan % kStateBlock == 0, "a block lies in one span");

template <class... T>
bool start_on_vectors(const T*... arrays) {
  return ((reinterpret_cast<uintptr_t>(arrays) % 16 == 0) && ...);
}

// Of up to T::kMost tensors, a power of two.
template <class T>
struct Table {
  T tensors[T::kMost];
  int first_span[T::kMost + 1];  // [i]: spans before tensor i; equal for what the table does not hold
  bool vectors;                  // every array starts on 16 bytes: see T::aligned

  // The tensor that this block's span is of, and the span's elements in it.
  __device__ __forceinline__ const T& find(int64_t span_size, int64_t& begin, int64_t& end) const {
    const int span = int(blockIdx.x);
    int low = 0;  // the last tensor whose first span is not after this one
    for (int step = T::kMost / 2; step > 0; step /= 2)
      if (first_span[low + step] <= span) low += step;
    begin = int64_t(span - first_span[low]) * span_size;
    end = begin + span_size < tensors[low].size ? begin + span_size : tensors[low].size;
    return tensors[low];
  }
};

struct Coefficients {
  float grad_scale, keep, one_minus_beta1, beta2, one_minus_beta2, step_size, root_correction, eps;

  Coefficients(double lr, double beta1, double beta2_, double eps_, double weight_decay, int64_t step,
               double grad_scale_)
      : grad_scale(float(grad_scale_)),
        keep(float(1.0 - lr * weight_decay)),
        one_minus_beta1(float(1.0 - beta1)),
        beta2(float(beta2_)),
        one_minus_beta2(float(1.0 - beta2_)),
        step_size(float(lr / (1.0 - std::pow(beta1, double(step))))),
        root_correction(float(std::sqrt(1.0 - std::pow(beta2_, double(step))))),
        eps(float(eps_)) {}

  __device__ __forceinline__ void update(float& p, float grad, float& m, float& v) const {
    const float g = grad * grad_scale;
    m = m + one_minus_beta1 * (g - m);
    v = v * beta2 + one_minus_beta2 * g * g;
    p = p * keep - step_size * m / (sqrtf(v) / root_correction + eps);
  }
};

// --- states of 8 bits

constexpr int kRun = kStateBlock / kWarp;  // neighbouring elements of a lane

// `whole`: all of the run, as vectors. Otherwise the first `count`; the rest are 0.
template <class T>
__device__ __forceinline__ Pack<T, kRun> load_run(const T* from, int count, bool whole) {
  if (whole) return load<kRun>(from);
  Pack<T, kRun> pack;
  for (int i = 0; i < kRun; ++i) pack.at[i] = i < count ? from[i] : T{};
  return pack;
}

template <class T>
__device__ __forceinline__ void store_run(T* into, const Pack<T, kRun>& pack, int count, bool whole) {
  if (whole) return store(into, pack);
  for (int i = 0; i < kRun; ++i)
    if (i < count) into[i] = pack.at[i];
}

// Codes and a scale per block of 256.
struct CodedStates {
  float *exp_avg_absmax, *exp_avg_sq_absmax;
  uint8_t *exp_avg, *exp_avg_sq;
};

// Of a block of 256 elements that a warp steps, what one lane has: elements j, j + 1, ... of the tensor, of
// which `count` exist; if all of the block do and all arrays start on 16 bytes, it is read as vectors.
struct Lane {
  int64_t j;
  int count;
  bool whole;

  // The block from element `at` on, of which `size` exist.
  __device__ __forceinline__ Lane(int64_t at, int size, bool vectors) {
    const int first = int(threadIdx.x) % kWarp * kRun;
    j = at + first, count = size - first, whole = vectors && size == kStateBlock;
  }
  template <class T>
  __device__ __forceinline__ Pack<T, kRun> load(const T* from) const {
    return load_run(from + j, count, whole);
  }
  template <class T>
  __device__ __forceinline__ void store(T* into, const Pack<T, kRun>& pack) const {
    store_run(into + j, pack, count, whole);
  }
};

// Steps the lane's elements p by their gradients, and codes the new states.
template <class Grad>
__device__ __forceinline__ void update_run(const Coefficients& c, const CodedStates& states,
                                           const float* maps, const Lane& lane, float (&p)[kRun],
                                           const Pack<Grad, kRun>& grad) {
  const int64_t block = lane.j / kStateBlock;
  auto m_codes = lane.load(states.exp_avg), v_codes = lane.load(states.exp_avg_sq);
  const float m_scale = states.exp_avg_absmax[block], v_scale = states.exp_avg_sq_absmax[block];
  float m[kRun], v[kRun], largest_m = 0.0f, largest_v = 0.0f;
  for (int i = 0; i < kRun; ++i) {
    m[i] = maps[m_codes.at[i]] * m_scale;
    v[i] = maps[256 + v_codes.at[i]] * v_scale;
    c.update(p[i], to_float(grad.at[i]), m[i], v[i]);
    if (i >= lane.count) m[i] = v[i] = 0.0f;
    largest_m = fmaxf(largest_m, fabsf(m[i]));  // passes over a NaN
    largest_v = fmaxf(largest_v, v[i]);
  }
  largest_m = warp_max(largest_m);
  largest_v = warp_max(largest_v);  // every lane has read the old scales
  if (lane.j % kStateBlock == 0)
    states.exp_avg_absmax[block] = largest_m, states.exp_avg_sq_absmax[block] = largest_v;
  const float m_inverse = inverse_of(largest_m), v_inverse = inverse_of(largest_v);
  for (int i = 0; i < kRun; ++i) {
    m_codes.at[i] = encode_signed(m[i], m_inverse);
    v_codes.at[i] = encode_unsigned(v[i], v_inverse);
  }
  lane.store(states.exp_avg, m_codes);
  lane.store(states.exp_avg_sq, v_codes);
}

// Both maps into shared memory, for all of the block.
__device__ __forceinline__ void copy_maps(float* maps, const float* signed_map, const float* unsigned_map) {
  for (int i = int(threadIdx.x); i < 512; i += kThreads)
    maps[i] = i < 256 ? signed_map[i] : unsigned_map[i - 256];
  __syncthreads();
}

// f(lane) for every block of 256 of [begin, end), a warp's own.
template <class F>
__device__ __forceinline__ void for_state_blocks(int64_t begin, int64_t end, bool vectors, F&& f) {
  for (int64_t at = begin + int(threadIdx.x) / kWarp * kStateBlock; at < end;
       at += kThreads / kWarp * kStateBlock)
    f(Lane(at, end - at < kStateBlock ? int(end - at) : kStateBlock, vectors));
}

// --- launches

// Calls start(table, grid) for as many tables as hold make(i), i < count, in spans of span_size.
template <class T, class Make, class Start>
void for_tables(int64_t count, int64_t span_size, Make&& make, Start&& start) {
  Table<T> table = {};
  int held = 0;
  int64_t spans = 0;
  const auto flush = [&] {
    for (int i = held; i <= T::kMost; ++i) table.first_span[i] = int(spans);
    start(table, Grid{dim3(unsigned(spans)), dim3(kThreads)});
    held = 0, spans = 0;
  };
  for (int64_t i = 0; i < count; ++i) {
    const T tensor = make(i);
    const int64_t more = (tensor.size + span_size - 1) / span_size;
    if (more == 0) continue;
    if (held == T::kMost || spans + more > kMostSpans) flush();
    table.vectors = (held == 0 || table.vectors) && tensor.aligned();
    table.tensors[held] = tensor;
    table.first_span[held++] = int(spans);
    spans += more;
  }
  flush();
}

}  // namespace
}  // namespace cuda
}  // namespace inlay
