// (op, instruction set) -> implementation: the one place that chooses.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "scratch.h"
#include "tensor.h"

namespace inlay {

struct KernelTable {
  const char* isa;
#define INLAY_OP(name, args) void(*name) args;
#include "ops.h"
#undef INLAY_OP
};

// The kernels in use: the best this machine has, or what INLAY_ISA or set_isa names.
const KernelTable& kernels();

// The kernels for tensors on `device`; throws std::invalid_argument when this build has none.
const KernelTable& kernels_for(const char* op, Device device);

std::string cuda_archs();                   // compiled in, for example "sm_80 sm_90a"; empty: no CUDA kernels
std::vector<std::string> built_isas();      // compiled in
std::vector<std::string> available_isas();  // compiled in and supported by this CPU and its OS, best last
void set_isa(const std::string& isa);       // throws std::invalid_argument naming what exists

// The checked ops: what bindings call.
#define INLAY_OP(name, args) void name args;
#include "ops.h"
#undef INLAY_OP

}  // namespace inlay
