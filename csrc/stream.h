// The device and stream that the calling thread's CUDA kernels go to.
#pragma once

#include <cstdint>

namespace inlay {

#if defined(INLAY_HAVE_CUDA)

// For its lifetime `device` is the current one, and kernels go to `stream` (a cudaStream_t); device -1:
// neither.
class OnStream {
 public:
  OnStream(int device, void* stream);
  ~OnStream();
  OnStream(const OnStream&) = delete;
  OnStream& operator=(const OnStream&) = delete;

 private:
  int before_ = -1;  // the device to go back to
};

// A number of its own for each CUDA graph that this stream (a cudaStream_t) is being captured into; 0: none.
uint64_t capture_of(void* stream);

#else

struct OnStream {
  OnStream(int, void*) {}
  ~OnStream() {}
};

inline uint64_t capture_of(void*) { return 0; }

#endif

}  // namespace inlay
