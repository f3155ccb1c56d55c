// Four-bit quantization in bitsandbytes' storage, both ways.
#include "cpu/codes.h"

namespace inlay {
namespace INLAY_ISA_NS {

namespace {

constexpr float kSmallest = 1e-38f;  // bitsandbytes' stand-in for the absmax of a block of zeros
constexpr int64_t kLargestBlock = 4096;

// How many of the 15 sorted bounds lie below x, by bisection: four lookups for kWidth elements.
struct Bisection {
  float padded[16];
  explicit Bisection(const float* bounds) {
    for (int i = 0; i < 15; ++i) padded[i] = bounds[i];
    padded[15] = 0;  // never looked at
  }
#if defined(INLAY_VEC_avx512)
  void codes(const float* x, uint8_t* out) const {
    const __m512 values = _mm512_loadu_ps(x), table = _mm512_loadu_ps(padded);
    __m512i below = _mm512_setzero_si512();
    for (int step = 8; step > 0; step /= 2) {
      const __m512i middle = _mm512_add_epi32(below, _mm512_set1_epi32(step - 1));
      const __mmask16 above = _mm512_cmp_ps_mask(values, _mm512_permutexvar_ps(middle, table), _CMP_GT_OQ);
      below = _mm512_mask_add_epi32(below, above, below, _mm512_set1_epi32(step));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(below));
  }
  static constexpr int kStep = 16;
#else
  void codes(const float* x, uint8_t* out) const {
    int below = 0;
    for (int step = 8; step > 0; step /= 2) below += *x > padded[below + step - 1] ? step : 0;
    *out = uint8_t(below);
  }
  static constexpr int kStep = 1;
#endif
};

template <class T>
void quantize_block(const T* w, int64_t size, int64_t blocksize, const Bisection& bisection,
                    const uint8_t* order, uint8_t* packed, float* absmax) {
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
  float scaled[kLargestBlock + 16];
  uint8_t codes[kLargestBlock + 16];
  const Vec reciprocal(1.0f / divisor);
  for_vecs(size, [&](int64_t i, int n) {
    const Vec x = load_n(w + i, n);
    const Vec unit = full ? x * reciprocal : x / Vec(divisor);
    store(scaled + i, max(min(unit, Vec(1.0f)), Vec(-1.0f)));  // lanes beyond n are 0 and never packed
  });
  if (size % 2) scaled[size] = 0;
  for (int64_t i = 0; i < size + size % 2; i += Bisection::kStep) bisection.codes(scaled + i, codes + i);
  for (int64_t i = 0; i < (size + 1) / 2; ++i)
    packed[i] = uint8_t(order[codes[2 * i]] << 4 | order[codes[2 * i + 1]]);
}

// The 16 products level·scale of a block, rounded to T: every element of the block is one of them.
template <class T>
struct Products {
  T values[16];
  Products(const float* levels, float scale) {
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
  static int64_t wide(const bf16* table, const uint8_t* p, int64_t n, bf16* out) {
    return words(table, p, n, out);
  }
  static int64_t wide(const f16* table, const uint8_t* p, int64_t n, f16* out) {
    return words(table, p, n, out);
  }
  // 16 bytes to 32 words: the even element is looked up in the low half of each lane, the odd one in the high
  // half.
  static int64_t words(const void* table, const uint8_t* p, int64_t n, void* out) {
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(table)));
    const __m512i odd = _mm512_slli_epi32(even, 16);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      const __m512i codes = Levels::bytes(p + i);
      const __m512i low = _mm512_permutexvar_epi32(_mm512_srli_epi32(codes, 4), even);
      const __m512i high = _mm512_permutexvar_epi32(codes, odd);
      _mm512_storeu_si512(static_cast<uint16_t*>(out) + 2 * i, _mm512_or_si512(low, high));
    }
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

// Elements [begin, end) of the flat weight, block by block; either end may fall inside a block or a byte.
template <class T>
void dequantize_run(const uint8_t* packed, const float* levels, const Scales& scales, int64_t blocksize,
                    int64_t begin, int64_t end, T* out) {
  while (begin < end) {
    const int64_t block = begin / blocksize;
    const int64_t stop = (block + 1) * blocksize < end ? (block + 1) * blocksize : end;
    const Products<T> products(levels, scales.at(block));
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
  const Bisection bisection(data<const float>(bounds));
  const uint8_t* codes = data<const uint8_t>(order);
  with_float(w.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(blocks, 4 * blocksize, [&](int64_t b) {
      const int64_t begin = b * blocksize, rest = size - begin;
      quantize_block(data<const T>(w) + begin, rest < blocksize ? rest : blocksize, blocksize, bisection,
                     codes, data<uint8_t>(packed) + begin / 2, data<float>(absmax) + b);
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
    parallel_for(out.shape[0], out.shape[1], [&](int64_t m) {
      const int64_t begin = (row0 + m) * columns + column0;
      dequantize_run(data<const uint8_t>(packed), data<const float>(levels), scales, blocksize, begin,
                     begin + out.shape[1], row<T>(out, m));
    });
  });
}

}  // namespace INLAY_ISA_NS
}  // namespace inlay
