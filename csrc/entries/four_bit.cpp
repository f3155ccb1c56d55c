// Four-bit storage and the products straight from it.
#include "entries/entry.h"

namespace inlay {

namespace {

void check_blocksize(const char* op, int64_t blocksize) {
  if (blocksize < 32 || blocksize > 4096 || (blocksize & (blocksize - 1)))
    throw std::invalid_argument("inlay." + std::string(op) +
                                ": blocksize: wanted a power of two in [32, 4096], got " +
                                std::to_string(blocksize) + "; 64 is the usual choice");
}

// The storage of a weight of `size` elements, of which the last one used is `last`.
void check_four_bit(const char* op, int64_t last, const TensorView& packed, const TensorView& levels,
                    const TensorView& absmax, const TensorView& codes, const TensorView& map,
                    const TensorView& offset, int64_t blocksize) {
  check_blocksize(op, blocksize);
  check_dtype(op, "packed", packed, DType::u8);
  check_vector(op, "packed", packed, numel(packed));
  check_dtype(op, "levels", levels, DType::f32);
  check_vector(op, "levels", levels, 16);
  check_dtype(op, "absmax", absmax, DType::f32);
  check_vector(op, "absmax", absmax, numel(absmax));
  int64_t blocks = numel(absmax);
  if (codes.data) {
    check_dtype(op, "codes", codes, DType::u8);
    check_vector(op, "codes", codes, numel(codes));
    check_dtype(op, "map", map, DType::f32);
    check_vector(op, "map", map, 256);
    check_dtype(op, "offset", offset, DType::f32);
    blocks = numel(codes) <= numel(absmax) * 256 ? numel(codes) : numel(absmax) * 256;
  }
  if (numel(packed) * 2 < last || blocks * blocksize < last)
    throw std::invalid_argument("inlay." + std::string(op) + ": packed: wanted bytes and scales for " +
                                std::to_string(last) + " weights, got " + std::to_string(numel(packed) * 2) +
                                " and " + std::to_string(blocks * blocksize) + "; check shape and blocksize");
}

}  // namespace

void quantize_4bit(const TensorView& packed, const TensorView& absmax, const TensorView& w,
                   const TensorView& bounds, const TensorView& order, int64_t blocksize) {
  constexpr const char* op = "quantize_4bit";
  check_blocksize(op, blocksize);
  check_float(op, "w", w);
  const int64_t size = numel(w);
  check_vector(op, "w", w, size);
  check_dtype(op, "packed", packed, DType::u8);
  check_vector(op, "packed", packed, (size + 1) / 2);
  check_dtype(op, "absmax", absmax, DType::f32);
  check_vector(op, "absmax", absmax, (size + blocksize - 1) / blocksize);
  check_dtype(op, "bounds", bounds, DType::f32);
  check_vector(op, "bounds", bounds, 15);
  check_dtype(op, "order", order, DType::u8);
  check_vector(op, "order", order, 16);
  run(op, &KernelTable::quantize_4bit, packed, absmax, w, bounds, order, blocksize);
}

void dequantize_4bit(const TensorView& out, const TensorView& packed, const TensorView& levels,
                     const TensorView& absmax, const TensorView& codes, const TensorView& map,
                     const TensorView& offset, int64_t blocksize, int64_t columns, int64_t row,
                     int64_t column) {
  constexpr const char* op = "dequantize_4bit";
  check_lead(op, "out", out);
  if (row < 0 || column < 0 || column + out.shape[1] > columns)
    fail(op, "out", "a rectangle inside the weight", out, "check row, column and columns");
  const int64_t last = numel(out) ? (row + out.shape[0] - 1) * columns + column + out.shape[1] : 0;
  check_four_bit(op, last, packed, levels, absmax, codes, map, offset, blocksize);
  run(op, &KernelTable::dequantize_4bit, out, packed, levels, absmax, codes, map, offset, blocksize, columns,
      row, column);
}

void dequantize_4bit_stack(const TensorView& out, const TensorList& packed, const TensorView& levels,
                           const TensorList& absmaxes, const TensorList& codes, const TensorView& map,
                           const TensorList& offsets, int64_t blocksize) {
  constexpr const char* op = "dequantize_4bit_stack";
  check_lead(op, "out", out);
  const int64_t columns = out.shape[1], nested = codes.size;
  if (columns < 2) fail(op, "out", "2 columns or more", out, "dequantize the weights one by one");
  if (absmaxes.size != packed.size || (nested && nested != packed.size) || offsets.size != nested)
    throw std::invalid_argument(
        "inlay." + std::string(op) +
        ": packed, absmaxes, codes, offsets: wanted one each (codes and offsets: or none), got " +
        std::to_string(packed.size) + ", " + std::to_string(absmaxes.size) + ", " + std::to_string(nested) +
        ", " + std::to_string(offsets.size) + "; pass the scales of every weight");
  int64_t rows = 0;
  for (int64_t i = 0; i < packed.size; ++i) {
    const int64_t mine = rows_of_packed(packed.items[i], columns);
    const TensorView none;
    check_four_bit(op, mine * columns, packed.items[i], levels, absmaxes.items[i],
                   nested ? codes.items[i] : none, map, nested ? offsets.items[i] : none, blocksize);
    rows += mine;
  }
  if (rows != out.shape[0]) fail(op, "out", "as many rows as all weights together", out, "check the shapes");
  run(op, &KernelTable::dequantize_4bit_stack, out, packed, levels, absmaxes, codes, map, offsets, blocksize);
}

namespace {

// None, or as long as one likes.
void check_scratch(const char* op, const char* name, const TensorView& scratch, DType dtype) {
  if (scratch.ndim == 0) return;
  check_dtype(op, name, scratch, dtype);
  check_vector(op, name, scratch, scratch.shape[0]);
}

void check_quantized_linear(const char* op, const TensorView& y, const TensorView& x,
                            const TensorView& packed, const TensorView& levels, const TensorView& absmax,
                            const TensorView& codes, const TensorView& map, const TensorView& offset,
                            const TensorView& bias, const TensorView& counters, const TensorView& sums,
                            int64_t blocksize) {
  check_lead(op, "x", x);
  check_dtype(op, "y", y, x.dtype);
  check_matrix(op, "y", y, x.shape[0], y.ndim == 2 ? y.shape[1] : -1);
  check_four_bit(op, y.shape[1] * x.shape[1], packed, levels, absmax, codes, map, offset, blocksize);
  if (bias.data) {
    check_dtype(op, "bias", bias, x.dtype);
    check_vector(op, "bias", bias, y.shape[1]);
  }
  check_scratch(op, "counters", counters, DType::i64);
  check_scratch(op, "sums", sums, DType::f32);
}

}  // namespace

void quantized_linear(const TensorView& y, const TensorView& x, const TensorView& packed,
                      const TensorView& levels, const TensorView& absmax, const TensorView& codes,
                      const TensorView& map, const TensorView& offset, const TensorView& bias,
                      const TensorView& counters, const TensorView& sums, int64_t blocksize) {
  constexpr const char* op = "quantized_linear";
  check_quantized_linear(op, y, x, packed, levels, absmax, codes, map, offset, bias, counters, sums,
                         blocksize);
  run(op, &KernelTable::quantized_linear, y, x, packed, levels, absmax, codes, map, offset, bias, counters,
      sums, blocksize);
}

void quantized_lora_linear(const TensorView& y, const TensorView& x, const TensorView& packed,
                           const TensorView& levels, const TensorView& absmax, const TensorView& codes,
                           const TensorView& map, const TensorView& offset, const TensorView& bias,
                           const TensorView& inner, const TensorView& b, const TensorView& counters,
                           const TensorView& sums, int64_t blocksize) {
  constexpr const char* op = "quantized_lora_linear";
  check_quantized_linear(op, y, x, packed, levels, absmax, codes, map, offset, bias, counters, sums,
                         blocksize);
  check_dtype(op, "b", b, DType::f32);
  check_matrix(op, "b", b, y.shape[1], b.ndim == 2 ? b.shape[1] : -1);
  check_dtype(op, "inner", inner, DType::f32);
  check_matrix(op, "inner", inner, x.shape[0], b.shape[1]);
  if (inner.shape[0] > 1 && inner.shape[1] > 0 && inner.strides[0] != inner.shape[1])
    fail(op, "inner", "rows without gaps", inner, "call .contiguous() first");
  run(op, &KernelTable::quantized_lora_linear, y, x, packed, levels, absmax, codes, map, offset, bias, inner,
      b, counters, sums, blocksize);
}

}  // namespace inlay
