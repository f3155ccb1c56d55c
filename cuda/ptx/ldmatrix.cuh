// ldmatrix: a warp reads four 8x8 matrices of 16-bit elements from shared memory as fragments of mma.
//
// Lane l names the start of row l % 8 of matrix l / 8: 16 bytes, aligned. Lane 4g + t receives of matrix i in
// out[i] the elements (g, 2t) and (g, 2t+1), the first in the low half; transposed, (2t, g) and (2t+1, g).
// The latter is what mma takes of an operand stored with the index of the sum along rows.
#pragma once

#include "device.cuh"

namespace inlay {
namespace cuda {

#if defined(__CUDACC__)

__device__ __forceinline__ void ldmatrix(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}

#else

namespace ldmatrix_detail {

struct alignas(16) Row {
  uint16_t at[8];
};

template <bool kTransposed>
void distribute(simt::Lane* lanes, unsigned) {
  const Row* rows[32];
  for (int lane = 0; lane < 32; ++lane) memcpy(&rows[lane], lanes[lane].in, sizeof rows[lane]);
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    uint32_t out[4];
    for (int i = 0; i < 4; ++i) {
      const uint16_t first = kTransposed ? rows[8 * i + 2 * t]->at[g] : rows[8 * i + g]->at[2 * t];
      const uint16_t second = kTransposed ? rows[8 * i + 2 * t + 1]->at[g] : rows[8 * i + g]->at[2 * t + 1];
      out[i] = uint32_t(second) << 16 | first;
    }
    memcpy(lanes[lane].out, out, sizeof out);
  }
}

}  // namespace ldmatrix_detail

inline void ldmatrix(uint32_t (&out)[4], const void* row) {
  simt::collective("ldmatrix", 0xffffffffu, ldmatrix_detail::distribute<false>, &row, sizeof row, out,
                   sizeof out);
}
inline void ldmatrix_transposed(uint32_t (&out)[4], const void* row) {
  simt::collective("ldmatrix", 0xffffffffu, ldmatrix_detail::distribute<true>, &row, sizeof row, out,
                   sizeof out);
}

#endif

}  // namespace cuda
}  // namespace inlay
