// The bodies of the CUDA kernels with all that a launch decides made into arguments. In a file of
// their own, so that a change of a kernel compiles in a moment.
//
// GRADCLIP_THREADS is the number of threads in a block.
#pragma once

#include "core/norm.h"
#include "core/span.h"
#include "core/units.h"
#include "cuda/clip.h"
#include "cuda/table.h"

namespace gradclip::cuda {

inline constexpr int kThreads = GRADCLIP_THREADS;

// Small, so that many lists take several launches.
inline constexpr int kCapacity = 5;
using SmallTable = Table<kCapacity>;
using SmallPositionTable = PositionTable<kCapacity>;
using SmallBorderTable = BorderTable<kCapacity>;
using SmallRowsTable = RowsTable<kCapacity>;

// With `slots`, also the power sums of tensors.
void power_sums_thread(const SmallTable& table, Norm kind, Precision precision, double* partials,
                       double* slots);
void scale_thread(const SmallTable& table, const Clip& clip);
void scale_each_thread(const SmallPositionTable& table, const double* coefficients);
void clamp_thread(const SmallTable& table, double bound);
void clip_rows_thread(const SmallRowsTable& table, const UnitLimit& limit, double* smallest);
void clip_in_one_block_thread(const SmallTable& table, Precision precision, const Clip& clip);
void finish_thread(Norm kind, const double* partials, int count, double* power_sum,
                   DType norm_dtype, void* norm_result);
void tensor_norms_thread(const SmallBorderTable& table, Norm kind, const double* slots,
                         double* norms);

}  // namespace gradclip::cuda
