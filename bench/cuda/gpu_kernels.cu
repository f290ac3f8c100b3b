#include "cuda/portability.cuh"
#include "gpu_kernels.h"

namespace gradclip::cuda::sweep {
namespace {

constexpr int kThreads = 256;
template <int kInFlight>
__global__ void __launch_bounds__(kThreads)
    read_kernel(const uint4* vectors, int64_t count, uint32_t* sink) {
  uint32_t all = 0;
  const int64_t block = int64_t{kInFlight} * kThreads;
  const int64_t step = block * gridDim.x;
#pragma unroll 1
  for (int64_t i = block * blockIdx.x + threadIdx.x; i + block <= count + threadIdx.x; i += step) {
    uint4 loaded[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) loaded[k] = vectors[i + k * kThreads];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      all ^= loaded[k].x ^ loaded[k].y ^ loaded[k].z ^ loaded[k].w;
    }
  }
  // Hardly ever true, but the compiler does not know.
  if (all == 0x12345678u) *sink = all;
}

// Some bits that repeat nowhere.
__global__ void __launch_bounds__(kThreads) fill_kernel(uint4* vectors, int64_t count) {
  const int64_t step = int64_t{kThreads} * gridDim.x;
  for (int64_t i = int64_t{kThreads} * blockIdx.x + threadIdx.x; i < count; i += step) {
    const uint32_t bits = static_cast<uint32_t>(i) * 2654435761u;
    vectors[i] = make_uint4(bits, ~bits, bits ^ 0x5bd1e995u, bits + 12345u);
  }
}

__global__ void spin_kernel(int64_t nanoseconds) {
  unsigned long long begin = 0;
  unsigned long long now = 0;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - begin < static_cast<unsigned long long>(nanoseconds));
}

template <int kBytes>
struct Parameters {
  int words[kBytes / static_cast<int>(sizeof(int))];
};

template <int kBytes>
__global__ void __launch_bounds__(kThreads)
    empty_kernel(GRADCLIP_GRID_CONSTANT(Parameters<kBytes>) parameters, int* result) {
  constexpr int kLast = kBytes / static_cast<int>(sizeof(int)) - 1;
  if (threadIdx.x == 0) *result = parameters.words[kLast];
}

template <int kBytes>
EmptyKernel empty() {
  return {kBytes, [](int mark, int* result, cudaStream_t stream) {
            // Not initialized, as the tables of the engine.
            Parameters<kBytes> parameters;
            parameters.words[kBytes / sizeof(int) - 1] = mark;
            return launch_kernel(&empty_kernel<kBytes>, 1, kThreads, stream, false, parameters,
                                 result);
          }};
}

}  // namespace

bool can_run_kernels() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, &fill_kernel) == cudaSuccess;
}

cudaError_t queue_fill(void* data, int64_t bytes, int blocks, cudaStream_t stream) {
  return launch_kernel(&fill_kernel, blocks, kThreads, stream, false, static_cast<uint4*>(data),
                       bytes / 16);
}

cudaError_t queue_read(const void* data, int64_t bytes, int loads, int blocks, void* sink,
                       cudaStream_t stream) {
  return launch_kernel(loads == 8 ? &read_kernel<8> : &read_kernel<4>, blocks, kThreads, stream,
                       false, static_cast<const uint4*>(data), bytes / 16,
                       static_cast<uint32_t*>(sink));
}

cudaError_t queue_spin(int64_t nanoseconds, cudaStream_t stream) {
  return launch_kernel(&spin_kernel, 1, 1, stream, false, nanoseconds);
}

std::vector<EmptyKernel> empty_kernels() {
  return {empty<8>(), empty<1024>(), empty<4000>(), empty<9664>(), empty<16000>(), empty<32064>()};
}

}  // namespace gradclip::cuda::sweep
