// Kernels that are wrong on purpose, one mistake each, and their corrected form. test_emulator.py runs
//
//   simt_broken CASE ORDER
//
// and expects "right", "wrong" (the result differs), an error of the emulation, or a sanitizer's report.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

#include "launch.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/load_l2.cuh"
#include "ptx/mma.cuh"

namespace inlay {
namespace cuda {
int multiprocessors() { return 1; }
}  // namespace cuda
}  // namespace inlay

namespace {

using namespace inlay::cuda;

constexpr int kThreads = 64;

// out[t] = in[(t + 1) % 64], through shared memory.
template <bool kBroken>
__global__ void rotate(float* out, const float* in) {
  INLAY_SHARED(float, tile, kThreads);
  const int t = int(threadIdx.x);
  tile[t] = in[t];
  if (!kBroken) __syncthreads();
  out[t] = tile[(t + 1) % kThreads];
}

// out[t] = in[0]: right by luck where thread 0 runs first.
template <bool kBroken>
__global__ void broadcast(float* out, const float* in) {
  INLAY_SHARED(float, first, 1);
  if (threadIdx.x == 0) first[0] = in[0];
  if (!kBroken) __syncthreads();
  out[threadIdx.x] = first[0];
}

// The second write of the tile must not pass the first read.
template <bool kBroken>
__global__ void use_twice(float* out, const float* in) {
  INLAY_SHARED(float, tile, kThreads);
  const int t = int(threadIdx.x), other = kThreads - 1 - t;
  tile[t] = in[t];
  __syncthreads();
  const float once = tile[other];
  if (!kBroken) __syncthreads();
  tile[t] = 2 * in[t];
  __syncthreads();
  out[t] = once + tile[other];
}

template <bool kBroken>
__global__ void barrier_for_half(float* out, const float* in) {
  if (kBroken && threadIdx.x >= kThreads / 2) return;
  __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

template <bool kBroken>
__global__ void shuffle_for_most(float* out, const float* in) {
  const int t = int(threadIdx.x);
  out[t] = in[t];
  if (kBroken && t % kWarp == 31) return;
  out[t] = warp_sum(in[t]);
}

// One half of the warp sums, another waits in a vote of the same lanes.
template <bool kBroken>
__global__ void different_collectives(float* out, const float* in) {
  const int t = int(threadIdx.x);
  if (kBroken && t % kWarp < 16)
    out[t] = float(__ballot_sync(kAllLanes, 1));
  else
    out[t] = warp_sum(in[t]);
}

template <bool kBroken>
__global__ void wrong_lane(float* out, const float* in) {
  float sum = in[threadIdx.x];
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    sum += __shfl_xor_sync(kAllLanes, sum, kBroken ? lanes - 1 : lanes);
  out[threadIdx.x] = sum;
}

// A lane that is not in the mask has nothing to give.
template <bool kBroken>
__global__ void lane_outside_mask(float* out, const float* in) {
  const int t = int(threadIdx.x), lane = t % kWarp;
  out[t] = in[t];
  if (lane < 16) out[t] = __shfl_sync(0xffffu, in[t], kBroken ? lane + 16 : lane ^ 1);
}

template <bool kBroken>
__global__ void past_the_end(float* out, const float* in) {
  const int t = int(threadIdx.x);
  out[t] = in[kBroken ? t + 1 : t];
}

template <bool kBroken>
__global__ void past_the_tile(float* out, const float* in) {
  INLAY_SHARED(float, tile, kThreads);
  const int t = int(threadIdx.x);
  tile[t] = in[t];
  __syncthreads();
  out[t] = tile[kBroken ? t + 1 : t];
}

// The vector must start on 16 bytes.
template <bool kBroken>
__global__ void misaligned(float* out, const float* in) {
  if (threadIdx.x != 0) return;
  const float4 four = *reinterpret_cast<const float4*>(in + (kBroken ? 1 : 4));
  out[0] = four.x + four.w;
}

template <bool kBroken>
__global__ void unwritten(float* out, const float* in) {
  INLAY_SHARED(float, tile, kThreads);
  const int t = int(threadIdx.x);
  if (!kBroken || t != 5) tile[t] = in[t];
  __syncthreads();
  out[t] = tile[t];
}

uint32_t pair(float low, float high) { return uint32_t(to_bf16(high).bits) << 16 | to_bf16(low).bits; }

// D [16, 8] = A [16, 16]·B [16, 8] with A[i][k] = in[i] + k and B[k][j] = k - j; a[1] and a[2] are easily
// confused.
template <bool kBroken>
__global__ void fragments(float* out, const float* in) {
  const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
  if (threadIdx.x >= kWarp) return;
  const auto a_at = [&](int i, int k) { return pair(in[i] + float(k), in[i] + float(k + 1)); };
  const auto b_at = [&](int k, int j) { return pair(float(k - j), float(k + 1 - j)); };
  uint32_t a[4] = {a_at(g, 2 * t), a_at(g + 8, 2 * t), a_at(g, 2 * t + 8), a_at(g + 8, 2 * t + 8)};
  if (kBroken) std::swap(a[1], a[2]);
  const uint32_t b[2] = {b_at(2 * t, g), b_at(2 * t + 8, g)};
  float c[4] = {};
  mma(c, a, b, bf16{});
  for (int r = 0; r < 4; ++r) out[(g + 8 * (r / 2)) * 8 + 2 * t + r % 2] = c[r];
}

// The same from shared memory, where A lies with k along rows.
template <bool kBroken>
__global__ void transposed_fragments(float* out, const float* in) {
  INLAY_SHARED(uint16_t, left, 16 * 24);  // A[i][k] at [k·24 + i]
  INLAY_SHARED(uint16_t, right, 16 * 24);
  const int me = int(threadIdx.x), lane = me % 8, matrix = me / 8 % 4, g = me % kWarp / 4, t = me % 4;
  for (int i = me; i < 256; i += kThreads) {
    left[i / 16 * 24 + i % 16] = to_bf16(in[i % 16] + float(i / 16)).bits;
    right[i / 16 * 24 + i % 16] = to_bf16(float(i / 16 - i % 16)).bits;
  }
  __syncthreads();
  if (me >= kWarp) return;
  const int below = kBroken ? matrix % 2 : matrix / 2, second = kBroken ? matrix / 2 : matrix % 2;
  uint32_t a[4], b[4];
  ldmatrix_transposed(a, left + (8 * below + lane) * 24 + 8 * second);
  ldmatrix_transposed(b, right + (8 * (matrix % 2) + lane) * 24 + 8 * (matrix / 2));
  float c[4] = {};
  mma(c, a, {b[0], b[1]}, bf16{});
  for (int r = 0; r < 4; ++r) out[(g + 8 * (r / 2)) * 8 + 2 * t + r % 2] = c[r];
}

// And where A lies row by row.
template <bool kBroken>
__global__ void loaded_fragments(float* out, const float* in) {
  INLAY_SHARED(uint16_t, left, 16 * 24);   // A[i][k] at [i·24 + k]
  INLAY_SHARED(uint16_t, right, 16 * 24);  // B[k][j] at [k·24 + j]
  const int me = int(threadIdx.x), lane = me % 8, matrix = me / 8 % 4, g = me % kWarp / 4, t = me % 4;
  for (int i = me; i < 256; i += kThreads) {
    left[i / 16 * 24 + i % 16] = to_bf16(in[i / 16] + float(i % 16)).bits;
    right[i / 16 * 24 + i % 16] = to_bf16(float(i / 16 - i % 16)).bits;
  }
  __syncthreads();
  if (me >= kWarp) return;
  const int below = kBroken ? matrix / 2 : matrix % 2, second = kBroken ? matrix % 2 : matrix / 2;
  uint32_t a[4], b[4];
  ldmatrix(a, left + (8 * below + lane) * 24 + 8 * second);
  ldmatrix_transposed(b, right + (8 * (matrix % 2) + lane) * 24 + 8 * (matrix / 2));
  float c[4] = {};
  mma(c, a, {b[0], b[1]}, bf16{});
  for (int r = 0; r < 4; ++r) out[(g + 8 * (r / 2)) * 8 + 2 * t + r % 2] = c[r];
}

// Shared memory holds what was copied only after a wait: for any group, and for the right one.
template <bool kBroken>
__global__ void no_wait(float* out, const float* in) {
  INLAY_SHARED(float, tile, 4 * kThreads);
  const int t = int(threadIdx.x);
  cp_async(tile + 4 * t, in + t / 4 * 4, true);
  cp_async_commit();
  if (!kBroken) cp_async_wait<0>();
  out[t] = tile[4 * t + t % 4];
}

template <bool kBroken>
__global__ void wrong_group(float* out, const float* in) {
  INLAY_SHARED(float, tile, 8 * kThreads);
  const int t = int(threadIdx.x);
  for (int half = 0; half < 2; ++half) {
    cp_async(tile + 8 * t + 4 * half, in + t / 4 * 4, half == 1);
    cp_async_commit();
  }
  cp_async_wait<kBroken ? 1 : 0>();
  out[t] = tile[8 * t + t % 4] + tile[8 * t + 4 + t % 4];  // the first half is zeros
}

// Blocks hand in numbers, and the one that comes last adds them: that is not the one with the highest number.
constexpr unsigned kBlocks = 8;
__device__ float handed_in[kBlocks][kThreads];
__device__ unsigned arrived;

template <bool kBroken>
__global__ void last_block(float* out, const float* in) {
  INLAY_SHARED(int, is_last, 1);
  const int t = int(threadIdx.x);
  handed_in[blockIdx.x][t] = float(blockIdx.x + 1) * in[t];
  __threadfence();
  __syncthreads();
  if (t == 0) is_last[0] = (kBroken ? blockIdx.x : atomicAdd(&arrived, 1u)) == kBlocks - 1;
  __syncthreads();
  if (!is_last[0]) return;
  out[t] = 0;
  for (unsigned b = 0; b < kBlocks; ++b) out[t] += load_l2(&handed_in[b][t]);
}

// --- what each must give
// ------------------------------------------------------------------------------------------

using Wanted = std::function<float(const std::vector<float>& in, int t)>;

struct Case {
  void (*kernel)(float*, const float*);
  size_t outputs;
  Wanted wanted;
  unsigned blocks = 1;
};

float sum_of_warp(const std::vector<float>& in, int t) {
  float sum = 0;
  for (int lane = 0; lane < kWarp; ++lane) sum += in[size_t(t / kWarp * kWarp + lane)];
  return sum;
}

float product_at(const std::vector<float>& in, int at) {
  float sum = 0;
  for (int k = 0; k < 16; ++k) sum += (in[size_t(at / 8)] + float(k)) * float(k - at % 8);
  return sum;
}

template <bool kBroken>
std::map<std::string, Case> cases() {
  const Wanted same = [](const auto& in, int t) { return in[size_t(t)]; };
  return {
      {"rotate", {rotate<kBroken>, 64, [](const auto& in, int t) { return in[size_t(t + 1) % 64]; }}},
      {"broadcast", {broadcast<kBroken>, 64, [](const auto& in, int) { return in[0]; }}},
      {"use_twice", {use_twice<kBroken>, 64, [](const auto& in, int t) { return 3 * in[size_t(63 - t)]; }}},
      {"barrier_for_half", {barrier_for_half<kBroken>, 64, same}},
      {"shuffle_for_most", {shuffle_for_most<kBroken>, 64, sum_of_warp}},
      {"different_collectives", {different_collectives<kBroken>, 64, sum_of_warp}},
      {"wrong_lane", {wrong_lane<kBroken>, 64, sum_of_warp}},
      {"lane_outside_mask",
       {lane_outside_mask<kBroken>, 64,
        [](const auto& in, int t) { return t % 32 < 16 ? in[size_t(t ^ 1)] : in[size_t(t)]; }}},
      {"past_the_end", {past_the_end<kBroken>, 64, same}},
      {"past_the_tile", {past_the_tile<kBroken>, 64, same}},
      {"misaligned", {misaligned<kBroken>, 1, [](const auto& in, int) { return in[4] + in[7]; }}},
      {"unwritten", {unwritten<kBroken>, 64, same}},
      {"fragments", {fragments<kBroken>, 128, product_at}},
      {"transposed_fragments", {transposed_fragments<kBroken>, 128, product_at}},
      {"loaded_fragments", {loaded_fragments<kBroken>, 128, product_at}},
      {"no_wait", {no_wait<kBroken>, 64, same}},
      {"wrong_group", {wrong_group<kBroken>, 64, same}},
      {"last_block",
       {last_block<kBroken>, 64, [](const auto& in, int t) { return 36 * in[size_t(t)]; }, kBlocks}},
  };
}

int run(const Case& that) {
  std::vector<float> in(kThreads), out(that.outputs, NAN);
  for (int i = 0; i < kThreads; ++i) in[size_t(i)] = float(i * i % 13 + i);
  launch("broken", that.kernel, Grid{dim3(that.blocks), dim3(kThreads)}, out.data(), in.data());
  for (size_t t = 0; t < that.outputs; ++t)
    if (!(out[t] == that.wanted(in, int(t)))) {
      std::printf("wrong at %zu: %g, wanted %g\n", t, double(out[t]), double(that.wanted(in, int(t))));
      return 1;
    }
  std::printf("right\n");
  return 0;
}

}  // namespace

int main(int count, char** words) {
  if (count != 4) return std::fprintf(stderr, "simt_broken CASE broken|fixed forward|reverse|random\n"), 2;
  const bool broken = !std::strcmp(words[2], "broken");
  const std::string order = words[3];
  inlay::simt::set_order(order == "forward"   ? inlay::simt::Order::forward
                         : order == "reverse" ? inlay::simt::Order::reverse
                                              : inlay::simt::Order::random,
                         7);
  try {
    return run((broken ? cases<true>() : cases<false>()).at(words[1]));
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return 3;
  }
}
