// Weight gradient of a narrow delta, on tensor cores: what LoRA and small submatrices need.
//
//   out[p, n, j] = Σ_m dy[m, n]·x[m, j] over the p-th share of the tokens; the gradient is the sum over p
//
//   dy  [M, N]    x  [M, s], s ≤ 64, 16 bits like dy    out  fp32 [P, N, s], any strides
//
// Reading dy once is the floor: 2·M·N bytes, while s ≤ 184 leaves tensor cores waiting (790 TFLOP/s by 4.3
// TB/s). A block holds 64 columns of dy and all of x's, and runs over its share of the tokens; P gives small
// N enough blocks, and the shares are added in one order, so that results do not depend on timing.
#include "slab.cuh"

namespace inlay {
namespace cuda {

namespace {

constexpr int kColumns = 64;  // of dy: 128 bytes of each of its rows, four whole sectors
constexpr int kTokens = 64;   // of a stage: 8 KB of dy
constexpr int kStages = 3;    // two are under way while one is used: 55 KB at most, of which sm_86 has 99
constexpr int kWarps = 4;     // of 16 columns each
constexpr int kThreads = kWarps * kWarp;
// With more columns of x, reading it from shared memory would take longer than reading dy from HBM.
constexpr int64_t kMostChosen = 64;

static_assert(kColumns == kWarps * 16, "the m16 of a product is a warp's share of the columns");

template <class T, int Tiles>
struct Stage {
  using Left = Slab<T, kTokens, kColumns>;
  using Right = Slab<T, kTokens, 8 * Tiles>;
  static constexpr int kSize = Left::kSize + Right::kSize;
  static_assert(kStages * kSize * sizeof(T) <= (99 << 10), "what a block of sm_86 and sm_89 can have");
  Left dy;
  Right x;
  __device__ __forceinline__ Stage(T* memory, int number)
      : dy{memory + number % kStages * kSize}, x{dy.at + Left::kSize} {}

  // sums [16 columns of dy, 8·Tiles columns of x] += dyᵀ·x
  __device__ __forceinline__ void add(float (&sums)[Tiles][4]) const {
    add_over_tokens(sums, dy, x, int(threadIdx.x) / kWarp * 16);
  }
};

struct Sums {
  float* data;
  int64_t share, row, column;  // strides
};

template <class T, int Tiles, bool Aligned>
__global__ void __launch_bounds__(kThreads)
    grad_kernel(Sums out, Rows<const T> dy, Rows<const T> x, int64_t tokens, int64_t columns, int64_t chosen,
                int64_t share) {
  INLAY_DYNAMIC_SHARED(T, memory);
  const int64_t column = int64_t(blockIdx.x) * kColumns, begin = int64_t(blockIdx.y) * share;
  const int64_t end = begin + share < tokens ? begin + share : tokens;
  const int stages = end > begin ? int((end - begin + kTokens - 1) / kTokens) : 0;
  const auto fetch = [&](int number) {
    if (number < stages) {
      const Stage<T, Tiles> stage(memory, number);
      stage.dy.template fetch<Aligned, kThreads>(dy, begin + int64_t(number) * kTokens, end, column, columns);
      stage.x.template fetch<Aligned, kThreads>(x, begin + int64_t(number) * kTokens, end, 0, chosen);
    }
    cp_async_commit();  // a group per stage, also an empty one: the wait below counts them
  };
  float sums[Tiles][4] = {};
  for (int number = 0; number < kStages - 1; ++number) fetch(number);
  for (int number = 0; number < stages; ++number) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this stage is there for all, and nobody reads the one that is refilled now
    fetch(number + kStages - 1);
    Stage<T, Tiles>(memory, number).add(sums);
  }
  const int lane = int(threadIdx.x) % kWarp;
  for (int tile = 0; tile < Tiles; ++tile)
    for (int i = 0; i < 4; ++i) {
      const int64_t n = column + int(threadIdx.x) / kWarp * 16 + lane / 4 + 8 * (i / 2);
      const int64_t j = 8 * tile + 2 * (lane % 4) + i % 2;
      if (n < columns && j < chosen)
        out.data[int64_t(blockIdx.y) * out.share + n * out.row + j * out.column] = sums[tile][i];
    }
}

template <class T, int Tiles>
void launch_grad(const TensorView& out, const TensorView& dy, const TensorView& x) {
  const int64_t tokens = dy.shape[0], shares = out.shape[0];
  const int64_t stages = (tokens + kTokens - 1) / kTokens, share = (stages + shares - 1) / shares * kTokens;
  const Grid grid{dim3(blocks_for(dy.shape[1], kColumns), unsigned(shares)), dim3(kThreads),
                  sizeof(T) * kStages * Stage<T, Tiles>::kSize};
  const Sums sums{data<float>(out), out.strides[0], out.strides[1], out.strides[2]};
  const auto run = [&](auto kernel) {
    launch("submatrix_grad", kernel, grid, sums, rows<const T>(dy), rows<const T>(x), tokens, dy.shape[1],
           x.shape[1], share);
  };
  const bool packs = dy.shape[1] % kPack == 0 && x.shape[1] % kPack == 0;
  if (packs && rows_aligned(dy) && rows_aligned(x)) return run(grad_kernel<T, Tiles, true>);
  run(grad_kernel<T, Tiles, false>);
}

template <class T>
void with_tiles(const TensorView& out, const TensorView& dy, const TensorView& x) {
  if (x.shape[1] <= 16) return launch_grad<T, 2>(out, dy, x);
  if (x.shape[1] <= 32) return launch_grad<T, 4>(out, dy, x);
  launch_grad<T, 8>(out, dy, x);
}

}  // namespace

void submatrix_grad(const TensorView& out, const TensorView& dy, const TensorView& x, bool add) {
  if (x.shape[1] > kMostChosen) fail("submatrix_grad", "x", "at most 64 columns", x, "use torch.mm");
  if (add) fail("submatrix_grad", "add", "false", out, "add the shares to it");
  if (out.shape[0] < 1)
    fail("submatrix_grad", "out", "[shares of the tokens, N, s]", out, "pass one share or more");
  if (dy.dtype == DType::bf16) return with_tiles<bf16>(out, dy, x);
  with_tiles<f16>(out, dy, x);
}

}  // namespace cuda
}  // namespace inlay
