// Weight gradient of a delta on AMX: fp32 sums of bf16 products, without an fp32 copy of either operand.
//
// Formed transposed, [s, N] = xᵀ·dy: x, the narrow operand, is transposed once; pairs of rows of dy
// interleave into the right operand, 32 columns at a time, which is one piece of work.
#include "cpu/tiles.h"

namespace inlay {
namespace INLAY_ISA_NS {

#if !defined(INLAY_VEC_amx)

void submatrix_grad(const TensorView&, const TensorView& dy, const TensorView&) {
  fail("submatrix_grad", "instruction set", "amx", dy, "use the reference on this machine");
}

#else

namespace {

constexpr int64_t kTokens =
    1024;  // per span: the interleaved operand of 32 columns is 64 KiB, half of L1 and L2's best

int64_t whole_squares(int64_t size) { return (size + kSquare - 1) / kSquare * kSquare; }

// 64-byte aligned scratch, zeroed.
struct Scratch {
  char* block;
  char* aligned;
  explicit Scratch(int64_t bytes) : block(new char[size_t(bytes + 64)]) {
    aligned = block + (64 - reinterpret_cast<uintptr_t>(block) % 64) % 64;
    memset(aligned, 0, size_t(bytes));
  }
  ~Scratch() { delete[] block; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// Pairs of rows [first, first + count) of 32 columns of dy; rows and columns beyond the end are 0.
void interleave(uint32_t* out, const TensorView& dy, int64_t first, int64_t count, int64_t column) {
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

}  // namespace

void submatrix_grad(const TensorView& out, const TensorView& dy, const TensorView& x) {
  const int64_t tokens = dy.shape[0], columns = dy.shape[1], chosen = x.shape[1];
  const int64_t padded = whole_squares(tokens), narrow = whole_squares(chosen);
  Scratch left(narrow * padded * 2);
  auto* turned = reinterpret_cast<uint16_t*>(left.aligned);
  parallel_for(chosen, tokens * 4, [&](int64_t j) {
    for (int64_t m = 0; m < tokens; ++m) turned[j * padded + m] = row<const uint16_t>(x, m)[j];
  });
  parallel_for(whole_squares(columns) / kSquare, tokens * (chosen + 32), [&](int64_t piece) {
    const Tiles tiles;
    Scratch right(kTokens * kSquare * 2), sums(narrow * kSquare * 4);
    auto* pairs = reinterpret_cast<uint32_t*>(right.aligned);
    auto* total = reinterpret_cast<float*>(sums.aligned);
    const int64_t column = piece * kSquare;
    for (int64_t first = 0; first < tokens; first += kTokens) {
      const int64_t count = tokens - first < kTokens ? tokens - first : kTokens;
      interleave(pairs, dy, first, count, column);
      for (int64_t j = 0; j < narrow; j += kSquare)
        square(total + j * kSquare, kSquare, true, turned + j * padded + first, padded,
               reinterpret_cast<const uint16_t*>(pairs), 2 * kSquare, whole_squares(count) / kSquare);
    }
    for (int64_t n = column; n < columns && n < column + kSquare; ++n)
      for (int64_t j = 0; j < chosen; ++j)
        data<float>(out)[n * out.strides[0] + j * out.strides[1]] = total[j * kSquare + n - column];
  });
}

#endif

}  // namespace INLAY_ISA_NS
}  // namespace inlay
