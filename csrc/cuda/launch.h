// The launches of the CUDA kernels, on the flat index of one device's tensors. Nothing here
// synchronizes, allocates or keeps anything between calls, except the properties of the devices.
// Every function works on the current device and returns the CUDA runtime's error code.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "core/decay.h"
#include "core/flat_index.h"
#include "core/norm.h"
#include "core/units.h"
#include "cuda/clip.h"
#include "cuda/plan.h"

namespace gradclip::cuda {

// A plan for the current device; see Plan. cudaErrorNotSupported if there is a decay and the device
// does not take kernel parameters as large as its tables.
cudaError_t make_plan(const FlatIndex& index, const Companions& companions, Plan* plan);

// The compute capabilities there is code for, times a hundred: "800,900" for 8.0 and 9.0.
const char* built_architectures();

// Writes the power sum of each worker; with `slots`, also that of each (tensor, worker) pair. A
// plan that decays needs slots; it changes the gradients before it measures them, and each
// parameter must have its gradient's offset from a 16-byte boundary.
cudaError_t power_sums(const Plan& plan, Norm kind, Precision precision, double* partials,
                       double* slots, cudaStream_t stream);

// Reduces the partials of one or more plans to a power sum, a norm, or both.
cudaError_t finish(Norm kind, const double* partials, int64_t count, double* power_sum,
                   DType norm_dtype, void* norm_result, cudaStream_t stream);

// Reduces slots to the norm of each tensor, at norms[position]; for a plan with positions.
cudaError_t tensor_norms(const Plan& plan, Norm kind, const double* slots, double* norms,
                         cudaStream_t stream);

// Multiplies by the coefficient that `clip` describes. With `early` the kernel may start while the
// previous one, which has to be a power_sums of this call, is still running.
cudaError_t scale(const Plan& plan, const Clip& clip, bool early, cudaStream_t stream);

// Multiplies each tensor by coefficients[position]; one of 0 clears NaN and infinity, too.
cudaError_t scale_each(const FlatIndex& index, const int64_t* positions, const double* coefficients,
                       cudaStream_t stream);

cudaError_t clamp(const Plan& plan, double bound, cudaStream_t stream);

// A plan for the current device.
cudaError_t make_plan(const std::vector<Rows>& rows, RowsPlan* plan);

// Limits each row, and writes the smallest coefficient of each worker.
cudaError_t clip_rows(const RowsPlan& plan, const UnitLimit& limit, double* smallest,
                      cudaStream_t stream);

// power_sums and scale in one launch, for a list that fits_one_block.
cudaError_t clip_in_one_block(const Plan& plan, Precision precision, const Clip& clip,
                              cudaStream_t stream);

}  // namespace gradclip::cuda
