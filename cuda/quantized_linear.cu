// y = x·Wᵀ + bias for a few rows x, straight from bitsandbytes' four-bit layout: W is read once and never
// written. A low-rank branch s·(x·Aᵀ)·Bᵀ is added before the one rounding: r more terms of a sum of K, 4·N·r
// bytes beside N·K/2 of W, and none of the five launches and two passes over y that it costs by itself.
//
//   x  [M, K]    W  [N, K], packed two codes a byte    y  [M, N]    bias  [N] or none
//   inner = s·x·Aᵀ  fp32 [M, r] (lora_linear.cu)    B  fp32 [N, r]
//
// Two kernels. Tensor cores (16-bit x, K and blocksize multiples of 64, M ≤ 64): levels in x's dtype, their
// fp32 scale applied to the fp32 sum of each 64-wide piece. Otherwise one warp per row of W, all in fp32.
#include "codes.cuh"
#include "ptx/mma.cuh"

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
__device__ __forceinline__ void put(Rows<T> y, const T* bias, const Branch& branch, int64_t m, int64_t n,
                                    float value) {
  value += branch.at(m, n);
  from_float(bias ? value + to_float(bias[n]) : value, y.at(m)[n]);
}

// --- any shape and dtype
// -----------------------------------------------------------------------------------------

constexpr int kDotThreads = 256;
constexpr int kTokens = 4;  // rows of x that share one pass over W

template <class T>
__global__ void __launch_bounds__(kDotThreads)
    dot_kernel(Rows<T> y, Rows<const T> x, Weight w, const T* bias, Branch branch, int64_t tokens) {
  INLAY_SHARED(float, copies, Levels::kSize);
  const Levels table{copies};
  table.fill(w.levels);
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t n = int64_t(blockIdx.x) * (kDotThreads / kWarp) + threadIdx.x / kWarp;
  if (n >= w.rows) return;  // a whole warp
  const int64_t start = n * w.columns, first = int64_t(blockIdx.y) * kTokens;
  float sums[kTokens] = {};
  for (int64_t k = lane; k < w.columns; k += kWarp) {
    const int64_t i = start + k;
    const float weight = table.at(code_of(w.packed[i >> 1], int(i & 1))) * w.scales.at(i);
    for (int m = 0; m < kTokens; ++m)
      if (first + m < tokens) sums[m] = fmaf(weight, to_float(x.at(first + m)[k]), sums[m]);
  }
  for (int m = 0; m < kTokens; ++m) {
    const float total = warp_sum(sums[m]);
    if (lane == 0 && first + m < tokens) put(y, bias, branch, first + m, n, total);
  }
}

// --- tensor cores
// ------------------------------------------------------------------------------------------------
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
// so that results do not depend on timing.

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

__device__ __forceinline__ Bytes fetch(const Weight& w, const int64_t (&row)[2], int64_t piece, int t) {
  Bytes result;
  for (int r = 0; r < 2; ++r) {
    const int64_t i = row[r] * w.columns + piece * kPiece;
    result.row[r] = *reinterpret_cast<const uint2*>(w.packed + (i >> 1) + 8 * t);
    result.scale[r] = w.scales.at(i);
  }
  return result;
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

template <class T, int Tiles>
__global__ void __launch_bounds__(kWarps* kWarp, kResident<Tiles>)
    mma_kernel(Rows<T> y, Rows<const T> x, Weight w, const T* bias, Branch branch, int64_t tokens) {
  INLAY_DYNAMIC_SHARED(uint32_t, memory);  // the table, then [16][8·Tiles] sums
  constexpr int kWidth = 8 * Tiles;
  float* const total = reinterpret_cast<float*>(memory + 256 * kWarp);
  const Pairs<T> pairs{memory};
  pairs.fill(w.levels);
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp, g = lane / 4, t = lane % 4;
  const int64_t pieces = w.columns / kPiece;
  const int64_t skipped = int64_t(blockIdx.y) * kWidth;
  x.data += skipped * x.stride, y.data += skipped * y.stride, tokens -= skipped;
  if (branch.inner) branch.inner += skipped * branch.rank;

  for (int64_t n = int64_t(blockIdx.x) * kRows; n < w.rows; n += int64_t(gridDim.x) * kRows) {
    // Rows beyond the last are computed from it and not stored.
    const int64_t row[2] = {n + g < w.rows ? n + g : w.rows - 1, n + g + 8 < w.rows ? n + g + 8 : w.rows - 1};
    Sums<T, Tiles> sums;
    for (int64_t first = warp; first < pieces; first += kWarps * kAhead<Tiles>) {
      Bytes bytes[kAhead<Tiles>];
      for (int i = 0; i < kAhead<Tiles>; ++i) {
        const int64_t piece = first + i * kWarps;
        bytes[i] = fetch(w, row, piece < pieces ? piece : first, t);
      }
      for (int i = 0; i < kAhead<Tiles>; ++i) {
        const int64_t piece = first + i * kWarps;
        if (piece < pieces) sums.add(bytes[i], pairs, x, tokens, piece * kPiece + 16 * t, g);
      }
    }
    for (int turn = 0; turn < kWarps; ++turn) {
      if (turn == warp)
        for (int tile = 0; tile < Tiles; ++tile)
          for (int i = 0; i < 4; ++i) {
            float& target = total[(g + 8 * (i / 2)) * kWidth + tile * 8 + 2 * t + i % 2];
            target = turn ? target + sums.at[tile][i] : sums.at[tile][i];
          }
      __syncthreads();
    }
    for (int i = int(threadIdx.x); i < kRows * kWidth; i += kWarps * kWarp) {
      const int64_t m = i / kRows, r = i % kRows;  // neighbouring threads store neighbouring outputs
      if (m < tokens && n + r < w.rows) put(y, bias, branch, m, n + r, total[r * kWidth + m]);
    }
    __syncthreads();  // `total` is written again
  }
}

template <class T, int Tiles>
void launch_mma(const Rows<T>& y, const Rows<const T>& x, const Weight& w, const T* bias,
                const Branch& branch, int64_t tokens) {
  Grid grid{dim3(blocks_for(w.rows, kRows), blocks_for(tokens, 8 * Tiles)), dim3(kWarps * kWarp)};
  const unsigned most = unsigned(kResident<Tiles> * multiprocessors()) / grid.blocks.y;
  if (grid.blocks.x > most) grid.blocks.x = most;
  grid.shared = sizeof(uint32_t) * 256 * kWarp + sizeof(float) * kRows * 8 * Tiles;
  launch("quantized_linear (mma)", mma_kernel<T, Tiles>, grid, y, x, w, bias, branch, tokens);
}

bool fits_tensor_cores(const TensorView& x, const TensorView& packed, int64_t blocksize) {
  return x.dtype != DType::f32 && x.shape[1] % kPiece == 0 && blocksize % kPiece == 0 &&
         x.shape[0] <= kMostTokens && rows_aligned(x) && reinterpret_cast<uintptr_t>(packed.data) % 8 == 0;
}

template <class T>
void with_tensor_cores(const Rows<T>& y, const Rows<const T>& x, const Weight& w, const T* bias,
                       const Branch& branch, int64_t tokens) {
  if (tokens <= 8) return launch_mma<T, 1>(y, x, w, bias, branch, tokens);
  if (tokens <= 16) return launch_mma<T, 2>(y, x, w, bias, branch, tokens);
  launch_mma<T, 4>(y, x, w, bias, branch, tokens);
}

void with_tensor_cores(const Rows<float>&, const Rows<const float>&, const Weight&, const float*,
                       const Branch&, int64_t) {}

void launch_linear(const TensorView& y, const TensorView& x, const TensorView& packed,
                   const TensorView& levels, const TensorView& absmax, const TensorView& codes,
                   const TensorView& map, const TensorView& offset, const TensorView& bias,
                   const Branch& branch, int64_t blocksize) {
  const int64_t tokens = x.shape[0];
  if (tokens == 0) return;
  const Weight w{data<const uint8_t>(packed), data<const float>(levels),
                 scales_of(absmax, codes, map, offset, blocksize), y.shape[1], x.shape[1]};
  with_float(x.dtype, [&](auto element) {
    using T = decltype(element);
    const auto* b = data<const T>(bias);
    if (fits_tensor_cores(x, packed, blocksize))
      return with_tensor_cores(rows<T>(y), rows<const T>(x), w, b, branch, tokens);
    const Grid grid{dim3(blocks_for(w.rows, kDotThreads / kWarp), blocks_for(tokens, kTokens)),
                    dim3(kDotThreads)};
    launch("quantized_linear (dot)", dot_kernel<T>, grid, rows<T>(y), rows<const T>(x), w, b, branch, tokens);
  });
}

}  // namespace

void quantized_linear(const TensorView& y, const TensorView& x, const TensorView& packed,
                      const TensorView& levels, const TensorView& absmax, const TensorView& codes,
                      const TensorView& map, const TensorView& offset, const TensorView& bias,
                      int64_t blocksize) {
  launch_linear(y, x, packed, levels, absmax, codes, map, offset, bias, Branch{}, blocksize);
}

void quantized_lora_linear(const TensorView& y, const TensorView& x, const TensorView& packed,
                           const TensorView& levels, const TensorView& absmax, const TensorView& codes,
                           const TensorView& map, const TensorView& offset, const TensorView& bias,
                           const TensorView& inner, const TensorView& b, int64_t blocksize) {
  const Branch branch{b.shape[1] ? data<const float>(inner) : nullptr, rows<const float>(b), b.shape[1]};
  launch_linear(y, x, packed, levels, absmax, codes, map, offset, bias, branch, blocksize);
}

}  // namespace cuda
}  // namespace inlay
