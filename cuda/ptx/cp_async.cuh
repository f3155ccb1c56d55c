// cp.async: 16 bytes from global to shared memory past the registers; there when a wait for its group says
// so, to the thread that copied, and after a barrier to its block.
//
//   cp_async(to, from, inside)   inside false: 16 zero bytes, and nothing is read; `from` is aligned
//   cp_async_commit()            closes a group: all copies of this thread since the last one
//   cp_async_wait<N>()           waits until at most the N newest groups of this thread are still under way
#pragma once

#include "device.cuh"

namespace inlay {
namespace cuda {

#if defined(__CUDACC__)

__device__ __forceinline__ void cp_async(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))),
               "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#else

inline void cp_async(void* to, const void* from, bool inside) {
  simt::start_copy(static_cast<simt::Copied*>(to), inside ? static_cast<const simt::Copied*>(from) : nullptr);
}
inline void cp_async_commit() { simt::commit_copies(); }
template <int N>
void cp_async_wait() {
  simt::wait_for_copies(N);
}

#endif

}  // namespace cuda
}  // namespace inlay
