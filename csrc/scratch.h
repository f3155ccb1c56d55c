// How much scratch an op can use that shares its work among the blocks of a GPU.
#pragma once

#include <cstdint>

namespace inlay {

struct SplitScratch {
  int64_t counters = 0;  // int64, zero before and after a call; the same number for all calls on a device
  int64_t sums = 0;      // fp32, of any content
};

// Tokens whose sums causal_conv1d_backward keeps in one row of its scratch.
constexpr int64_t kConvTokens = 64;

// What quantized_linear and quantized_lora_linear of x [tokens, columns] and W [rows, columns] want on the
// current device; nothing where they have no use for it.
SplitScratch quantized_linear_scratch(int64_t tokens, int64_t rows, int64_t columns);

namespace cuda {
SplitScratch quantized_linear_scratch(int64_t tokens, int64_t rows, int64_t columns);
}

}  // namespace inlay
