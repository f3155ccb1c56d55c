// Some tokens' neighbouring columns of a 16-bit matrix in shared memory, [Height][Width + kPad], brought
// there by cp.async and read as fragments of mma.
#pragma once

#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "rows.cuh"

namespace inlay {
namespace cuda {

constexpr int kPack = 8;     // elements in 16 bytes
constexpr int kPad = kPack;  // rows then start on different banks, eight of them on all

enum class Inner { columns, tokens };

template <class T, int Height, int Width>
struct Slab {
  static constexpr int kStride = Width + kPad;
  static constexpr int kSize = Height * kStride;
  static_assert(kStride * sizeof(T) / 16 % 2 == 1, "an odd number of 16-byte steps visits all banks");
  T* at;

  // Tokens [first, end) of columns [column, columns); zeros beyond either.
  template <bool Aligned, int Threads>
  __device__ __forceinline__ void fetch(Rows<const T> from, int64_t first, int64_t end, int64_t column,
                                        int64_t columns) const {
    for (int i = int(threadIdx.x); i < Height * Width / kPack; i += Threads) {
      const int row = i / (Width / kPack), across = i % (Width / kPack) * kPack;
      const int64_t token = first + row, left = columns - column - across;
      T* const to = at + row * kStride + across;
      const T* const source = from.at(token) + column + across;
      if (Aligned) {
        const bool inside = token < end && left > 0;  // columns is a multiple of kPack
        cp_async(to, inside ? source : from.data, inside);
      } else {
        for (int e = 0; e < kPack; ++e) to[e] = token < end && e < left ? source[e] : T{};
      }
    }
  }

  // Four 8x8 fragments: tokens [token, +16) by columns [column, +16), the neighbours along `inner` first.
  __device__ __forceinline__ void fragments(uint32_t (&out)[4], int token, int column, Inner inner) const {
    const int lane = int(threadIdx.x) % kWarp, matrix = lane / 8;
    const int second = inner == Inner::columns ? matrix % 2 : matrix / 2;
    const int below = inner == Inner::columns ? matrix / 2 : matrix % 2;
    ldmatrix_transposed(out, at + (token + 8 * below + lane % 8) * kStride + column + 8 * second);
  }

  // The same 16 by 16 elements with tokens as the rows of the m16 operand and columns as the index of the
  // sum.
  __device__ __forceinline__ void row_fragments(uint32_t (&out)[4], int token, int column) const {
    const int lane = int(threadIdx.x) % kWarp, matrix = lane / 8;
    ldmatrix(out, at + (token + 8 * (matrix % 2) + lane % 8) * kStride + column + 8 * (matrix / 2));
  }
};

// sums [16, 8·Tiles] += leftᵀ·right over the slabs' tokens, for the 16 columns of `left` from `column` on.
template <class T, int Height, int Width, int Tiles>
__device__ __forceinline__ void add_over_tokens(float (&sums)[Tiles][4], const Slab<T, Height, Width>& left,
                                                const Slab<T, Height, 8 * Tiles>& right, int column) {
  for (int token = 0; token < Height; token += 16) {
    uint32_t a[4];
    left.fragments(a, token, column, Inner::columns);
    for (int tile = 0; tile < Tiles; tile += 2) {
      uint32_t b[4];
      right.fragments(b, token, 8 * tile, Inner::tokens);
      const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
      mma(sums[tile], a, first, T{});
      mma(sums[tile + 1], a, second, T{});
    }
  }
}

}  // namespace cuda
}  // namespace inlay
