// Kernels around the ones that are compared: what fills memory, reads it, waits, or does nothing.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace gradclip::cuda::sweep {

// Whether there is code for the current GPU.
bool can_run_kernels();

// Some bits that repeat nowhere; a multiple of 16 bytes.
cudaError_t queue_fill(void* data, int64_t bytes, int blocks, cudaStream_t stream);

// As fast as can be, with 4 or 8 loads in flight; a multiple of 32 KB. The sink is one word.
cudaError_t queue_read(const void* data, int64_t bytes, int loads, int blocks, void* sink,
                       cudaStream_t stream);

// Occupies the stream, on one thread.
cudaError_t queue_spin(int64_t nanoseconds, cudaStream_t stream);

// Kernels that do nothing but take parameters of so many bytes.
struct EmptyKernel {
  int bytes;
  // Writes `mark`, which it finds at the end of its parameters.
  std::function<cudaError_t(int mark, int* result, cudaStream_t)> launch;
};
std::vector<EmptyKernel> empty_kernels();

}  // namespace gradclip::cuda::sweep
