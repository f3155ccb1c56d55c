// Four-bit quantization and its inverse, byte for byte what the CPU twin and bitsandbytes write.
//
//   quantize    absmax[b] = max |w| in block b    packed[i] = code[2i] << 4 | code[2i + 1]
//   dequantize  out[r, c] = round(levels[code]·absmax) of element (row + r)·columns + column + c
//
// Several weights of one width are dequantized below each other in one launch: query, key and value
// projections are 2.5 to 10 us each at the bandwidth of an H200, of which a launch is a good part.
#include "codes.cuh"

namespace inlay {
namespace cuda {

namespace {

constexpr int kThreads = 256;
constexpr float kSmallest = 1e-38f;  // bitsandbytes' stand-in for the absmax of a block of zeros
constexpr int kRun = 8;              // elements a lane takes at a time: 16 bytes of bf16 in, 4 bytes out

// --- quantize: `lanes` lanes share a block of `blocksize` elements
// ------------------------------------------------

template <class T>
__device__ __forceinline__ float element(const T* w, int64_t i, int64_t size) {
  return i < size ? to_float(w[i]) : 0.0f;  // the missing half of the last byte is coded as 0
}

// How many of the 15 sorted bounds lie below x, as its code.
__device__ __forceinline__ uint32_t code_for(float x, const float* bounds, const uint8_t* order) {
  int below = 0;
  for (int step = 8; step > 0; step /= 2) below += x > bounds[below + step - 1] ? step : 0;
  return order[below];
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(uint8_t* packed, float* absmax, const T* w, const float* bounds, const uint8_t* order,
                    int64_t size, int64_t blocksize, int lanes) {
  INLAY_SHARED(float, shared_bounds, 16);
  INLAY_SHARED(uint8_t, shared_order, 16);
  if (threadIdx.x < 16) shared_order[threadIdx.x] = order[threadIdx.x];
  if (threadIdx.x < 15) shared_bounds[threadIdx.x] = bounds[threadIdx.x];
  __syncthreads();

  const int64_t block = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / lanes;
  const int64_t begin = block * blocksize, lane = int(threadIdx.x) % lanes;
  const int64_t end = begin + blocksize < size ? begin + blocksize : size;  // before begin: nothing left
  float largest = 0.0f, poison = 0.0f;  // infinity and NaN times 0 are NaN, and stay it
  for (int64_t i = begin + lane * kRun; i < end; i += lanes * kRun)
    for (int k = 0; k < kRun; ++k) {
      const float x = element(w, i + k, end);
      largest = fabsf(x) > largest ? fabsf(x) : largest;
      poison = fmaf(x, 0.0f, poison);
    }
  for (int other = lanes / 2; other > 0; other /= 2) {  // lanes is a power of two up to 32
    const float theirs = __shfl_xor_sync(kAllLanes, largest, other);
    largest = theirs > largest ? theirs : largest;
    poison += __shfl_xor_sync(kAllLanes, poison, other);
  }
  if (begin >= size) return;

  // A full block multiplies by the reciprocal, a tail block divides: bitsandbytes' rounding in each case.
  const float divisor = largest > kSmallest ? largest : kSmallest;
  const bool full = end - begin == blocksize;
  const float reciprocal = __fdiv_rn(1.0f, divisor);
  if (lane == 0) absmax[block] = (full ? largest : divisor) + poison;
  for (int64_t i = begin + lane * kRun; i < end; i += lanes * kRun)
    for (int k = 0; k < kRun && i + k < end; k += 2) {
      uint32_t byte = 0;
      for (int half = 0; half < 2; ++half) {
        const float x = element(w, i + k + half, end);
        const float unit = full ? __fmul_rn(x, reciprocal) : __fdiv_rn(x, divisor);
        byte = byte << 4 | code_for(fmaxf(fminf(unit, 1.0f), -1.0f), shared_bounds, shared_order);
      }
      packed[(i + k) / 2] = uint8_t(byte);
    }
}

// --- dequantize
// --------------------------------------------------------------------------------------------------

constexpr int kUnroll = 4;  // loads in flight per lane: a block covers 8,192 columns at a time
constexpr unsigned kMostRows =
    4096;  // blocks along the rows; beyond that a block fills its table once for several

struct Rectangle {
  int64_t rows, width;           // of the output
  int64_t columns, row, column;  // columns of the weight; where the output begins in it
};

struct Segment {
  const uint8_t* packed;
  Scales scales;
  int64_t first;  // row of the output that its first row is
};

// The weights of one launch. By value: eight are 0.5 of the 4 KB that a launch can pass, and more than blocks
// have linears of one input.
struct Segments {
  static constexpr int kMost = 8;
  Segment at[kMost];
  int count;

  __device__ __forceinline__ const Segment& of(int64_t row) const {
    int i = 0;
    while (i + 1 < count && at[i + 1].first <= row) ++i;
    return at[i];
  }
};

// N = 8: every run of eight outputs starts on a byte of `packed` that is a multiple of four, and on a
// multiple of eight in its block. N = 1: anything.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(Rows<T> out, const Segments segments, const float* levels, Rectangle part) {
  INLAY_SHARED(float, copies, Levels::kSize);
  const Levels table{copies};
  table.fill(levels);
  const int64_t first = (int64_t(blockIdx.y) * kUnroll * kThreads + threadIdx.x) * N;
  for (int64_t m = blockIdx.x; m < part.rows; m += gridDim.x) {
    const Segment& from = segments.of(m);
    const int64_t start = (part.row + m - from.first) * part.columns + part.column;
    uint32_t words[kUnroll];
    float scale[kUnroll];
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t c = first + u * kThreads * N;
      if (c >= part.width) break;
      if (N == 8)
        words[u] = *reinterpret_cast<const uint32_t*>(from.packed + ((start + c) >> 1));
      else
        words[u] = from.packed[(start + c) >> 1];
      scale[u] = from.scales.at(start + c);
    }
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t c = first + u * kThreads * N;
      if (c >= part.width) break;
      Pack<T, N> values;
      for (int k = 0; k < N; ++k) {
        const int nibble = N == 8 ? k : int((start + c) & 1);
        from_float(__fmul_rn(table.at(code_of(words[u], nibble)), scale[u]), values.at[k]);
      }
      store(out.at(m) + c, values);
    }
  }
}

bool runs_of_eight(const TensorView& out, const Segments& segments, const Rectangle& part) {
  bool words = true;
  for (int i = 0; i < segments.count; ++i)
    words = words && reinterpret_cast<uintptr_t>(segments.at[i].packed) % 4 == 0;
  return words && part.columns % 8 == 0 && part.column % 8 == 0 && part.width % 8 == 0 && rows_aligned(out);
}

void launch_dequantize(const TensorView& out, const Segments& segments, const TensorView& levels,
                       const Rectangle& part) {
  with_float(out.dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto n) {
      Grid grid{dim3(blocks_for(part.rows, 1), blocks_for(part.width, n() * kThreads * kUnroll)),
                dim3(kThreads)};
      if (grid.blocks.x > kMostRows) grid.blocks.x = kMostRows;
      launch("dequantize_4bit", dequantize_kernel<T, n()>, grid, rows<T>(out), segments,
             data<const float>(levels), part);
    };
    if (runs_of_eight(out, segments, part)) return run(std::integral_constant<int, 8>{});
    run(std::integral_constant<int, 1>{});
  });
}

}  // namespace

void quantize_4bit(const TensorView& packed, const TensorView& absmax, const TensorView& w,
                   const TensorView& bounds, const TensorView& order, int64_t blocksize) {
  const int64_t size = w.shape[0], blocks = absmax.shape[0];
  const int lanes = blocksize / kRun < kWarp ? int(blocksize / kRun) : kWarp;
  const Grid grid{dim3(blocks_for(blocks, kThreads / lanes)), dim3(kThreads)};
  with_float(w.dtype, [&](auto type) {
    using T = decltype(type);
    launch("quantize_4bit", quantize_kernel<T>, grid, data<uint8_t>(packed), data<float>(absmax),
           data<const T>(w), data<const float>(bounds), data<const uint8_t>(order), size, blocksize, lanes);
  });
}

void dequantize_4bit(const TensorView& out, const TensorView& packed, const TensorView& levels,
                     const TensorView& absmax, const TensorView& codes, const TensorView& map,
                     const TensorView& offset, int64_t blocksize, int64_t columns, int64_t row,
                     int64_t column) {
  const Segments one{{{data<const uint8_t>(packed), scales_of(absmax, codes, map, offset, blocksize), 0}}, 1};
  launch_dequantize(out, one, levels, {out.shape[0], out.shape[1], columns, row, column});
}

void dequantize_4bit_stack(const TensorView& out, const TensorList& packed, const TensorView& levels,
                           const TensorList& absmaxes, const TensorList& codes, const TensorView& map,
                           const TensorList& offsets, int64_t blocksize) {
  const TensorView none;
  TensorView part = out;  // of the segments of one launch
  for (int64_t begin = 0; begin < packed.size; begin += Segments::kMost) {
    Segments segments = {};
    part.shape[0] = 0;
    for (int64_t i = begin; i < packed.size && segments.count < Segments::kMost; ++i) {
      const Scales scales = scales_of(absmaxes.items[i], codes.size ? codes.items[i] : none, map,
                                      codes.size ? offsets.items[i] : none, blocksize);
      segments.at[segments.count++] = {data<const uint8_t>(packed.items[i]), scales, part.shape[0]};
      part.shape[0] += rows_of_packed(packed.items[i], out.shape[1]);
    }
    launch_dequantize(part, segments, levels, {part.shape[0], out.shape[1], out.shape[1], 0, 0});
    part.data = static_cast<char*>(part.data) + part.shape[0] * out.strides[0] * element_size(out.dtype);
  }
}

}  // namespace cuda
}  // namespace inlay
