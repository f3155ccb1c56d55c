// csrc/dispatch.h for the emulated module: the CUDA kernels run on CPU tensors, and what stands in for
// instruction sets are the orders in which threads run between barriers.
#include "dispatch.h"

#include <stdexcept>

#include "simt/simt.h"

#define INLAY_OP(name, args) void name args;
namespace inlay {
namespace cuda {
#define INLAY_CPU_OP(name, args)
#include "ops.h"
}  // namespace cuda
}  // namespace inlay
#undef INLAY_OP

namespace inlay {

namespace {

#define INLAY_OP(name, args) &cuda::name,
#define INLAY_CPU_OP(name, args) nullptr,
constexpr KernelTable kEmulated = {
    "simt",
#include "ops.h"
};
#undef INLAY_OP

const std::vector<std::string> kOrders = {"simt-forward", "simt-reverse", "simt-random"};

}  // namespace

const KernelTable& kernels() { return kEmulated; }
const KernelTable& kernels_for(const char*, Device) { return kEmulated; }
SplitScratch quantized_linear_scratch(int64_t tokens, int64_t rows, int64_t columns) {
  return cuda::quantized_linear_scratch(tokens, rows, columns);
}
std::string cuda_archs() { return ""; }
std::vector<std::string> built_isas() { return kOrders; }
std::vector<std::string> available_isas() { return kOrders; }

// "simt-random:7" shuffles with seed 7.
void set_isa(const std::string& isa) {
  const size_t colon = isa.find(':');
  const std::string name = isa.empty() ? kOrders[0] : isa.substr(0, colon);
  for (size_t i = 0; i < kOrders.size(); ++i)
    if (kOrders[i] == name)
      return simt::set_order(simt::Order(i), colon < isa.size() ? std::stoull(isa.substr(colon + 1)) : 1);
  throw std::invalid_argument("set_isa: wanted simt-forward, simt-reverse or simt-random, got '" + isa + "'");
}

}  // namespace inlay
