// The device and stream of a call, and what a launcher may ask about the device. Nothing here waits for a
// GPU.
#include "launch.cuh"
#include "stream.h"

namespace inlay {

#if defined(__CUDACC__)

namespace {

thread_local cudaStream_t stream_of_call = nullptr;

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("inlay: ") + what + ": " + cudaGetErrorString(error));
}

}  // namespace

OnStream::OnStream(int device, void* stream) {
  if (device < 0) return;
  int now = 0;
  check(cudaGetDevice(&now), "cudaGetDevice");
  if (now != device) {
    check(cudaSetDevice(device), "cudaSetDevice");
    before_ = now;
  }
  stream_of_call = static_cast<cudaStream_t>(stream);
}

OnStream::~OnStream() {
  if (before_ >= 0) cudaSetDevice(before_);
}

uint64_t capture_of(void* stream) {
  cudaStreamCaptureStatus status;
  unsigned long long id = 0;
  check(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id),
        "cudaStreamGetCaptureInfo");
  return status == cudaStreamCaptureStatusActive ? id + 1 : 0;
}

namespace cuda {

void* current_stream() { return stream_of_call; }

int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

}  // namespace cuda

#else

namespace cuda {

int multiprocessors() { return 2; }  // few, so that persistent kernels do go around their loops

}  // namespace cuda

#endif

}  // namespace inlay
