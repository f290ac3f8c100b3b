// The kernels: bodies.cuh for the GPU.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/bodies.cuh"

namespace gradclip::cuda {

inline constexpr int kThreads = 256;
// What the compiler allocates registers for: 40 per thread. Left alone it aims at 8 blocks and 32
// registers, and issues the fourth load of a run only once the first is consumed.
inline constexpr int kResidentBlocks = 6;
// Reading parameters as well takes more registers: with 6 blocks it would spill on sm_120.
template <class AnyTable>
inline constexpr int kResident = AnyTable::kDecays ? 4 : kResidentBlocks;
// More threads if there is only one block.
inline constexpr int kThreadsOfOneBlock = 512;
// Fewer for a row, which often has no more than a thousand elements.
inline constexpr int kThreadsOfRow = 128;
// As many threads, and so registers for each, as in blocks of kThreads. Left alone the compiler
// takes 48 and, on sm_86 and sm_89, uses the first load of a run before it issues the fourth.
inline constexpr int kResidentBlocksOfRow = kResidentBlocks * kThreads / kThreadsOfRow;

// From here on tables are passed by reference and never copied or captured by value: that would
// move them from the constant bank to the stack.

template <Norm kNorm, bool kPerTensor, class AnyTable>
__global__ void __launch_bounds__(kThreads, kResident<AnyTable>)
    power_sums_kernel(GRADCLIP_GRID_CONSTANT(AnyTable) table, Precision precision, double* partials,
                      double* slots) {
  power_sums_body<kNorm, kPerTensor, kThreads>(table, precision, partials, slots);
}

template <class AnyTable>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    scale_kernel(GRADCLIP_GRID_CONSTANT(AnyTable) table, GRADCLIP_GRID_CONSTANT(Clip) clip) {
  scale_body<kThreads>(table, clip);
}

template <class AnyTable>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    scale_each_kernel(GRADCLIP_GRID_CONSTANT(AnyTable) table, const double* coefficients) {
  scale_each_body<kThreads>(table, coefficients);
}

template <class AnyTable>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    clamp_kernel(GRADCLIP_GRID_CONSTANT(AnyTable) table, double bound) {
  clamp_body<kThreads>(table, bound);
}

template <class AnyTable>
__global__ void __launch_bounds__(kThreadsOfRow, kResidentBlocksOfRow)
    clip_rows_kernel(GRADCLIP_GRID_CONSTANT(AnyTable) table, UnitLimit limit, double* smallest) {
  clip_rows_body<kThreadsOfRow>(table, limit, smallest);
}

template <Norm kNorm, class AnyTable>
__global__ void __launch_bounds__(kThreadsOfOneBlock)
    clip_in_one_block_kernel(GRADCLIP_GRID_CONSTANT(AnyTable) table, Precision precision,
                             GRADCLIP_GRID_CONSTANT(Clip) clip) {
  clip_in_one_block_body<kNorm, kThreadsOfOneBlock>(table, precision, clip);
}

template <Norm kNorm, class AnyTable>
__global__ void __launch_bounds__(kThreads)
    tensor_norms_kernel(GRADCLIP_GRID_CONSTANT(AnyTable) table, const double* slots,
                        double* norms) {
  tensor_norms_body<kNorm, kThreads>(table, slots, norms);
}

__global__ void __launch_bounds__(kThreads)
    finish_kernel(Norm kind, const double* partials, int count, double* power_sum, DType norm_dtype,
                  void* norm_result) {
  finish_body<kThreads>(kind, partials, count, power_sum, norm_dtype, norm_result);
}

}  // namespace gradclip::cuda
