// The part of the CUDA runtime that launchers and binding call, for the emulation: one device,
// whose memory is the CPU's, and a stream on which every launch returns after its kernel has ended.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <type_traits>

#include "grid.h"

#define __global__
#define __launch_bounds__(...)

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorNotSupported };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};

struct cudaFuncAttributes {
  int ptxVersion;
};

inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulation"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1;
  return cudaSuccess;
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  const char* requested = std::getenv("GRADCLIP_EMULATED_DRIVER");
  *version = requested == nullptr ? 13000 : std::atoi(requested);
  return cudaSuccess;
}

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}

namespace gradclip::emulation {

// Prints the number of launches at exit, if requested.
class LaunchCounter {
 public:
  ~LaunchCounter() {
    if (std::getenv("GRADCLIP_COUNT_LAUNCHES") == nullptr) return;
    std::fprintf(stderr, "%d kernels launched\n", count_);
  }

  void count() { ++count_; }

 private:
  int count_ = 0;
};

inline LaunchCounter launch_counter;

}  // namespace gradclip::emulation

namespace gradclip::cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t,
                          bool /*early*/, const Arguments&... arguments) {
  static_assert((std::is_same_v<std::decay_t<Parameters>, Arguments> && ...),
                "arguments are passed by address, so their types have to be the parameters'");
  emulation::launch_counter.count();
  emulation::Grid grid({static_cast<int>(blocks), threads}, emulation::Schedule(),
                       [&] { kernel(arguments...); });
  grid.run();
  return cudaSuccess;
}

}  // namespace gradclip::cuda
