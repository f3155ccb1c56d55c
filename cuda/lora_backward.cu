// What LoRA's backward wants of dy beside the base's product, in one pass over it.
//
//   dyb[p, m, j] = Σ_n dy[m, n]·sb[n, j]    over the p-th chunk of the columns n
//   db[q, n, j]  = Σ_m dy[m, n]·xa[m, j]    over the q-th share of the tokens m
//
//   dy  [M, N]    xa  [M, r]    sb = s·B  [N, r]    16 bits, r ≤ 16
//   dyb  fp32 [P, M, r]    db  fp32 [Q, N, r]    the caller adds up the parts, in one order
//
// By themselves both products are bound by reading dy, 2·M·N bytes each. The parts cost 8·r·M·N·(1/T + 1/C)
// bytes, written and read again, where a block has T tokens by C columns: with r = 16 and T = C = 512, a
// quarter of what is saved. T is bound by shared memory, and with r = 32, T = 256, three quarters: not worth
// it.
//
// A block goes through its columns 64 at a time, and for each through its tokens, 64 at a time. db of the 64
// columns lies in registers (a warp has 16 of the columns), dyb of all the block's tokens in shared memory (a
// warp has 16 of each 64 tokens, so that every number has one thread that adds to it).
#include "slab.cuh"

namespace inlay {
namespace cuda {

namespace {

constexpr int kColumns = 64;  // 128 bytes of each row of dy, four whole sectors
constexpr int kTokens = 64;   // of a stage: 8 KB of dy
constexpr int kStages = 3;    // two are under way while one is used
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
// Tokens of a block: dyb of theirs is 32 KB, with three stages 68 KB, of which sm_86 and sm_89 have 99, and
// two blocks of which fit where there is more.
constexpr int kMostTokens = 512;
constexpr int kTiles = 2;
constexpr int kWidth = 8 * kTiles;  // the widest r

static_assert(kColumns == kWarps * 16 && kTokens == kWarps * 16, "a warp has 16 columns, and 16 tokens");

struct Parts {
  float* data;
  int64_t part, row;  // strides; numbers of a row are neighbours
};

struct Work {
  int64_t tokens, columns, rank;
  int64_t share, chunk;  // tokens and columns of a block, multiples of 64
};

template <class T>
struct Stage {
  using Left = Slab<T, kTokens, kColumns>;
  using Right = Slab<T, kTokens, kWidth>;
  static constexpr int kSize = Left::kSize + Right::kSize;
  Left dy;
  Right xa;
  __device__ __forceinline__ Stage(T* memory, int number)
      : dy{memory + number % kStages * kSize}, xa{dy.at + Left::kSize} {}

  // sums [16 columns of the warp, r] += dyᵀ·xa
  __device__ __forceinline__ void add_db(float (&sums)[kTiles][4]) const {
    add_over_tokens(sums, dy, xa, int(threadIdx.x) / kWarp * 16);
  }

  // held [16 tokens of the warp, r] += dy·sb of these 64 columns
  __device__ __forceinline__ void add_dyb(float* held, const uint32_t (&sb)[4][kTiles][2]) const {
    const int token = int(threadIdx.x) / kWarp * 16, lane = int(threadIdx.x) % kWarp;
    float part[kTiles][4] = {};
    for (int step = 0; step < 4; ++step) {
      uint32_t a[4];
      dy.row_fragments(a, token, 16 * step);
      for (int tile = 0; tile < kTiles; ++tile) mma(part[tile], a, sb[step][tile], T{});
    }
    for (int tile = 0; tile < kTiles; ++tile)
      for (int i = 0; i < 4; ++i)
        held[(token + lane / 4 + 8 * (i / 2)) * kWidth + 8 * tile + 2 * (lane % 4) + i % 2] += part[tile][i];
  }
};

// The k16 x n8 fragments of 64 rows of sb from `column` on, zeros beyond its end.
template <class T>
__device__ __forceinline__ void load_sb(uint32_t (&out)[4][kTiles][2], Rows<const T> sb, int64_t column,
                                        int64_t columns, int64_t rank) {
  const int lane = int(threadIdx.x) % kWarp;
  for (int step = 0; step < 4; ++step)
    for (int tile = 0; tile < kTiles; ++tile)
      for (int r = 0; r < 2; ++r) {
        const int64_t k = column + 16 * step + 2 * (lane % 4) + 8 * r, j = 8 * tile + lane / 4;
        const uint32_t low = k < columns && j < rank ? sb.at(k)[j].bits : 0;
        const uint32_t high = k + 1 < columns && j < rank ? sb.at(k + 1)[j].bits : 0;
        out[step][tile][r] = high << 16 | low;
      }
}

__device__ __forceinline__ void store_db(const Parts& db, const float (&sums)[kTiles][4], int64_t column,
                                         const Work& work) {
  const int lane = int(threadIdx.x) % kWarp;
  for (int tile = 0; tile < kTiles; ++tile)
    for (int i = 0; i < 4; ++i) {
      const int64_t n = column + int(threadIdx.x) / kWarp * 16 + lane / 4 + 8 * (i / 2);
      const int64_t j = 8 * tile + 2 * (lane % 4) + i % 2;
      if (n < work.columns && j < work.rank)
        db.data[int64_t(blockIdx.y) * db.part + n * db.row + j] = sums[tile][i];
    }
}

template <class T, bool Aligned>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(Parts dyb, Parts db, Rows<const T> dy, Rows<const T> xa, Rows<const T> sb, Work work) {
  INLAY_DYNAMIC_SHARED(T, memory);  // the stages, then dyb of the block's tokens
  float* const held = reinterpret_cast<float*>(memory + kStages * Stage<T>::kSize);
  const int64_t begin = int64_t(blockIdx.y) * work.share, first = int64_t(blockIdx.x) * work.chunk;
  const int64_t end = begin + work.share < work.tokens ? begin + work.share : work.tokens;
  const int64_t last = first + work.chunk < work.columns ? first + work.chunk : work.columns;
  const int rows = end > begin ? int(end - begin) : 0, stages = (rows + kTokens - 1) / kTokens;
  const int64_t steps = last > first ? (last - first + kColumns - 1) / kColumns : 0;
  for (int i = int(threadIdx.x); i < stages * kTokens * kWidth; i += kThreads) held[i] = 0.0f;

  int64_t fetched_step = 0;  // what is fetched next: a stage of the tokens, at a step of the columns
  int fetched_stage = 0, fetched = 0;
  const auto fetch = [&] {
    if (fetched_step < steps && stages > 0) {
      const Stage<T> stage(memory, fetched++);
      const int64_t token = begin + int64_t(fetched_stage) * kTokens;
      stage.dy.template fetch<Aligned, kThreads>(dy, token, end, first + fetched_step * kColumns,
                                                 work.columns);
      stage.xa.template fetch<Aligned, kThreads>(xa, token, end, 0, work.rank);
      if (++fetched_stage == stages) fetched_stage = 0, ++fetched_step;
    }
    cp_async_commit();  // a group per stage, also an empty one: the wait below counts them
  };
  for (int number = 0; number < kStages - 1; ++number) fetch();
  int used = 0;
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t column = first + step * kColumns;
    uint32_t factors[4][kTiles][2];
    load_sb<T>(factors, sb, column, work.columns, work.rank);
    float sums[kTiles][4] = {};
    for (int number = 0; number < stages; ++number) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // this stage is there for all, and nobody reads the one that is refilled now
      fetch();
      const Stage<T> stage(memory, used++);
      stage.add_db(sums);
      stage.add_dyb(held + number * kTokens * kWidth, factors);
    }
    store_db(db, sums, column, work);
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < rows * kWidth; i += kThreads)
    if (i % kWidth < work.rank)
      dyb.data[int64_t(blockIdx.x) * dyb.part + (begin + i / kWidth) * dyb.row + i % kWidth] = held[i];
}

// `parts` shares of `size`, each a multiple of 64.
int64_t share_of(int64_t size, int64_t parts) { return ((size + 63) / 64 + parts - 1) / parts * 64; }

template <class T>
void launch_backward(const TensorView& dyb, const TensorView& db, const TensorView& dy, const TensorView& xa,
                     const TensorView& sb) {
  const Work work{dy.shape[0], dy.shape[1], xa.shape[1], share_of(dy.shape[0], db.shape[0]),
                  share_of(dy.shape[1], dyb.shape[0])};
  if (work.share > kMostTokens)
    fail("lora_backward", "db", "a share for every 512 tokens", db, "pass more shares");
  const Grid grid{dim3(blocks_for(dyb.shape[0], 1), blocks_for(db.shape[0], 1)), dim3(kThreads),
                  sizeof(T) * kStages * Stage<T>::kSize + sizeof(float) * size_t(work.share) * kWidth};
  static_assert(sizeof(T) * kStages * Stage<T>::kSize + sizeof(float) * kMostTokens * kWidth <= (99 << 10),
                "what a block of sm_86 and sm_89 can have");
  const auto run = [&](auto kernel) {
    launch("lora_backward", kernel, grid, Parts{data<float>(dyb), dyb.strides[0], dyb.strides[1]},
           Parts{data<float>(db), db.strides[0], db.strides[1]}, rows<const T>(dy), rows<const T>(xa),
           rows<const T>(sb), work);
  };
  const bool packs = dy.shape[1] % kPack == 0 && xa.shape[1] % kPack == 0;
  if (packs && rows_aligned(dy) && rows_aligned(xa)) return run(backward_kernel<T, true>);
  run(backward_kernel<T, false>);
}

}  // namespace

void lora_backward(const TensorView& dyb, const TensorView& db, const TensorView& dy, const TensorView& xa,
                   const TensorView& sb) {
  if (xa.shape[1] > kWidth) fail("lora_backward", "xa", "at most 16 columns", xa, "use the two products");
  if (dy.dtype == DType::bf16) return launch_backward<bf16>(dyb, db, dy, xa, sb);
  launch_backward<f16>(dyb, db, dy, xa, sb);
}

}  // namespace cuda
}  // namespace inlay
