// mma.sync.m16n8k16: a warp multiplies A [16, 16] by B [16, 8] and adds C [16, 8], 16-bit inputs, fp32 sums.
//
// Lane = 4·g + t holds, as in the PTX ISA ("Matrix fragments for mma.m16n8k16 with floating point type"):
//   A  a[0] (g, 2t), (g, 2t+1)     a[1] (g+8, 2t), (g+8, 2t+1)    a[2] (g, 2t+8), (g, 2t+9)   a[3] (g+8,
//   2t+8), .. B  b[0] (2t, g), (2t+1, g)     b[1] (2t+8, g), (2t+9, g) C  c[0] (g, 2t)   c[1] (g, 2t+1) c[2]
//   (g+8, 2t)   c[3] (g+8, 2t+1)
// Of a pair in one register the first element is in the low half.
#pragma once

#include "device.cuh"

namespace inlay {
namespace cuda {

#if defined(__CUDACC__)

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

namespace mma_detail {

struct Fragments {
  uint32_t a[4], b[2];
  float c[4];
};

template <class T>
float half_of(uint32_t pair, int which) {
  return to_float(T{uint16_t(pair >> (16 * which))});
}

// Gathers A and B from all lanes as the table above says, multiplies, and hands each lane its part of the
// sum.
template <class T>
void multiply(simt::Lane* lanes, unsigned) {
  float a[16][16], b[16][8];
  Fragments mine[32];
  for (int lane = 0; lane < 32; ++lane) {
    Fragments& f = mine[lane];
    memcpy(&f, lanes[lane].in, sizeof f);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][2 * t + half + 8 * (r / 2)] = half_of<T>(f.a[r], half);
      for (int r = 0; r < 2; ++r) b[2 * t + half + 8 * r][g] = half_of<T>(f.b[r], half);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + 8 * (r / 2), column = 2 * (lane % 4) + r % 2;
      for (int k = 0; k < 16; ++k) mine[lane].c[r] += a[row][k] * b[k][column];
    }
    memcpy(lanes[lane].out, mine[lane].c, sizeof mine[lane].c);
  }
}

}  // namespace mma_detail

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
  mma_detail::Fragments in;
  memcpy(in.a, a, sizeof a);
  memcpy(in.b, b, sizeof b);
  memcpy(in.c, c, sizeof c);
  simt::collective("mma", 0xffffffffu, mma_detail::multiply<T>, &in, sizeof in, c, sizeof c);
}

#endif

}  // namespace cuda
}  // namespace inlay
