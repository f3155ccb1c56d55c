// CUDA's vocabulary on the host: the same .cu files compile with g++ against this header and run thread by
// thread.
//
// A thread is a fiber. Between rendezvous threads run one after the other, in an order the test chooses, so
// that a missing barrier changes results. A barrier or warp collective is a rendezvous: if a thread it names
// never comes, that is an error naming both. Shared memory starts as 0xFF bytes, which are NaN as float, bf16
// and half.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// Of the thread that runs now; the scheduler sets them at each switch.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace inlay {
namespace simt {

constexpr int kWarp = 32;
constexpr int kExchange = 64;  // bytes a thread can bring to a collective, and take from it

enum class Order { forward, reverse, random };

// How threads run between rendezvous, and blocks within a launch.
void set_order(Order order, uint64_t seed);

// Runs `body` once per thread of the grid. Throws std::runtime_error naming kernel, block and threads when a
// barrier or collective is not reached by every thread it names.
void run(const char* kernel, dim3 grid, dim3 block, size_t dynamic_shared, void (*body)(void*),
         void* arguments);

// Shared memory of the running block: `key` tells arrays apart, every thread of the block gets the same
// address.
void* shared(int key, size_t bytes);
void* dynamic_shared();

void barrier();

// What one lane brought and takes away.
struct Lane {
  unsigned char in[kExchange], out[kExchange];
  bool here = false;
};

// A warp collective: waits for every lane in `mask`, then `complete` computes out from in for all of them at
// once.
using Complete = void (*)(Lane* lanes, unsigned mask);
void collective(const char* name, unsigned mask, Complete complete, const void* in, size_t in_bytes,
                void* out, size_t out_bytes);

// Asynchronous copies of the running thread (ptx/cp_async.cuh). The hardware may copy at once, or as late as
// at the wait: forward order copies late, reverse at once, random either way, copy by copy.
struct alignas(16) Copied {
  unsigned char bytes[16];
};
void start_copy(Copied* to, const Copied* from);  // from null: zeros
void commit_copies();
void wait_for_copies(int groups);  // until at most that many of the newest groups are under way

template <class T>
struct Brought {
  T value;
  int other;
};

template <class T, class Source>
T exchange(const char* name, unsigned mask, T value, int other, Source) {
  static_assert(sizeof(Brought<T>) <= kExchange, "a lane brings at most kExchange bytes");
  Brought<T> in{value, other};
  T out;
  collective(
      name, mask,
      [](Lane* lanes, unsigned) {
        for (int lane = 0; lane < kWarp; ++lane) {
          if (!lanes[lane].here) continue;
          Brought<T> mine;
          memcpy(&mine, lanes[lane].in, sizeof mine);
          const int from = Source::of(lane, mine.other);
          // A lane outside [0, 32) or one that is not taking part leaves the value as it was, as the hardware
          // does for the former; the latter is undefined there, and NaN bytes here.
          if (from < 0 || from >= kWarp) {
            memcpy(lanes[lane].out, &mine.value, sizeof(T));
          } else if (!lanes[from].here) {
            memset(lanes[lane].out, 0xff, sizeof(T));
          } else {
            memcpy(lanes[lane].out, lanes[from].in, sizeof(T));
          }
        }
      },
      &in, sizeof in, &out, sizeof out);
  return out;
}

struct FromLane {
  static int of(int, int other) { return other & (kWarp - 1); }
};
struct FromXor {
  static int of(int lane, int other) { return lane ^ other; }
};
struct FromBelow {
  static int of(int lane, int other) { return lane - other; }
};
struct FromAbove {
  static int of(int lane, int other) { return lane + other; }
};

unsigned vote(const char* name, unsigned mask, bool predicate);

}  // namespace simt
}  // namespace inlay

inline void __syncthreads() { inlay::simt::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { inlay::simt::vote("__syncwarp", mask, true); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return inlay::simt::vote("__ballot_sync", mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return inlay::simt::vote("__any_sync", mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return inlay::simt::vote("__all_sync", mask, predicate == 0) == 0;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return inlay::simt::exchange("__shfl_sync", mask, value, lane, inlay::simt::FromLane{});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return inlay::simt::exchange("__shfl_xor_sync", mask, value, lanes, inlay::simt::FromXor{});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  return inlay::simt::exchange("__shfl_up_sync", mask, value, int(delta), inlay::simt::FromBelow{});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  return inlay::simt::exchange("__shfl_down_sync", mask, value, int(delta), inlay::simt::FromAbove{});
}

// One thread runs at a time, so an atomic is the plain operation; it returns the old value.
template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <class T>
T atomicMax(T* address, T value) {
  const T old = *address;
  if (value > old) *address = value;
  return old;
}
inline void __threadfence() {}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;
  return product;
}
inline float __fadd_rn(float a, float b) {
  volatile float sum = a + b;
  return sum;
}
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}

// Shared arrays, the same in both worlds: flat, by name, type and element count.
#define INLAY_SHARED(T, name, count) \
  T* const name = static_cast<T*>(inlay::simt::shared(__COUNTER__, sizeof(T) * (count)))
#define INLAY_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(inlay::simt::dynamic_shared())
