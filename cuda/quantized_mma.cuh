// quantized_linear.cu on tensor cores: 16-bit x, K and blocksize multiples of 64, up to 64 rows of x.
//
// A tile is 16 rows of W (the m16 of the product) by 8·Tiles tokens (its n8). A sum does not care in which
// order its terms come, so that k is permuted to suit the layout: of a piece of 64 columns, lane 4g + t takes
// [16t, 16t + 16) of rows g and g + 8, eight neighbouring bytes each. Those are its A fragments of four
// products, two bytes a row and product; the B fragments are x at the same columns, 32 neighbouring bytes. No
// shuffles, nothing repacked.
//
// A byte becomes a pair of levels by one lookup in a table of 256 pairs, one copy per bank: 32 KB.
//
// The warps of a block take pieces in turn (warp w: w, w + 8, ...) and add up in the order of their numbers,
// so that results do not depend on timing. A chunk of the line that blocks share (shares.cuh) is a piece for
// each warp, 4 KB of W: the least that keeps all of them at work.
#pragma once

#include <algorithm>

#include "codes.cuh"
#include "ptx/mma.cuh"
#include "scratch.h"
#include "shares.cuh"

namespace inlay {
namespace cuda {

namespace {

struct Weight {
  const uint8_t* packed;
  const float* levels;  // [16]
  Scales scales;
  int64_t rows, columns;
};

struct Branch {
  const float* inner;  // null: there is none
  Rows<const float> b;
  int64_t rank;

  __device__ __forceinline__ float at(int64_t m, int64_t n) const {
    float sum = 0.0f;
    if (inner)
      for (int64_t j = 0; j < rank; ++j) sum = fmaf(inner[m * rank + j], b.at(n)[j], sum);
    return sum;
  }
};

template <class T>
struct Product {
  Rows<T> y;
  Rows<const T> x;
  Weight w;
  const T* bias;
  Branch branch;
  int64_t tokens;

  __device__ __forceinline__ void skip(int64_t count) {
    x.data += count * x.stride, y.data += count * y.stride, tokens -= count;
    if (branch.inner) branch.inner += count * branch.rank;
  }
  __device__ __forceinline__ void put(int64_t m, int64_t n, float value) const {
    value += branch.at(m, n);
    from_float(bias ? value + to_float(bias[n]) : value, y.at(m)[n]);
  }
};

constexpr int kPiece = 64;
constexpr int kRows = 16;
constexpr int kWarps = 8;
constexpr int kMostTokens =
    64;  // in groups of 32 that read W from L2 after the first; 64 at once would spill

// Blocks that a multiprocessor runs at a time: 65,536 registers and the tables (3·32 KB) set it, and a launch
// has that many, so that each fills its table once.
template <int Tiles>
constexpr int kResident = Tiles == 1 ? 3 : 2;

// Pieces whose bytes a warp loads before it uses the first. Latency times bandwidth is 25 KB a multiprocessor
// on an H200 (0.75 us); four pieces of 512 bytes by 24 warps are 48 KB. With 32 tokens, four would spill
// registers.
template <int Tiles>
constexpr int kAhead = Tiles <= 2 ? 4 : 2;

// A byte as a pair in one register, the high nibble's level in the low half.
template <class T>
struct Pairs {
  uint32_t* copies;  // shared, [256·32]

  __device__ __forceinline__ void fill(const float* levels) const {
    for (int i = int(threadIdx.x); i < 256 * kWarp; i += kWarps * kWarp) {
      const int byte = i / kWarp;
      T low, high;
      from_float(levels[byte >> 4], low);
      from_float(levels[byte & 15], high);
      copies[i] = uint32_t(high.bits) << 16 | low.bits;
    }
    __syncthreads();
  }
  __device__ __forceinline__ uint32_t at(uint32_t byte) const {
    return copies[byte * kWarp + threadIdx.x % kWarp];
  }
};

// What a lane needs of one piece of W: eight bytes and a scale, of rows g and g + 8.
struct Bytes {
  uint2 row[2];
  float scale[2];
};

// Of `Count` pieces, kWarps apart; those beyond `end` are the first once more. Nested: the scales are. Asking
// for each of them would put branches between the loads, which would then wait for one another.
template <bool Nested, int Count>
__device__ __forceinline__ void fetch(Bytes (&bytes)[Count], const Weight& w, const int64_t (&row)[2],
                                      int64_t first, int64_t end, int t) {
  for (int i = 0; i < Count; ++i) {
    const int64_t piece = first + i * kWarps < end ? first + i * kWarps : first;
    for (int r = 0; r < 2; ++r) {
      const int64_t at = row[r] * w.columns + piece * kPiece;
      bytes[i].row[r] = *reinterpret_cast<const uint2*>(w.packed + (at >> 1) + 8 * t);
      bytes[i].scale[r] = w.scales.at<Nested>(at);
    }
  }
}

template <class T, int Tiles>
struct Sums {
  float at[Tiles][4] = {};

  // Adds W[rows, piece] · x[tokens, piece]ᵀ.
  __device__ __forceinline__ void add(const Bytes& bytes, const Pairs<T>& pairs, Rows<const T> x,
                                      int64_t tokens, int64_t column, int g) {
    uint32_t a[4][4];  // of the four products, decoded once for all tokens
    for (int s = 0; s < 4; ++s) {
      const uint32_t low = (s < 2 ? bytes.row[0].x : bytes.row[0].y) >> (16 * (s % 2));
      const uint32_t high = (s < 2 ? bytes.row[1].x : bytes.row[1].y) >> (16 * (s % 2));
      a[s][0] = pairs.at(low & 255), a[s][2] = pairs.at(low >> 8 & 255);
      a[s][1] = pairs.at(high & 255), a[s][3] = pairs.at(high >> 8 & 255);
    }
    for (int tile = 0; tile < Tiles; ++tile) {
      float part[4] = {};
      for (int half = 0; half < 2; ++half) {  // 16 bytes of x are two products
        uint4 values = {0, 0, 0, 0};
        if (tile * 8 + g < tokens)
          values = *reinterpret_cast<const uint4*>(x.at(tile * 8 + g) + column + 8 * half);
        const uint32_t first[2] = {values.x, values.y}, second[2] = {values.z, values.w};
        mma(part, a[2 * half], first, T{});
        mma(part, a[2 * half + 1], second, T{});
      }
      for (int i = 0; i < 4; ++i) at[tile][i] = fmaf(bytes.scale[i / 2], part[i], at[tile][i]);
    }
  }
};

// This warp's sums over its pieces of a part of a tile.
template <class T, int Tiles>
__device__ __forceinline__ void multiply(Sums<T, Tiles>& sums, const Product<T>& p, const Pairs<T>& pairs,
                                         const Part& part) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp, g = lane / 4, t = lane % 4;
  const int64_t n = int64_t(part.tile) * kRows + g, last = p.w.rows - 1;
  const int64_t row[2] = {n < last ? n : last,
                          n + 8 < last ? n + 8 : last};  // those beyond it are not stored
  const int64_t pieces = p.w.columns / kPiece, stop = int64_t(part.end) * kWarps;
  const int64_t end = stop < pieces ? stop : pieces;
  for (int64_t first = int64_t(part.first) * kWarps + warp; first < end; first += kWarps * kAhead<Tiles>) {
    Bytes bytes[kAhead<Tiles>];
    p.w.scales.codes ? fetch<true>(bytes, p.w, row, first, end, t)
                     : fetch<false>(bytes, p.w, row, first, end, t);
    for (int i = 0; i < kAhead<Tiles>; ++i) {
      const int64_t piece = first + i * kWarps;
      if (piece < end) sums.add(bytes[i], pairs, p.x, p.tokens, piece * kPiece + 16 * t, g);
    }
  }
}

// total [16, 8·Tiles], shared: the sums of all warps, added up in turn.
template <class T, int Tiles>
__device__ __forceinline__ void add_warps(float* total, const Sums<T, Tiles>& sums) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp, g = lane / 4, t = lane % 4;
  for (int turn = 0; turn < kWarps; ++turn) {
    if (turn == warp)
      for (int tile = 0; tile < Tiles; ++tile)
        for (int i = 0; i < 4; ++i) {
          float& target = total[(g + 8 * (i / 2)) * 8 * Tiles + tile * 8 + 2 * t + i % 2];
          target = turn ? target + sums.at[tile][i] : sums.at[tile][i];
        }
    __syncthreads();
  }
}

// Calls f(i, m, r) for each token m and row r of a tile; neighbouring threads store neighbouring outputs.
template <int Tiles, class F>
__device__ __forceinline__ void each_output(F&& f) {
  for (int i = int(threadIdx.x); i < kRows * 8 * Tiles; i += kWarps * kWarp) f(i, i / kRows, i % kRows);
}

template <class T, int Tiles>
__global__ void __launch_bounds__(kWarps* kWarp, kResident<Tiles>)
    mma_kernel(Product<T> p, Line line, Scratch scratch) {
  INLAY_DYNAMIC_SHARED(uint32_t, memory);  // the table, then [16][8·Tiles] sums
  constexpr int kWidth = 8 * Tiles;
  float* const total = reinterpret_cast<float*>(memory + 256 * kWarp);
  const Pairs<T> pairs{memory};
  pairs.fill(p.w.levels);
  p.skip(int64_t(blockIdx.y) * kWidth);
  const Stretch mine(line, blockIdx.x);
  for (unsigned i = 0; i < mine.size(); ++i) {
    const Part part = mine.at(i);
    const auto store = [&](int m, int r, float value) {
      const int64_t n = int64_t(part.tile) * kRows + r;
      if (m < p.tokens && n < p.w.rows) p.put(m, n, value);
    };
    Sums<T, Tiles> sums;
    multiply(sums, p, pairs, part);
    add_warps(total, sums);
    if (part.end - part.first == line.chunks) {
      each_output<Tiles>([&](int, int m, int r) { store(m, r, total[r * kWidth + m]); });
    } else {
      const Handover<kRows * kWidth> shared(scratch, line, part.tile, blockIdx.y);
      float* const slot = shared.of(blockIdx.x - shared.first);
      each_output<Tiles>([&](int at, int m, int r) { slot[at] = total[r * kWidth + m]; });
      if (shared.hand_in()) each_output<Tiles>([&](int at, int m, int r) { store(m, r, shared.total(at)); });
    }
    __syncthreads();  // `total` is written again
  }
}

// How W is cut. Whole tiles go round in waves of as many blocks as are resident. Sharing them pays
//   - where the last wave leaves a multiprocessor one block, whose 16 KB under way are less than the 25 KB
//     that hide latency, or none: of the 896 tiles of [14336, 4096], two waves of 3·132 leave 104;
//   - where a share is no less than what a block loads before it uses the first of it, 16 KB of packed bytes,
//     or 8 KB with 32 tokens: it waits for memory once, and a smaller one would wait as long;
//   - where a tile that had a block for itself is at least halved: handing in costs about one such wait, for
//     trips to L2 with 0.5 to 2 KB. At [1024, 4096] 64 tiles of 32 KB become 128 shares.
template <int Tiles>
Line line_of(int64_t rows, int64_t columns, int64_t tokens, bool may_split) {
  const unsigned tiles = blocks_for(rows, kRows), chunks = std::max(1u, blocks_for(columns, kPiece * kWarps));
  const unsigned all = blocks_for(int64_t(tiles) * chunks, 1), groups = blocks_for(tokens, 8 * Tiles);
  const unsigned processors = unsigned(multiprocessors()), resident = kResident<Tiles> * processors / groups;
  const unsigned left = tiles % resident * groups, shares = std::min(resident, all / kAhead<Tiles>);
  const bool split = may_split && left > 0 && left <= processors && shares >= std::min(2 * tiles, resident);
  return cut(tiles, chunks, split ? shares : std::min(tiles, resident), split);
}

// fp32 numbers of scratch: what is handed in.
template <int Tiles>
int64_t sums_of(const Line& line, int64_t tokens) {
  return line.split ? int64_t(line.blocks) * blocks_for(tokens, 8 * Tiles) * 2 * kRows * 8 * Tiles : 0;
}

// A counter for each block of any launch.
int64_t counters_of() { return int64_t(kResident<1>) * multiprocessors(); }

template <class T, int Tiles>
void launch_mma(const Product<T>& p, const TensorView& counters, const TensorView& sums) {
  Line line = line_of<Tiles>(p.w.rows, p.w.columns, p.tokens, true);
  if (counters.shape[0] < counters_of() || sums.shape[0] < sums_of<Tiles>(line, p.tokens))
    line = line_of<Tiles>(p.w.rows, p.w.columns, p.tokens, false);
  Grid grid{dim3(line.blocks, blocks_for(p.tokens, 8 * Tiles)), dim3(kWarps * kWarp)};
  grid.shared = sizeof(uint32_t) * 256 * kWarp + sizeof(float) * kRows * 8 * Tiles;
  const Scratch scratch{data<unsigned long long>(counters), data<float>(sums)};
  launch("quantized_linear (mma)", mma_kernel<T, Tiles>, grid, p, line, scratch);
}

// Calls f(Tiles) with the 8-token tiles of a group.
template <class F>
auto with_tiles(int64_t tokens, F&& f) {
  if (tokens <= 8) return f(std::integral_constant<int, 1>{});
  if (tokens <= 16) return f(std::integral_constant<int, 2>{});
  return f(std::integral_constant<int, 4>{});
}

template <class T>
void with_tensor_cores(const Product<T>& p, const TensorView& counters, const TensorView& sums) {
  with_tiles(p.tokens, [&](auto tiles) { launch_mma<T, decltype(tiles)::value>(p, counters, sums); });
}

void with_tensor_cores(const Product<float>&, const TensorView&, const TensorView&) {}

bool fits_tensor_cores(const TensorView& x, const TensorView& packed, int64_t blocksize) {
  return x.dtype != DType::f32 && x.shape[1] % kPiece == 0 && blocksize % kPiece == 0 &&
         x.shape[0] <= kMostTokens && rows_aligned(x) && reinterpret_cast<uintptr_t>(packed.data) % 8 == 0;
}

}  // namespace

}  // namespace cuda
}  // namespace inlay
