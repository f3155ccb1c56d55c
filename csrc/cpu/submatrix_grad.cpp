// Weight gradient of a delta on AMX: fp32 sums of bf16 products, without an fp32 copy of either operand.
//
// Formed transposed, [s, N] = xᵀ·dy: x, the narrow operand, is transposed once; pairs of rows of dy
// interleave into the right operand, 32 columns at a time, which is one piece of work.
#include "cpu/tiles.h"

namespace inlay {
namespace INLAY_ISA_NS {

#if !defined(INLAY_VEC_amx)

void submatrix_grad(const TensorView&, const TensorView& dy, const TensorView&, bool) {
  fail("submatrix_grad", "instruction set", "amx", dy, "use the reference on this machine");
}

#else

namespace {

// One piece is 64 columns, two cache lines of every row of dy; 256 tokens of it are 32 KiB interleaved, which
// stay in L1 while the products use them.
constexpr int64_t kColumns = 2 * kSquare, kTokens = 256;
constexpr int64_t kAhead = 16;  // rows: rows lie too far apart for the hardware to fetch the next ones itself

int64_t whole_squares(int64_t size) { return (size + kSquare - 1) / kSquare * kSquare; }

struct Zeroed : Aligned {
  explicit Zeroed(int64_t bytes) : Aligned(bytes) { memset(start, 0, size_t(bytes)); }
};

// Pairs of rows [first, first + count) of 32 columns of dy; rows and columns beyond the end are 0.
void interleave_edge(uint32_t* out, const TensorView& dy, int64_t first, int64_t count, int64_t column) {
  const int64_t rest = dy.shape[1] - column, width = rest < kSquare ? rest : kSquare;
  for (int64_t r = 0; r < whole_squares(count); r += 2) {
    uint32_t* to = out + r / 2 * kSquare;
    const uint16_t* low = r < count ? row<const uint16_t>(dy, first + r) + column : nullptr;
    const uint16_t* high = r + 1 < count ? row<const uint16_t>(dy, first + r + 1) + column : nullptr;
    for (int64_t j = 0; j < kSquare; ++j) to[j] = 0;
    for (int64_t j = 0; low && j < width; ++j) to[j] = low[j];
    for (int64_t j = 0; high && j < width; ++j) to[j] |= uint32_t(high[j]) << 16;
  }
}

// The same where all rows and columns are there.
void interleave(uint32_t* out, const TensorView& dy, int64_t first, int64_t count, int64_t column) {
  if (dy.shape[1] - column < kSquare || count % kSquare)
    return interleave_edge(out, dy, first, count, column);
  alignas(64) uint16_t order[2][kSquare];
  for (int i = 0; i < 32; ++i) {
    order[0][i] = uint16_t(i / 2 + i % 2 * 32);  // element i / 2 of the first row, or of the second
    order[1][i] = uint16_t(order[0][i] + 16);
  }
  const __m512i left = _mm512_load_si512(order[0]), right = _mm512_load_si512(order[1]);
  for (int64_t r = 0; r < count; r += 2) {
    const uint16_t* p = row<const uint16_t>(dy, first + r) + column;
    const uint16_t* q = p + dy.strides[0];
    __builtin_prefetch(p + kAhead * dy.strides[0]);
    __builtin_prefetch(q + kAhead * dy.strides[0]);
    const __m512i low = _mm512_loadu_si512(p), high = _mm512_loadu_si512(q);
    _mm512_store_si512(out + r / 2 * kSquare, _mm512_permutex2var_epi16(low, left, high));
    _mm512_store_si512(out + r / 2 * kSquare + 16, _mm512_permutex2var_epi16(low, right, high));
  }
}

// [s, 32] sums of one square of columns into out [N, s], whichever way it lies, or added to what is there.
void write(const TensorView& out, const float* sums, int64_t column, bool add) {
  const int64_t rest = out.shape[0] - column, width = rest < kSquare ? rest : kSquare, chosen = out.shape[1];
  float* to = data<float>(out) + column * out.strides[0];
  for (int64_t j = 0; j < chosen; ++j)
    for (int64_t n = 0; n < width; ++n) {
      float& number = to[n * out.strides[0] + j * out.strides[1]];
      number = sums[j * kSquare + n] + (add ? number : 0.0f);
    }
}

}  // namespace

void submatrix_grad(const TensorView& out, const TensorView& dy, const TensorView& x, bool add) {
  const int64_t tokens = dy.shape[0], columns = dy.shape[1], chosen = x.shape[1];
  const int64_t padded = whole_squares(tokens), narrow = whole_squares(chosen);
  Zeroed left(narrow * padded * 2);
  auto* turned = reinterpret_cast<uint16_t*>(left.start);
  parallel_for(chosen, tokens * 4, [&](int64_t j) {
    for (int64_t m = 0; m < tokens; ++m) turned[j * padded + m] = row<const uint16_t>(x, m)[j];
  });
  parallel_for((columns + kColumns - 1) / kColumns, 2 * tokens * (chosen + 32), [&](int64_t piece) {
    const Tiles tiles;
    Zeroed right(kTokens * kColumns * 2), sums(narrow * kColumns * 4);
    const int64_t column = piece * kColumns, squares = columns - column > kSquare ? 2 : 1;
    for (int64_t first = 0; first < tokens; first += kTokens) {
      const int64_t count = tokens - first < kTokens ? tokens - first : kTokens;
      for (int64_t c = 0; c < squares; ++c) {
        auto* pairs = reinterpret_cast<uint32_t*>(right.start) + c * kTokens / 2 * kSquare;
        auto* total = reinterpret_cast<float*>(sums.start) + c * narrow * kSquare;
        interleave(pairs, dy, first, count, column + c * kSquare);
        for (int64_t j = 0; j < narrow; j += kSquare)
          square(total + j * kSquare, kSquare, true, turned + j * padded + first, padded,
                 reinterpret_cast<const uint16_t*>(pairs), 2 * kSquare, whole_squares(count) / kSquare);
      }
    }
    for (int64_t c = 0; c < squares; ++c)
      write(out, reinterpret_cast<float*>(sums.start) + c * narrow * kSquare, column + c * kSquare, add);
  });
}

#endif

}  // namespace INLAY_ISA_NS
}  // namespace inlay
