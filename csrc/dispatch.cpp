#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(INLAY_HAVE_avx2)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define INLAY_OP(name, args) void name args;
namespace inlay {
namespace scalar {
#include "ops.h"
}
#if defined(INLAY_HAVE_avx2)
namespace avx2 {
#include "ops.h"
}
namespace avx512 {
#include "ops.h"
}
namespace avx512_bf16 {
#include "ops.h"
}
namespace amx {
#include "ops.h"
}
#endif
#if defined(INLAY_HAVE_CUDA)
namespace cuda {
#define INLAY_CPU_OP(name, args)
#include "ops.h"
}  // namespace cuda
#endif
}  // namespace inlay
#undef INLAY_OP

namespace inlay {

namespace {

#define INLAY_OP(name, args) &scalar::name,
#define INLAY_CUDA_OP(name, args) nullptr,
constexpr KernelTable kScalar = {
    "scalar",
#include "ops.h"
};
#undef INLAY_OP

#if defined(INLAY_HAVE_avx2)
#define INLAY_OP(name, args) &avx2::name,
#define INLAY_CUDA_OP(name, args) nullptr,
constexpr KernelTable kAvx2 = {
    "avx2",
#include "ops.h"
};
#undef INLAY_OP
#define INLAY_OP(name, args) &avx512::name,
#define INLAY_CUDA_OP(name, args) nullptr,
constexpr KernelTable kAvx512 = {
    "avx512",
#include "ops.h"
};
#undef INLAY_OP

// Those of avx512, but where products of bf16 pairs pay.
constexpr KernelTable kAvx512Bf16 = [] {
  KernelTable table = kAvx512;
  table.isa = "avx512_bf16";
  table.attention_forward = &avx512_bf16::attention_forward;
  table.attention_backward = &avx512_bf16::attention_backward;
  table.expert_matmul = &avx512_bf16::expert_matmul;
  table.expert_grad = &avx512_bf16::expert_grad;
  table.matmul_sum = &avx512_bf16::matmul_sum;
  table.int8_matmul_sum = &avx512_bf16::int8_matmul_sum;
  return table;
}();

#define INLAY_OP(name, args) &amx::name,
#define INLAY_CUDA_OP(name, args) nullptr,
constexpr KernelTable kAmx = {
    "amx",
#include "ops.h"
};
#undef INLAY_OP

#endif

#if defined(INLAY_HAVE_CUDA)
#define INLAY_OP(name, args) &cuda::name,
#define INLAY_CPU_OP(name, args) nullptr,
constexpr KernelTable kCuda = {
    "cuda",
#include "ops.h"
};
#undef INLAY_OP
#endif

#if defined(INLAY_HAVE_avx2)
// XCR0: which registers the operating system saves. A CPU flag without it means a fault at the first use.
uint64_t saved_registers() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t(high) << 32) | low;
}

// Linux hands out the 8 KB of tile registers on request only; the permission is the process's.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

struct CpuFeatures {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, amx = false, intel = false;

  CpuFeatures() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    intel = __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool osxsave = c & (1u << 27), fma = c & (1u << 12), f16c = c & (1u << 29);
    if (!osxsave || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const uint64_t saved = saved_registers();
    constexpr uint64_t kYmm = 0x6, kZmm = 0xe6;
    constexpr unsigned kAvx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // f, dq, bw, vl
    avx2 = (saved & kYmm) == kYmm && fma && f16c && (b & (1u << 5));
    constexpr uint64_t kTiles = 0x60000;
    constexpr unsigned kAmx = (1u << 22) | (1u << 24);  // bf16, tile
    avx512 = avx2 && (saved & kZmm) == kZmm && (b & kAvx512) == kAvx512;
    amx = avx512 && (saved & kTiles) == kTiles && (d & kAmx) == kAmx && may_use_tiles();
    constexpr unsigned kBf16 = 1u << 5;  // of another leaf; every CPU with tiles has it
    const bool vnni = c & (1u << 11);    // every CPU with those pairs has it, and products of bytes want it
    avx512_bf16 = avx512 && vnni && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kBf16);
    amx = amx && avx512_bf16;
  }
};

const CpuFeatures& cpu() {
  static const CpuFeatures features;
  return features;
}
#endif

std::vector<const KernelTable*> available() {
  std::vector<const KernelTable*> tables = {&kScalar};
#if defined(INLAY_HAVE_avx2)
  if (cpu().avx2) tables.push_back(&kAvx2);
  // Intel's AVX-512 multiplies pairs of bf16 at half the rate of fp32, AMD's, by its tables, at twice.
  if (cpu().avx512_bf16 && cpu().intel) tables.push_back(&kAvx512Bf16);
  if (cpu().avx512) tables.push_back(&kAvx512);
  if (cpu().avx512_bf16 && !cpu().intel) tables.push_back(&kAvx512Bf16);
  if (cpu().amx) tables.push_back(&kAmx);
#endif
  return tables;
}

const KernelTable* find(const std::string& isa) {
  std::string names;
  for (const KernelTable* table : available()) {
    if (isa == table->isa) return table;
    names += (names.empty() ? "" : ", ") + std::string(table->isa);
  }
  throw std::invalid_argument("INLAY_ISA: wanted one of " + names +
                              " (what this build and this CPU have), got '" + isa +
                              "'; unset it to take the best");
}

const KernelTable* choose() {
  const char* forced = std::getenv("INLAY_ISA");
  return forced && *forced ? find(forced) : available().back();
}

std::atomic<const KernelTable*> current{nullptr};

}  // namespace

const KernelTable& kernels() {
  const KernelTable* table = current.load(std::memory_order_acquire);
  if (!table) current.store(table = choose(), std::memory_order_release);
  return *table;
}

const KernelTable& kernels_for(const char* op, Device device) {
  if (device == Device::cpu) return kernels();
#if defined(INLAY_HAVE_CUDA)
  if (device == Device::cuda) return kCuda;
#endif
  throw std::invalid_argument("inlay." + std::string(op) +
                              ": wanted CPU tensors, got CUDA tensors, and this build has no CUDA kernels; "
                              "build with INLAY_CUDA=on, or use the reference");
}

std::string cuda_archs() {
#if defined(INLAY_HAVE_CUDA)
  return INLAY_HAVE_CUDA;
#else
  return "";
#endif
}

SplitScratch quantized_linear_scratch([[maybe_unused]] int64_t tokens, [[maybe_unused]] int64_t rows,
                                      [[maybe_unused]] int64_t columns) {
#if defined(INLAY_HAVE_CUDA)
  return cuda::quantized_linear_scratch(tokens, rows, columns);
#else
  return {};
#endif
}

void set_isa(const std::string& isa) { current.store(isa.empty() ? choose() : find(isa)); }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : available()) names.emplace_back(table->isa);
  return names;
}

std::vector<std::string> built_isas() {
  std::vector<std::string> names = {"scalar"};
#if defined(INLAY_HAVE_avx2)
  names.insert(names.end(), {"avx2", "avx512", "avx512_bf16", "amx"});
#endif
  return names;
}

}  // namespace inlay
