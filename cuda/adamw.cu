// AdamW over many tensors, with fp32 or 8-bit states: a launch takes the pointers of up to 64 tensors by
// value, and cuts them into spans of one size, so that many small tensors and a few large ones keep every
// multiprocessor equally busy.
//
//   g = grad·grad_scale;  p ← p·keep;  m ← m + (1−β1)·(g−m);  v ← β2·v + (1−β2)·g²
//   p ← p − step_size·m/(sqrt(v)/root_correction + eps)
//
// Bytes per element, what memory allows being the floor: 28 with fp32 states; 16.06 with states of 8 bits, of
// which a warp takes 256 at a time, the elements that share a scale: no barriers, and nothing of the states
// leaves registers.
#include <cmath>

#include "dynamic.cuh"
#include "rows.cuh"

namespace inlay {
namespace cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kTensors = 64;             // 64·56 bytes: within the 4 KB that every GPU takes as parameters
constexpr int64_t kMostSpans = 1 << 30;  // per launch

// Elements per block. fp32 states: four vectors of each array per thread. 8 bits: four times 256 per warp,
// 128 KB beside which the 2 KB of the maps are few.
constexpr int64_t kSpan = 4096;
constexpr int64_t kCodedSpan = 8192;

bool starts_on_vector(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

struct Tensor {
  float *param, *exp_avg, *exp_avg_sq;
  const float* grad;
  int64_t size;

  bool aligned() const {
    return starts_on_vector(param) && starts_on_vector(exp_avg) && starts_on_vector(exp_avg_sq) &&
           starts_on_vector(grad);
  }
};

struct CodedTensor {
  float *param, *exp_avg_absmax, *exp_avg_sq_absmax;
  const float* grad;
  uint8_t *exp_avg, *exp_avg_sq;
  int64_t size;

  bool aligned() const {
    return starts_on_vector(param) && starts_on_vector(exp_avg) && starts_on_vector(exp_avg_sq) &&
           starts_on_vector(grad);
  }
};

template <class T>
struct Table {
  T tensors[kTensors];
  int first_span[kTensors + 1];  // [i]: spans before tensor i; equal for what the table does not hold
  bool vectors;                  // every array starts on 16 bytes

  // The tensor that this block's span is of, and the span's elements in it.
  __device__ __forceinline__ const T& find(int64_t span_size, int64_t& begin, int64_t& end) const {
    const int span = int(blockIdx.x);
    int low = 0;  // the last tensor whose first span is not after this one
    for (int step = kTensors / 2; step > 0; step /= 2)
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

template <int N>
__device__ __forceinline__ void update(const Coefficients& c, const Tensor& t, int64_t j) {
  auto p = load<N>(t.param + j), m = load<N>(t.exp_avg + j), v = load<N>(t.exp_avg_sq + j);
  const auto grad = load<N>(t.grad + j);
  for (int i = 0; i < N; ++i) c.update(p.at[i], grad.at[i], m.at[i], v.at[i]);
  store(t.param + j, p);
  store(t.exp_avg + j, m);
  store(t.exp_avg_sq + j, v);
}

__global__ void __launch_bounds__(kThreads) step_kernel(const Table<Tensor> table, const Coefficients c) {
  int64_t begin, end;
  const Tensor& t = table.find(kSpan, begin, end);
  int64_t j = begin + threadIdx.x;
  if (table.vectors) {
    for (j = begin + int64_t(threadIdx.x) * 4; j + 4 <= end; j += kThreads * 4) update<4>(c, t, j);
    j = end - end % 4 + threadIdx.x;  // begin is a multiple of 4
  }
  for (; j < end; j += kThreads) update<1>(c, t, j);
}

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

// The 256 elements from `at` on, of which `size` exist, by one warp.
__device__ __forceinline__ void update_block(const Coefficients& c, const CodedTensor& t, const float* maps,
                                             int64_t at, int size, bool vectors) {
  const int first = int(threadIdx.x) % kWarp * kRun, count = size - first;
  const int64_t j = at + first, block = at / kStateBlock;
  const bool whole = vectors && size == kStateBlock;
  auto p = load_run<float>(t.param + j, count, whole);
  const auto grad = load_run<float>(t.grad + j, count, whole);
  auto m_codes = load_run<uint8_t>(t.exp_avg + j, count, whole);
  auto v_codes = load_run<uint8_t>(t.exp_avg_sq + j, count, whole);
  const float m_scale = t.exp_avg_absmax[block], v_scale = t.exp_avg_sq_absmax[block];
  float m[kRun], v[kRun], largest_m = 0.0f, largest_v = 0.0f;
  for (int i = 0; i < kRun; ++i) {
    m[i] = maps[m_codes.at[i]] * m_scale;
    v[i] = maps[256 + v_codes.at[i]] * v_scale;
    c.update(p.at[i], grad.at[i], m[i], v[i]);
    if (i >= count) m[i] = v[i] = 0.0f;
    largest_m = fmaxf(largest_m, fabsf(m[i]));  // passes over a NaN
    largest_v = fmaxf(largest_v, v[i]);
  }
  largest_m = warp_max(largest_m);
  largest_v = warp_max(largest_v);  // every lane has read the old scales
  if (first == 0) t.exp_avg_absmax[block] = largest_m, t.exp_avg_sq_absmax[block] = largest_v;
  const float m_inverse = inverse_of(largest_m), v_inverse = inverse_of(largest_v);
  for (int i = 0; i < kRun; ++i) {
    m_codes.at[i] = encode_signed(m[i], m_inverse);
    v_codes.at[i] = encode_unsigned(v[i], v_inverse);
  }
  store_run(t.param + j, p, count, whole);
  store_run(t.exp_avg + j, m_codes, count, whole);
  store_run(t.exp_avg_sq + j, v_codes, count, whole);
}

__global__ void __launch_bounds__(kThreads) coded_kernel(const Table<CodedTensor> table, const Coefficients c,
                                                         const float* signed_map, const float* unsigned_map) {
  INLAY_SHARED(float, maps, 512);
  for (int i = int(threadIdx.x); i < 512; i += kThreads)
    maps[i] = i < 256 ? signed_map[i] : unsigned_map[i - 256];
  __syncthreads();
  int64_t begin, end;
  const CodedTensor& t = table.find(kCodedSpan, begin, end);
  for (int64_t at = begin + int(threadIdx.x) / kWarp * kStateBlock; at < end;
       at += kThreads / kWarp * kStateBlock)
    update_block(c, t, maps, at, end - at < kStateBlock ? int(end - at) : kStateBlock, table.vectors);
}

// --- launches

// Calls start(table, grid) for as many tables as hold make(i), i < count, in spans of span_size.
template <class T, class Make, class Start>
void for_tables(int64_t count, int64_t span_size, Make&& make, Start&& start) {
  Table<T> table = {};
  int held = 0;
  int64_t spans = 0;
  const auto flush = [&] {
    for (int i = held; i <= kTensors; ++i) table.first_span[i] = int(spans);
    start(table, Grid{dim3(unsigned(spans)), dim3(kThreads)});
    held = 0, spans = 0;
  };
  for (int64_t i = 0; i < count; ++i) {
    const T tensor = make(i);
    const int64_t more = (tensor.size + span_size - 1) / span_size;
    if (more == 0) continue;
    if (held == kTensors || spans + more > kMostSpans) flush();
    table.vectors = (held == 0 || table.vectors) && tensor.aligned();
    table.tensors[held] = tensor;
    table.first_span[held++] = int(spans);
    spans += more;
  }
  flush();
}

}  // namespace

void adamw_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                const TensorList& exp_avg_sqs, double lr, double beta1, double beta2, double eps,
                double weight_decay, int64_t step, double grad_scale) {
  const Coefficients c(lr, beta1, beta2, eps, weight_decay, step, grad_scale);
  const auto make = [&](int64_t i) {
    return Tensor{data<float>(params.items[i]), data<float>(exp_avgs.items[i]),
                  data<float>(exp_avg_sqs.items[i]), data<const float>(grads.items[i]),
                  params.items[i].shape[0]};
  };
  for_tables<Tensor>(params.size, kSpan, make, [&](const Table<Tensor>& table, const Grid& grid) {
    launch("adamw_step", step_kernel, grid, table, c);
  });
}

void adamw_8bit_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                     const TensorList& exp_avg_sqs, const TensorList& exp_avg_absmaxes,
                     const TensorList& exp_avg_sq_absmaxes, const TensorView& signed_map,
                     const TensorView& unsigned_map, double lr, double beta1, double beta2, double eps,
                     double weight_decay, int64_t step, double grad_scale) {
  static_assert(sizeof(Table<CodedTensor>) + sizeof(Coefficients) + 16 <= 4096, "what a launch can pass");
  static_assert(kCodedSpan % kStateBlock == 0, "a block lies in one span");
  const Coefficients c(lr, beta1, beta2, eps, weight_decay, step, grad_scale);
  const auto make = [&](int64_t i) {
    return CodedTensor{data<float>(params.items[i]),
                       data<float>(exp_avg_absmaxes.items[i]),
                       data<float>(exp_avg_sq_absmaxes.items[i]),
                       data<const float>(grads.items[i]),
                       data<uint8_t>(exp_avgs.items[i]),
                       data<uint8_t>(exp_avg_sqs.items[i]),
                       params.items[i].shape[0]};
  };
  for_tables<CodedTensor>(params.size, kCodedSpan, make,
                          [&](const Table<CodedTensor>& table, const Grid& grid) {
                            launch("adamw_8bit_step", coded_kernel, grid, table, c,
                                   data<const float>(signed_map), data<const float>(unsigned_map));
                          });
}

}  // namespace cuda
}  // namespace inlay
