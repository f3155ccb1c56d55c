// Stream-K (arXiv:2301.03598): the tiles of a product lie one behind the other on a line of chunks, and each
// block has one stretch of it, which may begin and end inside of a tile.
//
//   chunk     0 1 2 3 4 5 6 7 8 9 10 11 ...
//   tile      0 0 0 0 1 1 1 1 2 2 2  2  ...      four chunks each
//   block     0 0 0 0 0 0 1 1 1 1 1  1  ...      six chunks each: tile 1 belongs to blocks 0 and 1
//
// Blocks that share a tile hand in their sums, and the one that is last adds all of them, in the order of
// block numbers: results depend on where the line is cut, not on who comes last. No block waits for another.
//
//   counters  [blocks], zero before and after a launch: how many have handed in, at the tile's first block
//   sums      fp32 [blocks, 2, tile], of any content: a block shares at most the tile it ends in, slot 0, and
//             the tile it begins in, slot 1
#pragma once

#include "ptx/load_l2.cuh"

namespace inlay {
namespace cuda {

struct Line {
  unsigned chunks;  // of a tile
  unsigned blocks;
  bool split;             // inside of tiles; false: it is cut between them only
  unsigned share, extra;  // chunks of a block, and how many blocks have one more, or a tile more

  __device__ __forceinline__ unsigned begin(unsigned block) const {
    return block * share + (block < extra ? block : extra) * (split ? 1 : chunks);
  }
  // The block that has a chunk of a line that is split.
  __device__ __forceinline__ unsigned owner(unsigned chunk) const {
    const unsigned wide = extra * (share + 1);
    return chunk < wide ? chunk / (share + 1) : extra + (chunk - wide) / share;
  }
};

// Cuts a line into even stretches; `blocks` is no more than there are chunks, or tiles.
inline Line cut(unsigned tiles, unsigned chunks, unsigned blocks, bool split) {
  const unsigned units = split ? tiles * chunks : tiles, unit = split ? 1 : chunks;
  return {chunks, blocks, split, units / blocks * unit, units % blocks};
}

// A block's part of one tile: chunks [first, end) of it.
struct Part {
  unsigned tile, first, end;
};

// A block's stretch. Its last tile comes first: that one and the next are the ones it may share, and their
// sums are handed in and added up while tiles that are its own are still being read.
struct Stretch {
  unsigned begin, end, first, last, chunks;  // tiles [first, last]

  __device__ __forceinline__ Stretch(const Line& line, unsigned block)
      : begin(line.begin(block)),
        end(line.begin(block + 1)),
        first(begin / line.chunks),
        last((end - 1) / line.chunks),
        chunks(line.chunks) {}

  __device__ __forceinline__ unsigned size() const { return last - first + 1; }
  __device__ __forceinline__ Part at(unsigned i) const {
    const unsigned tile = i == 0 ? last : first + i - 1, start = tile * chunks;
    return {tile, begin > start ? begin - start : 0, end < start + chunks ? end - start : chunks};
  }
};

struct Scratch {
  unsigned long long* counters;
  float* sums;
};

// The sums of one tile, of kSize numbers, that several blocks have parts of.
template <int kSize>
struct Handover {
  unsigned long long* counter;
  float* sums;             // of block `first`
  unsigned first, blocks;  // how many

  // `group`: there are several such lines in a launch.
  __device__ __forceinline__ Handover(const Scratch& scratch, const Line& line, unsigned tile, unsigned group)
      : first(line.owner(tile * line.chunks)) {
    const unsigned place = group * line.blocks + first;
    blocks = line.owner((tile + 1) * line.chunks - 1) - first + 1;
    counter = scratch.counters + place;
    sums = scratch.sums + int64_t(place) * 2 * kSize;
  }

  // Of the i-th of its blocks: the first one ends in this tile, the others begin in it.
  __device__ __forceinline__ float* of(unsigned i) const { return sums + (2 * i + (i ? 1 : 0)) * kSize; }

  // True in the block that was last to hand in. Each thread has written its part of the block's sums.
  __device__ __forceinline__ bool hand_in() const {
    INLAY_SHARED(int, is_last, 1);
    __threadfence();  // what this thread wrote comes before what the block adds to the counter
    __syncthreads();
    if (threadIdx.x == 0) {
      is_last[0] = atomicAdd(counter, 1ull) + 1 == blocks;
      if (is_last[0]) *counter = 0;  // for the next launch
    }
    __syncthreads();
    __threadfence();  // and what the others wrote before what this thread reads
    return is_last[0];
  }

  __device__ __forceinline__ float total(int at) const {
    float sum = load_l2(of(0) + at);
    for (unsigned i = 1; i < blocks; ++i) sum += load_l2(of(i) + at);
    return sum;
  }
};

}  // namespace cuda
}  // namespace inlay
