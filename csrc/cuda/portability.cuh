// Everything in which CUDA, HIP and the tests' emulation on the CPU differ. Kernel bodies use only
// these names and those that CUDA and HIP share.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(GRADCLIP_EMULATION)
#include "emulation.h"
#elif defined(__HIPCC__)
#include <hip/hip_bf16.h>
#include <hip/hip_fp16.h>
#include <hip/hip_runtime.h>
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

// CUDA 11 has no wait for the previous kernel, and takes 4 KB of parameters; see table.h.
#if defined(GRADCLIP_EMULATION)
#define GRADCLIP_HAS_WAIT 1
#define GRADCLIP_LARGE_PARAMETERS 1
#elif defined(__HIPCC__)
#define GRADCLIP_HAS_WAIT 0
#define GRADCLIP_LARGE_PARAMETERS 0
#else
#define GRADCLIP_HAS_WAIT (CUDART_VERSION >= 12000)
#define GRADCLIP_LARGE_PARAMETERS (CUDART_VERSION >= 12010)
#endif

// A large, read-only kernel parameter: by value, but never copied to the stack.
#if defined(GRADCLIP_EMULATION)
#define GRADCLIP_GRID_CONSTANT(Type) const Type&
#elif defined(__HIPCC__)
#define GRADCLIP_GRID_CONSTANT(Type) const Type
#else
#define GRADCLIP_GRID_CONSTANT(Type) const __grid_constant__ Type
#endif

namespace gradclip::cuda {

#if defined(__HIP_DEVICE_COMPILE__) && defined(__GFX9__)
inline constexpr int kWarpThreads = 64;
#else
inline constexpr int kWarpThreads = 32;
#endif

#if !defined(GRADCLIP_EMULATION)

// The value of the thread `offset` lanes further on in the warp. All threads have to take part.
template <class Value>
__device__ __forceinline__ Value shuffle_down(Value value, int offset) {
#if defined(__HIPCC__)
  return __shfl_down(value, offset, kWarpThreads);
#else
  return __shfl_down_sync(0xffffffffu, value, offset);
#endif
}

// Bypasses the L1 cache, which may hold stale data from before another kernel wrote. Not __ldg: the
// compiler may hoist that above the wait.
__device__ __forceinline__ double load_result(const double* pointer) {
#if defined(__HIPCC__)
  return __builtin_nontemporal_load(pointer);
#else
  return __ldcg(pointer);
#endif
}

// Returns once the previous kernel in the stream has ended and its writes are visible; immediately
// if the launch did not ask for an early start.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if GRADCLIP_HAS_WAIT && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// A word holds two 16-bit numbers, the first one in its lower half.
__device__ __forceinline__ float2 unpack_float16(uint32_t word) {
  __half2 pair;
  memcpy(&pair, &word, sizeof pair);
  return __half22float2(pair);
}

__device__ __forceinline__ uint32_t pack_float16(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

__device__ __forceinline__ uint32_t pack_bfloat16(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

// Queues a kernel on a stream of the current device. With `early` it may start before the previous
// kernel has ended. Takes the arguments by address, since <<<>>> would copy each table once more.
template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), int64_t blocks, int threads,
                          cudaStream_t stream, bool early, const Arguments&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument for each parameter");
  static_assert((std::is_same_v<std::remove_cv_t<Parameters>, Arguments> && ...),
                "arguments are passed by address, so their types have to be the parameters'");
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
#if defined(__HIPCC__)
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel),
                          dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                          addresses, 0, stream);
#else
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), addresses);
#endif
}

#endif

// A bfloat16 is the upper half of a float32.
__device__ __forceinline__ float2 unpack_bfloat16(uint32_t word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

}  // namespace gradclip::cuda
