// The part of the CUDA runtime that the sweep (bench/cuda) calls, for the emulation: one GPU of one
// multiprocessor, whose memory is the CPU's, and a stream on which every launch returns after its
// kernel has ended. Between two events and in a graph nothing runs, since nobody looks at what that
// would leave: the sweep only takes the time.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "grid.h"

#define __global__
#define __launch_bounds__(...)

using cudaStream_t = void*;
using cudaEvent_t = int*;
using cudaGraph_t = int*;
using cudaGraphExec_t = int*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorNotSupported };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal };
constexpr unsigned cudaStreamNonBlocking = 1;
constexpr int CUDART_VERSION = 13000;

struct cudaFuncAttributes {
  int ptxVersion;
};

struct cudaDeviceProp {
  char name[32];
  int major;
  int minor;
  int multiProcessorCount;
  int l2CacheSize;
};

namespace gradclip::emulation {

// Whether time is being taken.
inline bool timing = false;

inline cudaError_t allocate(void** data, size_t bytes) {
  // Of what nobody has written, neither the norm nor a comparison comes out right.
  *data = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  // What is longer is only read to take the time.
  constexpr size_t kMost = size_t{1} << 26;
  if (bytes <= kMost) std::memset(*data, 0xff, bytes);
  return cudaSuccess;
}

inline cudaError_t release(void* data) {
  std::free(data);
  return cudaSuccess;
}

template <class Value, class Chosen>
cudaError_t set(Value* value, Chosen chosen) {
  *value = chosen;
  return cudaSuccess;
}

inline int none = 0;

}  // namespace gradclip::emulation

inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulation"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return gradclip::emulation::set(count, 1); }
inline cudaError_t cudaGetDevice(int* device) { return gradclip::emulation::set(device, 0); }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) {
  return gradclip::emulation::set(version, CUDART_VERSION);
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return gradclip::emulation::set(value, 1);
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  return gradclip::emulation::set(&attributes->ptxVersion, 90);
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {"emulation", 9, 0, 1, 64 * 1024};
  return cudaSuccess;
}

inline cudaError_t cudaMalloc(void** data, size_t bytes) {
  return gradclip::emulation::allocate(data, bytes);
}
inline cudaError_t cudaMallocHost(void** data, size_t bytes) {
  return gradclip::emulation::allocate(data, bytes);
}
inline cudaError_t cudaFree(void* data) { return gradclip::emulation::release(data); }
inline cudaError_t cudaFreeHost(void* data) { return gradclip::emulation::release(data); }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  if (!gradclip::emulation::timing) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (!gradclip::emulation::timing) std::memset(to, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return gradclip::emulation::set(stream, nullptr);
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return gradclip::emulation::set(event, &gradclip::emulation::none);
}
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
  gradclip::emulation::timing = !gradclip::emulation::timing;
  return cudaSuccess;
}
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  return gradclip::emulation::set(milliseconds, 0.5f);
}

inline cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  return gradclip::emulation::set(&gradclip::emulation::timing, true);
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  gradclip::emulation::timing = false;
  return gradclip::emulation::set(graph, &gradclip::emulation::none);
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, int) {
  return gradclip::emulation::set(executable, graph);
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }

namespace gradclip::cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t,
                          bool /*early*/, const Arguments&... arguments) {
  static_assert((std::is_same_v<std::decay_t<Parameters>, Arguments> && ...),
                "arguments are passed by address, so their types have to be the parameters'");
  if (emulation::timing) return cudaSuccess;
  emulation::Grid({static_cast<int>(blocks), threads}, emulation::Schedule(), [&] {
    kernel(arguments...);
  }).run();
  return cudaSuccess;
}

namespace sweep {

template <class Kernel>
cudaError_t allow_cluster(Kernel*, int, int) {
  return cudaSuccess;
}

template <class Kernel, class... Arguments>
cudaError_t launch_cluster(Kernel* kernel, int blocks, int threads, cudaStream_t stream,
                           const Arguments&... arguments) {
  return launch_kernel(kernel, blocks, threads, stream, false, arguments...);
}

}  // namespace sweep
}  // namespace gradclip::cuda
