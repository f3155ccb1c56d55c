// The device and stream that the calling thread's CUDA kernels go to.
#pragma once

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

#else

struct OnStream {
  OnStream(int, void*) {}
  ~OnStream() {}
};

#endif

}  // namespace inlay
