// Four-bit quantization in bitsandbytes' storage, both ways.
#include "cpu/codes.h"

namespace inlay {
namespace INLAY_ISA_NS {

namespace {

constexpr float kSmallest = 1e-38f;  // bitsandbytes' stand-in for the absmax of a block of zeros

// Codes of 16 elements at a time: how many of the 15 sorted bounds lie below each, by bisection (four lookups
// for a Vec), then the code of that many, two codes to a byte.
struct Coder {
  float bounds[16];
  const uint8_t* order;
  Coder(const float* sorted, const uint8_t* order_) : order(order_) {
    for (int i = 0; i < 15; ++i) bounds[i] = sorted[i];
    bounds[15] = 0;  // never looked at
  }

#if defined(INLAY_VEC_avx512)
  static __m128i below(const Levels& table, const float* x) {
    const __m512 values = _mm512_loadu_ps(x);
    __m512i count = _mm512_setzero_si512();
    for (int step = 8; step > 0; step /= 2) {
      const __m512i middle = _mm512_add_epi32(count, _mm512_set1_epi32(step - 1));
      const __mmask16 above =
          _mm512_cmp_ps_mask(values, _mm512_permutexvar_ps(middle, table.table), _CMP_GT_OQ);
      count = _mm512_mask_add_epi32(count, above, count, _mm512_set1_epi32(step));
    }
    return _mm512_cvtepi32_epi8(count);
  }
#elif defined(INLAY_VEC_avx2)
  static __m256i below_half(const Levels& table, const float* x) {
    const __m256 values = _mm256_loadu_ps(x);
    __m256i count = _mm256_setzero_si256();
    for (int step = 8; step > 0; step /= 2) {
      const Vec middle = table.at(_mm256_add_epi32(count, _mm256_set1_epi32(step - 1)));
      const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(values, middle.v, _CMP_GT_OQ));
      count = _mm256_add_epi32(count, _mm256_and_si256(above, _mm256_set1_epi32(step)));
    }
    return count;
  }
  static __m128i below(const Levels& table, const float* x) {
    const __m256i lanes = _mm256_packs_epi32(below_half(table, x), below_half(table, x + 8));
    const __m256i words = _mm256_permute4x64_epi64(lanes, 0xd8);  // packing works within 128-bit lanes
    return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
#endif

  // out[i] = code(x[2i]) << 4 | code(x[2i + 1]) for the 16 elements of x.
  void pack(const float* x, uint8_t* out) const {
#if defined(INLAY_VEC_avx512) || defined(INLAY_VEC_avx2)
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(order));
    const __m128i codes = _mm_shuffle_epi8(table, below(Levels(bounds), x));
    const __m128i pairs =
        _mm_maddubs_epi16(codes, _mm_set1_epi16(0x0110));  // 16 times the even one, plus the odd
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(pairs, pairs));
#else
    for (int i = 0; i < 8; ++i) out[i] = uint8_t(code(x[2 * i]) << 4 | code(x[2 * i + 1]));
#endif
  }

 private:
  int code(float x) const {
    int count = 0;
    for (int step = 8; step > 0; step /= 2) count += x > bounds[count + step - 1] ? step : 0;
    return order[count];
  }
};

template <class T>
void quantize_block(const T* w, int64_t size, int64_t blocksize, const Coder& coder, uint8_t* packed,
                    float* absmax) {
  Vec largest(0.0f), poison(0.0f);  // max drops a NaN; infinity and NaN times 0 are NaN, and stay it
  for_vecs(size, [&](int64_t i, int n) {
    const Vec x = load_n(w + i, n);
    largest = max(abs(x), largest);
    poison = fma(x, Vec(0.0f), poison);
  });
  const float raw = max_lane(largest), divisor = raw > kSmallest ? raw : kSmallest;
  const bool full = size == blocksize;
  *absmax = (full ? raw : divisor) + sum(poison);
  // A full block multiplies by the reciprocal, a tail block divides: bitsandbytes' rounding in each case.
  const Vec reciprocal(1.0f / divisor);
  const auto scale = [&](const T* from, int n, float* unit) {
    for_vecs(n, [&](int64_t i, int lanes) {
      const Vec x = load_n(from + i, lanes), scaled = full ? x * reciprocal : x / Vec(divisor);
      store(unit + i, max(min(scaled, Vec(1.0f)), Vec(-1.0f)));
    });
  };
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    float unit[16];
    scale(w + i, 16, unit);
    coder.pack(unit, packed + i / 2);
  }
  if (i == size) return;
  float unit[32] = {};  // zeros behind the end: an odd element is packed with the code of 0
  uint8_t bytes[8];
  scale(w + i, int(size - i), unit);
  coder.pack(unit, bytes);
  memcpy(packed + i / 2, bytes, size_t(size - i + 1) / 2);
}

// An output larger than this is not worth keeping in a cache: streaming stores write it without reading its
// lines first, which is 9 + 34 MB of traffic at 4096 x 4096 instead of 9 + 67.
constexpr int64_t kStreamBytes = int64_t(16) << 20;

// The 16 products level·scale of a block, rounded to T: every element of the block is one of them.
template <class T>
struct Products {
  T values[16];
  bool stream;
  Products(const float* levels, float scale, bool stream_) : stream(stream_) {
    for (int i = 0; i < 16; i += Vec::kWidth) store(values + i, load(levels + i) * Vec(scale));
  }
  void expand_byte(uint8_t byte, T* out) const {
    out[0] = values[byte >> 4];
    out[1] = values[byte & 15];
  }
  void expand(const uint8_t* from, int64_t bytes, T* out) const {
    for (int64_t i = expand_wide(from, bytes, out); i < bytes; ++i) expand_byte(from[i], out + 2 * i);
  }

 private:
#if defined(INLAY_VEC_avx512)
  int64_t wide(const bf16* table, const uint8_t* p, int64_t n, bf16* out) const {
    return words(table, p, n, out);
  }
  int64_t wide(const f16* table, const uint8_t* p, int64_t n, f16* out) const {
    return words(table, p, n, out);
  }
  int64_t words(const void* table, const uint8_t* p, int64_t n, void* out) const {
    const Words products(_mm256_loadu_si256(static_cast<const __m256i*>(table)));
    auto* to = static_cast<uint16_t*>(out);
    int64_t i = 0;
    if (stream && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
      for (; i + 16 <= n; i += 16)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + 2 * i), products.expand(p + i));
      return i;
    }
    for (; i + 16 <= n; i += 16) _mm512_storeu_si512(to + 2 * i, products.expand(p + i));
    return i;
  }
  static int64_t wide(const float* table, const uint8_t* p, int64_t n, float* out) {
    const Levels products(table);
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      const Vec even = products.high(p + i), odd = products.low(p + i);
      store(out + 2 * i, Vec(_mm512_permutex2var_ps(even.v, first, odd.v)));
      store(out + 2 * i + 16, Vec(_mm512_permutex2var_ps(even.v, second, odd.v)));
    }
    return i;
  }
  int64_t expand_wide(const uint8_t* p, int64_t n, T* out) const { return wide(values, p, n, out); }
#elif defined(INLAY_VEC_avx2)
  static int64_t wide(const float*, const uint8_t*, int64_t, float*) { return 0; }
  static int64_t wide(const bf16* table, const uint8_t* p, int64_t n, bf16* out) {
    return words(table, p, n, out);
  }
  static int64_t wide(const f16* table, const uint8_t* p, int64_t n, f16* out) {
    return words(table, p, n, out);
  }
  // 16 bytes to 32 words by byte shuffles: one table of low bytes, one of high bytes.
  static int64_t words(const void* table, const uint8_t* p, int64_t n, void* out) {
    uint8_t planes[2][16];
    for (int i = 0; i < 16; ++i)
      for (int b = 0; b < 2; ++b) planes[b][i] = static_cast<const uint8_t*>(table)[2 * i + b];
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(planes[0]));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(planes[1]));
    const __m128i nibble = _mm_set1_epi8(15);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i));
      const __m128i even = _mm_and_si128(_mm_srli_epi16(codes, 4), nibble),
                    odd = _mm_and_si128(codes, nibble);
      auto* to = reinterpret_cast<__m128i*>(static_cast<uint16_t*>(out) + 2 * i);
      for (int half = 0; half < 2; ++half) {
        const __m128i order = half ? _mm_unpackhi_epi8(even, odd) : _mm_unpacklo_epi8(even, odd);
        const __m128i bytes[2] = {_mm_shuffle_epi8(low, order), _mm_shuffle_epi8(high, order)};
        _mm_storeu_si128(to + 2 * half, _mm_unpacklo_epi8(bytes[0], bytes[1]));
        _mm_storeu_si128(to + 2 * half + 1, _mm_unpackhi_epi8(bytes[0], bytes[1]));
      }
    }
    return i;
  }
  int64_t expand_wide(const uint8_t* p, int64_t n, T* out) const { return wide(values, p, n, out); }
#else
  int64_t expand_wide(const uint8_t*, int64_t, T*) const { return 0; }
#endif
};

// Makes streamed stores visible to whoever the caller synchronizes with.
inline void order_streamed_stores() {
#if defined(INLAY_VEC_avx512)
  _mm_sfence();
#endif
}

// Elements [begin, end) of the flat weight, block by block; either end may fall inside a block or a byte.
template <class T>
void dequantize_run(const uint8_t* packed, const float* levels, const Scales& scales, int64_t blocksize,
                    int64_t begin, int64_t end, bool stream, T* out) {
  for (int64_t block = begin / blocksize; begin < end; ++block) {
    const int64_t stop = (block + 1) * blocksize < end ? (block + 1) * blocksize : end;
    const Products<T> products(levels, scales.at(block), stream);
    if (begin % 2) *out++ = products.values[packed[begin / 2] & 15], ++begin;
    const int64_t bytes = (stop - begin) / 2;
    products.expand(packed + begin / 2, bytes, out);
    out += 2 * bytes;
    begin += 2 * bytes;
    if (begin < stop) *out++ = products.values[packed[begin / 2] >> 4], ++begin;
  }
}

}  // namespace

void quantize_4bit(const TensorView& packed, const TensorView& absmax, const TensorView& w,
                   const TensorView& bounds, const TensorView& order, int64_t blocksize) {
  const int64_t size = w.shape[0], blocks = (size + blocksize - 1) / blocksize;
  const Coder coder(data<const float>(bounds), data<const uint8_t>(order));
  with_float(w.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(blocks, 4 * blocksize, [&](int64_t b) {
      const int64_t begin = b * blocksize, rest = size - begin;
      quantize_block(data<const T>(w) + begin, rest < blocksize ? rest : blocksize, blocksize, coder,
                     data<uint8_t>(packed) + begin / 2, data<float>(absmax) + b);
    });
  });
}

void dequantize_4bit(const TensorView& out, const TensorView& packed, const TensorView& levels,
                     const TensorView& absmax, const TensorView& codes, const TensorView& map,
                     const TensorView& offset, int64_t blocksize, int64_t columns, int64_t row0,
                     int64_t column0) {
  const Scales scales(absmax, codes, map, offset);
  with_float(out.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t rows = out.shape[0], width = out.shape[1];
    const bool stream = rows * width * int64_t(sizeof(T)) > kStreamBytes;
    const int64_t span = stream ? 32 : 1;  // rows between two fences
    parallel_for((rows + span - 1) / span, span * width, [&](int64_t piece) {
      for (int64_t m = piece * span; m < rows && m < (piece + 1) * span; ++m) {
        const int64_t begin = (row0 + m) * columns + column0;
        dequantize_run(data<const uint8_t>(packed), data<const float>(levels), scales, blocksize, begin,
                       begin + width, stream, row<T>(out, m));
      }
      if (stream) order_streamed_stores();
    });
  });
}

void dequantize_4bit_stack(const TensorView& out, const TensorList& packed, const TensorView& levels,
                           const TensorList& absmaxes, const TensorList& codes, const TensorView& map,
                           const TensorList& offsets, int64_t blocksize) {
  int64_t row = 0;
  for (int64_t i = 0; i < packed.size; ++i) {
    TensorView part = out, none;
    part.data = static_cast<char*>(out.data) + row * out.strides[0] * (out.dtype == DType::f32 ? 4 : 2);
    row += part.shape[0] = rows_of_packed(packed.items[i], out.shape[1]);
    const bool nested = codes.size > 0;
    dequantize_4bit(part, packed.items[i], levels, absmaxes.items[i], nested ? codes.items[i] : none, map,
                    nested ? offsets.items[i] : none, blocksize, out.shape[1], 0, 0);
  }
}

}  // namespace INLAY_ISA_NS
}  // namespace inlay
